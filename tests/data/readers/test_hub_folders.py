"""Data sets on the hub and folders of object stores are read as local folders are."""

import json
from contextlib import suppress

import pytest

from support.files import encoded_image, write_parquet
from support.hub import hub_server
from support.training_datasets import shown
from tf_lightning.data import ImageFiles
from tf_lightning.data.documents import Skipped
from tf_lightning.data.mixture import texts
from tf_lightning.data.readers.caption_source import caption_source
from tf_lightning.data.readers.source_report import report_source
from tf_lightning.errors import UserError

RED, BLUE, LIME = (encoded_image(color) for color in ("red", "blue", "lime"))
URL = "hf://datasets/me/data"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts files into a data set on the hub."""
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(tmp_path / "downloads"))
    site = tmp_path / "site"
    site.mkdir()

    def put(files: dict[str, bytes | list]) -> None:
        for name, content in files.items():
            if name.endswith(".parquet"):
                content = write_parquet(tmp_path / "rows.parquet", content).read_bytes()
            elif isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content).encode()
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(content)

    with hub_server(site):
        yield put


def read(**options) -> list:
    source = caption_source(URL, val_fraction=0, image_size=16, **options)
    found = source.documents("train")
    return [one.reason if isinstance(one, Skipped) else shown(one) for one in found]


TABLE = {
    "train/red.png": RED,
    "train/metadata.jsonl": [{"file_name": "red.png", "text": "a table"}],
    "test/1.png": LIME,
    "test/metadata.jsonl": [{"file_name": "1.png", "text": "of the test"}],
}
PARQUET = {
    "data/train-00000-of-00001.parquet": [
        {"image": {"bytes": RED, "path": None}, "text": "a row", "alt": "another"}
    ],
    "data/test-00000-of-00001.parquet": [{"image": {"bytes": LIME, "path": None}, "text": "test"}],
    "README.md": b"# about",
    "dataset_infos.json": b"{}",
}
BESIDE = {"train/b/1.png": BLUE, "train/b/1.txt": b"a text"}
NAMES = {"train/cats/IMG_1234.png": RED, "train/a_dog_01.png": BLUE, "test/a_bird.png": LIME}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (TABLE, [["a table", "<red>"]]),
        (PARQUET, [["a row", "<red>"]]),
        (BESIDE, [["a text", "<blue>"]]),
        (NAMES, [["a dog", "<blue>"], ["cats", "<red>"]]),
        (TABLE | BESIDE, [["a table", "<red>"], ["a text", "<blue>"]]),
    ],
)
def test_a_data_set_of_the_hub_is_read_in_any_layout(files, expected, hub):
    hub(files)
    assert sorted(read()) == expected
    source = caption_source(URL, val_fraction=0, image_size=16)
    report = "\n".join(report_source("captions", source))
    assert all(f'"{caption}"' in report for caption, _ in expected)

    def identity(source) -> tuple[str, str]:
        return source.fingerprint("train"), getattr(source, "image_digest", str)("train")

    before = identity(source)
    changed = {name: encoded_image("white") for name in files if name.endswith(".png")}
    hub(changed or {name: 2 * rows for name, rows in files.items() if name.startswith("data/")})
    assert identity(caption_source(URL, val_fraction=0, image_size=16)) != before


def test_names_of_images_are_not_names_of_splits(hub):
    hub({"a_train_01.jpg": RED, "crash_test_01.jpg": BLUE, "crash_test_02.jpg": LIME})
    assert len(read()) == 3
    hub({"a_train_01.txt": b"rails", "crash_test_01.txt": b"a wall", "crash_test_02.txt": b"dust"})
    assert sorted(read()) == [["a wall", "<blue>"], ["dust", "<lime>"], ["rails", "<red>"]]


def test_the_reader_does_not_depend_on_what_is_in_the_cache(hub):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    hub({f"data/{name}-00000.parquet": [{"messages": talk}] for name in ("train", "test")})
    first = caption_source(URL, val_fraction=0, image_size=16)
    with suppress(UserError):
        list(first.documents("train"))  # copies the file into the cache
    second = caption_source(URL, val_fraction=0, image_size=16)
    assert type(second) is type(first)
    assert second.fingerprint("train") == first.fingerprint("train")


def test_columns_are_chosen_by_name(hub):
    hub(PARQUET)
    assert read(caption_key="alt") == [["another", "<red>"]]
    source = caption_source(URL, val_fraction=0, caption_key="none")
    message = "no caption: found alt, image, text; wanted one of none; choose with caption_key"
    with pytest.raises(UserError, match=message):
        list(texts({"captions": source}))


def test_images_without_captions_train_an_autoencoder(hub):
    hub(NAMES)
    for path in (URL, f"{URL}/"):
        images = list(ImageFiles(path, val_fraction=0, image_size=16).documents("train"))
        assert len(images) == 3


def test_a_data_set_that_is_not_there_ends_in_one_sentence(hub):
    with pytest.raises(UserError, match=f"{URL} has no files; check the name"):
        caption_source(URL)
