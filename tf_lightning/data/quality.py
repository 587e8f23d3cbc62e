"""Quality of the documents of a source: duplicates, writing systems, lengths, sizes of images.

`Quality` is filled with one document after another and keeps about 170 bytes of memory for each;
ids and thumbnails are in temporary files. Then `findings` lists the documents that a user may
want to leave out, each with the reason.
"""

import hashlib
import tempfile
import unicodedata
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from tf_lightning.data.documents import AnyText, RawDocument, Skipped, Split
from tf_lightning.data.duplicates import Lookalikes, look_of
from tf_lightning.data.images import FORMATS

SMALL_SHARE = 0.5  # an image is small if its shorter side is below this share of the model's
LONG_RATIO = 3.0  # an image is long if one side is more than this many times the other
RARE_SHARE = 0.1  # a writing system is unusual if fewer of the source's documents have it
MAX_LETTERS = 10_000  # characters of a text that are looked at for its writing system

# Kinds of findings, by their names in the report and in the filter list.
REPEAT = "held-out documents that repeat training ones"
COPY = "copies of an earlier document"
LOOKALIKE = "images that look like earlier ones"
WRITING = "texts in an unusual writing system"
SMALL = "small images"
LONG = "long images"
KINDS = REPEAT, COPY, LOOKALIKE, WRITING, SMALL, LONG

NO_LETTERS = "no letters"
SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}  # others: as in Unicode


class Finding(NamedTuple):
    """A document that a user may want to leave out.

    Attributes:
        number: its number among the documents of the source.
        id: its id.
        kind: one of KINDS.
        reason: why, in words.
    """

    number: int
    id: str
    kind: str
    reason: str


class Quality:
    """Measures the documents of a source, in the order in which they are added.

    Add the training documents before the held-out ones, so that a held-out document that repeats a
    training document is found, not the other way round.

    Args:
        image_size: side of the images that the model sees, in pixels; None: unknown.

    Attributes:
        num: number of documents of each split.
        skipped: number of skipped samples by reason.
        characters: length of each text, of all wordings.
        sizes: width and height of each image file, after its rotation, one after the other.
        shared: documents whose image file an earlier document has too, such as other captions.
    """

    def __init__(self, image_size: int | None = None):
        self.image_size = image_size
        self.num: Counter[Split] = Counter()
        self.skipped: Counter[str] = Counter()
        self.ids = Lines()
        self.characters = array("q")
        self.scripts: dict[str, int] = {}  # numbers of the writing systems
        self.script = array("B")  # of each document
        self.digests, self.image_digests = array("Q"), array("Q")  # of each document
        self.files = array("Q")  # digest of the paths of its images; 0: not in files of their own
        # An earlier document that looks alike, or -1; and in how many bits their hashes differ.
        self.alike, self.bits = array("q"), array("B")
        self.sizes, self.owners = array("q"), array("q")  # owners: documents of the image files
        self.lookalikes = Lookalikes()
        self.shared = 0

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.digests)

    def add(self, split: Split, name: str, document: RawDocument | Skipped) -> None:
        """Measure one document.

        Args:
            split: "train" or "val".
            name: its id.
            document: the document.
        """
        if isinstance(document, Skipped):
            self.skipped[document.reason] += 1
            return
        number = len(self)
        self.num[split] += 1
        self.ids.append(name)
        texts = [text for part in document if isinstance(part, str) for text in wordings(part)]
        images = [part for part in document if isinstance(part, Image.Image)]
        self.characters.extend(map(len, texts))
        script = script_of("\n".join(texts))
        self.script.append(self.scripts.setdefault(script, len(self.scripts)))
        pixels = [image.tobytes() for image in images]
        encoded = [text.encode("utf-8", "replace") for text in texts]
        self.image_digests.append(digest(pixels))
        self.digests.append(digest([*pixels, *encoded]))
        files = [image.info.get("file") for image in images]
        have_paths = files and all(isinstance(file, Path) for file in files)
        self.files.append(digest([str(file).encode() for file in files]) if have_paths else 0)
        for file in files:
            if file is not None:
                self.sizes.extend(image_file_size(file))
                self.owners.append(number)
        self._compare(number, images, digest(encoded))

    def _compare(self, number: int, images: list[Image.Image], text: int) -> None:
        """Look for an earlier document whose images look like those of this one."""
        look = look_of(images, text) if images else None
        found = self.lookalikes.find(look) if look else None
        earlier, bits = found or (-1, 0)
        if look and not found:
            self.lookalikes.add(number, look)
        elif found and self.files[number] and self.files[number] == self.files[earlier]:
            self.shared += 1
            earlier = -1  # one image file with several texts is not a duplicate
        self.alike.append(earlier)
        self.bits.append(bits)

    def writing(self) -> dict[str, int]:
        """Count the documents of each writing system, the most frequent first."""
        counts = np.bincount(np.frombuffer(self.script, np.uint8), minlength=len(self.scripts))
        named = dict(zip(self.scripts, counts.tolist(), strict=True))
        return dict(sorted(named.items(), key=lambda item: -item[1]))

    def findings(self) -> list[Finding]:
        """List the documents that a user may want to leave out, kind by kind."""
        if not len(self):
            return []
        found = self._repeats() | {
            WRITING: self._unusual(),
            SMALL: self._small(),
            LONG: self._long(),
        }
        return [
            Finding(number, self.ids[number], kind, reason)
            for kind in KINDS
            for number, reason in found[kind]
        ]

    def _repeats(self) -> dict[str, list[tuple[int, str]]]:
        """List the documents that repeat or resemble an earlier one, each under one kind."""
        numbers, first = np.arange(len(self)), self._first()
        alike = np.frombuffer(self.alike, np.int64)
        earlier = np.where(alike >= 0, np.minimum(first, alike), first)
        is_repeat = (numbers >= self.num["train"]) & (earlier < self.num["train"])
        is_copy = ~is_repeat & (first != numbers)
        is_alike = ~is_repeat & ~is_copy & (alike >= 0)
        chosen = {REPEAT: is_repeat, COPY: is_copy, LOOKALIKE: is_alike}
        return {
            kind: [(n, self._likeness(n, int(first[n]))) for n in np.flatnonzero(which).tolist()]
            for kind, which in chosen.items()
        }

    def _likeness(self, number: int, first: int) -> str:
        """Describe how a document repeats or resembles an earlier one.

        Args:
            number: number of the document.
            first: number of the first document of the same content.
        """
        alike = self.alike[number]
        if first != number:
            return f"copy of {self.ids[first]}"
        if self.image_digests[number] == self.image_digests[alike]:
            return f"same image as {self.ids[alike]}, with another text"
        return f"looks like {self.ids[alike]} ({self.bits[number]} of 64 bits differ)"

    def _first(self) -> np.ndarray:
        """Return the first document of the same content for each document, (num_documents,)."""
        digests = np.frombuffer(self.digests, np.uint64)
        _, first, place = np.unique(digests, return_index=True, return_inverse=True)
        return first[place]

    def _unusual(self) -> Iterator[tuple[int, str]]:
        counts = self.writing()
        counts.pop(NO_LETTERS, None)
        rare = {s for s, count in counts.items() if count < RARE_SHARE * sum(counts.values())}
        names = list(self.scripts)
        for number, script in enumerate(self.script):
            if names[script] in rare:
                yield number, f"text in the {names[script]} writing system"

    def _image_sizes(self) -> np.ndarray:
        """Width and height of each image file, (num_image_files, 2)."""
        return np.frombuffer(self.sizes, np.int64).reshape(-1, 2)

    def _small(self) -> Iterator[tuple[int, str]]:
        limit = SMALL_SHARE * (self.image_size or 0)
        sizes = self._image_sizes()
        yield from self._with_images(sizes.min(1, initial=2**31) < limit, "small image of")

    def _long(self) -> Iterator[tuple[int, str]]:
        sizes = self._image_sizes()
        is_long = sizes.max(1, initial=0) > LONG_RATIO * sizes.min(1, initial=2**31)
        yield from self._with_images(is_long, "long image of")

    def _with_images(self, chosen: np.ndarray, what: str) -> Iterator[tuple[int, str]]:
        """Name each document that has a chosen image file, (num_image_files,) bool, once."""
        last = -1
        for image in np.flatnonzero(chosen).tolist():
            width, height = self._image_sizes()[image].tolist()
            if self.owners[image] != last:
                last = self.owners[image]
                yield last, f"{what} {width} x {height} pixels"

    def smallest(self, count: int) -> list[tuple[int, int, str]]:
        """List width, height and id of the image files with the shortest sides."""
        sizes = self._image_sizes()
        order = np.argsort(sizes.min(1, initial=2**31), kind="stable")[:count].tolist()
        return [(*sizes[image].tolist(), self.ids[self.owners[image]]) for image in order]

    def ratios(self) -> np.ndarray:
        """Width divided by height of each image file, (num_image_files,)."""
        sizes = self._image_sizes()
        return sizes[:, 0] / sizes[:, 1]


class Lines:
    """A list of texts in a temporary file; eight bytes of memory for each."""

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        self.ends = array("q", [0])

    def append(self, text: str) -> None:
        """Add a text."""
        content = text.encode("utf-8", "surrogatepass")
        self.file.seek(0, 2)
        self.file.write(content)
        self.ends.append(self.ends[-1] + len(content))

    def __getitem__(self, number: int) -> str:
        """Read a text."""
        self.file.seek(self.ends[number])
        content = self.file.read(self.ends[number + 1] - self.ends[number])
        return content.decode("utf-8", "surrogatepass")


def wordings(text: str) -> tuple[str, ...]:
    """Return the wordings of a text, of which each epoch draws one."""
    return text.texts if isinstance(text, AnyText) else (text,)


def digest(contents: list[bytes]) -> int:
    """Return a 64-bit hash of some contents in order; 0 if there are none."""
    if not contents:
        return 0
    whole = hashlib.blake2b(digest_size=8)
    for content in contents:
        whole.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(whole.digest(), "little")


def image_file_size(file: bytes | Path) -> tuple[int, int]:
    """Return width and height of an image file as a viewer shows it; reads only its header."""
    with warnings.catch_warnings(action="ignore"):
        opened = Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        with opened as image:
            width, height = image.size
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # damaged tags, which `images.upright` ignores too
                orientation = None
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def script_of(text: str) -> str:
    """Return the writing system of most letters of a text, or NO_LETTERS.

    This is not the language: English and German are both "Latin". Text with kana is "Japanese".
    """
    counts: Counter[str] = Counter()
    for letter, count in Counter(text[:MAX_LETTERS]).items():
        if letter.isalpha():
            counts[script_of_letter(letter)] += count
    if "Japanese" in counts:
        counts["Japanese"] += counts.pop("Han", 0)
    return max(counts, key=counts.__getitem__) if counts else NO_LETTERS


@cache
def script_of_letter(letter: str) -> str:
    """Return the writing system of a letter: the first word of its Unicode name."""
    words = unicodedata.name(letter, "other").removeprefix("FULLWIDTH ").split()
    first = words[0].partition("-")[0]
    return SCRIPTS.get(first, first.capitalize())
