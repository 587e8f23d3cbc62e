"""Text and pictures in any order from disk: our JSON lines, OBELICS, MMC4, MINT-1T."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.files import NamedPictureFiles, Spare
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.records import kind, parse_json, read_lines, read_parquet
from tf_lightning.data.tars import read_tar
from tf_lightning.data.web_documents import mint, mmc4, obelics
from tf_lightning.errors import UserError


class InterleavedFiles(NamedPictureFiles):
    """A document a line of .jsonl (also .gz, .zst), a row of .parquet, or a key of a .tar.

    A line is {"parts": ["a text", {"text": "another"}, {"image": "a/b.png"}]} or that list itself,
    a document of MMC4 (`text_list`, `image_info`), or one of OBELICS (`images`, `texts`). A
    .parquet is OBELICS's, a .tar MINT-1T's (.json with .tiff). A document of these three does
    without its missing pictures, which are counted.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names begin from; None: that of the file itself. OBELICS's pictures
            are in it under the SHA-256 of their URL.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """As `FileSource.samples`: the pictures' folder with each line, row, or files of a key."""
        match kind(file):
            case ".jsonl":
                records = enumerate(read_lines(file))
            case ".parquet":
                records = enumerate(read_parquet(file, ("images", "texts")))
            case ".tar":
                records = read_tar(file)
            case _:
                raise UserError(f"{file} is neither .jsonl, .parquet nor .tar; name other files")
        for key, record in records:
            yield str(key), (self.folder(file), record)

    def parts(self, sample: tuple[Path, Any]) -> list[str | Path | Spare]:
        """Texts and pictures in order."""
        folder, record = sample
        if isinstance(record, list):
            return mint(record)
        content = parse_json(record) if isinstance(record, bytes) else record
        match content:
            case {"text_list": _}:
                return mmc4(content, folder)
            case {"texts": _}:
                return obelics(content, folder)
        return [part if what == "text" else folder / part for what, part in parse_parts(content)]


def parse_parts(content: Any) -> list[tuple[str, str]]:
    """The parts of a line in order: "text" or "image", and the text or the picture's file."""
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
        paths: .jsonl, .parquet or .tar files, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names of pictures begin from; None: that of the file naming them.
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
        source = InterleavedFiles(paths, val_paths, val_fraction, image_size, images)
        super().__init__(sources={"interleaved": source}, weights=None, **kwargs)
