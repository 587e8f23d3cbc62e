"""UserError: an error that the user can fix. Interrupted: a signal, or another rank's failure."""

import re
import signal

MAX_SENTENCE = 300  # characters; a damaged file may be quoted whole in an error


class UserError(ValueError):
    """A mistake of the user. Its message is one sentence: value, limit, remedy.

    The command line prints the message alone, without a traceback, and exits with 1.
    """


def first_sentence(error: Exception | str) -> str:
    """Return the first sentence of an error message, without its full stop, or its beginning."""
    sentence = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".") or type(error).__name__
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[:MAX_SENTENCE]}..."


def not_a_number(what: str) -> str:
    """Return the message for an output that is NaN or infinite."""
    return (
        f"the network's output for {what} is not a number (NaN or infinite): its training diverged "
        "or its weights are damaged; use an earlier checkpoint"
    )


class Interrupted(BaseException):
    """A signal, or the failure of another rank, ends the command.

    It is not an Exception, so `except Exception` does not catch it.

    Args:
        signum: the signal.
        on_all_ranks: every rank raises it at the same place, so that they may save together.
        failure: the error of another rank, which is then the message; no signal was received.
    """

    def __init__(self, signum: int, on_all_ranks: bool = False, failure: str = ""):
        super().__init__(failure or f"interrupted by {signal.Signals(signum).name}")
        self.signum, self.on_all_ranks, self.failure = signum, on_all_ranks, failure
        self.hint = ""  # how to go on

    @property
    def exit_code(self) -> int:
        """The exit code that shells give a process that the signal ended; 1 after a failure."""
        return 1 if self.failure else 128 + self.signum
