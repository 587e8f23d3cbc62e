"""UserError: an error that the user can fix."""


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
