"""The commands of a run: fit, validate, test and prepare, and what they write."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.contact_sheet import FONT_SIZE, IMAGE_SIZE, TILE_WIDTH, TITLE_SIZE
from support import runs
from tf_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def events(run) -> EventAccumulator:
    """TensorBoard's events of the run."""
    accumulator = EventAccumulator(str(run), {"images": 0, "scalars": 0, "tensors": 0})
    return accumulator.Reload()


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def scalars(events: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


def test_a_run_logs_losses_speed_and_shares_under_their_documented_names(events):
    tags = {
        *(f"train/{name}" for name in ("loss", "loss_lm", "loss_diffusion", "grad_norm")),
        "train/steps_left_out",
        *("train/tokens_per_sec", "train/padding_share", "train/tflops_per_sec"),
        *("train/flops_per_token", "train/flops_per_token_6n", "train/images_per_token"),
        *("train/mixture/captions", "train/mixture/text"),
        *("train/epochs/captions", "train/epochs/text"),
        *(f"val/{source}/loss_lm" for source in ("captions", "text")),
        *(f"val/{source}/perplexity" for source in ("captions", "text")),
        *(f"val/{source}/bits_per_byte" for source in ("captions", "text")),
        "val/captions/loss_diffusion",
        *("lr-AdamW/decay", "lr-AdamW/no_decay"),
        *(f"val/{name}[shapes]" for name in ("fid", "clip_score", "cider", "bleu4")),
        *(f"val/composition[shapes]/{name}" for name in ("two_object", "color_attr", "position")),
        *("val/composition[shapes]/overall", "val/seconds", "val/time_share"),
    }
    # A source or noise level that a step does not contain is not logged at that step.
    by_source = {f"train/{source}/loss_lm" for source in ("captions", "text")}
    by_source |= {"train/captions/loss_diffusion"}
    by_level = {f"train/loss_diffusion/t{t:.2f}-{t + 0.25:.2f}" for t in (0, 0.25, 0.5, 0.75)}
    by_loss = {f"train/grad_norm_{loss}" for loss in ("lm", "diffusion")}  # at every fourth log
    at_the_end = {"val/retrieval_accuracy[retrieval]"}
    assert all(len(scalars(events, tag)) == 1 for tag in by_loss | at_the_end)
    logged = set(events.Tags()["scalars"])
    assert tags <= logged and by_source <= logged and by_level & logged
    assert logged - tags - by_source - by_level - by_loss - at_the_end == {"epoch"}
    for tag in tags:
        steps = 2 if tag.startswith("val/") else runs.MAX_STEPS
        assert len(scalars(events, tag)) == steps, tag
        assert all(map(math.isfinite, scalars(events, tag)))


def test_images_texts_and_scores_of_a_validation_are_at_one_step(events):
    """At the index of the last of 3 and of 6 optimizer steps; the data's table is at the start."""
    scores = [event.step for event in events.Scalars("val/composition[shapes]/overall")]
    assert scores == [event.step for event in events.Scalars("val/seconds")] == [2, 5]
    tags = events.Tags()
    for tag in tags["images"]:
        assert [event.step for event in events.Images(tag)] == scores, tag
    for tag in tags["tensors"]:
        expected = [0] if tag == "data/text_summary" else scores
        assert [event.step for event in events.Tensors(tag)] == expected, tag
    assert "data/text_summary" in tags["tensors"]


def test_the_logged_loss_is_the_weighted_sum_of_the_two(events):
    total, lm, diffusion = (
        torch.tensor(scalars(events, f"train/{name}"))
        for name in ("loss", "loss_lm", "loss_diffusion")
    )
    torch.testing.assert_close(total, lm + 5 * diffusion)
    assert lm[0] == pytest.approx(math.log(runs.VOCAB_SIZE), rel=0.25)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(events):
    floor, span = runs.MIN_LR_RATIO, runs.MAX_STEPS - runs.WARMUP_STEPS
    cosine = [
        floor + (1 - floor) * (1 + math.cos(math.pi * step / span)) / 2 for step in range(span)
    ]
    expected = [runs.PEAK_LR * scale for scale in [0.5, 1.0, *cosine]]
    assert scalars(events, "lr-AdamW/decay") == pytest.approx(expected)


def test_validation_shows_images_captions_and_text(events):
    assert set(events.Tags()["images"]) == {"generated/val", "captioned/val"}
    for name in ("generated/val", "captioned/val"):
        assert [image.step for image in events.Images(name)] == [2, 5]
        image = events.Images(name)[0]
        title = round(2 * 1.25 * TITLE_SIZE)
        assert image.width == 2 * TILE_WIDTH and image.height > title + IMAGE_SIZE  # one row
        assert image.height < title + 1.5 * IMAGE_SIZE + 8 * FONT_SIZE
    tables = events.Tensors("captions/val/text_summary")
    assert [table.step for table in tables] == [2, 5]
    rows = tables[0].tensor_proto.string_val[0].decode().split("\n| ")[1:]
    assert rows[0].startswith("---") and len(rows[1:]) == 2
    (text, _) = events.Tensors("text/val/text_summary")
    assert "imagine " in text.tensor_proto.string_val[0].decode()


def test_a_fit_ends_with_its_checkpoint_and_the_next_command(tmp_path, capsys, caplog):
    def short(config: dict) -> None:
        config["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]

    with caplog.at_level("INFO"):
        main(["fit", "-c", str(runs.write_config(tmp_path, short)), "--ckpt_path", "last"])
    said = caplog.text + capsys.readouterr().err
    last = os.path.relpath(tmp_path / "run/checkpoints/last.ckpt")
    assert "last.ckpt yet; training starts at step 0." in said
    assert "(step 3). Next:" in said and "tf-lightning generate " in said
    assert os.path.exists(last)


def test_a_run_leaves_checkpoints_config_report_and_samples(run):
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step0000003.ckpt", "step0000006.ckpt"]
    assert checkpoint_of(run).resolve().name == "step0000006.ckpt"
    files = {"config.yaml", "report.json", "sheet.png", "retrieval.json", "retrieval.png"}
    assert files <= {path.name for path in run.iterdir()}
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_of_the_checkpoint_agrees_with_the_run_and_leaves_it_alone(
    run, events, verb, capsys
):
    files = [path for path in run.iterdir() if path.is_file() and "tfevents" not in path.name]
    before = {path: path.read_bytes() for path in files}
    main([verb, "-c", str(run / "config.yaml"), "--ckpt_path", str(checkpoint_of(run))])
    assert {path: path.read_bytes() for path in before} == before
    found = json.loads((run / verb / "report.json").read_text())
    at_the_end = json.loads((run / "report.json").read_text())
    seconds = {name: found[name] for name in ("train_seconds", "validation_seconds")}
    # The checkpoint was written before the run's last validation, so its times are shorter.
    assert found == at_the_end | seconds
    assert all(0 < seconds[name] <= at_the_end[name] for name in seconds)
    table = capsys.readouterr().out
    assert "val/text/perplexity" in table
    assert f"{scalars(events, 'val/text/perplexity')[-1]:.6g}" in table


def test_a_run_prints_no_message_that_a_user_cannot_act_on(tmp_path):
    config = runs.write_config(tmp_path, lambda c: c["trainer"].update(max_steps=1, callbacks=[]))
    command = [sys.executable, "-m", "tf_lightning", "fit", "-c", str(config)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    noises = "Tip", "LeafSpec", "TPU", "many workers", "Warning", "args parameter", "Seed set"
    for noise in (*noises, "GPU available: False", "Modules in"):
        assert noise not in ended.stderr + ended.stdout
    assert "captions train: prepared 40 documents" in ended.stderr


def test_fit_reuses_the_corpora_that_prepare_made(tmp_path, capsys):
    config = runs.write_config(tmp_path)
    main(["prepare", "-c", str(config)])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("corpus.json")}
    assert made and "tf-lightning fit" in capsys.readouterr().out
    main(["fit", "-c", str(config), "--trainer.max_steps", "1"])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("corpus.json")} == made


def test_an_exported_folder_is_evaluated_like_its_checkpoint(run, tmp_path, capsys, refused):
    """The export holds the EMA weights, with which an evaluation works anyway."""

    config = str(runs.write_config(tmp_path))
    last, exported = str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "exported")
    main(["export", last, "--only", "net", "-o", exported])
    capsys.readouterr()
    tables = []
    for path in (last, exported):
        main(["validate", "-c", config, "--ckpt_path", path])
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if "val/" in line or "weights" in line])
    assert tables[0] == tables[1] and "ema" in " ".join(tables[0])
    line = refused("fit", "-c", config, "--ckpt_path", exported)
    assert "start a new run from it with --init_from.checkpoint" in line


def test_validate_finds_the_last_checkpoint_of_the_configurations_run(run, tmp_path, capsys):
    """An evaluation protocol has a logger of its own, so the folder is the recipe's."""
    (tmp_path / "protocol.yaml").write_text("trainer: {logger: {name: protocol, version: null}}")
    options = ["--trainer.limit_val_batches=1", "--ckpt_path", "last"]
    recipe = str(run / "config.yaml")
    main(["validate", "-c", recipe, "-c", str(tmp_path / "protocol.yaml"), *options])
    assert "val/" in capsys.readouterr().out
    main(["validate", "-c", recipe, *options[:1], "--ckpt_path", str(run)])
