"""Iterators over the samples of a WebDataset tar.

Members of a tar are never unpacked to disk, their names are only used as keys, and links and
devices are ignored, so a tar cannot refer to other files.
"""

import io
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import FileBytes
from tf_lightning.data.readers.formats import (
    MAX_HEADER,
    MAX_MEMBERS,
    MAX_SAMPLE,
    STREAM_ERRORS,
    SUFFIXES,
    compression,
    is_ignored,
    open_stream,
)

DAMAGED_TAR = "damaged tar, read up to the damage"
TAR_ERRORS = (tarfile.TarError, ValueError, zlib.error, RecursionError, *STREAM_ERRORS)

Member = tuple[str, int, int]  # name, offset, bytes
TarSample = list[tuple[str, bytes]]  # extension and content of each file


class _TarStream:
    """A stream that can be sought forward, and refuses to read more than a header's limit at once.

    tarfile reads the names and attributes of members whole, however long the header says they are.
    """

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.place, self.limit = stream, 0, MAX_HEADER

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        if size > self.limit:
            raise BadSample(f"tar with a header or file of more than {self.limit:,} bytes")
        content = self.stream.read(size)
        self.place += len(content)
        return content

    def tell(self) -> int:
        """Return the number of bytes before the next one."""
        return self.place

    def seek(self, place: int) -> None:
        """Skip to a later position."""
        if self.stream.seekable():
            self.place = self.stream.seek(place)
        while self.place < place:
            content = self.stream.read(min(place - self.place, 2**20))
            if not content:
                return
            self.place += len(content)


def read_tar(file: Path) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Iterate over the samples of a WebDataset tar: key, and (extension, content) of each file.

    The names of a sample's files are equal up to the first dot of the last component
    (webdataset's rule), or up to the last dot if several samples are equal up to the first. Images
    and their texts may lie in two folders. The files need not be next to each other, but a
    compressed tar is then held in memory in part.
    """
    members, damage = list_members(file)
    samples = _join_folders(group_members(members))
    read = _read_compressed if compression(file) else _read_plain
    yield from read(file, samples)
    if damage:
        raise damage


def list_members(file: Path) -> tuple[list[Member], BadSample | None]:
    """List the files in a tar up to its damage, and the damage."""
    members: list[Member] = []
    try:
        with open_stream(file) as stream:
            counted = _TarStream(stream)
            tar = tarfile.open(fileobj=counted, mode="r:")
            for member in tar:
                tar.members = []  # tarfile would keep all of them
                if not 0 <= member.size:  # a negative size would loop forever
                    raise BadSample(DAMAGED_TAR)
                if member.isreg() and not member.issparse() and not is_ignored(member.name):
                    members.append((member.name, member.offset_data, member.size))
                if len(members) > MAX_MEMBERS:
                    raise BadSample(f"tar of more than {MAX_MEMBERS:,} files")
            counted.seek(tar.offset)
            # A tar ends with blocks of zeros. tarfile silently accepts a truncated header, or the
            # end of the file, in their place.
            if counted.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadSample(DAMAGED_TAR)
    except BadSample as damage:
        return members, damage
    except TAR_ERRORS:
        return members, BadSample(DAMAGED_TAR)
    return members, None


def group_members(members: list[Member]) -> list[tuple[str, list[tuple[str, Member]]]]:
    """Group the files of a tar by sample, in the order of their first files.

    Returns:
        Key, and (extension, member) of each file, for each sample.
    """
    groups: dict[str, list[list[tuple[str, Member]]]] = {}  # by key up to the first dot
    order: list[tuple[str, list]] = []
    latest = None
    for member in members:
        key, extension = split_name(unicodedata.normalize("NFC", member[0]))  # macOS writes NFD
        rounds = groups.setdefault(key, [])
        # A name that comes again, not next to its sample, begins another sample of the same key.
        again = latest != key and rounds and extension in dict(rounds[-1])
        if not rounds or again:
            rounds.append([])
            order.append((key, rounds[-1]))
        rounds[-1].append((extension, member))
        latest = key
    for rounds in groups.values():
        if len({frozenset(dict(files)) for files in rounds}) > 1:  # a file has another's name
            rounds[0][:] = [file for files in rounds for file in files]
            for files in rounds[1:]:
                files.clear()
    return [sample for key, files in order if files for sample in _split_group(key, files)]


def _split_group(
    key: str, files: list[tuple[str, Member]]
) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """Split the files of a key at the last dots of their names if their extensions are not unique.

    "a.1.jpg, a.1.txt, a.2.jpg, a.2.txt" are two samples, "a.input.jpg, a.output.txt" are one, and
    so are "a.jpg, a.caption1.txt, a.caption2.txt", whose extensions are left whole.
    """
    short = [(extension.rpartition(".")[2], member) for extension, member in files]
    if len(dict(short)) == len(short) or all("." not in extension for extension, _ in files):
        yield key, short
        return
    parts: dict[str, list[tuple[str, Member]]] = {}
    for extension, member in files:
        middle, _, last = extension.rpartition(".")
        parts.setdefault(f"{key}.{middle}" if middle else key, []).append((last, member))
    others = [part for name, part in parts.items() if name != key]
    if len(others) < len(parts) and all(len(p) == 1 and not _is_image(p) for p in others):
        yield key, files
    else:
        yield from parts.items()


def _is_image(files: list[tuple[str, Member]]) -> bool:
    return any(f".{extension}" in SUFFIXES["image"] for extension, _ in files)


# Names of folders of a tar that only say what kind of files they have.
KIND_FOLDERS = (
    "images", "image", "imgs", "img", "jpg", "png", "captions", "caption", "texts", "text", "txt",
    "prompts", "json",
)  # fmt: skip


def _join_folders(samples: list[tuple[str, list]]) -> list[tuple[str, list]]:
    """Join "images/0.jpg" and "captions/0.txt" if no sample has an image and a text without it."""
    if any(len({_is_image([file]) for file in files}) > 1 for _, files in samples):
        return samples
    joined: dict[tuple[str, ...], tuple[str, list]] = {}
    for key, files in samples:
        *folders, base = key.split("/")
        common = *(name for name in folders if name.lower() not in KIND_FOLDERS), base
        joined.setdefault(common, (key, []))[1].extend(files)
    return list(joined.values())


def _read_plain(file: Path, samples: list) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Read the files of each sample at their offsets."""
    with file.open("rb") as stream:
        for key, files in samples:
            if sum(size for _, (_, _, size) in files) > MAX_SAMPLE:
                yield key, BadSample(f"files of more than {MAX_SAMPLE:,} bytes")
                continue
            contents = []
            for extension, (_, offset, size) in files:
                stream.seek(offset)
                content = FileBytes(_exactly(stream.read(size), size), file, offset)
                contents.append((extension, content))
            yield key, contents


def _read_compressed(file: Path, samples: list) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Read all files in their order; a sample is complete with its last one."""
    places = sorted(
        (offset, size, number, index)
        for number, (_, files) in enumerate(samples)
        for index, (_, (_, offset, size)) in enumerate(files)
    )
    held: dict[int, dict[int, bytes]] = {}  # contents of incomplete samples
    num_bytes = 0
    with open_stream(file) as raw:
        stream = _TarStream(raw)
        stream.limit = MAX_SAMPLE
        for offset, size, number, index in places:
            key, files = samples[number]
            num_bytes += size
            if num_bytes > MAX_SAMPLE:
                raise BadSample("compressed tar whose samples are too large or not sorted by name")
            try:
                stream.seek(offset)
                content = _exactly(stream.read(size), size)
            except TAR_ERRORS as error:
                raise BadSample(DAMAGED_TAR) from error
            held.setdefault(number, {})[index] = content
            if len(held[number]) == len(files):
                contents = held.pop(number)
                num_bytes -= sum(map(len, contents.values()))
                yield key, [(extension, contents[i]) for i, (extension, _) in enumerate(files)]


def _exactly(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise BadSample(DAMAGED_TAR)
    return content


def by_extension(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """Map the extensions of a sample's files to their contents.

    Raises:
        BadSample: two files have the same extension, so it is unknown which one is right.
    """
    found = dict(files)
    if len(found) < len(files):
        raise BadSample("two files with the same name")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name: "00000/000012.png" -> key "00000/000012", extension "png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()
