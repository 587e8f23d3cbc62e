"""Reads the files and keys of a command line, and refuses options without effect."""

import os
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

from tf_lightning.cli.config_files import ConfigContent
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


def typed_keys(args: list[str]) -> set[str]:
    """Return the keys that a command line gives as options, without `init_args`."""
    options = (arg[2:].partition("=")[0] for arg in args if arg.startswith("--"))
    return {option.replace(".init_args", "") for option in options}


def without_value(args: list[str]) -> str:
    """Return the first option that is followed by another option, not a value; "" if none is."""
    for arg, following in pairwise([*args, "--"]):
        if arg.startswith("--") and "." in arg and "=" not in arg and following.startswith("--"):
            return arg
    return ""


def config_files(args: list[str]) -> list[str]:
    """Return the files that a command line names with -c or --config."""
    files = []
    for arg, following in pairwise([*args, None]):
        if arg in ("-c", "--config") and following is not None:
            files.append(following)
        elif arg in ("-c=", "--config="):
            files.append("")
        elif found := re.fullmatch(r"(?:--config=|-c=?)(?!onfig)(.+)", arg):
            if re.match(r"kpt_path\b", found[1]):
                raise UserError(f"{arg} has one dash; write -{arg}")
            files.append(found[1])
    if "" in files:
        raise UserError("-c is empty; give the YAML file of a run")
    return files


def refuse_linked(args: list[str]) -> None:
    """Refuse an option of the data on the command line that the model's value would overwrite."""
    for arg in args:
        option = re.match(r"--data\.(?:init_args\.)?(\w+)(?:=|$)", arg)
        if option and option[1] in LINKED:
            name = option[1]
            raise UserError(f"{arg}: the data takes {name} from the model; give {LINKED[name]}")


def refuse_options_of_list(typed: set[str], files: Iterable[ConfigContent]) -> None:
    """Refuse an option of the logger where the files give several; all but one would be lost.

    Args:
        typed: the keys that the command line gives.
        files: the configuration files, in order.
    """
    options = [key for key in typed if key.startswith("trainer.logger.")]
    trainers = [file.values.get("trainer") for file in files]
    given = [t["logger"] for t in trainers if isinstance(t, dict) and "logger" in t]
    replaced = {"trainer.logger", "trainer.logger+"} & typed
    if options and not replaced and given and isinstance(given[-1], list):
        raise UserError(
            f"--{options[0]} does not reach into a list of loggers; change trainer.logger in the "
            "configuration file"
        )


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


def warn_of_unused_values(files: Iterable[ConfigContent], config: Namespace) -> None:
    """Warn of a configuration file that gives the data another value than the model has.

    The links have already replaced the value in `config`.
    """
    for file in files:
        data = file.values.get("data")
        data = data if isinstance(data, dict) else {}
        for name, value in (data | (data.get("init_args") or {})).items():
            if name in LINKED and value != config.data.init_args.get(name, value):
                rank_zero_warn(
                    f"{file.file}: data.{name}={value} is not used; the data takes {name} from the "
                    f"model, see {LINKED[name]}"
                )
