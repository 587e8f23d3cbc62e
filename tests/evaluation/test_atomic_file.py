"""Files of `evaluation` are written completely or not at all."""

import pytest

from evaluation.files import atomic_file


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
