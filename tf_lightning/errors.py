"""The one exception that means: the person at the keyboard can fix this."""


class UserError(ValueError):
    """A mistake in what the user gave; its message is one sentence: value, limit, remedy.

    The command line prints the message alone, without a traceback, and exits with 1.
    """
