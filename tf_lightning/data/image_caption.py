"""Captioned pictures from disk: WebDataset tars in img2dataset's layout."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tf_lightning.data.corpus import BadSample, RawDocument
from tf_lightning.data.files import FileSource
from tf_lightning.data.images import Stored, load_picture
from tf_lightning.data.mixture import Mixture

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")


class CaptionTars(FileSource):
    """Tars of {key}.jpg|jpeg|png|webp|gif with {key}.txt, or a "caption" in {key}.json.

    The files of a key stand one after another, as WebDataset has it.

    Args:
        paths: tars or globs to train on.
        val_paths: tars or globs to validate on.
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

    def samples(self, file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        """As `FileSource.samples`: the files of each key, by extension."""
        try:
            with tarfile.open(file) as tar:
                members = (member for member in tar if member.isfile())
                for key, group in groupby(members, key=lambda member: _split_name(member.name)[0]):
                    yield key, {_split_name(m.name)[1]: _read(tar, m, file) for m in group}
        except (tarfile.TarError, OSError, EOFError) as error:
            raise BadSample("damaged tar, read as far as it goes") from error

    def document(self, sample: dict[str, bytes]) -> RawDocument:
        """As `FileSource.document`: caption, picture."""
        picture = next((sample[kind] for kind in PICTURES if kind in sample), None)
        if picture is None:
            raise BadSample("caption without picture")
        return [_caption(sample), load_picture(picture, self.image_size)]


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    return Stored(tar.extractfile(member).read(), file, member.offset_data)


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension of a tar's file: "00000/000012.png" -> "00000/000012", "png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()


def _caption(sample: dict[str, bytes]) -> str:
    try:
        text = sample.get("txt")
        caption = json.loads(sample["json"])["caption"] if text is None else text.decode()
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample("picture without caption") from error
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("picture without caption")
    return caption.strip()


class ImageCaptionData(Mixture):
    """Tars of captioned pictures alone.

    Args:
        paths: WebDataset tars, or globs.
        val_paths: tars or globs to validate on.
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
        source = CaptionTars(paths, val_paths, val_fraction, image_size)
        super().__init__(sources={"captions": source}, weights=None, **kwargs)
