"""The parser of a run's configuration, and how its files are read one over the other."""

from collections.abc import Mapping
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from tf_lightning.cli.config_files import ConfigContent
from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.remote.urls import is_remote, public_url


class ConfigError(Exception):
    """A configuration that does not parse.

    Attributes:
        report: jsonargparse's message.
        options: names of the options of the command.
    """

    def __init__(self, report: str, options: list[str]):
        super().__init__(report)
        self.report, self.options = report, options


class ConfigParser(LightningArgumentParser):
    """Parses a run's configuration; raises ConfigError where it does not parse.

    Attributes:
        files: the configuration files of the command, by the words that name them.
    """

    files: Mapping[str, ConfigContent] = {}

    def get_defaults(self, *args, **kwargs) -> Namespace:
        """Return the defaults; keep only the class names of `model` and `data`.

        The arguments of the classes get defaults after parsing. Otherwise jsonargparse would pass
        the arguments of the default class to another class that a configuration names.
        """
        defaults = super().get_defaults(*args, **kwargs)
        for key in ("model", "data"):
            if isinstance(defaults.get(key), Namespace):
                defaults[key].pop("init_args", None)
        return defaults

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ConfigError."""
        if not self.exit_on_error:  # the parser of one class; the outer one adds the key
            super().error(message, ex)
        raise ConfigError(message, self.option_names()) from ex

    def parse_string(self, content: str, *args, **kwargs) -> Namespace:
        """Parse the content of a file, in which `class_path` may stand beside flat arguments."""
        values = next((file.values for file in self.files.values() if file.text == content), {})
        if (nested := nest_arguments(values)) != values:
            content = yaml.safe_dump(nested)
        return super().parse_string(content, *args, **kwargs)

    def dump(self, cfg: Namespace, *args, **kwargs) -> str:
        """Write a configuration as text. Its URLs have no logins and queries."""
        return super().dump(hide_logins(cfg), *args, **kwargs)

    def option_names(self) -> list[str]:
        """Return the names of the options, also those of the commands."""
        verbs = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        names = [
            name for verb in verbs for parser in verb.values() for name in parser.option_names()
        ]
        return names + [action.dest for action in self._actions if action.option_strings]


def hide_logins(value: Any) -> Any:
    """Return a copy of a configuration whose URLs have no logins and queries."""
    if isinstance(value, Namespace):
        return Namespace(**{key: hide_logins(item) for key, item in vars(value).items()})
    if isinstance(value, dict):
        return {key: hide_logins(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_logins(item) for item in value]
    return public_url(value) if is_remote(value) else value


def nest_arguments(values: Any) -> Any:
    """Move arguments beside a `class_path` into its `init_args`, at every depth."""
    if isinstance(values, list):
        return [nest_arguments(value) for value in values]
    if not isinstance(values, dict):
        return values
    values = {key: nest_arguments(value) for key, value in values.items()}
    if "class_path" not in values:
        return values
    own = {key: values[key] for key in ("class_path", "init_args", "dict_kwargs") if key in values}
    flat = {key: value for key, value in values.items() if key not in own}
    return own | {"init_args": {**(own.get("init_args") or {}), **flat}} if flat else own


class ConfigFile(ActionConfigFile):
    """Reads a configuration file over the values of earlier ones.

    A file that gives a callback of `NAMED` with its `class_path` states all of its options; options
    of earlier files are dropped. So an evaluation protocol does not depend on the run's recipe.
    """

    @staticmethod
    def apply_config(parser: ConfigParser, cfg: Namespace, dest: str, value: str) -> None:
        """Read the file `value` into `cfg`."""
        for key, given in parser.files[value].values.items():
            if key in NAMED and isinstance(given, dict) and "class_path" in given:
                cfg[key] = None
        ActionConfigFile.apply_config(parser, cfg, dest, value)
