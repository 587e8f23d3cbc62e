"""The configuration files of a command, read before they are parsed to know each key's line."""

from pathlib import Path
from typing import NamedTuple

import yaml

from tf_lightning.errors import UserError


class Place(NamedTuple):
    """The file and line of a key."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file} line {self.line}"


def read_config(file: Path) -> dict[str, Place]:
    """Read a configuration file, and return where each of its keys stands.

    Keys are dotted, without `init_args`, such as data.sources.text.seed.

    Raises:
        UserError: the file is missing, is not text, is not YAML, or holds no mapping.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the YAML file in it")
    if not file.is_file():
        raise UserError(f"there is no configuration {file}; check the path")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not a text file in UTF-8; -c takes the YAML file of a run, and a "
            "checkpoint is given with --ckpt_path"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{file}{line}: {error.problem or error.context}; correct the YAML"
        ) from error
    except yaml.YAMLError as error:  # such as a character that YAML does not allow
        raise UserError(f"{file}: {error}; correct the YAML") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file} has no keys such as `model:`; give the YAML file of a run")
    return dict(_places(root, file, ""))


def _places(node: yaml.MappingNode, file: Path, prefix: str):
    """Yield the dotted keys below a node with their places.

    Raises:
        UserError: a key stands twice in one mapping; YAML would keep the last one silently.
    """
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen and name != "<<":
            raise UserError(
                f"{file} line {line}: {prefix}{name} is given a second time, after line "
                f"{seen[name]}; leave one out"
            )
        seen[name] = line
        path = prefix if name == "init_args" else f"{prefix}{name}"
        if name != "init_args":
            yield path.removesuffix("+"), Place(file, line)
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, file, prefix if name == "init_args" else f"{path}.")
