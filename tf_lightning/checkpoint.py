"""Reading checkpoint files, without running code that they contain, and upgrading old ones.

Hyper-parameters are saved as plain dicts of numbers and strings, so that a checkpoint names no
class of this package and outlives a change of modules. Checkpoints of version 0.1 and before differ
in five ways, which `upgrade` undoes:

* Those written from Python contain pickled config dataclasses (OLD_CONFIGS).
* Some config fields had other names (RENAMED_FIELDS).
* Autoencoders had arguments that are gone (REMOVED_HPARAMS).
* Those written by the command line name the LightningModule's class and its instantiator.
* A data module had another name, under which Lightning stores its state (RENAMED_STATES).
"""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tf_lightning.checkpoint_file import load_checkpoint
from tf_lightning.errors import UserError

TRANSFUSION, AUTOENCODER = "image_codec", "autoencoder"  # keys that tell checkpoints apart
OTHER_KIND = {TRANSFUSION: "an autoencoder's", AUTOENCODER: "a Transfusion model's"}

OLD_CONFIGS = (
    "tf_lightning.transformer.TransformerConfig",
    "tf_lightning.rope_scaling.RopeScaling",
    "tf_lightning.unet.UNetConfig",
    "tf_lightning.conditioning.LinearConfig",
    "tf_lightning.autoencoder_network.AutoencoderConfig",
)
RENAMED_FIELDS = {
    "transformer": {"image_weights": "modality_weights"},
    "linear": {"place": "pos_embed"},
}
RENAMED_STATES = {"PictureData": "ImageData"}
REMOVED_HPARAMS = {"feature_weight", "feature_model"}


class PickledConfig(dict):
    """Stands for every class of OLD_CONFIGS in a pickle: a dict of the dataclass's fields."""

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Receive the fields from torch's restricted unpickler."""
        self.update(fields)


# Also needed where Lightning itself loads a checkpoint with weights_only=True.
torch.serialization.add_safe_globals([(PickledConfig, path) for path in OLD_CONFIGS])


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint's file: the path itself, or the last checkpoint in the folder of a run.

    Raises:
        UserError: the path is a folder without a checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or (path / "meta.pt").is_file():
        return path
    for last in (path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if last.exists():
            return last
    runs = sorted(folder.parent.parent.name for folder in path.glob("*/checkpoints/last.ckpt"))
    advice = f"give one of {', '.join(runs[:5])} in it" if runs else "give the folder of a run"
    raise UserError(f"{path} is a folder without checkpoints/last.ckpt; {advice}, or a file")


def read_checkpoint(path: str | Path, kind: str = TRANSFUSION, mmap: bool = False) -> dict:
    """Read a checkpoint to the CPU and upgrade it, without running code that it contains.

    Args:
        path: the file, or the folder of a run, whose last checkpoint is read.
        kind: TRANSFUSION or AUTOENCODER.
        mmap: leave tensors in the file until they are used; saves memory if few are needed.

    Raises:
        UserError: the file does not exist, or is not a checkpoint of this project and kind.
    """
    path = find_checkpoint(path)
    if (path / "meta.pt").is_file():
        raise UserError(
            f"{path} is a sharded checkpoint, which only `fit --ckpt_path last` reads; train with "
            "save_distributed_checkpoint: false for one file"
        )
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; train one with `tf-lightning fit` or check the path"
        )
    if path.name == "net.safetensors":
        raise UserError(f"{path} is a part of an export; give its folder, {path.parent}")
    try:
        checkpoint = load_checkpoint(path, mmap)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for files of other programs
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged "
            "or of another program: use an earlier one from the same folder"
        ) from error
    found = [key for key in OTHER_KIND if isinstance(checkpoint, dict) and key in checkpoint]
    if not found:
        raise UserError(
            f"{path} is not a tf_lightning checkpoint; give one written by `tf-lightning fit`"
        )
    if kind not in found:
        raise UserError(
            f"{path} is {OTHER_KIND[kind]} checkpoint; give a checkpoint of this configuration's "
            "own run"
        )
    return upgrade(checkpoint)


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Bring a checkpoint of an older version to the present format, in place, and return it.

    `read_checkpoint` calls it. Where Lightning reads a checkpoint by itself, the LightningModule
    calls it in `on_load_checkpoint`.
    """
    checkpoint["hyper_parameters"] = plain_hparams(checkpoint.get("hyper_parameters", {}))
    for old, new in RENAMED_STATES.items():
        if old in checkpoint:
            checkpoint[new] = checkpoint.pop(old)
    return checkpoint


def plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Convert hyper-parameters to plain values under their present names.

    Configs become dicts, old field names become new ones, and removed arguments are left out, as
    are the class and the instantiator that LightningCLI adds.
    """
    plain = {
        name: as_dict(value)
        for name, value in hparams.items()
        if not name.startswith("_") and name not in REMOVED_HPARAMS
    }
    for name, fields in RENAMED_FIELDS.items():
        if isinstance(config := plain.get(name), dict):
            plain[name] = {fields.get(key, key): value for key, value in config.items()}
    return plain


def as_dict(config: Any) -> Any:
    """Convert a config dataclass, and configs inside it, to a dict; return other values as is."""
    if is_dataclass(config):
        return asdict(config)
    if isinstance(config, PickledConfig):
        return {name: as_dict(value) for name, value in config.items()}
    return config


def select_weights(
    state_dict: Mapping[str, Tensor], weights: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Select the network's weights from the state dict of a `Transfusion`.

    Args:
        state_dict: holds the trained network under "net." and its EMA weights, if any, under
            "ema.".
        weights: "ema" or "raw"; None: the EMA weights, if any.

    Returns:
        The weights with the names of the network, and their kind, "ema" or "raw".

    Raises:
        UserError: `weights` is "ema" and there are no EMA weights, or a weight is not finite.
    """
    has_ema = any(name.startswith("ema.") for name in state_dict)
    weights = weights or ("ema" if has_ema else "raw")
    if weights == "ema" and not has_ema:
        raise UserError("the checkpoint has no EMA weights; give --weights raw")
    prefix = "ema." if weights == "ema" else "net."
    selected = {n.removeprefix(prefix): w for n, w in state_dict.items() if n.startswith(prefix)}
    spoilt = [name for name, weight in selected.items() if not torch.isfinite(weight).all()]
    if spoilt:
        raise UserError(
            f"{len(spoilt)} of the {len(selected)} weights in the checkpoint are not finite, the "
            f"first is {spoilt[0]}; use an earlier checkpoint of the run"
        )
    return selected, weights


def state_dict_error(error: RuntimeError) -> UserError:
    """Shorten the message of `load_state_dict` for weights that do not fit to one sentence."""
    first = str(error).splitlines()[:2][-1].strip().rstrip(".")  # after torch's heading
    return UserError(
        f"the checkpoint's weights do not fit this model ({first}); "
        "give the configuration that it was trained with"
    )
