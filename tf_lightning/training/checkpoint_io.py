"""Lightning's way to checkpoint files: whole, on the disk, and with a checksum."""

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tf_lightning.checkpoint_file import load_checkpoint, write_checkpoint
from tf_lightning.files import partial_path, remove
from tf_lightning.sharded import is_sharded, read_sharded


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes and reads files of a local disk with their checksum, others as Lightning does."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; an older file of the name stays until the new one is complete."""
        if is_local(path):
            write_checkpoint(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU, without running code that it contains.

        Raises:
            DamagedFile: the content is not what was written.
            UserError: it is a sharded checkpoint with a missing or damaged file.
        """
        if is_local(path):
            return (
                read_sharded(Path(path)) if is_sharded(Path(path)) else load_checkpoint(Path(path))
            )
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; a sharded one loses its name before its files."""
        if is_local(path) and is_sharded(Path(path)):
            partial = partial_path(Path(path))
            os.rename(path, partial)
            remove(partial)
        else:
            super().remove_checkpoint(path)


def is_local(path: str | Path) -> bool:
    """Return whether a path is on a local or mounted disk, and not on remote storage."""
    return isinstance(get_filesystem(path), LocalFileSystem)
