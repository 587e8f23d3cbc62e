"""Layouts of captioned images in a folder: which files hold the captions."""

import glob
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import NamedTuple

from tf_lightning.data.readers.captions import CAPTION_EXTENSIONS
from tf_lightning.data.readers.formats import OTHER_IMAGES, format_by_name
from tf_lightning.data.readers.name_captions import caption_of_name
from tf_lightning.progress import counted

# Files that have the captions of a folder, in order of preference.
METADATA_FILES = "metadata.jsonl", "metadata.csv", "metadata.parquet"
PACKED_FILES = "*.tar", "*.tar.gz", "*.tgz", "*.parquet"
# Tables of captions that are used if no image has a text file.
OTHER_TABLES = (
    *("*.jsonl", "captions.txt", "*.csv", "*.tsv", "*.json"),
    *("*.jsonl.gz", "*.csv.gz", "*.json.gz"),
)
# Files of data sets on the hub that hold no data.
HUB_FILES = (
    "README.md",
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
)
TRAINING, OTHER_SPLITS = (
    re.compile(rf"(^|[/_.-])({names})([/_.-]|$)", re.IGNORECASE)
    for names in ("train|training", "validation|valid|val|test|testing|dev|eval")
)
BESIDE, NAMES = "image", "names"  # kinds of layouts; BESIDE is also the format of images
HOW_TO_CAPTION = (
    'write a metadata.jsonl with a line such as {"file_name": "cat.jpg", "text": "a cat"} for each '
    "image, or a cat.txt beside each cat.jpg"
)


class Layout(NamedTuple):
    """Files that one source reads.

    Attributes:
        kind: BESIDE, NAMES, or None if the first of the files decides.
        patterns: globs of the files, relative to the folder.
    """

    kind: str | None
    patterns: list[str]


def folder_layouts(
    files: list[PurePath],
    caption_key: str | None,
    images_of: Callable[[list[PurePath]], Iterable[PurePath]],
) -> list[Layout]:
    """Find the layouts of the captioned images in a folder; [] if it has none.

    - Tars and parquet files contain their images, so other files are not looked at.
    - A metadata file has the captions of the images that it names, in its folder and below.
    - An image that no metadata file names may have a text file beside it.
    - In a folder without any caption, the names of the images or of their folders are captions.

    Args:
        files: the files in the folder and in the folders inside, relative to it.
        caption_key: key of the captions, which may be the suffix of the text files.
        images_of: returns the paths of the images that metadata files name, relative to the folder.
    """
    top = _first_found(files, (*METADATA_FILES, *PACKED_FILES))
    if top in PACKED_FILES:
        return [Layout(None, [top])]
    images = [file for file in files if is_named_as_image(file)]
    tables = _one_a_folder(files)
    if top and len(tables) > 1:
        tables = _naming_more(tables, images_of)
    beside = _with_text(images, files, caption_key)
    if not top and not beside:
        others = *OTHER_TABLES, *(() if tables else (f"**/{name}" for name in PACKED_FILES))
        if other := _first_found(files, others):
            return [Layout(None, [other])]
    plain = _without_captions(images, tables, beside)
    if tables and beside:
        named = {*images_of(tables)}
        beside = [image for image in beside if image not in named]
    found = {None: tables, BESIDE: beside, NAMES: plain}
    if not tables and not beside and not any(map(_has_name, plain)):
        return []
    kinds = [kind for kind in found if found[kind]]
    if kinds == [None]:
        return [Layout(None, _patterns_of_tables(tables))]
    if len(kinds) == 1:
        return [Layout(kinds[0], ["**/*"])]
    return [Layout(kind, [glob.escape(str(file)) for file in found[kind]]) for kind in kinds]


def training_files(files: list[PurePath]) -> list[PurePath]:
    """Leave out the files of other splits, by their names, if there are files for training."""
    images = {file.with_suffix("") for file in files if is_named_as_image(file)}
    # The name of an image, and of a text beside it, says what the image shows.
    names = {
        file: f"{file.parent.as_posix()}/" if file.with_suffix("") in images else file.as_posix()
        for file in files
    }
    train = {file for file in files if TRAINING.search(names[file])}
    others = {file for file in files if OTHER_SPLITS.search(names[file])} - train
    return [file for file in files if file not in others] if train else files


def explicit(files: list[PurePath], kind: str | None, patterns: list[str]) -> list[str]:
    """Replace the patterns of a layout by others that match none but these files.

    The files of tables are named one by one, images by their folders.
    """
    if patterns == ["**/*"]:
        folders = dict.fromkeys(file.parent for file in files if is_named_as_image(file))
        return [f"{glob.escape(str(folder))}/*" for folder in folders]
    found = [file for file in files if any(_matches(file, pattern) for pattern in patterns)]
    return [glob.escape(str(file)) for file in found] if kind is None else patterns


def _first_found(files: list[PurePath], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a file matches."""
    return next((p for p in patterns if any(_matches(file, p) for file in files)), None)


def _matches(file: PurePath, pattern: str) -> bool:
    """Return whether a relative path matches a pattern; "**/" stands for any folders or none."""
    name = pattern.removeprefix("**/")
    if name == pattern:
        return fnmatchcase(file.as_posix(), pattern) and len(file.parts) == len(
            PurePath(pattern).parts
        )
    return fnmatchcase(file.name, name)


def is_named_as_image(file: PurePath) -> bool:
    """Return whether the suffix of a file is that of an image, also of one that is not read."""
    return format_by_name(file) == "image" or file.suffix.lower() in OTHER_IMAGES


def _one_a_folder(files: list[PurePath]) -> list[PurePath]:
    """Find the metadata file of each folder that has one, by the order of METADATA_FILES."""
    tables = (file for file in files if file.name in METADATA_FILES)
    best: dict[PurePath, PurePath] = {}
    for file in sorted(tables, key=lambda file: METADATA_FILES.index(file.name)):
        best.setdefault(file.parent, file)
    return sorted(best.values())


def _naming_more(
    tables: list[PurePath], images_of: Callable[[list[PurePath]], Iterable[PurePath]]
) -> list[PurePath]:
    """Leave out the tables in folders whose images the table at the top names too."""
    top, *below = sorted(tables, key=lambda table: len(table.parts))
    named = {*images_of([top])}
    return [top, *(table for table in below if not named.issuperset(images_of([table])))]


def _with_text(
    images: list[PurePath], files: list[PurePath], caption_key: str | None
) -> list[PurePath]:
    """List the images with a text file of the same name."""
    suffixes = {f".{kind}" for kind in (*CAPTION_EXTENSIONS, "json", caption_key) if kind}
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in suffixes}
    return [image for image in images if image.with_suffix("") in texts]


def _without_captions(
    images: list[PurePath], tables: list[PurePath], beside: list[PurePath]
) -> list[PurePath]:
    """List the images in folders without texts that have no metadata file in or above them."""
    with_texts, with_tables = {image.parent for image in beside}, {t.parent for t in tables}
    return [
        image
        for image in images
        if image.parent not in with_texts and not with_tables & {*image.parents}
    ]


def _patterns_of_tables(tables: list[PurePath]) -> list[str]:
    """Return a glob if it matches the tables and no others, otherwise their paths."""
    names = {table.name for table in tables}
    if len(names) == 1 and all(len(table.parts) > 1 for table in tables):
        return [f"**/{names.pop()}"]
    return [glob.escape(str(table)) for table in tables]


def _has_name(image: PurePath) -> bool:
    """Return whether the name of an image, or of a folder above it, has words."""
    return any(map(caption_of_name, [image.stem, *image.parent.parts]))


def nothing_found(folder: str, files: list[PurePath]) -> str:
    """Describe a folder without captioned images, with the remedy."""
    images = [file for file in files if is_named_as_image(file)]
    if not files:
        advice = "check the name" if "://" in folder else "put images with captions into it"
        return f"the folder {folder} has no files; {advice}"
    if not images:
        found = f"{len(files):,} other files, such as" if len(files) > 1 else "only"
        return (
            f"the folder {folder} has no image, and no table or tar of images; it has {found} "
            f"{files[0]}: put the images beside their captions"
        )
    return (
        f"the folder {folder} has no captions: it has {counted(len(images), 'image')} with names "
        f"such as {images[0].name}, which are numbers or codes; {HOW_TO_CAPTION}"
    )
