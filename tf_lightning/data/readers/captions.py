"""Images with captions, from tars, tables, JSON and text files; and images alone.

- `CaptionTars`: WebDataset tars such as those of img2dataset.
- `CaptionRows`: tables with one image a row: metadata.jsonl|csv|parquet beside a folder of images
  (`file_name`, `text`), the JSON lines of Show-o2 (`path`, `prompt`) and JourneyDB (`img_path`,
  `prompt`), and the parquet files of the Hugging Face hub (`image`, `text`), img2dataset (`jpg`,
  `txt` or `caption`) and BAGEL (`image`, `captions`).
- `CaptionJson`: one JSON file: COCO captions, Karpathy's split of COCO, LLaVA's conversations.
- `CaptionFolders`: image files with a text file of the same name beside each.
- `ImageFiles`: image files without captions.

If an image has several captions, each epoch draws one of them.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tf_lightning.data.documents import AnyText, BadSample, Split
from tf_lightning.data.images import is_image_file
from tf_lightning.data.readers.chat import (
    COLUMNS,
    IMAGES_KEYS,
    conversation,
    is_conversation,
    read_messages,
)
from tf_lightning.data.readers.formats import (
    BOM,
    decode_text,
    file_format,
    may_be_image,
    read_start,
    refuse,
)
from tf_lightning.data.readers.globs import names_folder
from tf_lightning.data.readers.image_files import (
    ContextImage,
    ImageFileSource,
    ImagePathSource,
    as_image_file,
)
from tf_lightning.data.readers.json_records import (
    json_items,
    parse_json,
    parse_object,
    parse_record,
    read_records,
)
from tf_lightning.data.readers.local_or_remote import (
    copies,
    file_versions,
    is_file,
    is_in_cache,
    local_path,
    names_remote,
    read_bytes,
)
from tf_lightning.data.readers.tables import (
    first_present,
    missing,
    read_csv,
    read_parquet,
)
from tf_lightning.data.readers.tars import by_extension, read_tar
from tf_lightning.remote.downloads import run_ahead
from tf_lightning.remote.urls import is_remote

Parts = list[str | bytes | Path | ContextImage]

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "gif", "image", "img", "jfif", "jpe", "bmp", "tif", "tiff",
    "avif", "jp2",
)  # fmt: skip
CAPTION_EXTENSIONS = ("txt", "text", "caption", "captions")
IMAGE_KEYS = (
    "image", "jpg", "jpeg", "png", "webp", "file_name", "path", "img_path", "image_path",
    "filepath", "filename", "file", "image_file", "image_name", "img", "images",
)  # fmt: skip
CAPTION_KEYS = (
    "text", "caption", "prompt", "txt", "captions", "title", "description", "sentences", "raw",
    "comment",
)  # fmt: skip


def parse_caption(row: Any, caption_key: str | None = None) -> str:
    """Return the caption of a row, or all of several as `AnyText`.

    Args:
        row: a dict with a caption, or the caption itself: a text, a list of texts, BAGEL's dict
            {name of the captioner: caption} or its JSON.
        caption_key: key of the caption; null: the first of CAPTION_KEYS.

    Raises:
        BadSample: the row has no caption.
    """
    keys = (caption_key,) if caption_key else CAPTION_KEYS
    caption = row
    if isinstance(row, dict):
        caption = first_present(row, keys)
        if caption is None and not any(key in row for key in keys):
            raise BadSample(missing("caption", row, keys, "caption_key"))
        if isinstance(caption, str) and caption == row.get("captions") and caption[:1] in "{[":
            with suppress(BadSample):  # a caption may begin with a bracket
                caption = parse_json(caption)
    texts = list(_texts(caption))
    if not texts:
        raise BadSample("image without caption")
    return AnyText(texts)


def _texts(caption: Any) -> Iterator[str]:
    """Yield the non-empty texts of a caption, which may be nested in lists and dicts."""
    if isinstance(caption, str):
        text = caption.strip().removeprefix("\ufeff")
        if text:
            yield text
    elif isinstance(caption, list):
        for one in caption:
            text = first_present(one, CAPTION_KEYS) if isinstance(one, dict) else one
            yield from _texts(text)
    elif isinstance(caption, dict):
        for value in caption.values():
            yield from _texts(value)


# Tars


@dataclass(eq=False)
class CaptionTars(ImageFileSource):
    """Captioned images from WebDataset tars.

    A sample is {key}.jpg|jpeg|png|webp|gif|... with {key}.txt|text|caption, with several such as
    {key}.caption1.txt, or with a {key}.json that has one of CAPTION_KEYS, a list of captions, or a
    conversation as in LLaVA. Images and texts may lie in two folders, such as images/ and
    captions/. Upper case is allowed, and the order of the files does not matter.

    Args:
        paths: tars or globs of them to train on.
        caption_key: extension of the caption's file, or key of the caption in the .json; null: the
            first of CAPTION_EXTENSIONS, then of CAPTION_KEYS.
        image_key: extension of the image's file; null: the first of IMAGE_EXTENSIONS.
    """

    caption_key: str | None = None
    image_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("caption_key", "image_key")

    def samples(self, file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]] | BadSample]]:
        """Yield the files of each key; see `FileSource.samples`."""
        if file_format(file) != "tar":
            raise refuse(file, "CaptionTars reads tars; ImageCaptionData also reads other files")
        return read_tar(file)

    def parts(self, sample: list[tuple[str, bytes]]) -> list[str | bytes]:
        """List caption and image; see `ImageFileSource.parts`."""
        files = by_extension(sample)
        extensions = (self.image_key,) if self.image_key else IMAGE_EXTENSIONS
        image = first_present(files, extensions)
        if image is None and not self.image_key:
            image = next((x for x in files.values() if is_image_file(x[:64])), None)
        if not self.caption_key and "json" in files and not files.keys() & CAPTION_EXTENSIONS:
            record = parse_json(files["json"])
            if is_conversation(record):
                return tar_conversation(record, image)
        if image is None:
            raise BadSample(missing("image", files, extensions[:5], "image_key"))
        return [tar_caption(files, self.caption_key), image]


def tar_caption(files: dict[str, bytes], caption_key: str | None = None) -> str:
    """Return the caption among the files of a sample, by extension.

    Raises:
        BadSample: there is none.
    """
    extensions = (caption_key,) if caption_key else CAPTION_EXTENSIONS
    for extension in extensions:
        texts = [decode_text(content) for name, content in files.items()
                 if name == extension or name.endswith(f".{extension}")]  # fmt: skip
        if texts:
            return parse_caption(texts)
    if "json" not in files:
        raise BadSample(missing("caption", files, (*extensions, "json"), "caption_key"))
    return parse_caption(parse_json(files["json"]), caption_key)


def tar_conversation(record: Any, image: bytes | None) -> Parts:
    """Read a conversation whose image is another file of its sample.

    Raises:
        BadSample: it is not a conversation, or it names an image outside of the tar.
    """
    record = record if isinstance(record, dict) else {"messages": record}
    record = {key: value for key, value in record.items() if key not in IMAGES_KEYS}
    parts = conversation(read_messages(record | ({"image": image} if image else {}), Path()))
    if any(isinstance(getattr(part, "file", part), Path) for part in parts):
        raise BadSample("conversation in a tar that names an image outside of it")
    return parts


# Tables


@dataclass(eq=False)
class CaptionRows(ImagePathSource):
    """Captioned images from JSON lines, a JSON array, CSV or parquet, one a row.

    The image is the first present column of IMAGE_KEYS: a path, or in parquet the content of the
    file. The caption is the first present column of CAPTION_KEYS. Rows that are conversations are
    read as `ChatFiles` reads them.

    Args:
        caption_key: column of the captions; null: the first of CAPTION_KEYS.
        image_key: column of the images; null: the first of IMAGE_KEYS.
    """

    caption_key: str | None = None
    image_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("caption_key", "image_key")

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each row; see `FileSource.samples`."""
        match file_format(file):
            case "json":
                rows = read_records(file)
            case "csv" | "text":  # captions.txt of Flickr8k is a table
                rows = read_csv(file)
            case "parquet":
                names = (self.image_key, self.caption_key, *IMAGE_KEYS, *CAPTION_KEYS, *COLUMNS)
                columns = list(dict.fromkeys(name for name in names if name))
                rows = read_parquet(file, columns, "image_key and caption_key")
            case _:
                raise refuse(file, "tables are read from .jsonl, .json, .csv and .parquet files")
        names = (self.image_key,) if self.image_key else IMAGE_KEYS
        for number, row in enumerate(rows):
            with suppress(BadSample):  # which `parts` raises again
                row = parse_record(row)
            image = first_present(row, names) if isinstance(row, dict) else None
            # Rows of one image are held out together: Flickr8k's captions.txt has five.
            key = image if isinstance(image, str) else number
            yield str(key), (self.image_folder(file), row)

    def parts(self, sample: tuple[Path, Any]) -> Parts:
        """List caption and image, or a conversation; see `ImageFileSource.parts`."""
        folder, row = sample
        return row_parts(parse_record(row), folder, self.image_key, self.caption_key)


def row_parts(row: Any, folder: Path, image_key: str | None, caption_key: str | None) -> Parts:
    """Return caption and image of a row, or its conversation.

    Raises:
        BadSample: the row has no image or no caption, or is not an object.
    """
    if is_conversation(row):
        return conversation(read_messages(row, folder))
    row = parse_object(row)
    keys = (image_key,) if image_key else IMAGE_KEYS
    image = as_image_file(first_present(row, keys), folder)
    if image is None and not any(key in row for key in keys):
        raise BadSample(missing("image", row, keys, "image_key"))
    if image is None:
        raise BadSample("caption without image")
    return [parse_caption(row, caption_key), image]


# JSON

OTHER_LAYOUT = "JSON that is not in the layout of COCO, Karpathy or LLaVA"
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(eq=False)
class CaptionJson(ImagePathSource):
    """Captioned images from COCO's captions_*.json, Karpathy's dataset_coco.json, or LLaVA's JSON.

    Each image is a document with one of its captions, drawn in each epoch. Karpathy's file itself
    names the splits: "train" and "restval" are trained on, "val" is validated on. Conversations, as
    in LLaVA's files, are read as `ChatFiles` reads them, with an image for each <image> marker.

    Args:
        images: folder that paths of images are relative to, such as coco/val2014 for COCO, or the
            folder that contains val2014 for Karpathy; null: the folder of the JSON file.
        caption_key: key of a caption; null: "caption" for COCO, "raw" for Karpathy.
        image_key: key of an image's file; null: "file_name" for COCO, "filename" for Karpathy.
    """

    caption_key: str | None = None
    image_key: str | None = None

    VERSION: ClassVar[int] = 2
    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("caption_key", "image_key")

    def samples(self, file: Path) -> Iterator[tuple]:
        """Yield each image with its captions, or each conversation; see `FileSource.samples`."""
        if file_format(file) != "json":
            raise refuse(file, "COCO's and LLaVA's captions are JSON; use ImageCaptionData")
        folder = self.image_folder(file)
        match json_layout(file):
            case "coco":
                yield from coco(file, folder, self.image_key, self.caption_key)
            case "karpathy":
                yield from karpathy(file, folder, self.image_key, self.caption_key)
            case _:
                for number, record in enumerate(read_records(file)):
                    yield str(number), (folder, record)

    def parts(self, sample: tuple[Path, Any]) -> Parts:
        """List texts and images; see `ImageFileSource.parts`."""
        folder, row = sample
        if isinstance(row, CocoRow):
            return row_parts(row, folder, "image", "caption")
        return row_parts(parse_record(row), folder, self.image_key, self.caption_key)


class CocoRow(dict):
    """`image` and `caption` of an image of COCO or Karpathy, under whatever keys the file has."""


def json_layout(file: Path) -> str:
    """Return "coco" or "karpathy" for a JSON object of either, "rows" for any other file."""
    if read_start(file).removeprefix(BOM).lstrip()[:1] != b"{":
        return "rows"
    keys = set()
    try:
        for key, item in json_items(file):
            keys.add(key)
            if key == "images" and isinstance(item, dict) and "sentences" in item:
                return "karpathy"
            if key in ("images", "annotations") and isinstance(item, dict) and "id" in item:
                return "coco"
    except BadSample:  # JSON lines, or damage that the reader will report
        pass
    return "coco" if {"images", "annotations"} & keys and not keys & {"messages"} else "rows"


def coco(
    file: Path, folder: Path, image_key: str | None = None, caption_key: str | None = None
) -> Iterator[tuple[str, tuple[Path, dict] | BadSample]]:
    """Yield each image with all its captions.

    Layout: images[{id, file_name}], annotations[{image_id, caption}].
    """
    files: dict[Any, Any] = {}
    twice: set[Any] = set()
    captions: dict[Any, list[str]] = {}
    found, damage = None, None
    try:
        for key, item in json_items(file):
            if key == "images" and item != []:  # json_items yields [] where a list begins
                image_id = str(item["id"])
                if image_id in files and files[image_id] != item.get(image_key or "file_name"):
                    twice.add(image_id)
                files[image_id] = item.get(image_key or "file_name")
            elif key == "annotations" and item != []:
                texts = captions.setdefault(str(item["image_id"]), [])
                texts.append(item.get(caption_key or "caption"))
                found = found or item.keys()
    except BadSample as error:
        damage = error
    except (KeyError, TypeError, AttributeError) as error:
        raise BadSample(OTHER_LAYOUT) from error
    if not files and not damage:
        raise BadSample(OTHER_LAYOUT)
    for image_id, texts in captions.items():
        if image_id in twice:
            yield image_id, BadSample("id of two images, so it is unknown which one is right")
        elif texts.count(None) == len(texts):
            wanted = [caption_key or "caption"]
            yield image_id, BadSample(missing("caption", found, wanted, "caption_key"))
        else:
            yield image_id, (folder, CocoRow(image=files.get(image_id), caption=texts))
    if damage:
        raise damage


def karpathy(
    file: Path, folder: Path, image_key: str | None = None, caption_key: str | None = None
) -> Iterator[tuple]:
    """Yield each image with its sentences.

    Layout: images[{filepath, filename, split, sentences[{raw}]}].
    """
    for key, image in json_items(file):
        if key != "images" or not isinstance(image, dict):
            continue
        name, sentences = image.get(image_key or "filename"), image.get("sentences")
        if not isinstance(name, str) or not isinstance(sentences, list):
            yield str(name), BadSample("image without filename or sentences")
        elif image.get("split") not in KARPATHY_SPLITS:
            yield name, BadSample("image of an unknown split")
        else:  # no reader asks for "test"
            texts = [s.get(caption_key or "raw") for s in sentences if isinstance(s, dict)]
            row = CocoRow(image=f"{image.get('filepath') or '.'}/{name}", caption=texts)
            yield name, (folder, row), KARPATHY_SPLITS[image["split"]]


# Text files


@dataclass(eq=False)
class CaptionFolders(ImageFileSource):
    """Captioned images: image files, with their captions in text files of the same names.

    The caption of a/b.jpg is a/b.txt, a/b.caption or a/b.json, as img2dataset's output "files" has
    them.

    Args:
        paths: image files or globs to train on, such as 'photos/**/*.jpg'; other files are ignored.
        caption_key: suffix of the captions' files without dot, or key of the caption in the .json;
            null: the first of CAPTION_EXTENSIONS, then of CAPTION_KEYS.
    """

    caption_key: str | None = None

    def fingerprint(self, split: Split) -> str:
        """Include the sizes and times of the text files; see `Source.fingerprint`."""
        images = [local_path(file) for file in self.files(split)]
        # Remote folders are listed once, instead of asking for each text file.
        remote = (image for image in images if is_in_cache(image))
        self.snapshot.stat(path for image in remote for _, path in self._beside(image))
        texts = [path for image in images for path in self.texts_beside(image).values()]
        digest = hashlib.sha256()
        for line in file_versions(texts, self.snapshot):
            digest.update(f"{line}\n".encode())
        return f"{super().fingerprint(split)} {digest.hexdigest()}"

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """Yield the file itself if it is an image; see `FileSource.samples`."""
        if may_be_image(file):
            yield file.stem, file

    def parts(self, sample: Path) -> list[str | Path]:
        """List caption and image; see `ImageFileSource.parts`."""
        texts = self.texts_beside(sample).items()
        files = {kind: read_bytes(file, self.snapshot) for kind, file in texts}
        return [tar_caption(files, self.caption_key), sample]

    def _with_copies(self, samples: Iterator[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
        """See `FileSource`. Texts are copied ahead."""
        if not names_remote(self.paths) and not names_remote(self.val_paths):
            return samples
        return run_ahead(samples, lambda sample: copies(self._texts_of(sample[1]), self.snapshot))

    def _texts_of(self, sample: Path | BadSample) -> Iterable[Path]:
        return self.texts_beside(sample).values() if isinstance(sample, Path) else ()

    def texts_beside(self, image: Path) -> dict[str, Path]:
        """Find the text files beside an image, by suffix."""
        return {kind: file for kind, file in self._beside(image) if is_file(file, self.snapshot)}

    def _beside(self, image: Path) -> list[tuple[str, Path]]:
        """List the suffixes that a text file may have, each with the path of the file."""
        wanted = (*CAPTION_EXTENSIONS, "json", *([self.caption_key] if self.caption_key else []))
        names = ((kind, name) for kind in wanted for name in (kind.upper(), kind))
        return sorted({(kind, image.with_suffix(f".{name}")) for kind, name in names})


# Images alone


class ImageFiles(ImageFileSource):
    """Documents [image] without text, one a file.

    Args:
        paths: image files, globs or folders to train on, such as 'photos/**/*.jpg'. Of a folder,
            the images in it and in the folders inside are read.
    """

    def __post_init__(self) -> None:
        """Check the arguments, and replace each folder by a glob."""
        super().__post_init__()
        self.paths = _in_folders(self.paths)
        self.val_paths = self.val_paths and _in_folders(self.val_paths)

    def samples(self, file: Path) -> Iterator[tuple[str, list[Path]]]:
        """Yield the file itself under the name of its folder; see `FileSource.samples`."""
        if may_be_image(file):
            yield file.parent.name, [file]


def _in_folders(paths: str | list[str]) -> str | list[str]:
    if not isinstance(paths, str):
        return [_in_folders(path) for path in paths]
    if not names_folder(paths):
        return paths
    folder = paths.rstrip("/") if is_remote(paths) else glob.escape(os.path.expanduser(paths))
    return f"{folder}/**/*"
