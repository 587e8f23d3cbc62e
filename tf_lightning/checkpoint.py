"""Reading a checkpoint file: nothing that it holds is run."""

from pathlib import Path

import torch

from tf_lightning.errors import UserError

TRANSFUSION, AUTOENCODER = "image_codec", "autoencoder"  # keys that tell checkpoints apart
OTHER = {TRANSFUSION: "an autoencoder's", AUTOENCODER: "a Transfusion model's"}


def read_checkpoint(path: str | Path, kind: str = TRANSFUSION, mmap: bool = False) -> dict:
    """A checkpoint's contents on the CPU, without running anything that it holds.

    Args:
        path: the file.
        kind: TRANSFUSION or AUTOENCODER.
        mmap: leave tensors in the file until they are used, for one that needs few of them.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project and kind.
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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's readers raise of many kinds on bytes of other programs
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged "
            "or of another program: use an earlier one from the same folder"
        ) from error
    found = [key for key in OTHER if isinstance(checkpoint, dict) and key in checkpoint]
    if not found:
        raise UserError(
            f"{path} is not a tf_lightning checkpoint; give one written by `tf-lightning fit`"
        )
    if kind not in found:
        raise UserError(
            f"{path} is {OTHER[kind]} checkpoint; give the one of this configuration's own run"
        )
    return checkpoint


def misfit(error: RuntimeError) -> UserError:
    """What `load_state_dict` says of weights that do not fit, cut to one sentence."""
    first = str(error).splitlines()[1].strip().rstrip(".")
    return UserError(
        f"the checkpoint's weights do not fit this model ({first}); "
        "give the configuration that it was trained with"
    )
