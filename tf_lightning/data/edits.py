"""Picture, instruction, edited picture from disk, in MagicBrush's two layouts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.corpus import BadSample, RawDocument
from tf_lightning.data.files import FileSource
from tf_lightning.data.images import load_picture
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError

COLUMNS = ["img_id", "source_img", "instruction", "target_img"]  # mask_img is left where it is


class EditFiles(FileSource):
    """Documents [picture, instruction, picture].

    The folder layout is `edit_turns.json`, a list of {"input": "7-input.png", "output":
    "7-output1.png", "instruction": "..."}, beside `images/7/`. The parquet layout has columns
    img_id, source_img, instruction and target_img, the pictures as {"bytes": ...}. Turns that edit
    the same picture are held out together.

    Args:
        paths: `edit_turns.json` or .parquet files, or globs, to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
    ):
        super().__init__(paths, val_paths, val_fraction)
        self.image_size = image_size

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
        """As `FileSource.samples`: picture, instruction, picture, keyed by what is edited."""
        if file.suffix == ".parquet":
            yield from parquet_turns(file)
        else:
            yield from folder_turns(file)

    def document(self, sample: tuple[Any, Any, Any]) -> RawDocument:
        """As `FileSource.document`."""
        before, instruction, after = sample
        if not isinstance(instruction, str) or not instruction.strip():
            raise BadSample("edit without instruction")
        if not before or not after:
            raise BadSample("edit without picture")
        pictures = (load_picture(picture, self.image_size) for picture in (before, after))
        return [next(pictures), instruction.strip(), next(pictures)]


def folder_turns(file: Path) -> Iterator[tuple[str, tuple[Path | None, Any, Path | None]]]:
    """The turns of `edit_turns.json`, pictures as paths."""
    try:
        turns = json.loads(file.read_text())
    except ValueError as error:
        raise BadSample("file that is not JSON") from error
    for turn in turns if isinstance(turns, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        names = [turn.get(name) for name in ("input", "output")]
        key = str(names[0]).split("-")[0]
        folder = file.parent / "images" / key
        before, after = (folder / name if isinstance(name, str) else None for name in names)
        yield key, (before, turn.get("instruction"), after)


def parquet_turns(file: Path) -> Iterator[tuple[str, tuple[bytes | None, Any, bytes | None]]]:
    """The rows of a parquet file, pictures as bytes."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"reading {file} needs pyarrow; `pip install pyarrow`, or give MagicBrush's folder "
            "layout (edit_turns.json)"
        ) from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches(16, columns=COLUMNS):
            for row in batch.to_pylist():
                before, after = ((row[name] or {}).get("bytes") for name in COLUMNS[1::2])
                yield str(row["img_id"]), (before, row["instruction"], after)
    except (pyarrow.ArrowException, KeyError, AttributeError) as error:
        raise BadSample("damaged parquet file, or one of other columns") from error


class EditData(Mixture):
    """Edits alone.

    Args:
        paths: `edit_turns.json` or .parquet files, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
        kwargs: as in Mixture.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
        **kwargs,
    ):
        source = EditFiles(paths, val_paths, val_fraction, image_size)
        super().__init__(sources={"edits": source}, weights=None, **kwargs)
