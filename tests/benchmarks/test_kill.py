"""A small round of benchmarks/kill.py, and what its comparison of two runs finds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import kill, kill_sharded
from support import same_runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> kill.Reference:
    """The runs that nothing interrupts."""
    return kill.make_reference(tmp_path_factory.mktemp("reference"), ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "place"), [(0, "call save"), (1, "signal validation")])
def test_a_killed_run_ends_like_one_that_nothing_interrupts(seed, place, reference, tmp_path):
    attempt, failure = kill.run_try(seed, place, reference, tmp_path / "kept")
    assert failure == "" and attempt.kills > 0


def change_weight(folder: Path) -> None:
    file = folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["net.transformer.norm.weight"][0] += 1e-6
    file.unlink()  # a link
    torch.save(checkpoint, file)


def change_report(folder: Path) -> None:
    file = folder / "run" / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"perplexity": 1.0}))


def change_image(folder: Path) -> None:
    file = folder / "run" / "samples" / "0000.png"
    file.write_bytes(file.read_bytes() + b"0")


def change_corpus(folder: Path) -> None:
    next((folder / "data").glob("text-train-*/tokens.bin")).write_bytes(b"0" * 400)


def log_again(folder: Path) -> None:
    with SummaryWriter(str(folder / "run")) as writer:
        writer.add_scalar("train/loss", 1.0, 2)


def lose_log(folder: Path) -> None:
    for file in (folder / "run").glob("events.out.tfevents.*"):
        file.unlink()


CHANGES = {
    change_weight: "last.ckpt: state_dict.net.transformer.norm.weight is",
    change_report: "run/report.json: perplexity is 1.0 instead of",
    change_image: "run/samples/0000.png differs",
    change_corpus: "tokens.bin differs",
    log_again: "train/loss differs at [2]",
    lose_log: "captioned/val is not logged at [2, 5]",
    lambda folder: (folder / "run" / "metrics" / "step0000003-val.json").unlink(): "is missing",
    lambda folder: (folder / "run" / ".a.partial").touch(): "run/.a.partial is left",
    lambda folder: (folder / "data" / ".shards").mkdir(): "data/.shards is left",
    lambda folder: (folder / "tmp" / "a").touch(): "tmp/a is left",
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_every_difference_between_two_runs_is_found(change, run, tmp_path):
    same_runs.logged.cache_clear()
    folder, whole = tmp_path / "resumed", tmp_path / "whole"
    for copy in folder, whole:  # other tests leave further corpora beside the run
        shutil.copytree(run, copy / "run", symlinks=True)
        corpora = shutil.ignore_patterns("[!t]*") if change != change_corpus else None
        shutil.copytree(run.parent / "data", copy / "data", ignore=corpora)
        (copy / "tmp").mkdir()
    for copy in folder, whole:
        (copy / "run" / "checkpoints" / "step0000003.ckpt").unlink()
    if change is None:
        assert same_runs.differences(folder, whole, whole) == []
    else:
        change(folder)
        found = same_runs.differences(folder, whole, whole)
        assert any(CHANGES[change] in line for line in found), found


@pytest.mark.slow
def test_a_sharded_run_killed_in_a_save_ends_like_one_that_nothing_interrupts(tmp_path):
    assert kill_sharded.campaign(kills=1, seed=3, folder=tmp_path) == []
