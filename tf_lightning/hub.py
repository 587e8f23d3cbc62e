"""Folders in Hugging Face's layout: a local path, or a model name on the Hugging Face hub."""

import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path

from tf_lightning.errors import UserError, first_sentence

LANGUAGE_MODEL_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
]
HUB_TIMEOUT = 10.0  # seconds
FILE_SUFFIXES = (".ckpt", ".model", ".json", ".safetensors")  # never the end of a hub name


def is_hub_name(name: str | Path) -> bool:
    """Return whether `name` can be a hub name "owner/model", because no local path has it."""
    text = str(name)
    is_file = text.endswith(FILE_SUFFIXES)
    is_path = is_file or text[:1] in "/.~" or os.path.exists(text)
    return text.count("/") == 1 and not is_path


def split_hub_name(name: str) -> tuple[str, str] | None:
    """Split "owner/model/subfolder" into "owner/model" and "subfolder"; None for a local path."""
    owner, model, subfolder = (*name.split("/", 2), "", "")[:3]
    is_path = name.endswith(FILE_SUFFIXES) or os.path.exists(name) or not (owner and model)
    if is_path or not is_hub_name(f"{owner}/{model}") or (subfolder and os.path.exists(owner)):
        return None
    return f"{owner}/{model}", subfolder.strip("/")


def find_folder(
    name: str | Path, files: list[str], complete: Callable[[Path], bool] | None = None
) -> Path:
    """Return the folder of a model, downloading it from the hub if it is not local.

    Args:
        name: a local path, which is returned unchanged, or a hub name "owner/model".
        files: patterns of the files to download.
        complete: whether a copy that was downloaded before has the files; None: it has them.

    Raises:
        UserError: the hub has no such model or cannot be reached.
    """
    if not is_hub_name(name):
        return Path(name).expanduser()
    # Imported here because most commands do not use the hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            folder = snapshot_download(str(name), allow_patterns=files, local_files_only=True)
            is_local = complete is None or complete(Path(folder))
        except LocalEntryNotFoundError:
            is_local = False
        if not is_local:
            folder = snapshot_download(str(name), allow_patterns=files, etag_timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's transport raises many types
        raise UserError(
            f"there is no folder {name}, and the hub does not provide a model of this name "
            f"({first_sentence(error)}); check the path, the network and HF_HUB_OFFLINE"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict:
    """Return the JSON object in a file.

    Raises:
        UserError: the file is missing, is not JSON, or holds another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"there is no {path.name} in {path.parent}; check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({first_sentence(error)}); check the path, or download the "
            "folder again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return content


def read_shard_index(index: Path) -> dict[Path, set[str]]:
    """Return the safetensors files that an index lists, each with the names of its tensors.

    Raises:
        UserError: the index is damaged, or names a file outside of its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    files: dict[Path, set[str]] = {}
    for name, file in sorted(weight_map.items()):
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise UserError(
                f"{index} names {reprlib.repr(file)}, which is not a file beside it; "
                "download it again"
            )
        files.setdefault(index.parent / file, set()).add(name)
    return files
