"""Choice of the source of captioned images, by the format of the files that a path names."""

import glob
from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.captions import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    CaptionFolders,
    CaptionJson,
    CaptionRows,
    CaptionTars,
    json_layout,
)
from tf_lightning.data.readers.chat import ChatFiles, is_conversation, is_message
from tf_lightning.data.readers.formats import file_format, format_by_name, is_ignored
from tf_lightning.data.readers.json_records import parse_record, read_records
from tf_lightning.data.readers.tables import column_names
from tf_lightning.errors import UserError

# Files that have the captions of a folder, in order of preference.
METADATA_FILES = "metadata.jsonl", "metadata.csv", "metadata.parquet"
CAPTION_FILES = *METADATA_FILES, "*.tar", "*.tar.gz", "*.tgz", "*.parquet"
IMAGES_BESIDE_TEXTS = "**/*"
# Files that have them if there is no text beside an image, and then files in its folders.
OTHER_CAPTION_FILES = (
    *("*.jsonl", "captions.txt", "*.csv", "*.tsv", "*.json"),
    *("*.jsonl.gz", "*.csv.gz", "*.json.gz"),
    *(f"**/{name}" for name in CAPTION_FILES),
)

CaptionSource = CaptionTars | CaptionRows | CaptionJson | CaptionFolders | ChatFiles


def caption_source(
    paths: str | list[str],
    *,
    val_paths: str | list[str] | None = None,
    images: str | None = None,
    caption_key: str | None = None,
    image_key: str | None = None,
    **options,
) -> CaptionSource:
    """Create the source for captioned images whose format is that of the first file.

    Args:
        paths: files, globs or folders to train on. For a folder, its CAPTION_FILES are read, or its
            images with a text file beside each.
        val_paths: files, globs or folders to validate on.
        images: folder that paths of images are relative to; tars contain their images.
        caption_key: key, column or extension of the captions; null: the known ones.
        image_key: key, column or extension of the images; null: the known ones.
        options: the other arguments of the source.

    Raises:
        UserError: a folder contains no captions.
    """
    paths, val_paths = _replace_folders(paths), val_paths and _replace_folders(val_paths)
    options |= {"val_paths": val_paths, "caption_key": caption_key}
    named = {"images": images, "image_key": image_key}
    match _caption_format(_first_file(paths)):
        case "image":
            return CaptionFolders(paths, **options)
        case "object":
            return CaptionJson(paths, **named, **options)
        case "rows":
            return CaptionRows(paths, **named, **options)
        case "chat":
            del options["caption_key"]
            return ChatFiles(paths, **named, **options)
        case _:
            return CaptionTars(paths, image_key=image_key, **options)


def _first_file(paths: str | list[str]) -> Path:
    """Return the first file, or its name if it does not exist, as where data is only encoded."""
    first = paths if isinstance(paths, str) else paths[0]
    names = sorted(glob.glob(str(Path(first).expanduser()), recursive=True))
    found = [Path(name) for name in names if Path(name).is_file() and not is_ignored(name)]
    if first.endswith(f"/{IMAGES_BESIDE_TEXTS}"):  # other files, such as a README.txt, say nothing
        images = (file for file in found if format_by_name(file) == "image")
        return next(images, next(iter(found), Path(first)))
    return next(iter(found), Path(first))


def _caption_format(file: Path) -> str:
    """Return "tar", "image", "rows", "chat" for conversations, or "object" for COCO's JSON."""
    kind = file_format(file) if file.is_file() else format_by_name(file)
    if kind in ("text", "json", "csv") and _has_image_beside(file):
        return "image"
    if kind == "parquet" and file.is_file() and "messages" in column_names(file):
        return "chat"
    if kind in ("text", "csv", "parquet"):
        return "rows"
    if kind != "json":
        return kind
    if not file.is_file():
        return "rows" if ".jsonl" in file.name else "object"
    if json_layout(file) != "rows":
        return "object"
    try:
        record = parse_record(next(read_records(file, is_message), None))
    except BadSample:
        return "rows" if ".jsonl" in file.name else "object"
    return "chat" if is_conversation(record) else "rows"


def _has_image_beside(file: Path) -> bool:
    return any(
        file.with_suffix(f".{name}").is_file()
        for kind in IMAGE_EXTENSIONS
        for name in (kind, kind.upper())
    )


def _texts_in(folder: Path) -> Iterator[Path]:
    """Find the files in a folder that may have the caption of an image beside them."""
    for kind in (*CAPTION_EXTENSIONS, "json"):
        yield from folder.rglob("*." + "".join(f"[{letter}{letter.upper()}]" for letter in kind))


def _replace_folders(paths: str | list[str]) -> str | list[str]:
    """Replace each folder by a glob of the files in it that have the captions."""
    if not isinstance(paths, str):
        return [_replace_folders(path) for path in paths]
    folder = Path(paths).expanduser()
    if not folder.is_dir():
        return paths
    escaped = glob.escape(str(folder))
    for pattern in (*CAPTION_FILES, IMAGES_BESIDE_TEXTS, *OTHER_CAPTION_FILES):
        if pattern == IMAGES_BESIDE_TEXTS:
            found = any(map(_has_image_beside, _texts_in(folder)))
        else:
            found = any(not is_ignored(str(file)) for file in folder.glob(pattern))
        if found:
            return f"{escaped}/{pattern}"
    raise UserError(
        f"the folder {paths} has no captions: it needs a metadata.jsonl with a line such as "
        '{"file_name": "cat.jpg", "text": "a cat"} for each image, a cat.txt beside each cat.jpg, '
        "or .tar or .parquet files"
    )
