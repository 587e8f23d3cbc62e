"""Ids of samples: unique within a file, and the same whatever split or files are read."""

import random
from pathlib import Path

from support.files import encoded_image, write_tar
from support.sources import GreyImages
from tf_lightning.data.documents import identified
from tf_lightning.data.readers.captions import CaptionFolders, CaptionTars, ImageFiles
from tf_lightning.data.readers.ids import SampleIds, file_id
from tf_lightning.data.readers.text import TextFiles

FILE = Path("a/b.json")


def named(keys: list[str]) -> list[str]:
    ids = SampleIds(FILE)
    return [ids.next(key, ("sample", key)) for key in keys]


def test_a_sample_is_named_by_its_file_and_key_and_repeated_keys_are_numbered():
    assert named(["0", "1", "2"]) == ["a/b.json:0", "a/b.json:1", "a/b.json:2"]
    assert named(["x.jpg", "y.jpg", "x.jpg"]) == [
        "a/b.json:x.jpg", "a/b.json:y.jpg", "a/b.json:x.jpg#2"
    ]  # fmt: skip
    assert named(["", "", ""]) == ["a/b.json", "a/b.json#2", "a/b.json#3"]


def test_ids_are_unique_whether_keys_are_numbers_names_or_both():
    draw = random.Random(0)
    for _ in range(300):
        keys = [draw.choice([str(n), str(draw.randrange(12)), "", "a"]) for n in range(12)]
        ids = named(keys)
        assert len(set(ids)) == len(ids), keys
        # The n-th sample of a key has the key's n-th id.
        for key in set(keys):
            found = [one for one, own in zip(ids, keys, strict=True) if own == key]
            name = f"a/b.json:{key}" if key else "a/b.json"
            assert found == [name, *(f"{name}#{n}" for n in range(2, len(found) + 1))]


def test_numbers_as_keys_are_not_remembered():
    ids = SampleIds(FILE)
    for number in range(1000):
        ids.next(str(number), number)
    assert not ids.repeats and not ids.not_numbers


def test_an_id_is_one_line_and_no_comment():
    assert file_id(Path("#1.jpg")) == "./#1.jpg"
    assert file_id(Path("a\tb\n.jpg")) == "a?b?.jpg"
    assert named(["a\nb"]) == ["a/b.json:a?b"]


def test_ids_of_files_do_not_depend_on_the_split(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"text {n}" for n in range(40)))
    ids = {}
    for fraction in (0, 0.5):
        source = TextFiles(f"{tmp_path}/a.txt", val_fraction=fraction)
        for split in ("train", "val"):
            found = dict(identified("text", source, split))
            ids.setdefault(fraction, {}).update({str(d): one for one, d in found.items()})
    assert ids[0] == ids[0.5]


def test_each_kind_of_source_names_its_documents(tmp_path):
    image = encoded_image()
    write_tar(tmp_path / "a.tar", {"x.png": image, "x.txt": b"one", "y.png": image, "y.txt": b"2"})
    for folder in ("cats", "dogs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(image)
        (tmp_path / folder / "1.txt").write_text("one")
    pictures = f"{tmp_path}/*/1.*"

    def ids(source):
        return [one.removeprefix(f"{tmp_path}/") for one, _ in identified("s", source, "train")]

    assert ids(CaptionTars(f"{tmp_path}/a.tar", val_fraction=0)) == ["a.tar:x", "a.tar:y"]
    assert ids(CaptionFolders(pictures, val_fraction=0)) == ["cats/1.png", "dogs/1.png"]
    assert ids(ImageFiles(f"{tmp_path}/*/1.png", val_fraction=0)) == ["cats/1.png", "dogs/1.png"]
    assert ids(GreyImages(num_documents=2)) == ["s:train:0", "s:train:1"]
