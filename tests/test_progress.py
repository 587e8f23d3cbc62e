"""Progress bars: redrawn on a terminal, whole lines now and then elsewhere."""

import io
import sys

import pytest

from tf_lightning import progress
from tf_lightning.progress import Bar, LogBar, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(text: str) -> list[str]:
    assert "\r" not in text and "\x1b" not in text  # nothing is redrawn
    return text.splitlines()


def test_a_log_file_gets_a_line_every_30_seconds_and_the_last_state(clock, capsys):
    bar = progress_bar(total=100, desc="Reading", unit=" documents")
    for number in range(1, 101):
        clock[0] = number * 1.0
        bar.update()
        bar.refresh()
    bar.close()
    found = lines(capsys.readouterr().err)
    assert [line.split()[1:3] for line in found] == [
        ["30%", "30/100"],
        ["60%", "60/100"],
        ["90%", "90/100"],
        ["100%", "100/100"],
    ]
    assert all(line.startswith("Reading: ") and "documents/s" in line for line in found)


def test_the_last_state_is_written_once(clock, capsys):
    bar = progress_bar(total=4, desc="Reading")
    clock[0] = 31.0
    bar.update(4)
    bar.refresh()
    bar.close()
    assert len(lines(capsys.readouterr().err)) == 1


def test_thousands_of_updates_of_many_bars_are_few_lines(capsys):
    outer = progress_bar(total=1000, desc="Outer")
    for _ in range(1000):
        for _ in progress_bar(range(3), "Inner", leave=False):
            pass
        outer.set_postfix(x=1)
        outer.update()
    outer.write("a message")
    outer.close()
    printed = capsys.readouterr()
    assert len(lines(printed.err)) == 1 and "1000/1000" in printed.err and "x=1" in printed.err
    assert printed.out == "a message\n"


def test_a_bar_that_ends_before_its_delay_writes_nothing(capsys):
    list(progress_bar(range(3), "Quick", delay=2))
    progress_bar(total=3, disable=True).close()
    assert capsys.readouterr().err == ""


def test_a_stream_without_a_length_counts(clock, capsys):
    bar = progress_bar(iter(range(7)), "Stream", unit=" rows")
    assert sum(1 for _ in bar) == 7
    assert "Stream: 7 rows" in capsys.readouterr().err.replace("7rows", "7 rows")


@pytest.mark.parametrize("bar", [LogBar, Bar])
def test_a_slow_rate_has_no_stray_space(bar):
    assert bar.format_meter(1, 4, 20.0, unit=" documents").endswith("20.00s/documents]")
    assert bar.format_meter(40, 80, 20.0, unit=" documents").endswith(" 2.00 documents/s]")


def test_a_terminal_gets_a_bar_that_is_redrawn(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress_bar(range(4), "Reading", mininterval=0)
    assert not isinstance(bar, LogBar) and list(bar) == [0, 1, 2, 3]
    assert terminal.getvalue().count("\r") >= 4 and terminal.getvalue().count("\n") == 1
