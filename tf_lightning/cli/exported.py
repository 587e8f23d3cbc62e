"""Folders of `tf-lightning export` in place of checkpoints, for validate, test and predict."""

from pathlib import Path
from typing import Any

import lightning as L

from tf_lightning.checkpoint import TRANSFUSION, read_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.interop.export import read_weights
from tf_lightning.training.checkpoint_io import CheckedCheckpointIO


def is_exported(path: str | Path | None) -> bool:
    """Return whether a path is a folder of `tf-lightning export`."""
    return path is not None and (Path(path) / "net.json").is_file()


def read_trained(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a checkpoint file or an exported folder in the form of one; tensors stay in the file.

    Args:
        path: the file or folder.
        kind: as for `read_checkpoint`.

    Raises:
        UserError: it is neither, or is of another kind.
    """
    if not is_exported(path):
        return read_checkpoint(path, kind, mmap=True)
    if kind != TRANSFUSION:
        raise UserError(
            f"{path} is an exported Transfusion model; give an autoencoder's checkpoint"
        )
    return read_weights(path)


class ExportIO(CheckedCheckpointIO):
    """Reads checkpoint files, and exported folders, which suffice for an evaluation."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU; see `CheckedCheckpointIO`."""
        if not is_exported(path):
            return super().load_checkpoint(path, map_location, weights_only)
        facts = {"pytorch-lightning_version": L.__version__, "epoch": 0, "callbacks": {}}
        return facts | read_trained(path, TRANSFUSION)
