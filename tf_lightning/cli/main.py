"""The command `tf-lightning`: find the verb, run it, and report a mistake in one line.

Nothing heavy is imported before a verb runs, so `--help`, `--version` and a misspelt verb are
answered at once.
"""

import importlib
import sys
from difflib import get_close_matches
from importlib.metadata import version

from tf_lightning.cli.help import OVERVIEW, print_verb_help
from tf_lightning.cli.parser import stop
from tf_lightning.errors import UserError

LIGHTNING = ("fit", "validate", "test", "predict")
# Verb: the module in tf_lightning.cli and the function that runs it.
VERBS = {
    **dict.fromkeys(LIGHTNING, ("lightning", "run_lightning")),
    "prepare": ("prepare", "run_prepare"),
    "inspect": ("inspect", "run_inspect"),
    "generate": ("generate", "run_generate"),
    "export": ("export", "run_export"),
    "model-config": ("export", "run_model_config"),
}


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one sentence and exit code 1 or 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW)
    elif args[0] == "--version":
        print(f"tf-lightning {version('tf-lightning')}")
    elif args[0] in LIGHTNING and {"-h", "--help"} & set(args):
        print_verb_help(args)
    else:
        run(args)


def run(args: list[str]) -> None:
    """Run the verb that the arguments begin with."""
    verb = args[0]
    if verb not in VERBS and not verb.startswith("-"):
        nearest = get_close_matches(verb, VERBS, n=1)
        advice = f"did you mean {nearest[0]!r}? The commands are" if nearest else "use one of"
        stop(f"unknown command {verb!r}; {advice} {', '.join(VERBS)}", code=1)
    # Options before the verb, such as `-c CONFIG fit`, are LightningCLI's.
    module, function = VERBS.get(verb, VERBS["fit"])
    try:
        runner = getattr(importlib.import_module(f"tf_lightning.cli.{module}"), function)
        runner(args if function == "run_lightning" else args[1:])
    except UserError as error:
        stop(str(error), code=1)
    except OSError as error:  # a folder that cannot be written, a full disk
        if not error.filename:
            raise
        stop(f"{error.filename}: {error.strerror}", code=1)
    except KeyboardInterrupt:
        stop("interrupted", code=130)
