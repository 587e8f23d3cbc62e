"""The command as a process: locales, closed pipes, classes of the current folder, faults."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import runs
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli import main as program
from tf_lightning.cli.main import explain_error, first_line, report_fault
from tf_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CALLBACKS = """
import lightning as L

class Fails(L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("a fault\\nwith details")
"""


def command(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a folder that is not the checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    code = "from tf_lightning.cli.main import main; main()"  # as the installed script does
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        timeout=120,
    )


def test_a_class_of_the_current_folder_is_found_and_its_fault_is_kept_in_a_file(tmp_path):
    (tmp_path / "my_callbacks.py").write_text(CALLBACKS)

    def add(config: dict) -> None:
        config["trainer"] |= {"callbacks": [{"class_path": "my_callbacks.Fails"}], "max_steps": 1}

    runs.write_config(tmp_path, add)
    ended = command("fit", "-c", "config.yaml", cwd=tmp_path, TMPDIR=str(tmp_path))
    said = ended.stderr.decode()
    assert ended.returncode == 1 and "Traceback" not in said
    line = r"tf-lightning: error: RuntimeError: a fault \(the traceback is in (\S+); please report"
    file = Path(re.search(line, said)[1])
    assert "Traceback" in file.read_text() and "with details" in file.read_text()
    assert file.read_text().startswith("tf-lightning fit -c config.yaml\n")


def test_text_is_printed_in_every_locale(run, tmp_path):
    words = ["generate", str(run), "rot äö", "--output-modality", "text", "--temperature", "3"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = command(*words, "--max-new-tokens", "40", cwd=tmp_path, **ascii_only)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii() and ended.stdout.strip()


def test_a_closed_pipe_ends_the_command_silently(tmp_path):
    code = "from tf_lightning.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "fit", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_an_error_of_a_worker_is_told_without_its_traceback():
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    text += "last):\n  File a\ntf_lightning.errors.UserError: image 3 is damaged; repair it"
    assert explain_error(UserError(text)) == "image 3 is damaged; repair it"
    assert first_line(RuntimeError("one\ntwo")) == "one" and first_line(KeyError()) == "no message"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(13, "Permission denied", "a.png"), "a.png: Permission denied"),
        (MemoryError("7 GB"), "out of memory (7 GB); give a smaller --data.batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); give a smaller "
            "--data.batch_size, --model.activation_checkpointing full, or more GPUs with "
            "ModelParallelStrategy; `tf-lightning plan` says what fits",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "--data.num_work"),
        (RuntimeError("a fault"), None),
        (KeyError("a fault"), None),
    ],
)
def test_errors_that_a_user_can_act_on_are_sentences(error, sentence):
    told = explain_error(error)
    assert told is None if sentence is None else sentence in told


def test_a_step_without_enough_memory_ends_the_run_in_one_sentence(fails, tmp_path):
    """It names three remedies, and the step before it is saved."""
    config = runs.write_config(tmp_path, runs.only_checkpoints)
    code, line = fails("fit", "-c", config, "--trainer.callbacks+=support.runs.OutOfMemory")
    assert code == 1 and "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in line
    for remedy in ("--data.batch_size", "--model.activation_checkpointing full", "more GPUs with"):
        assert remedy in line
    assert read_checkpoint(tmp_path / "run")["global_step"] == 1


def test_a_fault_is_printed_where_no_file_can_be_written(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program.tempfile, "NamedTemporaryFile", fail)
    report_fault(ValueError, ValueError("a fault"), None)
    said = capsys.readouterr().err
    assert "tf-lightning: error: ValueError: a fault (please report it)" in said


def test_a_fault_is_reported_without_logins(monkeypatch, capsys, tmp_path):
    url = "https://me:secret@a.org/b.tar"
    monkeypatch.setattr(program.sys, "argv", ["tf-lightning", "fit", "--data.paths", url])
    monkeypatch.setattr(program.tempfile, "tempdir", str(tmp_path))
    report_fault(ValueError, ValueError(f"a fault of {url}"), None)
    [file] = tmp_path.iterdir()
    assert file.read_text().startswith("tf-lightning fit --data.paths https://a.org/b.tar\n")
    said = capsys.readouterr().err
    assert "a fault of https://a.org/b.tar" in said and "secret" not in said + file.read_text()
