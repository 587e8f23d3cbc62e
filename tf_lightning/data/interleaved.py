"""Text and pictures in any order from disk: JSONL that names picture files."""

import json
from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.corpus import BadSample, RawDocument
from tf_lightning.data.files import FileSource
from tf_lightning.data.images import load_picture
from tf_lightning.data.mixture import Mixture


class InterleavedFiles(FileSource):
    """Each line is a document: {"parts": ["a text", {"text": "another"}, {"image": "a/b.png"}]}.

    A line may also be the list itself. Pictures are found from the folder of the .jsonl file.

    Args:
        paths: .jsonl files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
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

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, bytes]]]:
        """As `FileSource.samples`: the pictures' folder with each line."""
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                yield str(number), (file.parent, line)

    def document(self, sample: tuple[Path, bytes]) -> RawDocument:
        """As `FileSource.document`."""
        folder, line = sample
        return [
            value if kind == "text" else load_picture(folder / value, self.image_size)
            for kind, value in parse_parts(line)
        ]


def parse_parts(line: str | bytes) -> list[tuple[str, str]]:
    """The parts of a line in order: "text" or "image", and the text or the picture's file."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise BadSample("line that is not JSON") from error
    parts = content.get("parts") if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise BadSample('line without "parts"')
    return [_parse_part(part) for part in parts]


def _parse_part(part: str | dict[str, str]) -> tuple[str, str]:
    match part:
        case str() as text:
            return "text", text
        case {"text": str() as text}:
            return "text", text
        case {"image": str() as path}:
            return "image", path
    raise BadSample("part that is neither text nor image")


class InterleavedData(Mixture):
    """Interleaved documents alone.

    Args:
        paths: .jsonl files, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of documents held out, in [0, 1).
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
        source = InterleavedFiles(paths, val_paths, val_fraction, image_size)
        super().__init__(sources={"interleaved": source}, weights=None, **kwargs)
