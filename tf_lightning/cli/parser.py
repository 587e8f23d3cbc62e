"""Argument parsing that every verb shares: help with line breaks, errors of one line.

This file imports nothing heavy, so that `--help` and a mistake are answered at once.
"""

import argparse
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

MAX_SEED = 2**62  # output i uses seed + i, which torch takes below 2**63


def stop(message: str, code: int, hint: str = "") -> NoReturn:
    """Print one line that begins with "tf-lightning: error:" on standard error, and exit.

    Args:
        message: what is wrong; line breaks become spaces.
        code: exit code; 1 for a mistake found later, 2 for a command line that does not parse.
        hint: a second line that says where help is.
    """
    print_error(message)
    if hint:
        print(hint, file=sys.stderr)
    raise SystemExit(code)


def print_error(message: str) -> None:
    """Print one line that begins with "tf-lightning: error:" on standard error.

    URLs in the message are printed without login and query.
    """
    if "://" in message:
        from tf_lightning.remote.urls import hide_logins

        message = hide_logins(message)
    print(f"tf-lightning: error: {' '.join(message.split())}", file=sys.stderr)


def path_type(text: str) -> Path:
    """Parse a path that is not empty; "~" is the user's folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """Parses the options of one verb; a mistake is reported in one line and exits with code 2."""

    def __init__(self, verb: str, description: str, epilog: str = "", **options) -> None:
        """Create the parser of `tf-lightning VERB`.

        Args:
            verb: the command's name.
            description: one sentence that says what the command does.
            epilog: examples and notes, printed as they are written.
            options: further arguments of argparse.ArgumentParser, such as `usage`; give
                `allow_abbrev=False` where other options are passed on to the configuration.
        """
        super().__init__(
            f"tf-lightning {verb}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.verb = verb

    def option_names(self) -> list[str]:
        """Return the options, with their dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def nearest_option(self, name: str) -> str:
        """Return the shortest option that ends in the name, or a similar one, or ""."""
        options = self.option_names()
        longer = [option for option in options if option.endswith(name[1:])]
        if longer:
            return min(longer, key=len)
        return next(iter(get_close_matches(name, options, n=1, cutoff=0.7)), "")

    def error(self, message: str) -> NoReturn:
        """Report a mistake and exit with code 2."""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            nearest = self.nearest_option(unknown[1])
            advice = f"; did you mean {nearest}?" if nearest else ""
            message = f"there is no option {unknown[1]}{advice}"
        stop(message, code=2, hint=f"`{self.prog} --help` lists the options.")


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """Parse a seed of torch's generators."""
    try:
        number = int(text)
    except ValueError:
        number = MAX_SEED
    if abs(number) >= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number below {MAX_SEED}")
    return number


def flag(name: str) -> str:
    """Return the command-line option of a configuration's field: --num-outputs of num_outputs."""
    return f"--{name.replace('_', '-')}"
