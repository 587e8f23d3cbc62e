"""Files of `evaluation` are written completely or not at all."""

import multiprocessing
import os
import signal

import pytest

from evaluation.files import MACHINE, atomic_file
from tf_lightning import files


def test_a_file_is_replaced_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with atomic_file(path) as file:
            file.write_text(text)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def killed_while_writing(path) -> None:
    with atomic_file(path) as file:
        file.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_and_other_files_are_not(tmp_path):
    path = tmp_path / "a.json"
    process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(path,))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    assert left.name == f".a.json.{MACHINE}-{process.pid}.partial"
    running = tmp_path / f".a.json.{MACHINE}-{os.getppid()}.partial"
    elsewhere = tmp_path / f".a.json.00000000-{process.pid}.partial"
    another = tmp_path / f".b.json.{MACHINE}-{process.pid}.partial"
    for file in (running, elsewhere, another):
        file.touch()
    with atomic_file(path) as file:
        file.write_text("new")
    assert {*tmp_path.iterdir()} == {path, running, elsewhere, another}


def test_temporary_files_have_the_names_that_the_package_clears(tmp_path):
    with atomic_file(tmp_path / "a.json") as file:
        assert files.UNFINISHED.fullmatch(file.name)
        file.touch()
