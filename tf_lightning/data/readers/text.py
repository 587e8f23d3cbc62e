"""Text from plain files, JSON and parquet, such as C4, Dolma and FineWeb."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tf_lightning.data.documents import BadSample, RawDocument
from tf_lightning.data.readers.files import FileSource
from tf_lightning.data.readers.formats import file_format, read_text, refuse
from tf_lightning.data.readers.json_records import parse_object, parse_record, read_records
from tf_lightning.data.readers.tables import first_present, missing, read_csv, read_parquet

TEXT_KEYS = ("text", "content", "raw_content")


@dataclass(eq=False)
class TextFiles(FileSource):
    """Text: each plain text file, JSON record and row of CSV or parquet is a document.

    JSON records are the lines of a file, or the items of one array, which may be {"data": [...]}. A
    text may be a list of lines. The content of a file decides what it is. All but parquet
    may be compressed (.gz, .zst, .bz2, .xz).

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on; null: hold out a share of `paths`.
        val_fraction: share of the documents to hold out if `val_paths` is null, in [0, 1).
        text_key: key or column of the text; null: the first of TEXT_KEYS.
    """

    text_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("text_key",)

    @property
    def _keys(self) -> tuple[str, ...]:
        return (self.text_key,) if self.text_key else TEXT_KEYS

    def samples(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the text or the record of each document; see `FileSource.samples`."""
        match file_format(file):
            case "text":
                for text in read_text(file):
                    yield "", text
            case "json":
                for number, record in enumerate(read_records(file)):
                    yield str(number), record
            case "csv":
                for number, row in enumerate(read_csv(file)):
                    yield str(number), row
            case "parquet":
                for number, row in enumerate(read_parquet(file, self._keys, "text_key")):
                    yield str(number), row
            case _:
                raise refuse(file, "text is read from .txt, .jsonl, .json, .csv and .parquet files")

    def document(self, sample: Any) -> RawDocument:
        """See `FileSource.document`."""
        record = sample if isinstance(sample, str) else parse_record(sample)
        if isinstance(record, str):
            return [record]
        record = parse_object(record)
        text = first_present(record, self._keys)
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "\n".join(text)
        if text is None and any(key in record for key in self._keys):
            raise BadSample("record without text")
        if text is None:
            raise BadSample(missing("text", record, self._keys, "text_key"))
        if not isinstance(text, str):
            raise BadSample(f"text that is of type {type(text).__name__}")
        return [text]
