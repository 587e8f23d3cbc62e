"""Files and folders are written completely or not at all."""

import os
import signal
from pathlib import Path

import pytest

from tf_lightning.files import (
    MACHINE,
    atomic_file,
    atomic_folder,
    partial_folder,
    partial_path,
    publish_folder,
)


def test_a_file_replaces_the_older_one_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


def test_a_block_that_raises_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_folder_replaces_the_older_one_when_the_block_succeeds(tmp_path):
    folder = tmp_path / "parent" / "folder"
    for content in ("old", "new"):
        with atomic_folder(folder) as partial:
            (partial / content).write_text(content)
    assert [file.name for file in folder.iterdir()] == ["new"]
    assert [*folder.parent.iterdir()] == [folder]


def test_a_block_that_raises_leaves_the_older_folder(tmp_path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    assert [file.name for file in folder.iterdir()] == ["old"]
    assert [*tmp_path.iterdir()] == [folder]


def test_the_first_of_two_processes_publishes_its_folder(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        publish_folder(tmp_path / name, tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert (tmp_path / "second").is_dir() and not (tmp_path / "first").exists()


def killed_while_writing(folder: Path) -> None:
    """Write a file and two folders, one of them in place of an older one, and be killed."""
    rename = os.rename

    def killed_after(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = killed_after  # the first rename moves the older folder away
    partial_path(folder / "a.txt").write_text("half")
    (partial_folder(folder / "half") / "file").write_text("half")
    with atomic_folder(folder / "replaced") as partial:
        (partial / "new").write_text("new")


def test_what_a_killed_process_left_is_removed_and_a_moved_folder_gets_its_name_back(tmp_path):
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / "old").write_text("old")
    if (child := os.fork()) == 0:
        killed_while_writing(tmp_path)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and len([*tmp_path.iterdir()]) == 4
    with atomic_file(tmp_path / "b.txt") as partial:
        partial.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "replaced"]
    assert [path.name for path in (tmp_path / "replaced").iterdir()] == ["old"]


def test_what_running_processes_and_other_machines_write_stays(tmp_path):
    names = [f".a.txt.{MACHINE}-{os.getppid()}.partial", ".a.txt.00000000-99999999.partial"]
    names += [".notes.partial", f"a.txt.{MACHINE}-99999999.partial"]
    for name in names:
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a.txt"}
