"""Picture, instruction, edited picture from disk: MagicBrush, OmniGen and OmniGen2, BAGEL."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.readers.captions import as_picture
from tf_lightning.data.readers.files import ImagePathSource
from tf_lightning.data.readers.formats import (
    file_format,
    parse_json,
    parse_object,
    read_bytes,
    read_lines,
    read_parquet,
)

MAGICBRUSH = ("img_id", "source_img", "instruction", "target_img")  # mask_img stays where it is
BAGEL = ("image_list", "instruction_list")
PLACEHOLDER = re.compile(r"\s*(?:<img>)?<\|image_(\d+)\|>(?:</img>)?\s*")  # OmniGen's


class EditFiles(ImagePathSource):
    """Documents [picture, instruction, picture], and longer ones of the same kinds.

    MagicBrush's folder is `edit_turns.json`, a list of {"input": "7-input.png", "output":
    "7-output1.png", "instruction": "..."}, beside `images/7/`; its parquet files have img_id,
    source_img, instruction and target_img. Turns that edit the same picture are held out together.
    BAGEL's parquet files have image_list and, for each step, instruction_list, of whose wordings
    one is taken, always the same. OmniGen's .jsonl (also .gz, .zst) have instruction, input_images
    and output_image or output_images; <|image_1|> in an instruction is where its picture stands.

    Args:
        paths: `edit_turns.json`, .jsonl or .parquet files, or globs, to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names in .jsonl begin from; None: that of the file itself.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, Any]]:
        """As `FileSource.samples`: a list of parts, or a line of JSON with its folder."""
        match file_format(file):
            case ".parquet":
                yield from parquet_turns(file)
            case ".jsonl":
                for number, line in enumerate(read_lines(file)):
                    yield str(number), (line, self.folder(file))
            case _:
                yield from folder_turns(file)

    def parts(self, sample: list[Any] | tuple[bytes, Path]) -> list[str | bytes | Path]:
        """Pictures and instructions in order."""
        parts = omnigen(*sample) if isinstance(sample, tuple) else sample
        words = [part for part in parts if isinstance(part, str) and part.strip()]
        if not words or any(part is None for part in parts[1::2]):
            raise BadSample("edit without instruction")
        if any(not part for part in parts):
            raise BadSample("edit without picture")
        return [part.strip() if isinstance(part, str) else part for part in parts]


def folder_turns(file: Path) -> Iterator[tuple[str, list[Path | str | None]]]:
    """The turns of `edit_turns.json`, pictures as paths."""
    turns = parse_json(read_bytes(file))
    for turn in turns if isinstance(turns, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        names = [turn.get(name) for name in ("input", "output")]
        key = str(names[0]).split("-")[0]
        folder = file.parent / "images" / key
        before, after = (folder / name if isinstance(name, str) else None for name in names)
        yield key, [before, turn.get("instruction"), after]


def parquet_turns(file: Path) -> Iterator[tuple[str, list[bytes | str | None]]]:
    """The rows of MagicBrush's or BAGEL's parquet files, pictures as bytes."""
    for number, row in enumerate(read_parquet(file, MAGICBRUSH + BAGEL)):
        if "image_list" in row:
            yield str(number), bagel(row, number)
            continue
        before, after = (as_picture(row.get(name), file.parent) for name in MAGICBRUSH[1::2])
        yield str(row.get("img_id")), [before, row.get("instruction"), after]


def bagel(row: dict[str, Any], number: int) -> list[bytes | str | None]:
    """A chain of edits: image_list [bytes], instruction_list [[wording, ...]], one shorter."""
    images, steps = (row.get(name) or [] for name in BAGEL)
    said = [step[zlib.crc32(b"%d" % number) % len(step)] if step else None for step in steps]
    parts = [None] * (len(images) + len(said))
    if len(images) == len(said) + 1:
        parts[::2], parts[1::2] = images, said
    return parts


def omnigen(line: bytes, folder: Path) -> list[str | Path | None]:
    """A task of OmniGen: what is given, in the order of the instruction, and what comes of it."""
    record = parse_object(line)
    outputs = record.get("output_images") or [record.get("output_image")]
    given, made, instruction = record.get("input_images") or [], outputs, record.get("instruction")
    if not isinstance(instruction, str) or not isinstance(given + made, list):
        raise BadSample("edit without instruction")
    given, made = ([as_picture(name, folder) for name in names] for names in (given, made))
    pieces = PLACEHOLDER.split(instruction)  # text, number, text, number, text
    if len(pieces) == 1:
        return [*given, instruction, *made]
    numbers = [int(number) - 1 for number in pieces[1::2]]
    if sorted(numbers) != list(range(len(given))):
        raise BadSample("instruction of other pictures than it is given")
    pieces[1::2] = [given[number] for number in numbers]
    return [piece for piece in pieces if piece != ""] + made


class EditData(Mixture):
    """Edits alone.

    Args:
        paths: `edit_turns.json`, .jsonl or .parquet files, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names in .jsonl begin from; None: that of the file itself.
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
        source = EditFiles(paths, val_paths, val_fraction, image_size, images)
        super().__init__(sources={"edits": source}, weights=None, **kwargs)
