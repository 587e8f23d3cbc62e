"""Sharded checkpoints: folders of torch.distributed.checkpoint, with a checksum of each file.

FOLDER/__0_0.distcp, ...  the weights and the optimizer state, one file for each rank
FOLDER/.metadata          the index of all tensors, as torch writes it
FOLDER/meta.pt            the rest of the checkpoint, as Lightning writes it
FOLDER/checksums.txt      CRC-32, size and name of each other file; older versions wrote none

The ranks write into a temporary folder beside it, and each rank computes the checksums of its own
files. Rank zero renames the folder when all have written, so a folder with the final name is whole.

torch unpickles `.metadata` and every entry that is not a tensor without restrictions, so a
downloaded folder could run code. This module checks them first, or reads them with restrictions.
"""

import io
import math
import os
import pickle
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tf_lightning.checkpoint_file import DamagedFile, load_checkpoint, sync_folder, verify
from tf_lightning.errors import UserError, first_sentence
from tf_lightning.files import replace

DESCRIPTION = ".metadata"  # torch's index of the shards
REST = "meta.pt"  # the checkpoint without weights and optimizer
CHECKSUMS = "checksums.txt"
WEIGHTS, OPTIMIZER = "state_dict.", "optimizer_"  # beginnings of the names of entries
READERS = 4  # threads that compute checksums


def is_sharded(path: Path) -> bool:
    """Return whether a path is the folder of a sharded checkpoint, which may be incomplete."""
    return any((path / name).is_file() for name in (DESCRIPTION, REST))


class CheckedFiles(FileSystem):
    """Opens the files of a folder, computes checksums when writing and verifies them when reading.

    Args:
        recorded: size and CRC-32 of each file that is read; None: none are known.
    """

    def __init__(self, recorded: dict[str, tuple[int, int]] | None = None):
        self.recorded = recorded
        self.written: dict[str, tuple[int, int]] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        """Open a file.

        Raises:
            DamagedFile: the content is not what was written.
        """
        path = Path(path)
        if mode == "rb":
            self.verify(path)
        with super().create_stream(path, mode) as file:
            if mode == "rb":
                yield file
            else:
                stream = ChecksumStream(file)
                yield stream
                self.written[path.name] = stream.size, stream.checksum

    def rename(self, path: Path, new_path: Path) -> None:
        """Rename a file that was written."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def verify(self, path: Path) -> None:
        """Compare a file with its checksum, unless this process did so since it was written.

        Raises:
            DamagedFile: it differs, or no checksum is recorded although others are.
        """
        if self.recorded is not None:
            if path.name not in self.recorded:
                raise DamagedFile(f"{CHECKSUMS} has no line for {path.name}")
            verify(path, *self.recorded[path.name])


class ChecksumStream:
    """A file that computes the CRC-32 and the number of the bytes that are written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.checksum = file, 0, 0

    def write(self, data: memoryview | bytes) -> int:
        """Write bytes."""
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# ---------------------------------------------------------------- writing


class ShardWriter(dcp.FileSystemWriter):
    """Writes the shards of a checkpoint, and on rank zero the other files of its folder.

    Args:
        partial: folder beside `folder` in which all ranks write.
        folder: where rank zero moves it when all ranks have written; an older one is replaced.
        rest: content of the file REST; only rank zero uses it.
    """

    def __init__(self, partial: Path, folder: Path, rest: bytes):
        super().__init__(partial)
        self.fs = CheckedFiles()
        self.folder, self.rest = folder, rest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """Write this rank's files; the result also has their checksums."""
        results = super().write_data(plan, planner).value()
        done: Future = Future()
        done.set_result((results, self.fs.written))
        return done

    def finish(
        self, metadata: Metadata, results: list[tuple[list[WriteResult], dict[str, Any]]]
    ) -> None:
        """Write the other files, on rank zero, and move the folder to its place."""
        super().finish(metadata, [of_rank for of_rank, _ in results])
        self.write_file(REST, self.rest)
        written = {name: facts for _, files in results for name, facts in files.items()}
        self.write_file(CHECKSUMS, checksum_lines(written | self.fs.written).encode())
        sync_folder(self.path)
        replace(self.path, self.folder)
        sync_folder(self.folder.parent)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file to the disk."""
        with self.fs.create_stream(self.path / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def checksum_lines(files: dict[str, tuple[int, int]]) -> str:
    """Return the content of the file CHECKSUMS."""
    lines = [f"{crc:08x} {size} {name}\n" for name, (size, crc) in sorted(files.items())]
    return "".join(lines)


def read_checksums(folder: Path) -> dict[str, tuple[int, int]] | None:
    """Read size and CRC-32 of each file of a folder; None if an older version wrote it.

    Raises:
        DamagedFile: the file is not as `checksum_lines` writes it.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    content = (folder / CHECKSUMS).read_bytes()
    try:
        lines = [line.split(" ") for line in content.decode().splitlines()]
        files = {name: (int(size), int(crc, 16)) for crc, size, name in lines}
        if checksum_lines(files).encode() == content:
            return files
    except ValueError:
        pass
    raise DamagedFile(f"{CHECKSUMS} is damaged")


# ---------------------------------------------------------------- reading


class ShardReader(dcp.FileSystemReader):
    """Reads entries of a sharded checkpoint on one device, without running code.

    A file is compared with its checksum when it is opened for the first time.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.fs = CheckedFiles(read_checksums(folder))
        self.metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Return the description of the shards, which is read and checked once."""
        if self.metadata is None:
            with self.fs.create_stream(self.path / DESCRIPTION, "rb") as file:
                self.metadata = MetadataUnpickler(file).load()
            check_shards(self.path, self.metadata)
        return self.metadata

    def load(self, state: dict[str, Any], planner: DefaultLoadPlanner) -> None:
        """Read entries into `state`.

        Args:
            state: tensors to fill by name, or the state that `planner` expects.
            planner: chooses the entries.

        Raises:
            UserError: a file is damaged.
        """
        try:
            _load_state_dict(state, storage_reader=self, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise refusal(self.path, first_failure(error)) from error


class ShardedWeights(Mapping[str, Tensor]):
    """The weights of a sharded checkpoint; each is read when it is asked for.

    Args:
        reader: reads them.
        prefix: beginning of the names of the weights, which their keys here leave out.
    """

    def __init__(self, reader: ShardReader, prefix: str = ""):
        self.reader = reader
        start = WEIGHTS + prefix
        entries = reader.read_metadata().state_dict_metadata
        self.entries = {n.removeprefix(start): e for n, e in entries.items() if n.startswith(start)}
        self.start = start

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        weight = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._read({name: weight})
        return weight

    def select(self, prefix: str) -> "ShardedWeights":
        """Return the weights whose names begin with `prefix`, without it."""
        return ShardedWeights(self.reader, self.start.removeprefix(WEIGHTS) + prefix)

    def on_meta(self) -> dict[str, Tensor]:
        """Return tensors of the same shapes and types without data."""
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self.entries.items()
        }

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Read all weights into tensors, of a module for example, one after the other.

        Raises:
            RuntimeError: names or shapes differ.
            UserError: a file is damaged.
        """
        for name in sorted(tensors.keys() | self.keys()):
            theirs = tuple(self.entries[name].size) if name in self.entries else "missing"
            ours = tuple(tensors[name].shape) if name in tensors else "missing"
            if ours != theirs:
                raise RuntimeError(f"{name} is {theirs} in the checkpoint and {ours} in the model")
        self._read({name: tensor.detach() for name, tensor in tensors.items()})

    def _read(self, tensors: dict[str, Tensor]) -> None:
        """Fill some tensors."""
        state = {self.start + name: tensor for name, tensor in tensors.items()}
        self.reader.load(state, DefaultLoadPlanner(flatten_state_dict=False))


def without_data(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors of the weights' shapes; a sharded checkpoint is not read."""
    return weights.on_meta() if isinstance(weights, ShardedWeights) else weights


def load_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a module; a sharded checkpoint is read straight into it.

    Raises:
        RuntimeError: they do not fit.
    """
    if isinstance(weights, ShardedWeights):
        weights.read_into(module.state_dict())
    else:
        module.load_state_dict(weights)


def read_sharded(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint in the form of one file.

    Its "state_dict" is a `ShardedWeights`, and its "optimizer_states", if any, are read when they
    are asked for, once; their parameters are named and not numbered.

    Raises:
        UserError: a file is missing or damaged, or would run code.
    """
    reader, rest = open_sharded(folder)
    weights = ShardedWeights(reader)
    checkpoint = rest | {"state_dict": weights}
    names = reader.read_metadata().state_dict_metadata
    count = len({name.split(".")[0] for name in names if name.startswith(OPTIMIZER)})
    if count:
        checkpoint["optimizer_states"] = (read_optimizer(reader, n) for n in range(count))
    return checkpoint


def read_optimizer(reader: ShardReader, number: int) -> dict[str, Any]:
    """Read the state of an optimizer."""
    state: dict[str, Any] = {}
    name = f"{OPTIMIZER}{number}"
    reader.load(state, _EmptyStateDictLoadPlanner(keys={name}))
    return state[name]


def open_sharded(folder: Path) -> tuple[ShardReader, dict[str, Any]]:
    """Return a reader of a sharded checkpoint, and the content of its file REST.

    Raises:
        UserError: a file is missing or too short, or an entry is anything but tensors and numbers.
    """
    try:
        reader = ShardReader(folder)
        reader.read_metadata()
        reader.fs.verify(folder / REST)
        rest = load_checkpoint(folder / REST)
        if not isinstance(rest, dict):
            raise ValueError(f"{REST} is not part of a checkpoint")
        return reader, rest
    except Exception as error:  # pickle and torch raise many types for other content
        raise refusal(folder, error) from error


def refusal(folder: Path, error: Exception) -> UserError:
    """Return the error for an incomplete or damaged folder."""
    return UserError(
        f"{folder} is not a complete sharded checkpoint of tf_lightning "
        f"({first_sentence(error)}); use an earlier one"
    )


def first_failure(error: CheckpointException) -> BaseException:
    """Return the error of the first rank that failed."""
    return next(iter(error.failures.values()))[0]


# ---------------------------------------------------------------- checks


def check_sharded(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Refuse a sharded checkpoint that is incomplete or damaged, or that would run code.

    Args:
        folder: its folder.
        share: (r, n): verify the checksums of every n-th file, beginning with file r.

    Raises:
        UserError: a file is missing, too short or damaged, or an entry is anything but tensors and
            numbers.
    """
    reader, _ = open_sharded(folder)
    names = sorted(reader.fs.recorded or ())[share[0] :: share[1]]
    try:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(reader.fs.verify, [folder / name for name in names]))
    except (DamagedFile, OSError) as error:
        raise refusal(folder, error) from error


class MetadataUnpickler(pickle.Unpickler):
    """Builds only the classes that describe the shards of a checkpoint, and calls nothing else."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    OTHERS = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_rebuild_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> object:
        """Return a class of the metadata, or refuse it."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self.MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif is_dtype or (module, name) in self.OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


def check_shards(folder: Path, metadata: Metadata) -> None:
    """Check that every entry is in its file, and that entries other than tensors run no code.

    Raises:
        ValueError: a file is too short, or outside of the folder, or smaller than its tensors.
        Exception: a file is missing, or torch's restricted unpickler refuses an entry.
    """
    num_bytes, sizes = dict.fromkeys(metadata.state_dict_metadata, 0), {}
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a file of this folder")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        if sizes[name] < place.offset + place.length:
            raise ValueError(f"{name} is cut off")
        num_bytes[index.fqn] += place.length
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (folder / name).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            check_parts(name, entry, num_bytes[name])
        elif name.startswith(WEIGHTS):
            raise ValueError(f"{name} is not a tensor")


def check_parts(name: str, entry: TensorStorageMetadata, num_bytes: int) -> None:
    """Check that a tensor has as many elements as its parts, and no more than its data."""
    count = math.prod(entry.size)
    parts = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if parts != count or count * entry.properties.dtype.itemsize > num_bytes:
        raise ValueError(f"parts of {name} are missing")
