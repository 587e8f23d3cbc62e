"""Text from .txt, JSON lines and parquet, such as C4, Dolma and FineWeb."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample, RawDocument
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
    """Text: each .txt file, each line of .jsonl or .json, and each row of .parquet is a document.

    Lines and rows have their text under "text". All but .parquet may be compressed as .gz or .zst.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[str, Any]]]:
        """Yield the format and the content of each document; see `FileSource.samples`."""
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
        """See `FileSource.document`."""
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
