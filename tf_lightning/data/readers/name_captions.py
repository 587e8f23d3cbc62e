"""Captions from the names of image files and of their folders."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.formats import may_be_image
from tf_lightning.data.readers.image_files import ImageFileSource
from tf_lightning.remote.cache import cached_path
from tf_lightning.remote.urls import is_remote

FILE_NAME, FOLDER_NAME = "file_name", "folder_name"  # values of `caption_key`
# Words that cameras, phones, browsers and data sets write into names, in lower case.
GENERIC = frozenset(
    "img image images imgs dsc dscn dscf sam pict pic pics picture pictures photo photos pxl mvi "
    "vid gopr dji screenshot screen shot whatsapp signal telegram snapchat fb scan frame file "
    "download downloads untitled unnamed unknown copy at am pm data dataset train val valid "
    "validation test my new folder jpg jpeg png".split()
)
COUNTER = re.compile(r"(?<=[^\W\d_]{3})\d+$")  # a counter at the end: matches cat2, not mp3
HEXADECIMAL = re.compile(r"(?=.*\d)[0-9a-f]{6,}(-[0-9a-f]+)*", re.IGNORECASE)  # hashes and UUIDs


def caption_of_name(name: str) -> str | None:
    """Return the words of a name, such as "black cat" for "black_cat_001"; None if it has none.

    Numbers, codes and words such as IMG at the start and at the end are left out: IMG_1234,
    DSC0001, 000123 and hashes are not captions.
    """
    if HEXADECIMAL.fullmatch(name):
        return None
    text = name.replace("_", " ")
    if " " not in text:  # hyphens and dots separate words unless there are spaces
        text = re.sub(r"[-+.]+", " ", text)
    words = text.split()
    words = words[_num_dropped(words) :]
    words = words[: len(words) - sum(1 for _ in takewhile(_is_code, reversed(words)))]
    return COUNTER.sub("", " ".join(words)) if any(map(_is_word, words)) else None


def _num_dropped(words: list[str]) -> int:
    """Count the codes at the start, with the generic words before and between them."""
    start = [*takewhile(lambda word: _is_code(word) or _is_generic(word), words)]
    return len(start) if any(map(_is_code, start)) else 0


def _is_code(word: str) -> bool:
    """Return whether a word is a number, such as (2), or a code, such as DSC0001 or img7."""
    letters = re.sub(r"[\W\d_]", "", word)
    num_digits = len(re.findall(r"\d", word))
    return not letters or num_digits >= 3 or bool(num_digits) and _is_generic(letters)


def _is_generic(word: str) -> bool:
    return word.lower() in GENERIC


def _is_word(word: str) -> bool:
    """Return whether a word has a meaning; one letter has none in alphabets."""
    letters = re.sub(r"[\W\d_]", "", word)
    return (len(letters) > 1 or not letters.isascii()) and not _is_generic(word)


@dataclass(eq=False)
class NamedImages(ImageFileSource):
    """Images whose captions are the names of their files or of their folders.

    The caption is the name of the file if it has words, otherwise the name of the nearest folder
    that has. The words are those of `caption_of_name`.

    Args:
        paths: image files or globs to train on, such as 'photos/**/*'; other files are ignored.
        caption_key: "file_name" or "folder_name" uses only this name; null: the first with words.
        roots: folders, also as URLs, whose names are not used, nor those of the folders above them;
            null: the folder of the file is used, and none above it.
    """

    caption_key: str | None = None
    roots: list[str] | None = None

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """Yield the file itself if it is an image; see `FileSource.samples`."""
        if may_be_image(file):
            yield file.parent.name, file

    def parts(self, sample: Path) -> list[str | Path]:
        """List caption and image; see `ImageFileSource.parts`."""
        caption = next(filter(None, map(caption_of_name, self._names(sample))), None)
        if caption is None:
            raise BadSample("image whose name is a number or a code, such as IMG_1234")
        return [caption, sample]

    def _names(self, image: Path) -> Iterator[str]:
        """Yield the names that may be the caption, the preferred one first."""
        if self.caption_key != FOLDER_NAME:
            yield image.stem
        if self.caption_key != FILE_NAME:
            yield from folder_names(image, [*map(_as_path, self.roots or ())])


def _as_path(folder: str) -> Path:
    return cached_path(folder) if is_remote(folder) else Path(folder).expanduser()


def folder_names(image: Path, roots: list[Path]) -> list[str]:
    """List the names of the folders between a root and an image, the nearest first.

    If the image is below no root, its own folder is the only one.
    """
    names = []
    for folder in image.parents:
        if folder in roots:
            return names
        names.append(folder.name)
    return names[:1]
