"""Shards prepared by processes, by several jobs or after a kill make the same corpus."""

import glob
import json
import os

import pytest

from support.prepare_runs import CaptionedRed
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.cli.main import main
from tf_lightning.data.corpus import prepare as corpus_prepare
from tf_lightning.data.corpus.prepare import plan_corpus, prepare
from tf_lightning.errors import UserError
from tf_lightning.progress import progress_bar
from tf_lightning.tokenizer.tokenizer import train_tokenizer


@pytest.fixture
def run(tmp_path):
    """Call `prepare` with arguments that suit the tests."""
    words = iter(["a red circle only text and so on 0 1 2 3 4 5 6"])
    tokenizer = train_tokenizer(words, tmp_path / "a.model", vocab_size=300)

    def prepare_here(source, split="train", directory=None, **how):
        arguments = {
            "name": "given",
            "directory": directory or tmp_path / "cache",
            "tokenizer": tokenizer,
            "autoencoder": load_autoencoder("pixels"),
            "row_length": 16,
            "patch_size": 4,
        }
        return prepare(plan_corpus(source, split, **arguments), **how)

    return prepare_here


def write_texts(folder, count: int = 7) -> CaptionedRed:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number} [a].txt").write_text(f"red {number}")
    (folder / "3 [a].txt").write_text("a caption of many, many words, longer than a row")
    return CaptionedRed(f"{glob.escape(str(folder))}/*.txt", val_fraction=0.0)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 10)  # two files a shard


def content(corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.path.iterdir()}


@pytest.mark.slow  # each process imports torch
def test_the_corpus_does_not_depend_on_the_number_of_processes(run, tmp_path, monkeypatch):
    source = write_texts(tmp_path / "texts")
    whole = content(run(source))
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 10)
    assert len(source.shards("train")) == 4
    for number, processes in enumerate((1, 2)):
        corpus = run(source, directory=tmp_path / str(number), processes=processes)
        assert content(corpus) == whole
        assert [path.name for path in corpus.path.parent.iterdir()] == [corpus.path.name]
    assert json.loads(whole["corpus.json"])["skipped"] == {"longer than a row of 16 tokens": 1}
    assert (len(corpus), corpus.document(6 - 1)[0].tolist()) == (6, corpus_ids(run, source, 6))


def corpus_ids(run, source, number: int) -> list[int]:
    """Token ids of text `number`, prepared alone."""
    alone = CaptionedRed(glob.escape(str(source.files("train")[number])), val_fraction=0.0)
    return run(alone).document(0)[0].tolist()


def test_jobs_prepare_their_parts_and_the_last_one_merges_them(run, tmp_path, small_shards):
    source = write_texts(tmp_path / "texts")
    assert run(source, part=(0, 2)) is None
    assert run(source, part=(0, 2)) is None  # again: this part is complete
    assert len(run(source, part=(1, 2))) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_shards_that_a_process_left_after_the_corpus_are_removed(run, tmp_path):
    corpus = run(write_texts(tmp_path / "texts"))
    left = corpus.path.with_name(f".{corpus.path.name}-shards")
    (left / "000000").mkdir(parents=True)  # killed before it removed them
    assert len(run(CaptionedRed(f"{glob.escape(str(tmp_path))}/texts/*.txt", val_fraction=0.0)))
    assert [*corpus.path.parent.iterdir()] == [corpus.path]


def test_after_a_kill_finished_shards_are_kept(run, tmp_path, small_shards, monkeypatch):
    source = write_texts(tmp_path / "texts")
    last = tmp_path / "texts" / "6 [a].txt"
    times = os.stat(last).st_atime_ns, os.stat(last).st_mtime_ns
    last.write_text("kill ")  # with the same size and time, the corpus has the same hash
    os.utime(last, ns=times)
    read = []
    monkeypatch.setattr(
        CaptionedRed, "document", lambda self, file: read.append(file.name) or ["red"]
    )
    whole = CaptionedRed.samples

    def samples(self, file):
        if file == last and file.read_text() == "kill ":
            raise KeyboardInterrupt
        return whole(self, file)

    monkeypatch.setattr(CaptionedRed, "samples", samples)
    with pytest.raises(KeyboardInterrupt):
        run(source)
    assert len(read) == 6
    last.write_text("red 6")
    os.utime(last, ns=times)
    assert len(run(source)) == 7
    assert read[6:] == ["6 [a].txt"]


def in_one_process(monkeypatch) -> list[int]:
    """Prepare shards here instead of in processes; returns where their numbers are noted."""
    chosen = []

    def prepare_here(job, numbers, processes):
        chosen.append(processes)
        return (corpus_prepare._prepare_shard(job, number, lambda: None) for number in numbers)

    monkeypatch.setattr(corpus_prepare, "_prepare_in_processes", prepare_here)
    return chosen


@pytest.mark.parametrize(("files", "expected"), [(7, [2]), (6, []), (1, [])])
def test_a_small_source_is_prepared_by_one_process(
    files, expected, run, tmp_path, small_shards, monkeypatch
):
    """Two files a shard: 4 shards, 3 and 1."""
    monkeypatch.setattr(corpus_prepare.os, "cpu_count", lambda: 8)
    chosen = in_one_process(monkeypatch)
    assert len(run(write_texts(tmp_path / "texts", files), processes=None)) == max(1, files - 1)
    assert chosen == expected


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("counted", [True, False])
def test_the_progress_counts_documents(
    processes, counted, run, tmp_path, small_shards, monkeypatch, capsys
):
    """Sources of many bytes are not counted before; the total is an estimate by finished shards."""
    in_one_process(monkeypatch)
    source = write_texts(tmp_path / "texts")
    bars = []

    def bar(**options):
        bars.append(progress_bar(**options | {"delay": 0}))
        return bars[-1]

    monkeypatch.setattr(corpus_prepare, "progress_bar", bar)
    if not counted:
        monkeypatch.setattr(CaptionedRed, "num_samples", lambda self, split: None)
    run(source, processes=processes)
    assert (bars[0].n, bars[0].total) == (7, 7)
    assert "7/7 [" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_killed_half_way_leaves_only_finished_shards(run, tmp_path, small_shards):
    source = write_texts(tmp_path / "texts")
    last = tmp_path / "texts" / "6 [a].txt"
    last.write_text("kill")
    with pytest.raises(UserError, match="one of 2 processes was killed, .* fewer --processes"):
        run(source, processes=2)
    (folder,) = (tmp_path / "cache").iterdir()
    finished = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert "000003" not in finished
    assert all((folder / name / "corpus.json").is_file() for name in finished)


def test_the_command_prepares_parts_and_merges_them(tmp_path, small_shards, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"a text {number} " * 20)
    texts = {"paths": f"{folder}/*.txt", "vocab_size": 280, "cache_dir": str(tmp_path / "cache")}
    data = {"class_path": "tf_lightning.data.TextData", "init_args": texts}
    sizes = {"vocab_size": 280, "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    (tmp_path / "a.yaml").write_text(json.dumps({"data": data, "model": {"transformer": sizes}}))
    arguments = ["prepare", "-c", str(tmp_path / "a.yaml"), "--processes", "1"]
    main([*arguments, "--shard", "0/2"])
    assert (
        "This part is done; when all parts are done, run `tf-lightning" in capsys.readouterr().out
    )
    main([*arguments, "--shard=1/2"])
    assert "The corpora are in" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("text-train-*/answer-*.json"))) == 1


@pytest.mark.parametrize("given", ["2/2", "1", "a/b", "-1/2"])
def test_a_malformed_part_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "-c", "a.yaml", f"--shard={given}"])
    assert "is not I/N with 0 <= I < N; give 0/8 to 7/8 for 8 jobs" in capsys.readouterr().err
