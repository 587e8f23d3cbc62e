"""A sharded run samples and measures: its numbers are those of its checkpoint on one device."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from support import ranks, runs
from tf_lightning.cli.main import main

REPORTS = ("report.json", "retrieval.json")  # of callbacks that sample at the end of a run
TIMES = ("train_seconds", "validation_seconds")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The folder of a run of `runs.config` on two ranks that share the weights.

    It validates after step 3, and trains on only if all memory of that validation is free.
    """
    folder = tmp_path_factory.mktemp("sharded")
    freed = "--trainer.callbacks+=support.runs.NoCopies"
    ranks.fit(runs.write_config(folder), 2, json.dumps(ranks.SHARDED), freed)
    return folder / "run"


def numbers(file: Path) -> dict[str, float]:
    return {n["name"]: n["value"] for n in json.loads(file.read_text())["numbers"]}


def report(file: Path) -> dict:
    """The content of a report without its times, and with its numbers up to 1e-5."""
    values = json.loads(file.read_text())
    return {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in values.items()
        if name not in TIMES
    }


@pytest.mark.slow
def test_numbers_within_a_sharded_run_equal_those_of_its_checkpoint_on_one_device(
    sharded, tmp_path
):
    config = yaml.safe_load((sharded / "config.yaml").read_text())
    config.pop("ckpt_path", None)
    config["trainer"] |= {"devices": 1, "strategy": "auto"}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    last = str(sharded / "checkpoints" / "last.ckpt")
    main(["validate", "-c", str(tmp_path / "config.yaml"), "--ckpt_path", last])
    alone = tmp_path / "run" / "validate"
    found = numbers(sharded / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json")
    assert found == pytest.approx(numbers(alone / "metrics.json"), rel=1e-5, abs=1e-9)
    assert {"val/fid[shapes]", "val/clip_score[shapes]", "val/text/perplexity"} <= found.keys()
    assert "val/composition[shapes]/overall" in found
    for name in REPORTS:
        first, second = (report(at / name) for at in (sharded, alone))
        assert first == second


@pytest.mark.slow
def test_a_sharded_run_whose_copies_do_not_fit_warns_and_trains_to_its_end(tmp_path):
    no_memory = "--trainer.callbacks+=support.runs.NoMemory"
    ranks.fit(runs.write_config(tmp_path), 2, json.dumps(ranks.SHARDED), no_memory)
    run = tmp_path / "run"
    assert (run / "checkpoints" / f"step{runs.MAX_STEPS:07d}.ckpt").exists()
    assert not any((run / name).exists() for name in REPORTS)
    found = numbers(run / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json")
    assert "val/captions/loss_diffusion" in found and not any("fid" in name for name in found)
    (file,) = tmp_path.rglob("warnings-0.txt")
    failed = [line.partition(" failed: a whole copy of the network")[0] for line in file.open()]
    assert failed == [
        "the evaluation at step 3",
        "the evaluation at step 6",
        "ShapesReport at step 6",
        "RetrievalAccuracy of captions at step 6",
    ]
    assert not [*tmp_path.rglob("warnings-1.txt")]  # rank zero warns


@pytest.mark.slow
def test_a_sharded_run_trains_bit_by_bit_as_without_its_validations(sharded, tmp_path):
    config = runs.write_config(tmp_path, runs.only_checkpoints)
    cache = f"--data.init_args.cache_dir={sharded.parent}/data"
    more = ["--trainer.limit_val_batches=0", cache]
    ranks.fit(config, 2, json.dumps(ranks.SHARDED), *more)
    with_them, without = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (sharded, tmp_path / "run")
    )
    assert all(torch.equal(with_them[name], without[name]) for name in without)
