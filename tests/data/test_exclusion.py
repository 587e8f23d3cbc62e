"""A filter list leaves out exactly the documents that it names."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest

from support.files import encoded_image, write_lines
from support.sources import GreyImages, RepeatedWord, ShardedNoise
from tf_lightning.data import CaptionFolders, ImageData, ImageFiles, Mixture, TextFiles
from tf_lightning.data.documents import Skipped, identified
from tf_lightning.data.exclusion import (
    EXCLUDED,
    FilteredSource,
    read_filter_list,
    unknown_ids,
)
from tf_lightning.data.readers.caption_source import SeveralLayouts, caption_source
from tf_lightning.data.readers.source_report import report_source
from tf_lightning.errors import UserError


def write_list(folder: Path, ids, name: str = "exclude.txt") -> str:
    path = folder / name
    path.write_text("\n".join(ids) + "\n")
    return str(path)


def pictures(folder: Path, count: int = 40) -> Path:
    """A folder of captioned images in several colors."""
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n:02}.png").write_bytes(encoded_image((n, 2 * n, 3 * n)))
        (folder / f"{n:02}.txt").write_text(f"color {n}")
    return folder


def contents(data: Mixture) -> dict:
    """Every document of a mixture, as lists of numbers."""
    data.prepare_data()
    return {
        (split, name): [[p.tolist() for p in corpus.document(i)] for i in range(len(corpus))]
        for split, corpora in data.corpora.items()
        for name, corpus in corpora.items()
    }


def test_a_filter_list_has_ids_reasons_and_comments(tmp_path):
    lines = ["# a comment", "", "a/b.jpg\ttoo small, 3 x 4", "c d.jpg  ", " e.tar:7", "\ufefff"]
    file = write_list(tmp_path, lines)
    assert read_filter_list(file) == {"a/b.jpg", "c d.jpg", "e.tar:7", "\ufefff"}
    Path(file).write_bytes(b"\xef\xbb\xbfa\tb\r\nc\r\n")  # as Windows's editor writes it
    assert read_filter_list(file) == {"a", "c"}


def test_a_file_that_is_no_filter_list_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded_image())
    for file in (tmp_path / "absent.txt", tmp_path / "a.png", tmp_path):
        with pytest.raises(UserError, match=r"exclude='.*' cannot be read as a filter list; give"):
            Mixture({"words": RepeatedWord("red", 5)}, exclude=str(file))


def test_prepared_data_equals_that_of_a_folder_without_the_files(tmp_path, mixture, monkeypatch):
    folder = pictures(tmp_path / "all" / "pictures")
    bad = [f"{n:02}" for n in range(0, 40, 3)]
    less = shutil.copytree(folder, tmp_path / "less" / "pictures")
    for name in bad:
        (less / f"{name}.png").unlink()
        (less / f"{name}.txt").unlink()
    found = []
    for place, ids in (("all", [f"pictures/{n}.png\tbad" for n in bad]), ("less", [])):
        monkeypatch.chdir(tmp_path / place)
        source = CaptionFolders("pictures/*.png", image_size=8, val_fraction=0.2)
        exclude = write_list(tmp_path, ids) if ids else None
        data = mixture({"pictures": source}, exclude=exclude, cache_dir=str(tmp_path / place))
        found.append(contents(data))
    assert found[0] == found[1]
    assert sum(map(len, found[0].values())) == 40 - len(bad)


def test_documents_of_every_kind_of_source_are_left_out_of_theirs_alone(tmp_path, mixture):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"w {n}"}) for n in range(30)))
    text = TextFiles(f"{tmp_path}/a.jsonl", val_fraction=0.2)
    sources = {"text": text, "grey": GreyImages(num_documents=9), "noise": ShardedNoise(9, 3, 8)}
    ids = [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/a.jsonl:11", "grey:train:4", "noise:train:7"]
    ids += ["noise:val:1"]
    data = mixture(sources, exclude=write_list(tmp_path, ids))
    for name, source in sources.items():
        for split in ("train", "val"):
            whole = dict(identified(name, source, split))
            left = [d for d in data.sources[name].documents(split) if d != Skipped(EXCLUDED)]
            expected = [document for one, document in whole.items() if one not in ids]
            assert [d[0] for d in left] == [d[0] for d in expected]
    data.prepare_data()
    skipped = [c.skipped.get(EXCLUDED, 0) for s in data.corpora.values() for c in s.values()]
    assert sum(skipped) == len(ids)


def test_the_fingerprint_depends_on_the_ids_of_the_source_alone(tmp_path):
    folder = pictures(tmp_path / "pictures", 4)
    source = CaptionFolders(f"{folder}/*.png", image_size=8)
    grey = GreyImages()

    def prints(*ids, own=source, name="captions"):
        return FilteredSource(name, own, frozenset(ids)).fingerprint("train")

    plain = source.fingerprint("train")
    one, two = f"{folder}/00.png", f"{folder}/01.png"
    assert prints() == prints("elsewhere/00.png") == prints("grey:train:3") == plain
    assert len({plain, prints(one), prints(two), prints(one, two)}) == 4
    assert prints(one, two, "grey:train:3") == prints(two, one)
    assert prints(one, own=grey, name="grey") == grey.fingerprint("train")
    assert prints("grey:train:3", own=grey, name="grey") != grey.fingerprint("train")
    assert prints("grey:val:3", own=grey, name="grey") == grey.fingerprint("train")


def test_shards_leave_out_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 300)
    folder = pictures(tmp_path / "pictures", 12)
    source = CaptionFolders(f"{folder}/*.png", image_size=8, val_fraction=0)
    ids = frozenset([f"{folder}/03.png", f"{folder}/11.png"])
    for own, unwanted in ((source, ids), (ShardedNoise(), frozenset(["s:train:5"]))):
        filtered = pickle.loads(pickle.dumps(FilteredSource("s", own, unwanted)))
        whole = list(filtered.documents("train"))
        parts = [d for shard in filtered.shards("train") for d in shard.documents("train")]
        assert [repr(p[:1]) if isinstance(p, list) else p for p in parts] == [
            repr(w[:1]) if isinstance(w, list) else w for w in whole
        ]
        assert whole.count(Skipped(EXCLUDED)) == len(unwanted)
    assert len(FilteredSource("s", source, ids).shards("train")) > 1


def test_documents_of_folders_with_several_layouts_are_left_out(tmp_path, mixture):
    pictures(tmp_path / "mixed" / "texts", 10)
    table = tmp_path / "mixed" / "table"
    table.mkdir()
    write_lines(
        table / "metadata.jsonl", [{"file_name": f"{n}.png", "text": "x"} for n in range(9)]
    )
    for n in range(9):
        (table / f"{n}.png").write_bytes(encoded_image((n, 0, 200)))
    source = caption_source(str(tmp_path / "mixed"), image_size=8, val_fraction=0.2)
    assert isinstance(source, SeveralLayouts)
    ids = [f"{tmp_path}/mixed/texts/03.png", f"{table}/metadata.jsonl:4.png"]
    data = mixture({"mixed": source}, exclude=write_list(tmp_path, ids))
    data.prepare_data()
    counts = [len(corpora["mixed"]) for corpora in data.corpora.values()]
    assert sum(counts) == 10 + 9 - 2
    assert report_source("mixed", data.sources["mixed"]) == report_source("mixed", source) != []


def test_what_else_a_source_has_is_kept(tmp_path):
    folder = pictures(tmp_path / "pictures", 4)
    source = CaptionFolders(f"{folder}/*.png", image_size=8, val_fraction=0)
    filtered = FilteredSource("s", source, frozenset())
    assert filtered.image_size == 8 and filtered.num_samples("train") == 4
    assert not hasattr(filtered, "image_digest")


def test_ids_of_no_document_are_counted_in_one_sentence(tmp_path, mixture, recwarn):
    folder = pictures(tmp_path / "pictures")
    ids = [f"{folder}/00.png", f"{folder}/99.png", "moved/01.png", "words:train:3"]
    source = CaptionFolders(f"{folder}/*.png", image_size=8, val_fraction=0.2)
    sources = {"pictures": source, "words": RepeatedWord("red", 5)}
    exclude = write_list(tmp_path, ids)
    expected = (
        f"2 of 4 ids in {exclude} match no document of this data, so they have no effect; write "
        "the list anew with `tf-lightning inspect` if files were moved or changed"
    )
    for _ in range(2):  # prepared, and opened
        with pytest.warns(UserWarning, match=re.escape(expected)):
            mixture(sources, exclude=exclude).prepare_data()
    assert unknown_ids(exclude, [{EXCLUDED: 3}, {EXCLUDED: 1}]) is None


def test_the_images_of_an_autoencoder_are_filtered_too(tmp_path, recwarn):
    folder = pictures(tmp_path / "pictures")
    source = ImageFiles(f"{folder}/*.png", image_size=8, val_fraction=0.2)
    exclude = write_list(tmp_path, [f"{folder}/{n:02}.png" for n in range(0, 40, 4)])
    stores = []
    for extra in ({}, {"exclude": exclude}):
        data = ImageData(source, cache_dir=str(tmp_path / "cache"), **extra)
        data.setup()
        stores.append({i.tobytes() for store in data.stores.values() for i in store.images})
    assert len(stores[0]) == 40 and len(stores[1]) == 30 and stores[1] < stores[0]
    assert not [w for w in recwarn if "ids in" in str(w.message)]
