"""The documentation's files, and the links, code blocks and commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order, without the indentation of a list."""
    found = []
    for indent, language, text in FENCE.findall(page.read_text()):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        found.append(Block(language, "\n".join(lines)))
    return found


def prose(page: Path) -> str:
    """A page without its fenced code blocks, and without the old names of the changelog."""
    text = FENCE.sub("", page.read_text())
    if page.name != "CHANGELOG.md":
        return text
    # Tables have the old name in their first column. Below "Removed" all names are old.
    now = text.partition("### Removed")[0]
    return re.sub(r"^\| .*? \| ", "| ", now, flags=re.MULTILINE)


def shell_lines(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script; comments are left out."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command of a page, in code blocks and in inline code."""
    found = [
        words
        for block in blocks(page)
        if block.language == "bash"
        for words in shell_lines(block.text)
    ]
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.match(r"(OMP_NUM_THREADS=\d+ )?(tf-lightning|python|make) ", code):
            found += shell_lines(code)
    return found


def name(page: Path) -> str:
    """A page's path, for the name of a test."""
    return str(page.relative_to(ROOT))
