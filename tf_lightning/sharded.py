"""Checks of sharded checkpoints, folders of torch.distributed.checkpoint, before torch reads them.

torch unpickles `.metadata`, which describes the shards, and every entry that is no tensor without
any restriction, so a folder of somebody else could run code.
"""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tf_lightning.errors import UserError, first_sentence

DESCRIPTION, REST = ".metadata", "meta.pt"  # of the shards; what is neither weight nor optimizer


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
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


def is_sharded(path: Path) -> bool:
    """Return whether a path is the folder of a sharded checkpoint, which may be incomplete."""
    return any((path / name).is_file() for name in (DESCRIPTION, REST))


def check_sharded(folder: Path) -> None:
    """Refuse a sharded checkpoint that is incomplete, or that would run code.

    Raises:
        UserError: a file is missing or too short, or an entry is anything but tensors and numbers.
    """
    try:
        with (folder / DESCRIPTION).open("rb") as file:
            check_shards(folder, MetadataUnpickler(file).load())
        torch.load(folder / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch raise many types for other content
        raise UserError(
            f"{folder} is no complete sharded checkpoint of tf_lightning "
            f"({first_sentence(error)}); use an earlier one"
        ) from error


def check_shards(folder: Path, metadata: Metadata) -> None:
    """Check that every entry is in its file, and that those which are no tensors run no code.

    Raises:
        ValueError: a file is too short, or outside of the folder.
        Exception: a file is missing, or torch's restricted unpickler refuses an entry.
    """
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{place.relative_path!r} is no file of this folder")
        with (folder / place.relative_path).open("rb") as file:
            if file.seek(0, io.SEEK_END) < place.offset + place.length:
                raise ValueError(f"{place.relative_path} is cut off")
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
