"""Images with captions, from WebDataset tars, tables and JSON; and images alone.

- `CaptionTars`: WebDataset tars such as those of img2dataset.
- `CaptionRows`: tables with one image a row: metadata.jsonl|csv|parquet beside a folder of images
  (`file_name`, `text`), the JSON lines of Show-o2 (`path`, `prompt`) and JourneyDB (`img_path`,
  `prompt`), and the parquet files of the Hugging Face hub (`image`, `text`), img2dataset (`jpg`,
  `txt` or `caption`) and BAGEL (`image`, `captions`).
- `CaptionJson`: one JSON file: COCO captions, Karpathy's split of COCO, LLaVA's conversations.
- `ImageFiles`: image files without captions.
"""

import glob
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.files import ImageFileSource, ImagePathSource, as_image_file
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

# Tars

TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "image")
TAR_CAPTIONS = ("txt", "text", "caption")


class CaptionTars(ImageFileSource):
    """Captioned images from WebDataset tars.

    A sample is {key}.jpg|jpeg|png|webp|gif|image with {key}.txt|text|caption, or with a {key}.json
    that has "caption" or "text". The files of a key are next to each other.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        """Yield the files of each key; see `FileSource.samples`."""
        return read_tar(file)

    def parts(self, sample: list[tuple[str, bytes]]) -> list[str | bytes]:
        """List caption and image; see `ImageFileSource.parts`."""
        files = by_extension(sample)
        image = first_present(files, TAR_IMAGES)
        if image is None:
            raise BadSample("caption without image")
        return [_tar_caption(files), image]


def _tar_caption(files: dict[str, bytes]) -> str:
    try:
        text = first_present(files, TAR_CAPTIONS)
        if text is None:
            return parse_caption(parse_json(files["json"]), ("caption", "text"))
        return parse_caption({"caption": text.decode()}, ("caption",))
    except (BadSample, UnicodeDecodeError, KeyError) as error:
        raise BadSample("image without caption") from error


# Tables

ROW_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "img_path", "image_path")
ROW_CAPTIONS = ("text", "caption", "prompt", "txt", "captions")


class CaptionRows(ImagePathSource):
    """Captioned images from .jsonl (also .gz, .zst), .csv or .parquet, one a row.

    The image is the first present column of `image`, `jpg`, `jpeg`, `png`, `webp`, `file_name`,
    `path`, `img_path`, `image_path`: a path, or in parquet the content of the file. The caption is
    the first present column of `text`, `caption`, `prompt`, `txt`, or one of `captions`, chosen by
    a hash so that it is always the same one.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each row; see `FileSource.samples`."""
        match file_format(file):
            case ".jsonl":
                rows = read_lines(file)
            case ".csv":
                rows = read_csv(file)
            case ".parquet":
                rows = read_parquet(file, ROW_IMAGES + ROW_CAPTIONS)
            case _:
                raise UserError(f"{file} is neither .jsonl, .csv nor .parquet; name other files")
        for number, row in enumerate(rows):
            yield str(number), (self.image_folder(file), row)

    def parts(self, sample: tuple[Path, Any]) -> list[str | bytes | Path]:
        """List caption and image; see `ImageFileSource.parts`."""
        folder, row = sample
        row = parse_object(row) if isinstance(row, bytes) else row
        image = as_image_file(first_present(row, ROW_IMAGES), folder)
        if image is None:
            raise BadSample("caption without image")
        return [parse_caption(row, ROW_CAPTIONS), image]


def first_present(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value of the first name that a row has, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def parse_caption(row: Any, names: tuple[str, ...]) -> str:
    """Return the caption of a row; one of several is chosen by a hash.

    Raises:
        BadSample: the row has no caption.
    """
    caption = first_present(row, names) if isinstance(row, dict) else None
    if isinstance(caption, str) and caption == row.get("captions"):
        caption = parse_object(caption)  # BAGEL: {name of the captioner: caption}
    if isinstance(caption, dict):
        caption = list(caption.values())
    if isinstance(caption, list) and caption:
        caption = caption[zlib.crc32(repr(caption).encode()) % len(caption)]
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("image without caption")
    return caption.strip()


# JSON

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
LLAVA_ROLES = {"human": "USER", "gpt": "ASSISTANT", "system": "SYSTEM"}


class CaptionJson(ImagePathSource):
    """Captioned images from COCO's captions_*.json, Karpathy's dataset_coco.json, or LLaVA's JSON.

    Each caption is a document with its image, and the captions of an image are held out together.
    Karpathy's file itself names the splits: "train" and "restval" are trained on, "val" is
    validated on. A conversation of LLaVA is one document, with an image for each <image> marker.

    Args:
        images: folder that paths of images are relative to, such as coco/val2014 for COCO, or the
            folder that contains val2014 for Karpathy; null: the folder of the JSON file.
    """

    def samples(self, file: Path) -> Iterator[tuple]:
        """Yield each caption with its image, or each conversation; see `FileSource.samples`."""
        content, folder = parse_json(read_bytes(file)), self.image_folder(file)
        try:
            if isinstance(content, list):
                yield from llava(content, folder)
            elif "annotations" in content:
                yield from coco(content, folder)
            else:
                yield from karpathy(content, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadSample("JSON that is not in the layout of COCO, Karpathy or LLaVA") from error

    def parts(self, sample: list | BadSample) -> list[str | Path]:
        """List texts and images; see `ImageFileSource.parts`."""
        if isinstance(sample, BadSample):
            raise sample
        return sample


def coco(content: dict[str, Any], folder: Path) -> Iterator[tuple[str, list | BadSample]]:
    """Yield each annotation. Layout: images[{id, file_name}], annotations[{image_id, caption}]."""
    files = {image["id"]: folder / image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        key = annotation["image_id"]
        yield str(key), _pair(annotation["caption"], files.get(key))


def karpathy(content: dict[str, Any], folder: Path) -> Iterator[tuple]:
    """Yield each sentence. Layout: images[{filepath, filename, split, sentences[{raw}]}]."""
    for image in content["images"]:
        file = folder / image.get("filepath", "") / image["filename"]
        for sentence in image["sentences"]:
            if image["split"] in KARPATHY_SPLITS:  # no reader asks for "test"
                split = KARPATHY_SPLITS[image["split"]]
                yield image["filename"], _pair(sentence["raw"], file), split
            else:
                yield image["filename"], BadSample("image of an unknown split")


def llava(content: list[Any], folder: Path) -> Iterator[tuple[str, list | BadSample]]:
    """Yield each conversation.

    Layout: a list of {"image": path or paths, "conversations": [{from, value}]}.
    """
    for number, record in enumerate(content):
        try:
            names = record.get("image") or []
            names = [names] if isinstance(names, str) else names
            files = [folder / name for name in names]
            yield str(record.get("id", number)), _conversation(record["conversations"], files)
        except (KeyError, TypeError, AttributeError):
            yield str(number), BadSample("conversation that is not in LLaVA's layout")


def _conversation(turns: list[dict[str, str]], files: list[Path]) -> list | BadSample:
    """Write turns as LLaVA-1.5 does, "USER: ... ASSISTANT: ...", with a file for each <image>."""
    dialogue = " ".join(
        f"{LLAVA_ROLES.get(turn['from'], turn['from'])}: {turn['value']}" for turn in turns
    )
    texts = re.split(r"<image>\n?", dialogue)
    if len(texts) != len(files) + 1:
        return BadSample("conversation with a wrong number of <image> markers")
    parts = [texts[0]]
    for file, text in zip(files, texts[1:], strict=True):
        parts += [file, text]
    return [part for part in parts if part]


def _pair(caption: Any, file: Path | None) -> list | BadSample:
    if file is None:
        return BadSample("caption without image")
    if not isinstance(caption, str) or not caption.strip():
        return BadSample("image without caption")
    return [caption.strip(), file]


# Any of the above

# Files that have the captions of a folder, in order of preference.
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "*.tar", "*.parquet")


def caption_source(
    paths: str | list[str],
    *,
    val_paths: str | list[str] | None = None,
    images: str | None = None,
    **options,
) -> CaptionTars | CaptionRows | CaptionJson:
    """Create the source for captioned images whose format is that of the first path.

    Args:
        paths: files, globs or folders to train on. For a folder, its CAPTION_FILES are read.
        val_paths: files, globs or folders to validate on.
        images: folder that paths of images are relative to; tars contain their images.
        options: the other arguments of the source.

    Raises:
        UserError: a folder contains none of CAPTION_FILES.
    """
    paths, val_paths = _replace_folders(paths), val_paths and _replace_folders(val_paths)
    options |= {"val_paths": val_paths}
    match file_format(Path(paths if isinstance(paths, str) else paths[0])):
        case ".json":
            return CaptionJson(paths, images=images, **options)
        case ".jsonl" | ".csv" | ".parquet":
            return CaptionRows(paths, images=images, **options)
        case _:
            return CaptionTars(paths, **options)


def _replace_folders(paths: str | list[str]) -> str | list[str]:
    """Replace each folder by a glob of the files in it that have the captions."""
    if not isinstance(paths, str):
        return [_replace_folders(path) for path in paths]
    folder = Path(paths).expanduser()
    if not folder.is_dir():
        return paths
    for pattern in CAPTION_FILES:
        if any(folder.glob(pattern)):
            return f"{glob.escape(str(folder))}/{pattern}"
    raise UserError(
        f"the folder {paths} has no captions: it needs a metadata.jsonl with a line such as "
        '{"file_name": "cat.jpg", "text": "a cat"} for each image, or .tar or .parquet files'
    )


# Images alone


class ImageFiles(ImageFileSource):
    """Documents [image] without text, one a file.

    Args:
        paths: image files or globs to train on, such as 'photos/**/*.jpg'.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[Path]]]:
        """Yield the file itself under the name of its folder; see `FileSource.samples`."""
        yield file.parent.name, [file]
