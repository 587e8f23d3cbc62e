"""Pictures in folders, without words."""

from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.corpus import RawDocument
from tf_lightning.data.files import FileSource
from tf_lightning.data.images import load_picture


class ImageFiles(FileSource):
    """Documents [picture], one a file.

    Args:
        paths: picture files or globs to train on, such as 'photos/**/*.jpg'.
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

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """As `FileSource.samples`: the file itself, keyed by its folder."""
        yield file.parent.name, file

    def document(self, sample: Path) -> RawDocument:
        """As `FileSource.document`."""
        return [load_picture(sample, self.image_size)]
