"""UserError: an error that the user can fix. Interrupted: a signal from outside."""

import signal


class UserError(ValueError):
    """A mistake in the input of the user; its message is one sentence: value, limit, remedy.

    The command line prints the message alone, without a traceback, and exits with 1.
    """


def not_a_number(what: str) -> str:
    """Return the message for an output that is NaN or infinite."""
    return (
        f"the network's output for {what} is not a number (NaN or infinite): its training diverged "
        "or its weights are damaged; use an earlier checkpoint"
    )


class Interrupted(BaseException):
    """A signal ends the run. It is no Exception, so that nothing that expects failures catches it.

    Args:
        signum: the signal.
        on_all_ranks: every rank raises it at the same place, so that they may save together.
    """

    def __init__(self, signum: int, on_all_ranks: bool = False):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum, self.on_all_ranks = signum, on_all_ranks
        self.hint = ""  # how to go on

    @property
    def exit_code(self) -> int:
        """The exit code that shells give a process that the signal ended."""
        return 128 + self.signum
