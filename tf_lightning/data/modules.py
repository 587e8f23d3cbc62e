"""Data modules with a single kind of files: a `Mixture` of one source."""

from collections.abc import Callable
from functools import partial

from tf_lightning.data.mixture import Mixture
from tf_lightning.data.readers.caption_source import caption_source
from tf_lightning.data.readers.edits import EditFiles
from tf_lightning.data.readers.files import FileSource
from tf_lightning.data.readers.interleaved import InterleavedFiles
from tf_lightning.data.readers.text import TextFiles


class _FileData(Mixture):
    """Mixture of one file source.

    The leading underscore keeps the class out of the list of data modules in the command's help.

    Args:
        name: name of the source, which names its metrics.
        make_source: class or function that takes `paths`, `val_paths` and `val_fraction`.
        paths: files or globs to train on.
        val_paths: files or globs to validate on; null: hold out a share of `paths`.
        val_fraction: share of the documents to hold out if `val_paths` is null, in [0, 1).
        kwargs: arguments of `Mixture`.
    """

    def __init__(
        self,
        name: str,
        make_source: Callable[..., FileSource],
        paths: str | list[str],
        *,
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        **kwargs,
    ):
        source = make_source(paths, val_paths=val_paths, val_fraction=val_fraction)
        super().__init__(sources={name: source}, weights=None, **kwargs)


class _ImageFileData(_FileData):
    """Mixture of one file source of documents with images.

    Args:
        name: name of the source, which names its metrics.
        make_source: class or function that also takes `image_size` and `images`.
        paths: files or globs to train on.
        image_size: side of the square images in pixels.
        images: folder that paths of images are relative to; null: the folder of the file that
            contains the path.
        keys: names of keys and columns, arguments of `make_source`.
        kwargs: `val_paths`, `val_fraction`, and the arguments of `Mixture`.
    """

    def __init__(
        self,
        name: str,
        make_source: Callable[..., FileSource],
        paths: str | list[str],
        *,
        image_size: int = 256,
        images: str | None = None,
        keys: dict[str, str | None] | None = None,
        **kwargs,
    ):
        make_source = partial(make_source, image_size=image_size, images=images, **(keys or {}))
        super().__init__(name, make_source, paths, **kwargs)


class TextData(_FileData):
    """Data module for text files, as `TextFiles` reads them.

    Args:
        paths: .txt, .jsonl, .json or .parquet files to train on, or globs of them.
        text_key: key or column of the text; null: the first known one, such as "text".
        kwargs: `val_paths`, `val_fraction`, and the arguments of `Mixture`.
    """

    def __init__(self, paths: str | list[str], *, text_key: str | None = None, **kwargs):
        super().__init__("text", partial(TextFiles, text_key=text_key), paths, **kwargs)


class ImageCaptionData(_ImageFileData):
    """Data module for images with captions, all in one format.

    Args:
        paths: files, globs or folders to train on: WebDataset tars; .jsonl, .csv or .parquet as
            `CaptionRows` reads them; .json of COCO, Karpathy or LLaVA as `CaptionJson` reads it;
            conversations as `ChatFiles` reads them; images with a text file beside each; or a
            folder of images with a metadata.jsonl, .csv or .parquet.
        caption_key: key, column or extension of the captions; null: the first known one, such as
            "text".
        image_key: key, column or extension of the images; null: the first known one, such as
            "image".
        kwargs: `val_paths`, `val_fraction`, `image_size`, `images`, and the arguments of `Mixture`.
    """

    def __init__(
        self,
        paths: str | list[str],
        *,
        caption_key: str | None = None,
        image_key: str | None = None,
        **kwargs,
    ):
        keys = {"caption_key": caption_key, "image_key": image_key}
        super().__init__("captions", caption_source, paths, keys=keys, **kwargs)


class InterleavedData(_ImageFileData):
    """Data module for documents of text and images in any order, as `InterleavedFiles` reads them.

    Args:
        paths: .jsonl, .parquet or .tar files to train on, or globs of them.
        images_key: key or column of the images, as in OBELICS; null: "images".
        texts_key: key or column of the texts, as in OBELICS; null: "texts".
        kwargs: `val_paths`, `val_fraction`, `image_size`, `images`, and the arguments of `Mixture`.
    """

    def __init__(
        self,
        paths: str | list[str],
        *,
        images_key: str | None = None,
        texts_key: str | None = None,
        **kwargs,
    ):
        keys = {"images_key": images_key, "texts_key": texts_key}
        super().__init__("interleaved", InterleavedFiles, paths, keys=keys, **kwargs)


class EditData(_ImageFileData):
    """Data module for image edits, as `EditFiles` reads them.

    Args:
        paths: `edit_turns.json`, .jsonl or .parquet files to train on, or globs of them.
        source_key: key or column of the image to edit; null: the first known one.
        instruction_key: key or column of the instruction; null: the first known one.
        target_key: key or column of the edited image; null: the first known one.
        kwargs: `val_paths`, `val_fraction`, `image_size`, `images`, and the arguments of `Mixture`.
    """

    def __init__(
        self,
        paths: str | list[str],
        *,
        source_key: str | None = None,
        instruction_key: str | None = None,
        target_key: str | None = None,
        **kwargs,
    ):
        keys = {
            "source_key": source_key,
            "instruction_key": instruction_key,
            "target_key": target_key,
        }
        super().__init__("edits", EditFiles, paths, keys=keys, **kwargs)
