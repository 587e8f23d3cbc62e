"""Progress bars: a line that is redrawn on a terminal, and a line now and then in a log file."""

import sys
import time
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines of a bar in a log file


class Bar(tqdm):
    """A progress bar whose unit may begin with a space: "12 documents/s" and "2s/document"."""

    @staticmethod
    def format_meter(*args: Any, **options: Any) -> str:
        """See `tqdm.format_meter`."""
        return tqdm.format_meter(*args, **options).replace("s/ ", "s/")


class LogBar(Bar):
    """A progress bar for output that is not a terminal: whole lines, `LOG_SECONDS` apart.

    A bar that stays on a terminal when it ends also writes its last state, once.
    """

    last_line: float | None = None  # when the last line was written; at first, when the bar began
    written: tuple[float, str | None] | None = None  # position and scores of the last line

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if the last one is old enough."""
        now = time.monotonic()
        if self.last_line is None:
            self.last_line = now
        elif now - self.last_line >= LOG_SECONDS:
            self.last_line = now
            self.write_state()
        return False

    def write_state(self) -> None:
        """Write a line with the present state."""
        self.fp.write(f"{self}\n")
        self.written = (self.n, self.postfix)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a log file has no line to clear for other output."""

    def close(self) -> None:
        """Write the last state, unless the bar ends before its delay or disappears at its end."""
        if self.leave and not self.disable and time.time() - self.start_t >= self.delay:
            if self.written != (self.n, self.postfix):
                self.write_state()
        self.leave = False  # tqdm would end the line again
        super().close()


def on_terminal() -> bool:
    """Return whether progress bars are shown on a terminal."""
    return sys.stderr.isatty()


def write_line(text: str) -> None:
    """Write a line to standard output, above the bars of a terminal.

    In a log file the bars stay as they are: `tqdm.write` would make them repeat an old state.
    """
    if on_terminal():
        tqdm.write(text)
    else:
        print(text, flush=True)


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """Return a `Bar` on standard error, or a `LogBar` if that is not a terminal.

    Args:
        args: positional arguments of tqdm: the iterable and the description.
        options: keyword arguments of tqdm.
    """
    if on_terminal():
        return Bar(*args, dynamic_ncols=True, **options)
    return LogBar(*args, **(options | {"ncols": 0, "bar_format": None}))  # 0: numbers alone


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, such as "1 document" or "2,000 documents"."""
    return f"{number:,} {noun}" + "s" * (number != 1)
