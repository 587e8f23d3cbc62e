"""Sharded checkpoints of one process, as a run with FSDP2 writes them, and damage to them."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tf_lightning.files import partial_folder
from tf_lightning.sharded import ShardWriter


def write_sharded(checkpoint: dict[str, Any], folder: Path, num_files: int = 1) -> Path:
    """Write a checkpoint as a sharded folder; return the folder.

    Args:
        checkpoint: in the form of one file.
        folder: the folder to write.
        num_files: number of its shards.
    """
    checkpoint, rest = copy.copy(checkpoint), io.BytesIO()
    state = {"state_dict": checkpoint.pop("state_dict")}
    for number, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
        state[f"optimizer_{number}"] = optimizer
    torch.save(checkpoint, rest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(partial_folder(folder), folder, rest.getvalue())
    writer.thread_count = num_files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it saves without other ranks
        dcp.save(state, storage_writer=writer, no_dist=True)
    return folder


def flip_bit(file: Path, bit: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
