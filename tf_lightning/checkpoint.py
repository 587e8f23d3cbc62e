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

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from tf_lightning.checkpoint_file import load_checkpoint
from tf_lightning.errors import UserError, first_sentence
from tf_lightning.sharded import REST, ShardedWeights, check_sharded, is_sharded, read_sharded

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


# ---------------------------------------------------------------- the checkpoints of a run


def find_checkpoint(path: str | Path, kind: str = TRANSFUSION) -> Path:
    """Return a checkpoint's file: the path itself, or the newest sound one in the folder of a run.

    Args:
        path: a file, the folder of a run, or its folder of checkpoints.
        kind: TRANSFUSION or AUTOENCODER.

    Raises:
        UserError: the path is a folder without a sound checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or is_sharded(path):
        return path
    folder = path / "checkpoints"
    if found := find_checkpoints(path, folder if folder.is_dir() else path):
        newest = newest_sound(found, kind)
        say_once(f"Checkpoint: {newest}")
        return newest
    runs = sorted({file.parent.parent.name for file in path.glob("*/checkpoints/*.ckpt")})
    advice = f"give one of {', '.join(runs[:5])} in it" if runs else "give the folder of a run"
    raise UserError(f"{path} is a folder without checkpoints; {advice}, or a file")


def find_checkpoints(folder: Path, checkpoints: Path) -> list[Path]:
    """Find the checkpoints of a run, newest first; a file with several names is listed once.

    Copying a folder gives its files new times in any order, but keeps the link `last.ckpt`. Files
    that are newer than its target although they are of an earlier step are listed after it.

    Args:
        folder: the run's folder, where SLURM's preempted jobs leave theirs.
        checkpoints: folder of the others.
    """
    found = {path.resolve() for path in [*checkpoints.glob("*.ckpt"), *folder.glob("hpc_*.ckpt")]}
    stats = {path: path.stat() for path in sorted(found) if path.exists()}
    once = {(stat.st_dev, stat.st_ino): path for path, stat in stats.items()}.values()
    newest = sorted(once, key=lambda path: (stats[path].st_mtime_ns, path.name), reverse=True)
    last = (checkpoints / "last.ckpt").resolve()
    place = newest.index(last) if last in newest else 0
    if not any(step_of(path) < step_of(last) for path in newest[:place]):
        return newest
    ahead = [path for path in newest[:place] if step_of(path) >= step_of(last)]
    rest = [path for path in newest if path not in (*ahead, last)]
    return [*ahead, last, *sorted(rest, key=step_of, reverse=True)]


def step_of(path: Path) -> float:
    """Return the step of a checkpoint without checking it; infinity if it cannot be read."""
    file = path / REST if path.is_dir() else path
    try:
        step = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        return float(step)
    except Exception:  # torch raises many types for damaged files
        return math.inf


def newest_sound(found: list[Path], kind: str, all_shards: bool = True) -> Path:
    """Return the first of some checkpoints that is not damaged, and warn of the damaged ones.

    Args:
        found: paths of checkpoints, at least one.
        kind: TRANSFUSION or AUTOENCODER.
        all_shards: verify the checksums of all shards; false: only check that the shards exist.

    Raises:
        UserError: all are damaged, or are of another program.
    """
    refusal = None
    for path in found:
        try:
            read_checkpoint(path, kind, mmap=True)
            if all_shards and path.is_dir():
                check_sharded(path)
        except UserError as error:
            refusal = refusal or error
            continue
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        if refusal:
            rank_zero_warn(f"{refusal}; {path}, the one before, is used")
        return path
    raise refusal


@cache
def say_once(message: str) -> None:
    """Print a message that a command has not printed before."""
    rank_zero_info(message)


# ---------------------------------------------------------------- reading


def read_checkpoint(path: str | Path, kind: str = TRANSFUSION, mmap: bool = False) -> dict:
    """Read a checkpoint to the CPU and upgrade it, without running code that it contains.

    Args:
        path: the file or the sharded folder, or the folder of a run, whose newest sound checkpoint
            is read.
        kind: TRANSFUSION or AUTOENCODER.
        mmap: leave tensors in the file until they are used; saves memory if few are needed. Those
            of a sharded checkpoint are always left; see `read_sharded`.

    Raises:
        UserError: the file does not exist, or is not a checkpoint of this project and kind.
    """
    path = find_checkpoint(path, kind)
    checkpoint = read_sharded(path) if is_sharded(path) else read_file(path, mmap)
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
    check_content(checkpoint, path)
    return upgrade(checkpoint)


def read_file(path: Path, mmap: bool) -> Any:
    """Read a checkpoint that is one file.

    Raises:
        UserError: there is no file, or it is damaged or of another program.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; train one with `tf-lightning fit` or check the path"
        )
    if path.name == "net.safetensors":
        raise UserError(f"{path} is a part of an export; give its folder, {path.parent}")
    try:
        return load_checkpoint(path, mmap)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for files of other programs
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged "
            "or of another program: use an earlier one from the same folder"
        ) from error


def check_content(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint with parts of other types, before anything is computed from them.

    A tensor that is larger than its data in the file, by strides of zero, could fill the memory.

    Raises:
        UserError: the weights or the tokenizer are missing, or are not tensors with data.
    """
    tensors = {"tokenizer": checkpoint.get("tokenizer")} if TRANSFUSION in checkpoint else {}
    weights, hparams = checkpoint.get("state_dict"), checkpoint.get("hyper_parameters", {})
    wrong = [name for name, part in (("state_dict", weights), ("hyper_parameters", hparams))
             if not isinstance(part, Mapping)]  # fmt: skip
    if not wrong and not isinstance(weights, ShardedWeights):  # which were checked
        tensors |= weights
    wrong += [str(name) for name, tensor in tensors.items() if not has_data(tensor)]
    if wrong:
        raise UserError(
            f"{path} has {wrong[0][:80]!r} in another form than tf_lightning writes; it is damaged "
            "or of another program: use an earlier one from the same folder"
        )


def has_data(tensor: Any) -> bool:
    """Return whether a value is a tensor whose elements all are in the file."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


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
) -> tuple[Mapping[str, Tensor], str]:
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
    if isinstance(state_dict, ShardedWeights):
        selected = state_dict.select(prefix)
    else:
        selected = {
            n.removeprefix(prefix): w for n, w in state_dict.items() if n.startswith(prefix)
        }
    check_finite_weights(selected, "in the checkpoint", "use an earlier checkpoint of the run")
    return selected, weights


def check_finite_weights(weights: Mapping[str, Tensor], place: str, remedy: str) -> None:
    """Refuse weights with a NaN or an infinity.

    Args:
        weights: weights by name.
        place: where they are, such as "in the checkpoint", for the message.
        remedy: what to do, for the message.

    Raises:
        UserError: a weight is not finite.
    """
    spoilt = [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not torch.isfinite(weight).all()
    ]
    if spoilt:
        raise UserError(
            f"{len(spoilt)} of the {len(weights)} weights {place} are not finite, the first is "
            f"{spoilt[0]}; {remedy}"
        )


def state_dict_error(error: RuntimeError) -> UserError:
    """Shorten the message of `load_state_dict` for weights that do not fit to one sentence."""
    first = first_sentence(str(error).splitlines()[:2][-1])  # after torch's heading
    return UserError(
        f"the checkpoint's weights do not fit this model ({first}); "
        "give the configuration that it was trained with"
    )
