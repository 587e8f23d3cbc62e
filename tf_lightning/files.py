"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tf_lightning.errors import UserError

FULL = 2**20  # bytes; a disk with less room is full


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Raise UserError if a block that writes into a folder fails because its disk is full."""
    try:
        yield
    except Exception as error:
        # numpy, torch and safetensors raise errors of their own, without errno.
        number = getattr(error, "errno", None)
        is_full = number is None and shutil.disk_usage(folder).free < FULL
        if isinstance(error, UserError) or not (is_full or number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise UserError(
            f"no space left on the disk of {folder}; free some, or name a folder on another disk"
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block succeeds.

    A block that raises leaves an older file at `path` as it was, and removes the temporary one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with told_if_full(path.parent):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish_folder(folder: Path, path: Path) -> None:
    """Move a finished folder to `path`, unless another process has put its own there first.

    For processes, also on several nodes, that may make the same folder at the same time.
    """
    if not path.is_dir():
        os.rename(folder, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder, which replaces the folder `path` when the block succeeds.

    A block that raises leaves an older folder at `path` as it was, and removes the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with told_if_full(path.parent):
            yield partial
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
