"""The list of the files of an encoded folder, with a checksum of each block of a file.

`tf-lightning prepare --data.encoded DIR` writes it as DIR/manifest.json when all else is written.
A copy of the folder in an object store is read by this list: the files need not be listed there,
and each block is checked when it arrives.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from tf_lightning.files import atomic_file
from tf_lightning.progress import progress_bar

MANIFEST = "manifest.json"
BLOCK = 2**20  # bytes


@dataclass(frozen=True)
class FileBlocks:
    """A file in blocks of equal size; the last one may be shorter.

    Attributes:
        size: bytes of the file.
        size_of_block: bytes of a block.
        checks: CRC-32 of each block.
    """

    size: int
    size_of_block: int
    checks: list[int]

    def limits(self, number: int) -> tuple[int, int]:
        """Return the first byte of a block, and the byte after its last one."""
        return number * self.size_of_block, min((number + 1) * self.size_of_block, self.size)

    def numbers(self, first: int, end: int) -> range:
        """Return the numbers of the blocks with the bytes `first` to `end` - 1."""
        return range(first // self.size_of_block, -(-end // self.size_of_block))

    def fits(self, number: int, content: bytes) -> bool:
        """Return whether this is the content of a block."""
        first, end = self.limits(number)
        return len(content) == end - first and zlib.crc32(content) == self.checks[number]


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder; hidden files are left out."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [n for n in names if n.name != MANIFEST and not any(p[0] == "." for p in n.parts)]
    files = {}
    for name in progress_bar(shown, f"checksums of {folder}", unit=" files", delay=2):
        with (folder / name).open("rb") as file:
            checks = [zlib.crc32(content) for content in iter(lambda: file.read(BLOCK), b"")]  # noqa: B023
            files[name.as_posix()] = {"size": file.tell(), "crc32": checks}
    with atomic_file(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({"block": BLOCK, "files": files}))


def parse_manifest(content: bytes) -> dict[str, FileBlocks]:
    """Return the files of a manifest by their path in the folder.

    Raises:
        ValueError, KeyError, TypeError: the content is not a manifest.
    """
    manifest = json.loads(content)
    block = int(manifest["block"])
    files = {
        name: FileBlocks(file["size"], block, file["crc32"])
        for name, file in manifest["files"].items()
    }
    for name, file in files.items():
        if block < 1 or len(file.checks) != -(-file.size // block) or ".." in name.split("/"):
            raise ValueError(f"{name} is not described in full")
    return files
