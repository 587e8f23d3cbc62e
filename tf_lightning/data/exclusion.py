"""Filter lists: documents that are left out of the data.

A filter list is a text file with the id of one document in each line. A tab and the reason may
follow the id. Empty lines and lines that begin with # are comments. `tf-lightning inspect` writes
such a file; `documents.identified` says which ids documents have.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import RawDocument, Skipped, Source, Split, identified
from tf_lightning.data.readers.ids import file_id
from tf_lightning.errors import UserError

EXCLUDED = "named in the filter list"  # reason of the documents that are skipped
WITHOUT = " without "  # in a fingerprint, before the hash of the ids that are left out
ENDS_OF_FILE = re.compile("[:#]")  # the characters that may follow a path in an id


def read_filter_list(file: str | Path) -> frozenset[str]:
    """Read the ids of a filter list.

    Raises:
        UserError: the file cannot be read, or is not a text.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"exclude={str(file)!r} cannot be read as a filter list; give a text file with the id "
            "of a document in each line, as `tf-lightning inspect` writes it"
        ) from error
    lines = (line.partition("\t")[0].strip() for line in text.splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


class FilteredSource(Source):
    """The documents of a source without those that a filter list names.

    Args:
        name: name of the source.
        source: the source.
        ids: ids of the documents to leave out, also of those of other sources.
    """

    def __init__(self, name: str, source: Source, ids: frozenset[str]):
        self.name, self.unfiltered, self.ids = name, source, ids

    def __getattr__(self, name: str) -> Any:
        """Return another attribute of the source, such as `image_size`."""
        if name == "unfiltered":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.unfiltered, name)

    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """See `Source.documents`; a document that is left out is `Skipped`."""
        for _, document in self.identified(split):
            yield document

    def identified(self, split: Split) -> Iterator[tuple[str, RawDocument | Skipped]]:
        """Yield each document with its id; see `documents.identified`."""
        for document_id, document in identified(self.name, self.unfiltered, split):
            is_left_out = document_id in self.ids and not isinstance(document, Skipped)
            yield document_id, Skipped(EXCLUDED) if is_left_out else document

    def fingerprint(self, split: Split) -> str:
        """See `Source.fingerprint`; ids of other sources and splits do not change it."""
        fingerprint, ids = self.unfiltered.fingerprint(split), sorted(self._own_ids(split))
        digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]
        return f"{fingerprint}{WITHOUT}{digest}" if ids else fingerprint

    def concerns(self, split: Split) -> bool:
        """Return whether an id may belong to this source, assumed if its files are absent."""
        try:
            return bool(self._own_ids(split))
        except UserError:
            return bool(self.ids)

    def shards(self, split: Split) -> list["FilteredSource"]:
        """Divide the source; one whose documents are named by their number stays whole."""
        if not (hasattr(self.unfiltered, "shards") and hasattr(self.unfiltered, "identified")):
            return [self]
        return [FilteredSource(self.name, part, self.ids) for part in self.unfiltered.shards(split)]

    def _own_ids(self, split: Split) -> frozenset[str]:
        """Return the ids that begin with a file of the split, or with the source's name."""
        if not hasattr(self.unfiltered, "identified"):
            return frozenset(name for name in self.ids if name.startswith(f"{self.name}:{split}:"))
        files = set(map(file_id, self.unfiltered.files(split)))
        return frozenset(name for name in self.ids if any(map(files.__contains__, starts(name))))


def leaves_out(fingerprint: str) -> bool:
    """Return whether the source of a fingerprint leaves out ids of a filter list."""
    return re.search(f"{WITHOUT}[0-9a-f]{{12}}$", fingerprint) is not None


def starts(document_id: str) -> Iterator[str]:
    """Yield the beginnings of an id that may be the path of its file, the whole id included."""
    yield document_id
    yield from (document_id[: end.start()] for end in ENDS_OF_FILE.finditer(document_id))


def filtered(sources: dict[str, Source], exclude: str | None) -> dict[str, Source]:
    """Return sources by name without the documents that the filter list `exclude` names.

    Args:
        sources: the sources by name.
        exclude: path of the filter list; None: all documents stay.

    Raises:
        UserError: the filter list cannot be read.
    """
    if exclude is None:
        return sources
    ids = read_filter_list(exclude)
    return {name: FilteredSource(name, source, ids) for name, source in sources.items()}


def unknown_ids(exclude: str, skipped: list[dict[str, int]]) -> str | None:
    """Return a warning about ids of a filter list that match no document; None if all match.

    Args:
        exclude: path of the filter list.
        skipped: number of skipped documents by reason, of each source and split.
    """
    count = len(read_filter_list(exclude))
    unknown = count - sum(reasons.get(EXCLUDED, 0) for reasons in skipped)
    if unknown <= 0:
        return None
    return (
        f"{unknown:,} of {count:,} ids in {exclude} match no document of this data, so they have "
        "no effect; write the list anew with `tf-lightning inspect` if files were moved or changed"
    )
