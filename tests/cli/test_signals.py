"""A signal ends every command with its exit code, and leaves nothing half-written."""

import json
import os
import signal

import pytest

from support import runs
from tf_lightning.cli import outputs
from tf_lightning.cli.main import main
from tf_lightning.data.corpus.prepare import ShardWriter
from tf_lightning.interop import export

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


def code_of(*args: str) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def signal_at(monkeypatch, owner, name: str, nth: int = 1, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal when a function is called for the nth time."""
    whole, count = getattr(owner, name), []

    def signalled(*args, **kwargs):
        count.append(1)
        if len(count) == nth:
            os.kill(os.getpid(), signum)
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_generate_keeps_the_outputs_that_are_complete(
    signum, code, run, tmp_path, monkeypatch, capsys
):
    before = signal.getsignal(signum)
    signal_at(monkeypatch, outputs, "write_output", nth=2, signum=signum)
    options = ["-n", 3, "--batch-size", 1, "--num-inference-steps", 1, "-o", tmp_path / "out"]
    assert code_of("generate", run, "a red circle", *options) == code
    said = capsys.readouterr().err
    assert "Kept 1 output in" in said and f"interrupted by {signal.Signals(signum).name}" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["0000.json", "0000.png", "sheet.html"]
    assert signal.getsignal(signum) == before


def test_export_leaves_an_earlier_export_as_it_was(run, tmp_path, monkeypatch):
    assert code_of("export", run, "-o", tmp_path / "out", "--only", "net") == 0
    before = (tmp_path / "out" / "net.safetensors").read_bytes()
    signal_at(monkeypatch, export, "save_file")
    assert code_of("export", run, "-o", tmp_path / "out", "--weights", "raw") == 143
    assert (tmp_path / "out" / "net.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_validate_writes_no_part_of_its_results(run, tmp_path):
    config = runs.write_config(
        tmp_path,
        lambda config: config["data"]["init_args"].update(cache_dir=str(run.parent / "data")),
    )
    stop = runs.stop_at("on_validation_batch_start", 2)
    assert code_of("validate", "-c", config, "--ckpt_path", run, *stop) == 143
    assert not list(tmp_path.rglob("*.json"))


def text_config(folder) -> list[str]:
    """The arguments that prepare six files of text."""
    (folder / "texts").mkdir()
    for number in range(6):
        (folder / "texts" / f"{number}.txt").write_text(f"a text {number} " * 20)
    paths, cache = f"{folder}/texts/*.txt", str(folder / "cache")
    arguments = {"paths": paths, "vocab_size": 280, "cache_dir": cache, "val_fraction": 0.0}
    data = {"class_path": "tf_lightning.data.TextData", "init_args": arguments}
    sizes = {"vocab_size": 280, "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    (folder / "a.yaml").write_text(json.dumps({"data": data, "model": {"transformer": sizes}}))
    return ["prepare", "-c", str(folder / "a.yaml"), "--processes", "1"]


def test_prepare_keeps_finished_shards_and_nothing_of_others(tmp_path, monkeypatch, capsys):
    command = text_config(tmp_path)
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 10)
    signal_at(monkeypatch, ShardWriter, "add", nth=3)
    assert code_of(*command) == 143
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "tf-lightning: error: interrupted by SIGTERM",
        "Finished shards are kept; the same command continues.",
    ]
    (shards,) = tmp_path.glob("cache/.*-shards")
    kept = sorted(os.listdir(shards))
    assert kept == ["000000", "000001"] and all(
        (shards / s / "corpus.json").is_file() for s in kept
    )
    made = {name: (shards / name).stat().st_mtime_ns for name in kept}
    monkeypatch.undo()
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 10)
    signal_at(monkeypatch, ShardWriter, "add", nth=2)
    assert code_of(*command) == 143  # the next one is interrupted too, and those are kept
    assert {name: (shards / name).stat().st_mtime_ns for name in kept} == made
    monkeypatch.undo()
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 10)
    assert code_of(*command) == 0
    assert not list(tmp_path.glob("cache/.*"))
