"""Captioned pictures in tables: a row a picture, which is named or in the row itself.

metadata.jsonl|csv|parquet beside a folder of pictures (`file_name`, `text`), Show-o2's JSON lines
(`path`, `prompt`), JourneyDB's (`img_path`, `prompt`), the parquet files of the Hugging Face hub
(`image`, `text`), of img2dataset (`jpg`, `txt` or `caption`) and of BAGEL (`image`, `captions`).
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.files import NamedPictureFiles
from tf_lightning.data.records import kind, parse_object, read_csv, read_lines, read_parquet
from tf_lightning.errors import UserError

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "img_path", "image_path")
CAPTIONS = ("text", "caption", "prompt", "txt", "captions")


class CaptionRows(NamedPictureFiles):
    """A row a picture: .jsonl (also .gz, .zst), .csv or .parquet.

    The picture is the first there is of `image`, `jpg`, `jpeg`, `png`, `webp`, `file_name`,
    `path`, `img_path`, `image_path`: a name, or in parquet its bytes. Its caption is the first of
    `text`, `caption`, `prompt`, `txt`, or one of `captions`, which is always the same one.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names begin from; None: that of the file itself.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """As `FileSource.samples`: the pictures' folder with each row."""
        match kind(file):
            case ".jsonl":
                rows = read_lines(file)
            case ".csv":
                rows = read_csv(file)
            case ".parquet":
                rows = read_parquet(file, PICTURES + CAPTIONS)
            case _:
                raise UserError(f"{file} is neither .jsonl, .csv nor .parquet; name other files")
        for number, row in enumerate(rows):
            yield str(number), (self.folder(file), row)

    def parts(self, sample: tuple[Path, Any]) -> list[str | bytes | Path]:
        """Caption, picture."""
        folder, row = sample
        row = parse_object(row) if isinstance(row, bytes) else row
        picture = as_picture(first(row, PICTURES), folder)
        if picture is None:
            raise BadSample("caption without picture")
        return [parse_caption(row, CAPTIONS), picture]


def first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these entries that there is, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def as_picture(value: Any, folder: Path) -> bytes | Path | None:
    """A picture's file: from a name, from bytes, or from the hub's {"bytes": ..., "path": ...}."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return folder / value
    return value if isinstance(value, bytes) else None


def parse_caption(row: Any, names: tuple[str, ...]) -> str:
    """The caption of a row; BadSample where there is none."""
    caption = first(row, names) if isinstance(row, dict) else None
    if isinstance(caption, str) and caption == row.get("captions"):
        caption = parse_object(caption)  # BAGEL: names of captioners, their captions
    if isinstance(caption, dict):
        caption = list(caption.values())
    if isinstance(caption, list) and caption:
        caption = caption[zlib.crc32(repr(caption).encode()) % len(caption)]
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("picture without caption")
    return caption.strip()
