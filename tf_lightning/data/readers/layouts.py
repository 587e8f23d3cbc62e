"""Layouts of captioned images in a folder: which of its images have their captions where."""

import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tf_lightning.data.readers.captions import CAPTION_EXTENSIONS
from tf_lightning.data.readers.files import find_files
from tf_lightning.data.readers.formats import OTHER_IMAGES, format_by_name, is_ignored
from tf_lightning.data.readers.name_captions import caption_of_name, folder_names
from tf_lightning.errors import UserError

# Files that have the captions of a folder, in order of preference.
METADATA_FILES = "metadata.jsonl", "metadata.csv", "metadata.parquet"
PACKED_FILES = "*.tar", "*.tar.gz", "*.tgz", "*.parquet"
# Files that have them if there is no text beside an image.
OTHER_TABLES = (
    *("*.jsonl", "captions.txt", "*.csv", "*.tsv", "*.json"),
    *("*.jsonl.gz", "*.csv.gz", "*.json.gz"),
)
BESIDE, NAMES = "image", "names"  # kinds of layouts
HOW_TO_CAPTION = (
    'write a metadata.jsonl with a line such as {"file_name": "cat.jpg", "text": "a cat"} for each '
    "image, or a cat.txt beside each cat.jpg"
)


class Layout(NamedTuple):
    """Files that one source reads.

    Attributes:
        kind: BESIDE, NAMES, or None if the first of the files decides.
        paths: the files, or globs of them.
    """

    kind: str | None
    paths: list[str]


def folder_layouts(
    folder: Path, caption_key: str | None, images_of: Callable[[list[Path]], Iterable[Path]]
) -> list[Layout]:
    """Find the layouts of the captioned images in a folder and in the folders inside.

    - Tars and parquet files contain their images, so other files are not looked at.
    - A metadata file has the captions of the images that it names, in its folder and below.
    - An image that no metadata file names may have a text file beside it.
    - In a folder without any caption, the names of the images or of their folders are captions.

    Args:
        folder: the folder.
        caption_key: key of the captions, which may be the suffix of the text files.
        images_of: returns the paths of the images that metadata files name.

    Raises:
        UserError: the folder has no captioned images.
    """
    escaped = glob.escape(str(folder))
    top = _first_found(folder, (*METADATA_FILES, *PACKED_FILES))
    if top in PACKED_FILES:
        return [Layout(None, [f"{escaped}/{top}"])]
    files = _files_in(folder)
    images = [file for file in files if _is_named_image(file)]
    tables = [folder / top] if top else _one_a_folder(files)
    beside = _with_text(images, files, caption_key)
    if not top and not beside:
        others = *OTHER_TABLES, *(() if tables else (f"**/{name}" for name in PACKED_FILES))
        if other := _first_found(folder, others):
            return [Layout(None, [f"{escaped}/{other}"])]
    plain = _without_captions(images, tables, beside)
    if tables and beside:
        named = {os.path.normpath(path) for path in images_of(tables)}
        beside = [image for image in beside if os.path.normpath(image) not in named]
    found = {None: tables, BESIDE: beside, NAMES: plain}
    if not tables and not beside and not any(_has_name(image, folder) for image in plain):
        raise UserError(_nothing_found(folder, files, images))
    kinds = [kind for kind in found if found[kind]]
    if kinds == [None]:
        return [Layout(None, _globs_of_tables(folder, tables))]
    if len(kinds) == 1:
        return [Layout(kinds[0], [f"{escaped}/**/*"])]
    return [Layout(kind, [glob.escape(str(file)) for file in found[kind]]) for kind in kinds]


def _first_found(folder: Path, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a file in the folder matches."""
    for pattern in patterns:
        if any(not is_ignored(str(file)) for file in folder.glob(pattern)):
            return pattern
    return None


def _files_in(folder: Path) -> list[Path]:
    try:
        return find_files(f"{glob.escape(str(folder))}/**/*")
    except UserError:  # there are none
        return []


def _is_named_image(file: Path) -> bool:
    return format_by_name(file) == "image" or file.suffix.lower() in OTHER_IMAGES


def _one_a_folder(files: list[Path]) -> list[Path]:
    """Find the metadata file of each folder that has one, by the order of METADATA_FILES."""
    tables = (file for file in files if file.name in METADATA_FILES)
    best: dict[Path, Path] = {}
    for file in sorted(tables, key=lambda file: METADATA_FILES.index(file.name)):
        best.setdefault(file.parent, file)
    return sorted(best.values())


def _with_text(images: list[Path], files: list[Path], caption_key: str | None) -> list[Path]:
    """List the images with a text file of the same name."""
    suffixes = {f".{kind}" for kind in (*CAPTION_EXTENSIONS, "json", caption_key) if kind}
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in suffixes}
    return [image for image in images if image.with_suffix("") in texts]


def _without_captions(images: list[Path], tables: list[Path], beside: list[Path]) -> list[Path]:
    """List the images in folders without texts that have no metadata file in or above them."""
    with_texts, with_tables = {image.parent for image in beside}, {t.parent for t in tables}
    return [
        image
        for image in images
        if image.parent not in with_texts and not with_tables & {*image.parents}
    ]


def _globs_of_tables(folder: Path, tables: list[Path]) -> list[str]:
    """Return a glob of the tables if one matches them and no others, otherwise their paths."""
    names = {table.name for table in tables}
    if len(names) == 1 and folder not in {table.parent for table in tables}:
        return [f"{glob.escape(str(folder))}/**/{names.pop()}"]
    return [glob.escape(str(table)) for table in tables]


def _has_name(image: Path, folder: Path) -> bool:
    """Return whether the name of an image, or of a folder between it and `folder`, has words."""
    return any(map(caption_of_name, [image.stem, *folder_names(image, [folder])]))


def _nothing_found(folder: Path, files: list[Path], images: list[Path]) -> str:
    """Say what a folder without captioned images has, and what to do."""
    if not files:
        return f"the folder {folder} has no files; put images with captions into it"
    if not images:
        kinds = defaultdict(int)
        for file in files:
            kinds[file.suffix or file.name] += 1
        most = max(kinds, key=kinds.get)
        return (
            f"the folder {folder} has {len(files):,} files, most of them {most}, but no image and "
            "no table or tar of images; put the images beside their captions"
        )
    return (
        f"the folder {folder} has no captions: it has {len(images):,} images with names such as "
        f"{images[0].name}, which are numbers or codes; {HOW_TO_CAPTION}"
    )
