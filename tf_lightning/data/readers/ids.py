"""Ids of the documents of a file, which filter lists name."""

from collections import Counter
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """Replace characters that break a line or cannot be written, such as those of a bad name."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def file_id(file: Path | str) -> str:
    """Return the path of a file as ids have it: printable, and unlike a comment."""
    name = printable(str(file))
    return f"./{name}" if name.startswith("#") else name


class SampleIds:
    """Names the samples of a file, one after another, whatever split they belong to.

    The id of a file that is one sample, such as an image, is its path. Others are "path:key", as in
    "00000.tar:000000123". If a key occurs again, the id ends with its number, as in
    "edit_turns.json:7#2".

    Args:
        file: path of the file.
        name: its name in ids, such as the URL of a remote file; "": its path.
    """

    def __init__(self, file: Path, name: str = ""):
        self.file, self.name = file, file_id(name or file)
        self.count = 0  # samples so far
        # Most keys are the number of the sample, from 0 on. Only the others are remembered.
        self.not_numbers: set[int] = set()  # samples whose key is not their number
        self.repeats: Counter[str] = Counter()

    def next(self, key: str, sample: Any) -> str:
        """Return the id of the next sample.

        Args:
            key: key of the sample, from `FileSource.samples`.
            sample: the sample.
        """
        if sample in (self.file, [self.file]):
            return self.name
        key = key.lstrip("/")  # of tars whose samples are in no folder
        number = self.count
        self.count += 1
        if key == str(number) and key not in self.repeats:
            return f"{self.name}:{key}"
        self.not_numbers.add(number)
        if key not in self.repeats and self._was_a_number(key, number):
            self.repeats[key] = 1
        self.repeats[key] += 1
        name = f"{self.name}:{printable(key)}" if key else self.name
        return name if self.repeats[key] == 1 else f"{name}#{self.repeats[key]}"

    def _was_a_number(self, key: str, number: int) -> bool:
        """Return whether an earlier sample had this key as its number."""
        if not (key.isascii() and key.isdigit() and key == str(int(key))):
            return False
        return int(key) < number and int(key) not in self.not_numbers
