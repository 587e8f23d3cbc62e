"""Sharded checkpoints of somebody else run no code; damaged and incomplete ones are refused."""

import gc
import os
import pickle
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from support.compare import bit_equal
from support.sharded_folders import flip_bit, write_sharded
from tf_lightning.checkpoint import select_weights, step_of
from tf_lightning.checkpoint_file import write_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.sharded import (
    check_sharded,
    is_sharded,
    load_into,
    open_sharded,
    read_sharded,
    without_data,
)


def save(folder: Path, **entries) -> Path:
    """Write a sharded checkpoint with these entries besides tensors and numbers."""
    tensors = {"weights": torch.ones(3, 4), "step": 3, "names": ["a"]}
    torch.distributed.checkpoint.save(tensors | entries, checkpoint_id=folder)
    torch.save({"global_step": 3}, folder / "meta.pt")
    return folder


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


class Hidden:
    """Reaches a function through a module that descriptions of shards come from."""

    def __reduce__(self):
        return torch.distributed.checkpoint.metadata.field, ()


@pytest.mark.parametrize("content", [Evil(), Hidden(), print, {"a": Evil}])
def test_the_metadata_of_a_sharded_checkpoint_runs_no_code(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="not a complete sharded checkpoint"):
        check_sharded(tmp_path)
    assert not (tmp_path / "RAN").exists()


def test_an_entry_that_is_no_tensor_runs_no_code(tmp_path, monkeypatch):
    """torch.distributed.checkpoint reads these entries with weights_only=False."""
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "step.ckpt", rate=Evil())
    with pytest.raises(UserError, match="not a complete sharded checkpoint"):
        check_sharded(folder)
    assert not (tmp_path / "RAN").exists()
    read = {"rate": None}
    torch.distributed.checkpoint.load(read, checkpoint_id=folder)
    assert (tmp_path / "RAN").exists()  # what the check prevents


def test_a_sharded_checkpoint_of_torch_is_accepted_when_it_is_complete(tmp_path):
    folder = save(tmp_path / "whole", betas=(0.9, 0.95))
    check_sharded(folder)
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        killed = Path(shutil.copytree(folder, tmp_path / name.strip(".")))
        (killed / name).unlink()
        assert is_sharded(killed)
        with pytest.raises(UserError, match="not a complete sharded checkpoint"):
            check_sharded(killed)
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is cut off"):
        check_sharded(folder)


def test_a_shard_outside_of_the_folder_is_refused(tmp_path):
    folder = save(tmp_path / "step.ckpt")
    description = pickle.loads((folder / ".metadata").read_bytes())
    for place in description.storage_data.values():
        place.relative_path = "../step.ckpt/" + place.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(description))
    with pytest.raises(UserError, match="is not a file of this folder"):
        check_sharded(folder)


# ---------------------------------------------------------------- reading, with checksums


def small(**entries) -> dict:
    """A small checkpoint with weights, an optimizer and what else belongs to it."""
    weights = {"net.a": torch.arange(12.0).view(3, 4), "ema.a": torch.ones(3, 4), "net.b": ONE}
    state = {"net.a": {"exp_avg": torch.full((3, 4), 2.0), "step": torch.tensor(3.0)}}
    groups = [{"params": ["net.a"], "lr": 0.1, "betas": (0.9, 0.95)}, {"params": [], "lr": 0.2}]
    optimizers = [{"state": state, "param_groups": groups}]
    rest = {"global_step": 3, "image_codec": None}
    return rest | {"state_dict": weights, "optimizer_states": optimizers} | entries


ONE = torch.tensor([1], dtype=torch.int64)
FILES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "meta.pt", "checksums.txt")


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_sharded_checkpoint_is_read_as_it_was_written(num_files, tmp_path):
    folder = write_sharded(small(), tmp_path / "step.ckpt", num_files)
    assert {path.name for path in folder.iterdir()} == {*FILES} - {*FILES[1 : 3 - num_files]}
    check_sharded(folder)
    read = read_sharded(folder)
    read["state_dict"] = dict(read["state_dict"])
    read["optimizer_states"] = list(read["optimizer_states"])
    assert bit_equal(read, small())


def test_weights_are_selected_and_read_into_a_module(tmp_path):
    weights = read_sharded(write_sharded(small(), tmp_path / "step.ckpt"))["state_dict"]
    selected, kind = select_weights(weights)
    assert (kind, [*selected], selected["a"].sum()) == ("ema", ["a"], 12)
    net = select_weights(weights, "raw")[0]
    assert {name: tuple(w.shape) for name, w in without_data(net).items()} == {
        "a": (3, 4),
        "b": (1,),
    }
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"b is \(1,\) in the checkpoint and missing in the"):
        load_into(module, net)
    module.register_buffer("b", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"b is \(1,\) in the checkpoint and \(2,\) in the"):
        load_into(module, net)
    module.b = torch.zeros(1, dtype=torch.int64)
    load_into(module, net)
    assert bit_equal(module.state_dict(), {"a": small()["state_dict"]["net.a"], "b": ONE})


def read_everything(folder: Path) -> None:
    read = read_sharded(folder)
    dict(read["state_dict"])
    list(read["optimizer_states"])


@pytest.mark.parametrize("read", [check_sharded, read_everything])
def test_every_flipped_bit_is_refused(read, tmp_path):
    folder = write_sharded(small(), tmp_path / "step.ckpt", num_files=2)
    rng = random.Random(0)
    for name in FILES:
        file = folder / name
        whole = file.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), 80 if name.endswith("distcp") else 20):
            flip_bit(file, bit)
            with pytest.raises(UserError, match="not a complete sharded checkpoint"):
                read(folder)
            file.write_bytes(whole)
    read(folder)


@pytest.mark.parametrize("name", FILES[:4])
def test_a_missing_or_truncated_file_is_refused(name, tmp_path):
    folder = write_sharded(small(), tmp_path / "step.ckpt", num_files=2)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} has .* bytes instead of|{name} is cut off"):
        open_sharded(folder)
        check_sharded(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"(?s)not a complete.*{name}.*; use an earlier one"):
        check_sharded(folder)


def test_each_rank_verifies_a_share_of_the_files(tmp_path):
    folder = write_sharded(small(), tmp_path / "step.ckpt", num_files=2)
    flip_bit(folder / "__0_1.distcp", 4000)
    refused = []
    for rank in range(2):
        try:
            check_sharded(folder, (rank, 2))
        except UserError as error:
            refused.append((rank, "__0_1.distcp does not have its checksum" in str(error)))
    assert refused in ([(0, True)], [(1, True)])


def test_weights_are_read_without_a_second_copy_in_memory(tmp_path):
    """Above the module's own memory, less than a quarter of 12 weights is needed.

    Each has 36 MB, so that its memory is new: malloc takes smaller pieces from what was freed.
    """
    count, length = 12, 9 * 2**20
    weights = {f"net.{n}": torch.full((length,), float(n)) for n in range(count)}
    folder = write_sharded(small(state_dict=weights), tmp_path / "step.ckpt", num_files=4)
    module = torch.nn.Module()
    for n in range(count):
        module.register_buffer(str(n), torch.zeros(length))
    with PeakMemory() as peak:
        load_into(module, read_sharded(folder)["state_dict"].select("net."))
    assert all(int(module.get_buffer(str(n))[-1]) == n for n in range(count))
    assert peak.growth < 4 * count * length / 4
    with PeakMemory() as peak:  # the measurement finds a copy
        copies = dict(read_sharded(folder)["state_dict"])
    assert peak.growth > 0.9 * 4 * count * length and len(copies) == count


class PeakMemory:
    """The largest growth of this process's memory, without that of mapped files, in a block."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.begin, self.growth, self.ended = anonymous_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.001):
            self.growth = max(self.growth, anonymous_memory() - self.begin)

    def __exit__(self, *error) -> None:
        self.growth = max(self.growth, anonymous_memory() - self.begin)
        self.ended.set()
        self.thread.join()


def anonymous_memory() -> int:
    """Bytes of this process's memory that are not of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1])


# ---------------------------------------------------------------- writing


def test_an_older_checkpoint_of_the_name_is_replaced_whether_file_or_folder(tmp_path):
    path = tmp_path / "step.ckpt"
    write_checkpoint(small(global_step=1), path)
    write_sharded(small(global_step=2), path)
    assert step_of(path) == 2
    write_sharded(small(global_step=3), path)
    assert step_of(path) == 3
    write_checkpoint(small(global_step=4), path)
    assert step_of(path) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["step.ckpt"]


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    path = write_sharded(small(global_step=1), tmp_path / "step.ckpt")

    def fail(*arguments):
        raise OSError("the disk is broken")

    monkeypatch.setattr("tf_lightning.sharded.sync_folder", fail)
    with pytest.raises(CheckpointException, match="the disk is broken"):
        write_sharded(small(global_step=2), path)
    assert step_of(path) == 1
    check_sharded(path)
