"""Captioned pictures in WebDataset tars, as img2dataset writes them."""

from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.caption_json import CaptionJson
from tf_lightning.data.caption_rows import CaptionRows, first, parse_caption
from tf_lightning.data.corpus import BadSample
from tf_lightning.data.files import PictureFiles
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.records import kind, parse_json
from tf_lightning.data.tars import by_extension, read_tar

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "image")
CAPTIONS = ("txt", "text", "caption")


class CaptionTars(PictureFiles):
    """Tars of {key}.jpg|jpeg|png|webp|gif|image with {key}.txt|text|caption, or {key}.json.

    Of the JSON "caption" or "text" is read. Files of a key stand one after another.

    Args:
        paths: tars or globs to train on.
        val_paths: tars or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
        """As `FileSource.samples`: the files of each key."""
        return read_tar(file)

    def parts(self, sample: list[tuple[str, bytes]]) -> list[str | bytes]:
        """Caption, picture."""
        files = by_extension(sample)
        picture = first(files, PICTURES)
        if picture is None:
            raise BadSample("caption without picture")
        return [_caption(files), picture]


def _caption(files: dict[str, bytes]) -> str:
    try:
        text = first(files, CAPTIONS)
        if text is None:
            return parse_caption(parse_json(files["json"]), ("caption", "text"))
        return parse_caption({"caption": text.decode()}, ("caption",))
    except (BadSample, UnicodeDecodeError, KeyError) as error:
        raise BadSample("picture without caption") from error


class ImageCaptionData(Mixture):
    """Captioned pictures alone, of one layout.

    Args:
        paths: WebDataset tars; .jsonl, .csv or .parquet as `CaptionRows` reads them; COCO's,
            Karpathy's or LLaVA's .json as `CaptionJson` does; or globs of one of these kinds.
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
        files = (paths, val_paths, val_fraction, image_size)
        match kind(Path(paths if isinstance(paths, str) else paths[0])):
            case ".json":
                source = CaptionJson(*files, images)
            case ".jsonl" | ".csv" | ".parquet":
                source = CaptionRows(*files, images)
            case _:
                source = CaptionTars(*files)
        super().__init__(sources={"captions": source}, weights=None, **kwargs)
