"""Pictures in folders, without words."""

from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.files import PictureFiles


class ImageFiles(PictureFiles):
    """Documents [picture], one a file, such as 'photos/**/*.jpg'.

    Args:
        paths: picture files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[Path]]]:
        """As `FileSource.samples`: the file itself, keyed by its folder."""
        yield file.parent.name, [file]
