"""Which names are hub names, and which files are JSON objects."""

import pytest

from tf_lightning.errors import UserError
from tf_lightning.hub import find_folder, is_hub_name, read_json


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model", True),
        ("model", False),
        ("owner/model/part", False),
        ("/owner", False),
        ("./model", False),
        ("../model", False),
        ("runs/last.ckpt", False),
        ("data/tokenizer.model", False),
        ("folder/tokenizer.json", False),
        ("folder/vae.safetensors", False),
    ],
)
def test_hub_names_have_an_owner_and_a_model(name, expected):
    assert is_hub_name(name) == expected


def test_an_existing_path_is_not_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/model")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert not is_hub_name("owner/model")
    assert find_folder("owner/model", []).is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config.json in"),
        ("{", "cannot be read"),
        ("[1]", "does not hold a JSON object"),
    ],
)
def test_files_that_are_not_json_objects_are_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_json(file)
