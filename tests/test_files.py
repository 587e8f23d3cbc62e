"""Files and folders are written completely or not at all."""

import pytest

from tf_lightning.files import atomic_file, atomic_folder, publish_folder


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
