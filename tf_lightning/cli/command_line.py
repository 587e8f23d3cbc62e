"""Reads the files and keys of a command line, and refuses options without effect."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

from tf_lightning.cli.config_files import Place, read_config
from tf_lightning.errors import UserError
from tf_lightning.training.resume import differences

# Options of the data that follow the model.
LINKED = {
    "patch_size": "--model.patch_size",
    "vocab_size": "--model.transformer.vocab_size",
    "time_token": "--model.linear.time",
}


def expand_home(values: Any) -> Any:
    """Replace "~" at the start of every text in a nested value; a Namespace changes in place."""
    if isinstance(values, str):
        option, equals, value = values.partition("=")
        if option.startswith("--") and equals:
            return f"{option}={os.path.expanduser(value)}"
        return os.path.expanduser(values)
    if isinstance(values, list | tuple):
        return type(values)(map(expand_home, values))
    if isinstance(values, dict | Namespace):
        for key, value in list(
            vars(values).items() if isinstance(values, Namespace) else values.items()
        ):
            values[key] = expand_home(value)
    return values


def places_of_keys(args: list[str]) -> dict[str, Place]:
    """Read the configuration files of a command line, and return the last place of each key.

    Raises:
        UserError: a file is missing or is not YAML.
    """
    places: dict[str, Place] = {}
    for file in config_files(args):
        places |= read_config(Path(file))
    typed = typed_keys(args)
    return {key: place for key, place in places.items() if key not in typed}


def typed_keys(args: list[str]) -> set[str]:
    """Return the keys that a command line gives as options, without `init_args`."""
    options = (arg[2:].partition("=")[0] for arg in args if arg.startswith("--"))
    return {option.replace(".init_args", "") for option in options}


def config_files(args: list[str]) -> list[str]:
    """Return the files that a command line names with -c or --config."""
    files = []
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if arg in ("-c", "--config") and following:
            files.append(following)
        elif found := re.fullmatch(r"(?:--config=|-c=?)(?!onfig)(.+)", arg):
            if re.match(r"kpt_path\b", found[1]):
                raise UserError(f"{arg} has one dash; write -{arg}")
            files.append(found[1])
    return files


def refuse_linked(args: list[str]) -> None:
    """Refuse an option of the data on the command line that the model's value would overwrite."""
    for arg in args:
        option = re.match(r"--data\.(?:init_args\.)?(\w+)(?:=|$)", arg)
        if option and option[1] in LINKED:
            name = option[1]
            raise UserError(f"{arg}: the data takes {name} from the model; give {LINKED[name]}")


def refuse_model_options(
    args: list[str], verb: str, given: Namespace, hparams: Mapping[str, Any]
) -> None:
    """Refuse an option of the model on an evaluation's command line that the checkpoint overrides.

    Args:
        args: the command line.
        verb: the command.
        given: the model's arguments of configuration and command line.
        hparams: those of the checkpoint.
    """
    typed = {m[1] for arg in args if (m := re.match(r"--model\.(?:init_args\.)?([\w.]+)", arg))}
    for name, value, saved in differences(given.as_dict(), hparams):
        if name in typed:
            raise UserError(
                f"--model.{name} {value}: {verb} takes the model from the checkpoint, which has "
                f"{saved}; leave it out"
            )


def warn_of_unused_values(config: Namespace) -> None:
    """Warn of a configuration file that gives the data another value than the model has.

    The links have already replaced the value in `config`, so the files are read again.
    """
    for file in config.get("config") or []:
        content = yaml.safe_load(Path(str(file)).read_text(encoding="utf-8"))
        data = content.get("data") if isinstance(content, dict) else None
        data = data if isinstance(data, dict) else {}
        for name, value in (data | (data.get("init_args") or {})).items():
            if name in LINKED and value != config.data.init_args.get(name, value):
                rank_zero_warn(
                    f"{file}: data.{name}={value} is not used; the data takes {name} from the "
                    f"model, see {LINKED[name]}"
                )
