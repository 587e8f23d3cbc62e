"""Captioned pictures in one JSON file: COCO captions, Karpathy's split of COCO, LLaVA."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.files import NamedPictureFiles
from tf_lightning.data.records import parse_json, read_bytes

KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
ROLES = {"human": "USER", "gpt": "ASSISTANT", "system": "SYSTEM"}


class CaptionJson(NamedPictureFiles):
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
