"""Checkpoint files: whole or not there, with a checksum that finds every change."""

import errno
import os
import sys
import warnings
import zipfile
import zlib

import pytest
import safetensors.torch
import torch

from tf_lightning import checkpoint_file
from tf_lightning.checkpoint_file import (
    TRAILER_SIZE,
    DamagedFile,
    check,
    combine,
    load_checkpoint,
    lock,
    num_bytes,
    reserve,
    trailer,
    write_checkpoint,
)
from tf_lightning.errors import UserError

CHECKPOINT = {"weights": torch.arange(99).reshape(9, 11) / 7, "names": ["a", {"b": 1.5}]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "step.ckpt"
    write_checkpoint(CHECKPOINT, path)
    return path


def test_memory_that_tensors_share_is_counted_once():
    whole = torch.zeros(8, 5)
    saved = {"whole": whole, "views": [whole[2:], whole.T], "other": torch.zeros(3), "name": "a"}
    assert num_bytes(saved) == 4 * (8 * 5 + 3)
    assert num_bytes({"sparse": torch.eye(3).to_sparse()}) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="fallocate is Linux's")
def test_reserved_space_does_not_change_the_size_of_a_file(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"abc")
        reserve(file, 10 << 20)
        found = os.fstat(file.fileno())
        assert found.st_size == 3 and 512 * found.st_blocks in (10 << 20, 4096)  # reserved, or not


def test_a_disk_with_too_little_space_is_told_before_writing(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file, pytest.raises(OSError) as error:
        reserve(file, 1 << 60)
    assert error.value.errno == errno.ENOSPC and (tmp_path / "file").stat().st_size == 0


def test_large_tensors_are_read_as_they_were_written(tmp_path):
    large = {name: torch.randn(3_000_000) for name in "abc"}  # 12 MB each
    write_checkpoint(large, tmp_path / "large.ckpt")
    read = load_checkpoint(tmp_path / "large.ckpt")
    assert all(torch.equal(read[name], large[name]) for name in large)


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
    def fail(file, data):
        file.write(data[:10])
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(checkpoint_file, "write_all", fail)
    with pytest.raises(UserError, match=f"no space left on the disk of {file.parent}"):
        write_checkpoint(CHECKPOINT, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["step.ckpt"]


def test_what_killed_writes_left_is_removed(file):
    (file.parent / ".step.ckpt.123.partial").write_bytes(b"half")
    (file.parent / ".last.ckpt.123.partial").symlink_to("gone.ckpt")
    (file.parent / "notes.partial").write_bytes(b"of someone else")
    write_checkpoint(CHECKPOINT, file.with_name("next.ckpt"))
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == ["next.ckpt", "notes.partial", "step.ckpt"]


def test_what_another_process_is_writing_is_kept(file):
    partial = file.parent / ".other.ckpt.123.partial"
    with partial.open("wb") as writing:
        lock(writing)
        write_checkpoint(CHECKPOINT, file)
        assert partial.exists()
    write_checkpoint(CHECKPOINT, file)
    assert not partial.exists()


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


@pytest.mark.parametrize("size", [0, 1, 99, 1000])
def test_checksums_of_blocks_combine_to_that_of_the_whole(size):
    one, two = b"one block" * 7, bytes(range(256)) * 4
    whole = zlib.crc32(one + two[:size])
    assert combine(zlib.crc32(one), zlib.crc32(two[:size]), size) == whole


def test_the_checksum_of_many_blocks_is_that_of_the_file(file, monkeypatch):
    content = file.read_bytes()
    assert content.endswith(trailer(zlib.crc32(content[:-TRAILER_SIZE] + b"\0\0")))
    monkeypatch.setattr(checkpoint_file, "BLOCK", 100)
    check(file)


def test_a_file_is_sent_to_the_disk_while_it_is_written(file, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "SEND_SIZE", 1)
    monkeypatch.setattr(checkpoint_file, "SMALL", 0)  # each piece has its checksum from the thread
    write_checkpoint(CHECKPOINT, file)
    assert torch.equal(load_checkpoint(file)["weights"], CHECKPOINT["weights"])


def test_an_old_file_is_verified_once(file, monkeypatch):
    count = []
    compute = checkpoint_file.FileChecksum.result
    monkeypatch.setattr(
        checkpoint_file.FileChecksum, "result", lambda self: count.append(1) or compute(self)
    )
    load_checkpoint(file)
    load_checkpoint(file)
    assert len(count) == 2  # a change within the clock's resolution would not be seen
    monkeypatch.setattr(checkpoint_file, "SETTLED", 0)
    for _ in range(3):
        load_checkpoint(file)
    assert len(count) == 3
    content = bytearray(file.read_bytes())
    content[content.index(CHECKPOINT["weights"].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFile):
        load_checkpoint(file)


def rewrite(file, change) -> None:
    """Write an archive's members again, without checksum, after `change` has edited the list."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        with zipfile.ZipFile(file, "w", change(members)) as archive:
            for name, content in members:
                archive.writestr(name, content)


def test_an_archive_that_torch_did_not_write_is_refused(file):
    rewrite(file, lambda members: zipfile.ZIP_STORED)
    assert load_checkpoint(file)["names"] == CHECKPOINT["names"]
    rewrite(file, lambda members: zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedFile, match="is compressed"):
        load_checkpoint(file)
    rewrite(file, lambda members: members.append(members[-1]) or zipfile.ZIP_STORED)
    with pytest.raises(DamagedFile, match="two members of one name"):
        load_checkpoint(file)


def test_members_that_share_bytes_are_refused(file):
    """A small file would fill the memory."""
    rewrite(file, lambda members: zipfile.ZIP_STORED)
    content = bytearray(file.read_bytes())
    first = content.index(b"PK\1\2")
    for entry in (first, content.index(b"PK\1\2", first + 1)):  # each with most of the file
        content[entry + 20 : entry + 28] = 2 * (len(content) * 2 // 3).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="larger than the file"):
        load_checkpoint(file)


def test_a_file_of_another_program_is_refused(file):
    file.write_bytes(safetensors.torch.save({"weights": CHECKPOINT["weights"]}))
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(file)


def test_a_link_and_its_target_on_another_disk_are_read_and_the_link_is_replaced(file, tmp_path):
    link = tmp_path / "link.ckpt"
    link.symlink_to(file)
    assert load_checkpoint(link)["names"] == CHECKPOINT["names"]
    write_checkpoint({"names": []}, link)
    assert load_checkpoint(link)["names"] == [] and not link.is_symlink()
    assert load_checkpoint(file)["names"] == CHECKPOINT["names"]


def test_another_name_of_the_file_keeps_the_old_content(file, tmp_path):
    os.link(file, tmp_path / "kept.ckpt")
    write_checkpoint({"names": []}, file)
    assert load_checkpoint(tmp_path / "kept.ckpt")["names"] == CHECKPOINT["names"]
