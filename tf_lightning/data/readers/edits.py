"""Image edits (image, instruction, edited image): MagicBrush, OmniGen, OmniGen2 and BAGEL."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.files import ImagePathSource, as_image_file
from tf_lightning.data.readers.formats import (
    file_format,
    parse_json,
    parse_object,
    read_bytes,
    read_lines,
    read_parquet,
)

MAGICBRUSH = ("img_id", "source_img", "instruction", "target_img")  # mask_img is not read
BAGEL = ("image_list", "instruction_list")
PLACEHOLDER = re.compile(r"\s*(?:<img>)?<\|image_(\d+)\|>(?:</img>)?\s*")  # OmniGen


class EditFiles(ImagePathSource):
    """Image edits: documents [image, instruction, image], or longer ones such as chains of edits.

    - MagicBrush's folder: `edit_turns.json`, a list of {"input": "7-input.png", "output":
      "7-output1.png", "instruction": "..."}, beside `images/7/`.
    - MagicBrush's parquet files: img_id, source_img, instruction and target_img. Edits of the same
      image are held out together.
    - BAGEL's parquet files: image_list, and instruction_list with several wordings for each step,
      one of which is chosen by a hash.
    - OmniGen's .jsonl (also .gz, .zst): instruction, input_images, and output_image or
      output_images. <|image_1|> in an instruction marks the place of the first input image.

    Args:
        paths: `edit_turns.json`, .jsonl or .parquet files to train on, or globs of them.
        images: folder that paths of images in .jsonl are relative to; null: the folder of the file.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield parts, or a line of JSON with its image folder; see `FileSource.samples`."""
        match file_format(file):
            case ".parquet":
                yield from parquet_turns(file)
            case ".jsonl":
                for number, line in enumerate(read_lines(file)):
                    yield str(number), (line, self.image_folder(file))
            case _:
                yield from folder_turns(file)

    def parts(self, sample: list[Any] | tuple[bytes, Path]) -> list[str | bytes | Path]:
        """List images and instructions in order; see `ImageFileSource.parts`."""
        parts = omnigen(*sample) if isinstance(sample, tuple) else sample
        words = [part for part in parts if isinstance(part, str) and part.strip()]
        if not words or any(part is None for part in parts[1::2]):
            raise BadSample("edit without instruction")
        if any(not part for part in parts):
            raise BadSample("edit without image")
        return [part.strip() if isinstance(part, str) else part for part in parts]


def folder_turns(file: Path) -> Iterator[tuple[str, list[Path | str | None]]]:
    """Yield the edits of `edit_turns.json`, with images as paths."""
    turns = parse_json(read_bytes(file))
    for turn in turns if isinstance(turns, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        names = [turn.get(name) for name in ("input", "output")]
        key = str(names[0]).split("-")[0]
        folder = file.parent / "images" / key
        before, after = (folder / name if isinstance(name, str) else None for name in names)
        yield key, [before, turn.get("instruction"), after]


def parquet_turns(file: Path) -> Iterator[tuple[str, list[bytes | str | None]]]:
    """Yield the rows of MagicBrush's or BAGEL's parquet files, with images as bytes."""
    for number, row in enumerate(read_parquet(file, MAGICBRUSH + BAGEL)):
        if "image_list" in row:
            yield str(number), bagel(row, number)
            continue
        before, after = (as_image_file(row.get(name), file.parent) for name in MAGICBRUSH[1::2])
        yield str(row.get("img_id")), [before, row.get("instruction"), after]


def bagel(row: dict[str, Any], number: int) -> list[bytes | str | None]:
    """Parse a chain of edits: n images, and n - 1 lists of wordings of an instruction."""
    images, steps = (row.get(name) or [] for name in BAGEL)
    wording = zlib.crc32(b"%d" % number)
    instructions = [step[wording % len(step)] if step else None for step in steps]
    parts = [None] * (len(images) + len(instructions))
    if len(images) == len(instructions) + 1:
        parts[::2], parts[1::2] = images, instructions
    return parts


def omnigen(line: bytes, folder: Path) -> list[str | Path | None]:
    """Parse a line of OmniGen: input images in the order of the instruction, then output images."""
    record = parse_object(line)
    instruction, inputs = record.get("instruction"), record.get("input_images") or []
    outputs = record.get("output_images") or [record.get("output_image")]
    valid = isinstance(instruction, str) and isinstance(inputs, list) and isinstance(outputs, list)
    if not valid:
        raise BadSample("edit without instruction")
    inputs, outputs = (
        [as_image_file(name, folder) for name in names] for names in (inputs, outputs)
    )
    pieces = PLACEHOLDER.split(instruction)  # text, number, text, number, text
    if len(pieces) == 1:
        return [*inputs, instruction, *outputs]
    numbers = [int(number) - 1 for number in pieces[1::2]]
    if sorted(numbers) != list(range(len(inputs))):
        raise BadSample("instruction with wrong image placeholders")
    pieces[1::2] = [inputs[number] for number in numbers]
    return [piece for piece in pieces if piece != ""] + outputs
