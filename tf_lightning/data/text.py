"""Text from disk: .txt and .jsonl files."""

import json
from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.corpus import BadSample, RawDocument
from tf_lightning.data.files import FileSource
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError


class TextFiles(FileSource):
    """Each .txt file is one document; each line of a .jsonl file is one, under the key "text".

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[str, bytes]]]:
        """As `FileSource.samples`: the kind of file with each document's bytes."""
        if file.suffix == ".txt":
            yield "", (file.suffix, file.read_bytes())
        elif file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, line in enumerate(lines):
                    yield str(number), (file.suffix, line)
        else:
            raise UserError(f"{file} is neither .txt nor .jsonl; rename it or name other files")

    def document(self, sample: tuple[str, bytes]) -> RawDocument:
        """As `FileSource.document`."""
        suffix, content = sample
        try:
            text = content.decode("utf-8") if suffix == ".txt" else json.loads(content)["text"]
        except UnicodeDecodeError as error:
            raise BadSample("text that is not UTF-8") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample('line that is not JSON with a "text"') from error
        if not isinstance(text, str):
            raise BadSample('line that is not JSON with a "text"')
        return [text]


class TextData(Mixture):
    """Text files alone.

    Args:
        paths: .txt or .jsonl files, or globs.
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
