"""Reading a checkpoint file: nothing that it holds is run."""

from pathlib import Path

import torch

from tf_lightning.errors import UserError


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's contents on the CPU, without running anything that it holds.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project.
    """
    path = Path(path)
    if (path / "meta.pt").is_file():  # its index is a pickle, which is not opened for strangers
        raise UserError(
            f"{path} is a sharded checkpoint, which only `fit --ckpt_path last` reads; train with "
            "save_distributed_checkpoint: false for one file"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; train one with `tf-lightning fit` or check the path"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise of many kinds on bytes of other programs
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged "
            "or of another program: use an earlier one from the same folder"
        ) from error
    if not isinstance(checkpoint, dict) or "image_codec" not in checkpoint:
        raise UserError(
            f"{path} is not a tf_lightning checkpoint; give one written by `tf-lightning fit`"
        )
    return checkpoint
