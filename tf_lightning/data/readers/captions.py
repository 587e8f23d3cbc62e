"""Captioned pictures in WebDataset tars, as img2dataset writes them.

Pictures in folders, without words.

Captioned pictures in one JSON file: COCO captions, Karpathy's split of COCO, LLaVA.

Captioned pictures in tables: a row a picture, which is named or in the row itself.

metadata.jsonl|csv|parquet beside a folder of pictures (`file_name`, `text`), Show-o2's JSON lines
(`path`, `prompt`), JourneyDB's (`img_path`, `prompt`), the parquet files of the Hugging Face hub
(`image`, `text`), of img2dataset (`jpg`, `txt` or `caption`) and of BAGEL (`image`, `captions`).
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.readers.files import ImageFileSource, ImagePathSource
from tf_lightning.data.readers.formats import (
    by_extension,
    file_format,
    parse_json,
    parse_object,
    read_bytes,
    read_csv,
    read_lines,
    read_parquet,
    read_tar,
)
from tf_lightning.errors import UserError

KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
ROLES = {"human": "USER", "gpt": "ASSISTANT", "system": "SYSTEM"}


class CaptionJson(ImagePathSource):
    """COCO's captions_*.json, Karpathy's dataset_coco.json, or a LLaVA file of conversations.

    Each caption is a document with its picture; those of one picture are held out together.
    Karpathy's file says itself what is held out: training is "train" and "restval", validation is
    "val". A conversation is one document, its pictures where it says <image>.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names begin from, for COCO such as coco/val2014, for Karpathy the
            folder of val2014; None: that of the file itself.
    """

    def samples(self, file: Path) -> Iterator[tuple]:
        """As `FileSource.samples`; such a file can only be read whole."""
        content, folder = parse_json(read_bytes(file)), self.folder(file)
        try:
            if isinstance(content, list):
                yield from llava(content, folder)
            elif "annotations" in content:
                yield from coco(content, folder)
            else:
                yield from karpathy(content, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadSample("JSON of another layout than COCO, Karpathy or LLaVA") from error

    def parts(self, sample: list | BadSample) -> list[str | Path]:
        """Caption and picture, or a conversation."""
        if isinstance(sample, BadSample):
            raise sample
        return sample


def coco(content: dict[str, Any], folder: Path) -> Iterator[tuple[str, list | BadSample]]:
    """Each annotation with its picture: images[{id, file_name}], annotations[{image_id, ...}]."""
    files = {image["id"]: folder / image["file_name"] for image in content["images"]}
    for note in content["annotations"]:
        key = note["image_id"]
        yield str(key), _pair(note["caption"], files.get(key))


def karpathy(content: dict[str, Any], folder: Path) -> Iterator[tuple]:
    """Each sentence with its picture: images[{filepath, filename, split, sentences[{raw}]}]."""
    for image in content["images"]:
        file = folder / image.get("filepath", "") / image["filename"]
        for sentence in image["sentences"]:
            if image["split"] in KARPATHY:  # nobody asks for "test"
                yield image["filename"], _pair(sentence["raw"], file), KARPATHY[image["split"]]
            else:
                yield image["filename"], BadSample("picture of an unknown split")


def llava(content: list[Any], folder: Path) -> Iterator[tuple[str, list | BadSample]]:
    """Each conversation: {"image": file or files, "conversations": [{"from", "value"}, ...]}."""
    for number, record in enumerate(content):
        try:
            names = record.get("image") or []
            names = [names] if isinstance(names, str) else names
            files = [folder / name for name in names]
            yield str(record.get("id", number)), _talk(record["conversations"], files)
        except (KeyError, TypeError, AttributeError):
            yield str(number), BadSample("conversation of another layout than LLaVA's")


def _talk(turns: list[dict[str, str]], files: list[Path]) -> list | BadSample:
    """What is said, as LLaVA-1.5 writes it: USER: ... ASSISTANT: ...; a file for each <image>."""
    said = " ".join(f"{ROLES.get(turn['from'], turn['from'])}: {turn['value']}" for turn in turns)
    texts = re.split(r"<image>\n?", said)
    if len(texts) != len(files) + 1:
        return BadSample("conversation of more or fewer pictures than it marks")
    parts = [texts[0]]
    for file, text in zip(files, texts[1:], strict=True):
        parts += [file, text]
    return [part for part in parts if part]


def _pair(caption: Any, file: Path | None) -> list | BadSample:
    if file is None:
        return BadSample("caption without picture")
    if not isinstance(caption, str) or not caption.strip():
        return BadSample("picture without caption")
    return [caption.strip(), file]


PICTURES = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "img_path", "image_path")
CAPTIONS = ("text", "caption", "prompt", "txt", "captions")


class CaptionRows(ImagePathSource):
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
        match file_format(file):
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


TAR_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "image")
TAR_CAPTIONS = ("txt", "text", "caption")


class CaptionTars(ImageFileSource):
    """Tars of {key}.jpg|jpeg|png|webp|gif|image with {key}.txt|text|caption, or {key}.json.

    Of the JSON "caption" or "text" is read. Files of a key stand one after another.

    Args:
        paths: tars or globs to train on.
        val_paths: tars or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        """As `FileSource.samples`: the files of each key."""
        return read_tar(file)

    def parts(self, sample: list[tuple[str, bytes]]) -> list[str | bytes]:
        """Caption, picture."""
        files = by_extension(sample)
        picture = first(files, TAR_PICTURES)
        if picture is None:
            raise BadSample("caption without picture")
        return [_caption(files), picture]


def _caption(files: dict[str, bytes]) -> str:
    try:
        text = first(files, TAR_CAPTIONS)
        if text is None:
            return parse_caption(parse_json(files["json"]), ("caption", "text"))
        return parse_caption({"caption": text.decode()}, ("caption",))
    except (BadSample, UnicodeDecodeError, KeyError) as error:
        raise BadSample("picture without caption") from error


class ImageCaptionData(Mixture):
    """Captioned pictures alone, of one layout.

    Args:
        paths: WebDataset tars; .jsonl, .csv or .parquet as `CaptionRows` reads them; COCO's,
            Karpathy's or LLaVA's .json as `CaptionJson` does; or globs of one of these kinds.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names of pictures begin from; None: that of the file naming them.
        kwargs: as in Mixture.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
        images: str | None = None,
        **kwargs,
    ):
        files = (paths, val_paths, val_fraction, image_size)
        match file_format(Path(paths if isinstance(paths, str) else paths[0])):
            case ".json":
                source = CaptionJson(*files, images)
            case ".jsonl" | ".csv" | ".parquet":
                source = CaptionRows(*files, images)
            case _:
                source = CaptionTars(*files)
        super().__init__(sources={"captions": source}, weights=None, **kwargs)


class ImageFiles(ImageFileSource):
    """Documents [picture], one a file, such as 'photos/**/*.jpg'.

    Args:
        paths: picture files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[Path]]]:
        """As `FileSource.samples`: the file itself, keyed by its folder."""
        yield file.parent.name, [file]
