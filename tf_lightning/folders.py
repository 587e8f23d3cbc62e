"""Folders that a run will write."""

import os
from pathlib import Path

from tf_lightning.errors import UserError


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written or created; nothing is created.

    Raises:
        UserError: it or the folder above it is a file, or may not be written.
    """
    above = [folder.absolute(), *folder.absolute().parents]
    existing = next(path for path in above if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, so {folder} cannot be a folder; name another one")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} may not be written; allow it or name another folder")
