"""Sharded checkpoints of somebody else run no code, and incomplete ones are refused."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from tf_lightning.errors import UserError
from tf_lightning.sharded import check_sharded, is_sharded


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
    with pytest.raises(UserError, match="no complete sharded checkpoint"):
        check_sharded(tmp_path)
    assert not (tmp_path / "RAN").exists()


def test_an_entry_that_is_no_tensor_runs_no_code(tmp_path, monkeypatch):
    """torch.distributed.checkpoint reads these entries with weights_only=False."""
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "step.ckpt", rate=Evil())
    with pytest.raises(UserError, match="no complete sharded checkpoint"):
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
        with pytest.raises(UserError, match="no complete sharded checkpoint"):
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
    with pytest.raises(UserError, match="is no file of this folder"):
        check_sharded(folder)
