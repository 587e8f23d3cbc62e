"""The one exception that means: the person at the keyboard can fix this."""


class UserError(ValueError):
    """A mistake in what the user gave; its message is one sentence: value, limit, remedy.

    The command line prints the message alone, without a traceback, and exits with 1.
    """


def not_a_number(what: str) -> str:
    """The sentence for a network that has diverged."""
    return (
        f"the network's output for {what} is not a number (NaN or infinite): its training diverged "
        "or its weights are damaged; use an earlier checkpoint"
    )
