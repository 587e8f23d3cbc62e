"""Checkpoint files: whole or not there, with a checksum that finds every change."""

import zipfile

import pytest
import torch

from tf_lightning import checkpoint_file
from tf_lightning.checkpoint_file import DamagedFile, check, load_checkpoint, write_checkpoint
from tf_lightning.errors import UserError

CHECKPOINT = {"weights": torch.arange(99).reshape(9, 11) / 7, "names": ["a", {"b": 1.5}]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "step.ckpt"
    write_checkpoint(CHECKPOINT, path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_is_read_as_it_was_written(mmap, file):
    read = load_checkpoint(file, mmap)
    assert torch.equal(read["weights"], CHECKPOINT["weights"])
    assert read["names"] == CHECKPOINT["names"]
    assert [path.name for path in file.parent.iterdir()] == ["step.ckpt"]


def test_other_programs_read_the_file(file):
    assert torch.equal(torch.load(file, weights_only=True)["weights"], CHECKPOINT["weights"])
    assert zipfile.ZipFile(file).comment.startswith(b"crc32:")


def test_every_flipped_bit_and_every_cut_is_found(file):
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 21):  # all bits of a byte, and all places of a block
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            check(file)
    for length in range(2, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            check(file)
    file.write_bytes(whole)
    check(file)


def test_a_damaged_file_is_refused_although_torch_reads_it(file):
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(CHECKPOINT["weights"].numpy().tobytes())] ^= 1
    file.write_bytes(damaged)
    torch.load(file, weights_only=True)
    with pytest.raises(DamagedFile):
        load_checkpoint(file)


def test_a_file_without_a_checksum_is_read(file):
    torch.save(CHECKPOINT, file)
    assert load_checkpoint(file)["names"] == CHECKPOINT["names"]
    torch.save(CHECKPOINT, file, _use_new_zipfile_serialization=False)  # older than the archives
    assert load_checkpoint(file)["names"] == CHECKPOINT["names"]


def test_a_full_disk_is_named_and_leaves_the_older_file(file, monkeypatch):
    def fail(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(checkpoint_file.torch, "save", fail)
    with pytest.raises(UserError, match=f"no space left on the disk of {file.parent}"):
        write_checkpoint(CHECKPOINT, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["step.ckpt"]


def test_what_killed_writes_left_is_removed(file):
    (file.parent / ".step.ckpt.123.partial").write_bytes(b"half")
    (file.parent / "notes.partial").write_bytes(b"of someone else")
    write_checkpoint(CHECKPOINT, file.with_name("next.ckpt"))
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == ["next.ckpt", "notes.partial", "step.ckpt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(file, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(checkpoint_file.os, name)

        def record(*args, name=name, original=original):
            done.append(name)
            return original(*args)

        monkeypatch.setattr(checkpoint_file.os, name, record)
    write_checkpoint(CHECKPOINT, file)
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder
