"""The configuration files of a command, read once: their values, and the line of each key."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tf_lightning.errors import UserError

CYCLE = "{} has an alias that refers to itself, or is nested too deeply; write it out"


class Place(NamedTuple):
    """The file and line of a key."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file} line {self.line}"


class ConfigContent(NamedTuple):
    """A configuration file.

    Attributes:
        file: its path.
        text: its content.
        values: the content as plain YAML types.
        places: where each key stands. Keys are dotted, without `init_args`, such as
            data.sources.text.seed.
    """

    file: Path
    text: str
    values: dict[str, Any]
    places: dict[str, Place]

    def refuse_empty_groups(self, groups: Iterable[str]) -> None:
        """Raise UserError for a group of options that is neither a mapping nor a file."""
        for name in groups:
            value = self.values.get(name, {})
            if not isinstance(value, dict | str):
                shown = "null" if value is None else value
                raise UserError(
                    f"{self.places[name]}: {name} is {shown}; give its options, as in "
                    f"`{name}: {{KEY: VALUE}}`, or leave it out"
                )


def read_config(file: Path) -> ConfigContent:
    """Read a configuration file.

    Raises:
        UserError: the file is missing, is not text, is not YAML, holds no mapping, or has a key
            that is not text or occurs twice.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the YAML file in it")
    if not file.is_file():
        raise UserError(f"there is no configuration {file}; check the path")
    try:
        text = file.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{file} has no keys such as `model:`; give the YAML file of a run")
        places = _unique(_places(root, file, ""))
        values = loader.construct_document(root)
        _refuse_cycles(values, file)
        return ConfigContent(file, text, values, places)
    except RecursionError as error:
        raise UserError(CYCLE.format(file)) from error
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


def _refuse_cycles(values: Any, file: Path) -> None:
    """Raise UserError where an alias stands inside of its own anchor."""
    try:
        json.dumps(values, default=str)
    except ValueError as error:
        raise UserError(CYCLE.format(file)) from error


def _places(node: yaml.MappingNode, file: Path, prefix: str) -> Iterator[tuple[str, Place]]:
    """Yield the dotted keys below a node, without `init_args`, with their places."""
    for key, value in node.value:
        place = Place(file, key.start_mark.line + 1)
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            shown = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
            raise UserError(f"{place}: the key{shown} is not text; write a name, or quote it")
        path = f"{prefix}{key.value}".replace("init_args.", "")
        if key.value != "init_args":
            yield path, place
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, file, f"{path}.".removesuffix("init_args."))


def _unique(places: Iterator[tuple[str, Place]]) -> dict[str, Place]:
    """Return the places by key.

    Raises:
        UserError: a key stands twice in the file, nested or dotted; YAML would keep the last one
            silently.
    """
    seen: dict[str, Place] = {}
    for key, place in places:
        if key in seen and not key.endswith("<<"):
            raise UserError(
                f"{place}: {key} is given a second time, after line {seen[key].line}; leave one out"
            )
        seen[key] = place
    return {key.removesuffix("+"): place for key, place in seen.items()}
