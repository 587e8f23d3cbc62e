"""A language model's folder as Hugging Face lays it out: on this disk, or by name on the hub."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tf_lightning.errors import UserError

FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*"]
HUB_TIMEOUT = 10.0  # seconds


def is_hub_name(name: str | Path) -> bool:
    """Whether this is no path here but may be a name "owner/model" on the hub."""
    text = str(name)
    known = text.endswith((".ckpt", ".model", ".json"))
    return text.count("/") == 1 and not known and text[0] not in "/." and not Path(text).exists()


def find_folder(name: str | Path) -> Path:
    """The folder of a name: itself, or the hub's copy, which is fetched where it is not here yet.

    Raises:
        UserError: the hub does not give it.
    """
    if not is_hub_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            folder = snapshot_download(str(name), allow_patterns=FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            folder = snapshot_download(str(name), allow_patterns=FILES, etag_timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's transport raises kinds of its own
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"there is no folder {name}, and the hub gives no model of this name ({reason}); "
            "check the path, the network and HF_HUB_OFFLINE"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict:
    """The object in a file.

    Raises:
        UserError: it is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give the folder of a Hugging Face language model"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return content


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by Hugging Face's name; only the files' heads are read.

    Raises:
        UserError: a file is missing or broken, or a shard lacks what the index says it holds.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, promised in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); download it again") from error
        if absent := sorted(promised - found.keys()):
            raise UserError(
                f"{file} lacks {len(absent)} of the tensors that its index names "
                f"({absent[0]}, ...); download it again"
            )
        shapes |= found
    return shapes


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor, by Hugging Face's name; `tensor_shapes` tells what cannot be read."""
    return {k: tensor for file in _weight_files(folder) for k, tensor in load_file(file).items()}


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files, one or many, each with the names that an index promises of it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {folder / "model.safetensors": set()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    files: dict[Path, set[str]] = {}
    for name, file in sorted(weight_map.items()):
        files.setdefault(folder / file, set()).add(name)
    return files
