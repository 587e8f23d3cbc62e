"""Globs, held-out documents and fingerprints of file sources."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sources import GreyImages
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, num_samples
from tf_lightning.data.readers import files
from tf_lightning.data.readers.caption_source import caption_source
from tf_lightning.data.readers.files import FileSource, held_out
from tf_lightning.data.readers.globs import find_files
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesTexts


class Lines(FileSource):
    """One document per line; the line "!" is a bad sample, the line "!!" ends the file."""

    def samples(self, file: Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(file.read_text().splitlines()):
            if line == "!!":
                raise BadSample("torn file")
            yield str(number), line

    def document(self, sample: str) -> RawDocument:
        if sample == "!":
            raise BadSample("bad line")
        return [sample]


def test_globs_are_sorted_and_reach_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "a.txt", "b/c.txt", "b/d.md"):
        (tmp_path / name).touch()
    found = find_files([f"{tmp_path}/**/*.txt"])
    assert [file.name for file in found] == ["a.txt", "c.txt", "z.txt"]
    assert find_files(f"{tmp_path}/a.txt") == [tmp_path / "a.txt"]


def test_a_path_without_files_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no file matches .*; check the path, or give a glob"):
        find_files([f"{tmp_path}/*.tar"])
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"is a folder; give the files in it, such as .*/\*.jsonl"):
        find_files([str(tmp_path)])


def test_a_link_to_a_folder_above_is_a_user_error_and_other_links_are_followed(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").touch()
    (folder / "a.txt").touch()
    (folder / "linked").symlink_to(tmp_path / "more")
    assert [file.name for file in find_files(f"{folder}/**/*")] == ["a.txt", "b.txt"]
    for name in ("again", "once_more"):  # two links would give 2 ** 40 paths
        (folder / name).symlink_to(".")
    match = "(again|once_more)' is a link to a folder above it; remove the link"
    with pytest.raises(UserError, match=match):
        find_files(f"{folder}/**/*")
    with pytest.raises(UserError, match=match):
        caption_source(str(folder))
    assert find_files(f"{folder}/again/*.txt") == [folder / "again" / "a.txt"]


def test_links_that_lead_to_each_other_are_a_user_error(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").touch()
        (tmp_path / name / "x").symlink_to(tmp_path / other)
    with pytest.raises(UserError, match="/(a|b)/x/x' is a link to a folder above it; remove the"):
        find_files(f"{tmp_path}/**/*.txt")
    (tmp_path / "b" / "x").unlink()
    found = [str(file.relative_to(tmp_path)) for file in find_files(f"{tmp_path}/**/*.txt")]
    assert found == ["a/a.txt", "a/x/b.txt", "b/b.txt"]


def test_the_held_out_share_equals_val_fraction():
    share = sum(held_out(f"00000.tar/{n:09}", 0.1) for n in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)
    assert not any(held_out(str(n), 0.0) for n in range(1000))


def test_the_splits_do_not_depend_on_the_folder_of_the_file(tmp_path):
    lines = [f"document {n}" for n in range(200)]
    splits = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.lines").write_text("\n".join(lines))
        source = Lines(f"{tmp_path}/{folder}/a.lines", val_fraction=0.2)
        splits.append([[d for (d,) in source.documents(split)] for split in ("train", "val")])
    assert splits[0] == splits[1]
    train, val = splits[0]
    assert sorted(train + val) == sorted(lines)
    assert 20 < len(val) < 60


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.95, 1 - 1e-9])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_two_usable_documents_are_enough_for_both_splits(count, fraction, tmp_path):
    lines = "\n".join(["!", *map(str, range(count)), "!", "!"])
    for name in range(8):  # the hashes depend on the name
        (tmp_path / f"{name}.lines").write_text(lines)
        source = Lines(f"{tmp_path}/{name}.lines", val_fraction=fraction)
        before = source.fingerprint("train")
        splits = [
            [found for found in source.documents(split) if not isinstance(found, Skipped)]
            for split in ("train", "val")
        ]
        assert sorted(splits[0] + splits[1]) == sorted([str(n)] for n in range(count))
        assert all(splits) or count < 2 and not splits[1]
        assert source.fingerprint("train") == before
        # Where both splits have documents by their hashes alone, nothing else decides.
        keys = [f"{name}.lines/{n + 1}" for n in range(count)]
        by_hash = [str(n) for n, key in enumerate(keys) if held_out(key, fraction)]
        if 0 < len(by_hash) < count:
            assert splits[1] == [[text] for text in by_hash]


def test_shards_hold_out_what_the_whole_source_holds_out(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.lines").write_text(f"document {number}")
    source = Lines(f"{tmp_path}/*", val_fraction=0.001)
    monkeypatch.setattr(files, "SHARD_BYTES", 1)
    for split, count in (("train", 3), ("val", 1)):
        whole, shards = list(source.documents(split)), source.shards(split)
        assert len(shards) == 4 and len(whole) == count
        assert [found for shard in shards for found in shard.documents(split)] == whole


def test_nothing_is_held_out_of_paths_if_val_paths_are_given(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).write_text("\n".join(f"{name} {n}" for n in range(50)))
    source = Lines([f"{tmp_path}/train"], [f"{tmp_path}/val"], val_fraction=0.5)
    for split in ("train", "val"):
        assert list(source.documents(split)) == [[f"{split} {n}"] for n in range(50)]


def test_bad_samples_are_skipped_and_a_damaged_file_ends(tmp_path):
    (tmp_path / "a").write_text("one\n!\ntwo\n!!\nthree")
    (tmp_path / "b").write_text("four")
    source = Lines([f"{tmp_path}/a", f"{tmp_path}/b"], val_fraction=0)
    expected = [["one"], Skipped("bad line"), ["two"], Skipped("torn file"), ["four"]]
    assert list(source.documents("train")) == expected


def test_the_samples_of_a_split_are_counted_unless_the_files_are_large(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("\n".join(["!", *map(str, range(300)), "!!", "end"]))
    source = Lines(f"{tmp_path}/a", val_fraction=0.2)
    for split in ("train", "val"):
        assert num_samples(source, split) == len(list(source.documents(split))) > 40
    shapes = ShapesTexts(7, num_val=3)
    assert (num_samples(shapes, "train"), num_samples(shapes, "val")) == (7, 3)
    assert num_samples(GreyImages(), "train") is None  # a source of only the two methods
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    assert num_samples(source, "train") is None


def test_the_fingerprint_depends_on_content_arguments_and_split(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    source = Lines([str(file)])
    before = source.fingerprint("train")
    assert Lines([str(file)]).fingerprint("train") == before
    assert source.fingerprint("val") != before
    assert Lines([str(file)], val_fraction=0.5).fingerprint("train") != before
    os.utime(file, (1, 1))
    assert source.fingerprint("train") != before
