"""Choice of the source of captioned images, by the layout of the files that a path names."""

import copy
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.data.readers.captions import (
    IMAGE_EXTENSIONS,
    CaptionFolders,
    CaptionJson,
    CaptionRows,
    CaptionTars,
    json_layout,
)
from tf_lightning.data.readers.chat import ChatFiles, is_conversation, is_message
from tf_lightning.data.readers.formats import file_format, format_by_name, is_ignored
from tf_lightning.data.readers.globs import find_files, matching_files, names_folder
from tf_lightning.data.readers.image_files import ImagePathSource
from tf_lightning.data.readers.json_records import parse_record, read_records
from tf_lightning.data.readers.layouts import (
    BESIDE,
    HUB_FILES,
    NAMES,
    Layout,
    explicit,
    folder_layouts,
    nothing_found,
    training_files,
)
from tf_lightning.data.readers.local_or_remote import local_file
from tf_lightning.data.readers.name_captions import FILE_NAME, FOLDER_NAME, NamedImages
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.data.readers.tables import column_names
from tf_lightning.errors import UserError
from tf_lightning.remote.cache import cached_path
from tf_lightning.remote.listing import RemoteFile
from tf_lightning.remote.urls import is_remote, public_url

CaptionSource = CaptionTars | CaptionRows | CaptionJson | CaptionFolders | NamedImages | ChatFiles


def caption_source(
    paths: str | list[str],
    *,
    val_paths: str | list[str] | None = None,
    images: str | None = None,
    caption_key: str | None = None,
    image_key: str | None = None,
    **options,
) -> "CaptionSource | SeveralLayouts":
    """Create the source for captioned images in the layouts that the paths have.

    Args:
        paths: files, globs or folders to train on, local or as URLs such as hf://datasets/NAME. All
            files have the format of the first one. A folder may have several layouts; see
            `folder_layouts`.
        val_paths: files, globs or folders to validate on.
        images: folder that paths of images are relative to; tars contain their images.
        caption_key: key, column or extension of the captions, "file_name" or "folder_name"; null:
            the known ones.
        image_key: key, column or extension of the images; null: the known ones.
        options: the other arguments of the source.

    Raises:
        UserError: a folder contains no captions.
    """
    keys = {"images": images, "image_key": image_key, "caption_key": caption_key}
    train = _layouts(paths, keys)
    val = _layouts(val_paths, keys) if val_paths else {}
    roots = [path for path in _as_list(paths) + _as_list(val_paths or []) if names_folder(path)]
    if len(train) == 1 and (not val or val.keys() == train.keys()):
        ((kind, files),) = train.items()
        return _source_of(kind, files, keys, roots, val_paths=val.get(kind), **options)
    if val:
        options["val_fraction"] = 0.0
    return SeveralLayouts(
        [_source_of(*layout, keys, roots, **options) for layout in train.items()],
        [_source_of(kind, files, keys, roots, val_paths=files, **options)
         for kind, files in val.items()],
    )  # fmt: skip


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _layouts(paths: str | list[str], keys: dict[str, str | None]) -> dict[str, str | list[str]]:
    """Return the kinds of the layouts (see `_caption_format`), each with its files or globs."""
    layouts: dict[str, list[str]] = {}
    file_kind = None
    for path in _as_list(paths):
        if names_folder(path) and is_remote(path):
            found = _layouts_of_url(path.rstrip("/"), keys)
        elif names_folder(path):
            found = _layouts_of_folder(Path(path).expanduser(), keys)
        else:
            file_kind = file_kind or _kind_of_files(path, keys["caption_key"])
            found = {file_kind: [path]}
        for kind, files in found.items():
            layouts.setdefault(kind, []).extend(files)
    if isinstance(paths, str):  # the fingerprint tells a string from a list of one string
        return {kind: files[0] if len(files) == 1 else files for kind, files in layouts.items()}
    return layouts


def _layouts_of_folder(folder: Path, keys: dict[str, str | None]) -> dict[str, list[str]]:
    """Return the kinds of the layouts of a folder, each with its globs."""

    def images_of(tables: list[PurePath]) -> Iterator[Path]:
        return _named_images((folder / table for table in tables), folder, keys)

    escaped = glob.escape(str(folder))
    files = [file.relative_to(folder) for file in matching_files(f"{escaped}/**/*")]
    found: dict[str, list[str]] = {}
    for kind, patterns in _find_layouts(str(folder), files, keys, images_of):
        globs = [f"{escaped}/{pattern}" for pattern in patterns]
        found.setdefault(kind or _caption_format(_first_file(globs[0])), []).extend(globs)
    return found


def _layouts_of_url(url: str, keys: dict[str, str | None]) -> dict[str, list[str]]:
    """Return the kinds of the layouts of a folder at a URL, each with its URLs or globs of them.

    If there are files for training by their names, those for validation and tests are left out.
    """
    folder, snapshot = cached_path(url), Snapshot()
    [found] = snapshot.find([f"{url}/**/*"])
    remote = {cached_path(file.url).relative_to(folder): file for file in found}

    def images_of(tables: list[PurePath]) -> Iterator[Path]:
        for table in tables:
            with local_file(remote[table]) as copied:
                yield from _named_images([copied], folder, keys)

    files = [file for file in remote if file.name not in HUB_FILES and not is_ignored(str(file))]
    kept = training_files(files)
    layouts: dict[str, list[str]] = {}
    for kind, patterns in _find_layouts(public_url(url), kept, keys, images_of):
        if len(kept) < len(files):  # the patterns also match the others
            patterns = explicit(kept, kind, patterns)
        kind = kind or _format_by_name(folder / patterns[0])
        layouts.setdefault(kind, []).extend(f"{url}/{pattern}" for pattern in patterns)
    return layouts


def _named_images(
    tables: Iterable[Path], folder: Path, keys: dict[str, str | None]
) -> Iterator[Path]:
    """Yield the images that tables name, relative to a folder."""
    rows = CaptionRows("", **keys)
    for image in (image for table in tables for image in rows.image_paths(table)):
        with suppress(ValueError):  # it is outside of the folder
            yield Path(os.path.normpath(image)).relative_to(os.path.normpath(folder))


def _find_layouts(
    folder: str,
    files: list[Path],
    keys: dict[str, str | None],
    images_of: Callable[[list[PurePath]], Iterable[PurePath]],
) -> list[Layout]:
    """Call `folder_layouts`.

    Raises:
        UserError: the folder has no captioned images.
    """
    layouts = folder_layouts(files, keys["caption_key"], images_of)
    if not layouts:
        raise UserError(nothing_found(folder, files))
    if keys["caption_key"] in (FILE_NAME, FOLDER_NAME):
        return [Layout(NAMES, ["**/*"])]
    return layouts


def _source_of(
    kind: str, paths: str | list[str], keys: dict[str, str | None], roots: list[str], **options
) -> CaptionSource:
    """Create the source that reads a kind of layout.

    Args:
        kind: a result of `_caption_format`, or NAMES.
        paths: the files, or globs of them.
        keys: `images`, `image_key` and `caption_key`.
        roots: folders that were given; their own names are not captions.
        options: the other arguments of the source.
    """
    keys = dict(keys)
    if kind == BESIDE:
        return CaptionFolders(paths, caption_key=keys["caption_key"], **options)
    if kind == NAMES:
        return NamedImages(paths, caption_key=keys["caption_key"], roots=roots, **options)
    match kind:
        case "object":
            return CaptionJson(paths, **keys, **options)
        case "rows":
            return CaptionRows(paths, **keys, **options)
        case "chat":
            del keys["caption_key"]
            return ChatFiles(paths, **keys, **options)
        case _:
            del keys["images"]
            return CaptionTars(paths, **keys, **options)


def _kind_of_files(path: str, caption_key: str | None) -> str:
    """Return the kind of the files of a glob: NAMES for images without text files beside them."""
    file = _first_file(path)
    kind = _caption_format(file)
    if kind != BESIDE or not file.is_file():
        return kind
    texts = CaptionFolders(path, caption_key=caption_key).texts_beside
    return kind if any(map(texts, find_files(path))) else NAMES


def _first_file(path: str) -> Path:
    """Return the first file, or its name if it does not exist, as where data is only encoded."""
    found = matching_files(path)
    if path.endswith("/**/*"):  # other files, such as a README.txt, say nothing
        images = (file for file in found if format_by_name(file) == "image")
        return next(images, next(iter(found), Path(path)))
    return next(iter(found), Path(path))


def _caption_format(file: Path) -> str:
    """Return "tar", "image", "rows", "chat" for conversations, or "object" for COCO's JSON."""
    if not file.is_file():
        return _format_by_name(file)
    kind = file_format(file)
    if kind in ("text", "json", "csv") and _has_image_beside(file):
        return BESIDE
    if kind == "parquet" and "messages" in column_names(file):
        return "chat"
    if kind in ("text", "csv", "parquet"):
        return "rows"
    if kind != "json":
        return kind
    if json_layout(file) != "rows":
        return "object"
    try:
        record = parse_record(next(read_records(file, is_message), None))
    except BadSample:
        return "rows" if ".jsonl" in file.name else "object"
    return "chat" if is_conversation(record) else "rows"


def _format_by_name(file: Path) -> str:
    """Return the result of `_caption_format` by the name alone; neither file nor copy is read."""
    kind = format_by_name(file)
    if kind == "json":
        return "rows" if ".jsonl" in file.name else "object"
    return "rows" if kind in ("text", "csv", "parquet") else kind


def _has_image_beside(file: Path) -> bool:
    return any(
        file.with_suffix(f".{name}").is_file()
        for kind in IMAGE_EXTENSIONS
        for name in (kind, kind.upper())
    )


@dataclass(eq=False)
class SeveralLayouts(Source):
    """Captioned images in several layouts, one source for each.

    Args:
        sources: sources of the training documents; without `val_sources`, each holds out its share.
        val_sources: sources of the validation documents, read from their `val_paths`.
    """

    sources: list[CaptionSource]
    val_sources: list[CaptionSource] = field(default_factory=list)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.sources[0].image_size

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """Aspect-ratio buckets; see `ImageFileSource`."""
        return self.sources[0].image_sizes

    @image_sizes.setter
    def image_sizes(self, sizes: tuple[Size, ...]) -> None:
        self.sources = [copy.copy(source) for source in self.sources]
        self.val_sources = [copy.copy(source) for source in self.val_sources]
        for source in self.sources + self.val_sources:
            source.image_sizes = sizes

    def of_split(self, split: Split) -> list[CaptionSource]:
        """List the sources of a split."""
        return self.val_sources if split == "val" and self.val_sources else self.sources

    def files(self, split: Split) -> list[Path | RemoteFile]:
        """List the files that a split is read from."""
        return [file for source in self.of_split(split) for file in source.files(split)]

    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """See `Source.documents`."""
        for _, document in self.identified(split):
            yield document

    def identified(self, split: Split) -> Iterator[tuple[str, RawDocument | Skipped]]:
        """Yield each document with its id; see `documents.identified`."""
        for source in self.of_split(split):
            yield from source.identified(split)

    def fingerprint(self, split: Split) -> str:
        """See `Source.fingerprint`."""
        return repr([source.fingerprint(split) for source in self.of_split(split)])

    def image_digest(self, split: Split) -> str:
        """Hash the image files that tables name; see `ImagePathSource.image_digest`."""
        tables = [part for part in self.of_split(split) if isinstance(part, ImagePathSource)]
        return " ".join(table.image_digest(split) for table in tables)

    def num_samples(self, split: Split) -> int | None:
        """Count the samples; None if the files are large."""
        counts = [source.num_samples(split) for source in self.of_split(split)]
        return None if None in counts else sum(counts)

    def shards(self, split: Split) -> list[Source]:
        """List the shards of all sources, in order."""
        return [shard for source in self.of_split(split) for shard in source.shards(split)]
