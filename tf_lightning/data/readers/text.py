"""Text from disk: .txt, JSON lines and parquet, as C4, FineWeb and Dolma have it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample, RawDocument
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.readers.files import FileSource
from tf_lightning.data.readers.formats import (
    file_format,
    parse_json,
    read_bytes,
    read_lines,
    read_parquet,
)
from tf_lightning.errors import UserError

NO_TEXT = 'line that is not JSON with a "text"'


class TextFiles(FileSource):
    """Each .txt is one document; so is each line of .jsonl or .json, each row of .parquet.

    Of lines and rows "text" is read. All may be packed: .gz, .zst.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
        """As `FileSource.samples`: the file_format of file with each document."""
        match file_format(file):
            case ".txt":
                yield "", (".txt", read_bytes(file))
            case ".jsonl" | ".json":
                for number, line in enumerate(read_lines(file)):
                    yield str(number), (".jsonl", line)
            case ".parquet":
                for number, row in enumerate(read_parquet(file, ("text",))):
                    yield str(number), (".parquet", row)
            case _:
                raise UserError(
                    f"{file} is neither .txt, .jsonl, .json (these also .gz or .zst) nor .parquet; "
                    "rename it or name other files"
                )

    def document(self, sample: tuple[str, Any]) -> RawDocument:
        """As `FileSource.document`."""
        suffix, content = sample
        try:
            if suffix == ".txt":
                return [content.decode("utf-8")]
            record = parse_json(content) if suffix == ".jsonl" else content
            text = record["text"]
        except UnicodeDecodeError as error:
            raise BadSample("text that is not UTF-8") from error
        except (BadSample, KeyError, TypeError) as error:
            raise BadSample(NO_TEXT) from error
        if not isinstance(text, str):
            raise BadSample(NO_TEXT)
        return [text]


class TextData(Mixture):
    """Text files alone.

    Args:
        paths: .txt, .jsonl, .json or .parquet files, packed or not, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of documents held out, in [0, 1).
        kwargs: as in Mixture.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        **kwargs,
    ):
        source = TextFiles(paths, val_paths, val_fraction)
        super().__init__(sources={"text": source}, weights=None, **kwargs)
