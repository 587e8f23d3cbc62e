"""Report of the layouts that were recognized in a source of captioned images."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePath

from PIL import Image

from tf_lightning.data.documents import Skipped, Source
from tf_lightning.data.readers.caption_source import SeveralLayouts
from tf_lightning.data.readers.captions import CaptionFolders, CaptionJson, CaptionRows, CaptionTars
from tf_lightning.data.readers.files import SHARD_BYTES, FileSource
from tf_lightning.data.readers.layouts import is_named_as_image
from tf_lightning.data.readers.name_captions import NamedImages
from tf_lightning.progress import counted

EXAMPLES = 3  # captions that are shown of each layout
EXAMPLE_LENGTH = 70  # characters of them
TITLES = {
    CaptionTars: "tars with images and captions",
    CaptionRows: "tables with a row for each caption",
    CaptionJson: "JSON of COCO, Karpathy or LLaVA",
    CaptionFolders: "images with a text file beside each",
    NamedImages: "images whose file or folder names are the captions",
}


def report_source(name: str, source: Source) -> list[str]:
    """Describe the layouts that were recognized, with some captions; no lines for other sources.

    Args:
        name: name of the source.
        source: the source.
    """
    source = getattr(source, "unfiltered", source)
    layouts = source.sources if isinstance(source, SeveralLayouts) else [source]
    known = [layout for layout in layouts if type(layout) in TITLES]
    lines = [line for layout in known for line in _layout_lines(name, layout)]
    rest = _images_without_row(known)
    if rest:
        first, count = rest[0], counted(len(rest), "image")
        lines.append(f"{name}: {count} not named by the table and left out, such as {first}")
    return lines


def _layout_lines(name: str, layout: FileSource) -> Iterator[str]:
    files = layout.files("train")
    if isinstance(layout, CaptionFolders | NamedImages):
        files = [file for file in files if is_named_as_image(PurePath(str(file)))] or files
    shown = str(files[0]) if len(files) == 1 else f"{len(files):,} files, such as {files[0]}"
    yield f"{name}: {TITLES[type(layout)]}: {shown}"
    documents = (found for found in layout.documents("train") if not isinstance(found, Skipped))
    for document in islice(documents, EXAMPLES):
        texts = [part for part in document if isinstance(part, str)]
        images = [part for part in document if isinstance(part, Image.Image)]
        text = " ".join(" ".join(texts).split())
        text = text if len(text) <= EXAMPLE_LENGTH else f"{text[: EXAMPLE_LENGTH - 3]}..."
        yield f'  "{text}"{"".join(map(_file_name, images))}'


def _file_name(image: Image.Image) -> str:
    """Return where an image was read from, if that is a file of its own."""
    file = image.info.get("file")
    return f" is {file}" if isinstance(file, Path) else ""


def _images_without_row(layouts: list[FileSource]) -> list[Path]:
    """List the images in the folders of tables that no layout reads; [] for large tables."""
    tables = [
        (layout, file)
        for layout in layouts
        if isinstance(layout, CaptionRows) and not layout.images
        for file in layout.files("train")
        if isinstance(file, Path) and file.stat().st_size <= SHARD_BYTES
    ]
    paths = [image for layout, file in tables for image in layout.image_paths(file)]
    if not paths:  # there is no table, or it holds the images itself
        return []
    paths += [file for layout in layouts for file in layout.files("train")]
    read = {os.path.normpath(path) for path in paths if isinstance(path, Path)}
    folders = {file.parent for _, file in tables}
    found = {path for folder in folders for path in folder.rglob("*")}
    return [
        path
        for path in sorted(found)
        if is_named_as_image(path) and os.path.normpath(path) not in read
    ]
