"""The command `tf-lightning`: find the verb, run it, and report a mistake in one line.

Nothing heavy is imported before a verb runs, so `--help`, `--version` and a misspelt verb are
answered at once.
"""

import importlib
import os
import sys
import tempfile
import traceback
from difflib import get_close_matches
from importlib.metadata import version

from tf_lightning.cli.help import OVERVIEW, print_verb_help
from tf_lightning.cli.parser import print_error, stop
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.signals import handled, interrupt

LIGHTNING = ("fit", "validate", "test", "predict")
# Verb: the module in tf_lightning.cli and the function that runs it.
VERBS = {
    **dict.fromkeys(LIGHTNING, ("lightning", "run_lightning")),
    "prepare": ("prepare", "run_prepare"),
    "inspect": ("inspect", "run_inspect"),
    "plan": ("plan", "run_plan"),
    "generate": ("generate", "run_generate"),
    "export": ("export", "run_export"),
    "model-config": ("export", "run_model_config"),
}


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one sentence and exit code 1 or 2.

    Args:
        args: the words of the command; None: those of this process. Other errors are then reported
            by `report_fault`; a caller with `args` receives them.
    """
    if args is None:
        args = sys.argv[1:]
        prepare_process()
    try:
        dispatch(args)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()


def prepare_process() -> None:
    """Find classes in the current folder, print any text in any locale, and report faults."""
    # After the installed packages, so that no file of the folder hides one of them.
    sys.path.append(os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = report_fault


def report_fault(kind: type[BaseException], error: BaseException, trace) -> None:
    """Report an error that is not the user's mistake: one line, and a file with the traceback."""
    from tf_lightning.remote.urls import hide_logins

    lines = hide_logins("".join(traceback.format_exception(kind, error, trace)))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tf-lightning-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"tf-lightning {hide_logins(' '.join(sys.argv[1:]))}\n\n{lines}")
        where = f"the traceback is in {file.name}; please report it"
    except OSError:  # no room for the file
        where = "please report it"
        print(lines, file=sys.stderr)
    print_error(f"{kind.__name__}: {first_line(error)} ({where})")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, of the original one if a worker raised it."""
    text = str(error).strip()
    if "Original Traceback" in text:  # torch's DataLoader repeats the worker's whole traceback
        return text.splitlines()[-1].partition(": ")[2]
    return text.splitlines()[0] if text else "no message"


def leave_closed_pipe() -> None:
    """End without a message when the reader of our output has ended, such as `head`."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(null, stream.fileno())
    raise SystemExit(128 + 13)  # as a program that SIGPIPE ends


def dispatch(args: list[str]) -> None:
    """Answer --help and --version, or run the verb."""
    if not args or args[0] in ("-h", "--help", "help"):
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
        nearest = get_close_matches(verb.lower(), VERBS, n=1)
        advice = f"did you mean {nearest[0]!r}? The commands are" if nearest else "use one of"
        stop(f"unknown command {verb!r}; {advice} {', '.join(VERBS)}", code=1)
    if verb not in VERBS:
        later = next((word for word in args if word in VERBS), None)
        if later is None:
            stop(f"there is no option {verb}; see `tf-lightning --help`", code=2)
        stop(f"{verb} comes before the command; begin with `tf-lightning {later}`", code=2)
    module, function = VERBS[verb]
    try:
        runner = getattr(importlib.import_module(f"tf_lightning.cli.{module}"), function)
        with handled(interrupt):
            runner(args if function == "run_lightning" else args[1:])
    except BrokenPipeError:
        raise
    except Exception as error:
        message = explain_error(error)
        if message is None:
            raise
        stop(message, code=1)
    except KeyboardInterrupt:
        stop("interrupted", code=130)
    except Interrupted as error:
        stop(str(error), code=error.exit_code, hint=error.hint)


def explain_error(error: Exception) -> str | None:
    """Return the sentence for an error that the user can act on, else None.

    Lightning's and torch's classes are recognized by name, because they may not be imported.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, UserError | OSError) and "Original Traceback" in str(error):
        return first_line(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "MisconfigurationException" in names:
        return str(error)
    if names & {"OutOfMemoryError", "MemoryError"} or "can't allocate memory" in str(error):
        return (
            f"out of memory ({first_line(error)}); give a smaller --data.batch_size, "
            "--model.activation_checkpointing full, or more GPUs with ModelParallelStrategy; "
            "`tf-lightning plan` says what fits"
        )
    if "DataLoader worker" in str(error) and "killed by signal" in str(error):
        return f"{first_line(error)}; there may be too little memory: give fewer --data.num_workers"
    return None
