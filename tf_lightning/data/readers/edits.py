"""Image edits (image, instruction, edited image): MagicBrush, OmniGen, OmniGen2 and BAGEL."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tf_lightning.data.documents import AnyText, BadSample
from tf_lightning.data.readers.formats import file_format, refuse
from tf_lightning.data.readers.image_files import ImagePathSource, as_image_file
from tf_lightning.data.readers.json_records import parse_object, parse_record, read_records
from tf_lightning.data.readers.tables import first_present, missing, read_parquet

SOURCE_KEYS = (
    "source_img", "source_image", "src_img", "input_image", "original_image", "input", "source",
)  # fmt: skip
INSTRUCTION_KEYS = (
    "instruction", "edit_prompt", "edited_prompt_list", "instruction_list", "edit", "prompt",
)  # fmt: skip
TARGET_KEYS = (
    "target_img", "target_image", "edited_img", "edited_image", "output_image", "output", "target",
)  # fmt: skip
OMNIGEN = ("input_images", "output_images")
BAGEL = ("image_list", "instruction_list")
PLACEHOLDER = re.compile(r"\s*(?:<img>)?<\|image_(\d{1,4})\|>(?:</img>)?\s*")  # OmniGen

Parts = list[str | bytes | Path | None]


@dataclass(eq=False)
class EditFiles(ImagePathSource):
    """Image edits: documents [image, instruction, image], or longer documents: chains of edits.

    - MagicBrush's folder: `edit_turns.json`, a list of {"input": "7-input.png", "output":
      "7-output1.png", "instruction": "..."}, beside `images/7/`.
    - MagicBrush's parquet files: img_id, source_img, instruction and target_img, and other rows or
      JSON records with one of SOURCE_KEYS, INSTRUCTION_KEYS and TARGET_KEYS. Edits of the same
      img_id are held out together.
    - BAGEL's parquet files: image_list, and instruction_list with several wordings for each step.
    - OmniGen's .jsonl: instruction, input_images, and output_image or output_images. <|image_1|> in
      an instruction marks the place of the first input image.

    JSON may be lines or one array, and compressed. If an instruction has several wordings, each
    epoch draws one.

    Args:
        paths: JSON or parquet files to train on, or globs of them.
        images: folder that paths of images in JSON are relative to; null: the folder of the file.
        source_key: key or column of the image to edit; null: the first of SOURCE_KEYS.
        instruction_key: key or column of the instruction; null: the first of INSTRUCTION_KEYS.
        target_key: key or column of the edited image; null: the first of TARGET_KEYS.
    """

    source_key: str | None = None
    instruction_key: str | None = None
    target_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("source_key", "instruction_key", "target_key")

    @property
    def _keys(self) -> list[tuple[str, ...]]:
        known = SOURCE_KEYS, INSTRUCTION_KEYS, TARGET_KEYS
        given = self.source_key, self.instruction_key, self.target_key
        return [(key,) if key else keys for key, keys in zip(given, known, strict=True)]

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each record; see `FileSource.samples`."""
        match file_format(file):
            case "parquet":
                columns = ("img_id", *BAGEL, *OMNIGEN, *(k for keys in self._keys for k in keys))
                option = "source_key, instruction_key and target_key"
                records = read_parquet(file, dict.fromkeys(columns), option)
            case "json":
                records = read_records(file)
            case _:
                raise refuse(file, "edits are read from .json, .jsonl and .parquet files")
        in_turns = file.name == "edit_turns.json"
        for number, record in enumerate(records):
            if in_turns:
                key, folder = turn_folder(record, file)
            else:
                with suppress(BadSample):  # which `parts` raises again
                    record = parse_record(record)
                key = record.get("img_id") if isinstance(record, dict) else None
                folder = self.image_folder(file)
            yield str(number if key is None else key), (folder, record)

    def parts(self, sample: tuple[Path, Any]) -> list[str | bytes | Path]:
        """List images and instructions in order; see `ImageFileSource.parts`."""
        folder, record = sample
        row = parse_record(record)
        if not isinstance(row, dict):
            raise BadSample("edit without instruction")
        if "image_list" in row:
            parts = bagel(row, folder)
        elif any(key in row for key in OMNIGEN):
            parts = omnigen(row, folder, self._keys)
        else:
            parts = pair(row, folder, self._keys)
        words = [part for part in parts if isinstance(part, str) and part.strip()]
        if not words or any(part is None for part in parts[1::2]):
            raise BadSample("edit without instruction")
        if any(not part for part in parts):
            raise BadSample("edit without image")
        return parts


def turn_folder(record: Any, file: Path) -> tuple[str, Path]:
    """Return the key of a turn of MagicBrush's `edit_turns.json`, and the folder of its images."""
    record = parse_object(record) if isinstance(record, bytes) else record
    name = record.get("input") if isinstance(record, dict) else None
    key = str(name).split("-")[0]
    return key, file.parent / "images" / key


def pair(row: dict[str, Any], folder: Path, keys: list[tuple[str, ...]]) -> Parts:
    """Parse one edit: an image, an instruction and the edited image."""
    present = {key.lower() for key in row} | set(row)
    if not present & set(keys[1]):
        raise BadSample(missing("instruction", row, keys[1], "instruction_key"))
    if not present & {*keys[0], *keys[2]}:
        raise BadSample(missing("image", row, keys[0] + keys[2], "source_key and target_key"))
    before, instruction, after = (first_present(row, names) for names in keys)
    return [as_image_file(before, folder), wording(instruction), as_image_file(after, folder)]


def wording(instruction: Any) -> str | None:
    """Return an instruction, or all of its wordings as `AnyText`; None if there is none."""
    texts = instruction if isinstance(instruction, list) else [instruction]
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return AnyText(texts) if texts else None


def bagel(row: dict[str, Any], folder: Path) -> Parts:
    """Parse a chain of edits: n images, and n - 1 instructions with lists of wordings."""
    images, steps = (row.get(name) for name in BAGEL)
    if not isinstance(images, list) or not isinstance(steps, list):
        raise BadSample("edit whose image_list or instruction_list is not a list")
    parts: Parts = [None] * (len(images) + len(steps))
    if len(images) == len(steps) + 1:
        parts[::2] = [as_image_file(image, folder) for image in images]
        parts[1::2] = [wording(step) for step in steps]
    return parts


def omnigen(row: dict[str, Any], folder: Path, keys: list[tuple[str, ...]]) -> Parts:
    """Parse a record of OmniGen: input images in the order of the instruction, then outputs."""
    instruction = wording(next((row[key] for key in keys[1] if row.get(key) is not None), None))
    if instruction is None:
        raise BadSample("edit without instruction")
    output = next((row[key] for key in keys[2] if row.get(key) is not None), None)
    inputs = _image_files(row.get("input_images") or [], folder)
    outputs = _image_files(row.get("output_images") or output, folder)
    pieces = PLACEHOLDER.split(instruction)  # text, number, text, number, text
    if isinstance(instruction, AnyText) and any(map(PLACEHOLDER.search, instruction.texts)):
        raise BadSample("instruction with image placeholders in several wordings")
    if len(pieces) == 1:
        return [*inputs, instruction, *outputs]
    numbers = [int(number) - 1 for number in pieces[1::2]]
    if sorted(numbers) != list(range(len(inputs))):
        raise BadSample("instruction with wrong image placeholders")
    pieces[1::2] = [inputs[number] for number in numbers]
    return [piece for piece in pieces if piece != ""] + outputs


def _image_files(images: Any, folder: Path) -> list[bytes | Path | None]:
    images = images if isinstance(images, list) else [images]
    return [as_image_file(image, folder) for image in images]
