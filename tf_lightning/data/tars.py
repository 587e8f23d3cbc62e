"""The samples of a WebDataset tar, read in place: nothing is unpacked to disk.

What is no plain file (links, devices, folders) is passed over, and names serve only as keys, so a
member cannot reach outside.
"""

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.images import Stored
from tf_lightning.data.records import MAX_BYTES

DAMAGED = "damaged tar, read as far as it goes"


def read_tar(file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Key of each sample, and the extension and content of its files.

    The files of a key stand one after another, as WebDataset has it.
    """
    try:
        with tarfile.open(file) as tar:
            for key, group in groupby(_plain_files(tar), key=lambda m: split_name(m.name)[0]):
                yield key, [(split_name(m.name)[1], _read(tar, m, file)) for m in group]
            tar.fileobj.seek(tar.offset)
            # Behind the last member stand blocks of zeros. tarfile takes a torn header, or the end
            # of the file, for them and says nothing.
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadSample(DAMAGED)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise BadSample(DAMAGED) from error


def by_extension(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """A sample's files; BadSample where two have one name, as then neither is known to be right."""
    found = dict(files)
    if len(found) < len(files):
        raise BadSample("two files of one name")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a tar's file: "00000/000012.png" -> "00000/000012", "png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    content = tar.extractfile(member).read()
    packed = not isinstance(tar.fileobj, io.BufferedReader)  # has no place that could be read alone
    return content if packed else Stored(content, file, member.offset_data)


def _plain_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if not 0 <= member.size <= MAX_BYTES:  # a negative size would be read again and again
            raise BadSample(DAMAGED)
        if member.isfile():
            yield member
