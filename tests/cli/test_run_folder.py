"""The folder of a run: one run in it, everything of the run in it, and what is resumed from it."""

import copy
import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.retrieval import RetrievalAccuracy
from support import runs
from support.sharded_folders import flip_bit, write_sharded
from tf_lightning.checkpoint import (
    TRANSFUSION,
    find_checkpoint,
    find_checkpoints,
    newest_sound,
)
from tf_lightning.checkpoint_file import write_checkpoint
from tf_lightning.cli.main import main
from tf_lightning.cli.run_folder import (
    append_to_csv,
    configured_folders,
    files_of_run,
    folder_of,
    resume_command,
)
from tf_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("--ckpt_path last", "--trainer.logger.name", "--overwrite")


def few_steps(config: dict) -> None:
    runs.only_checkpoints(config)
    config["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}


def fit(folder: Path, *arguments: str, change=few_steps) -> None:
    main(["fit", "-c", str(runs.write_config(folder, change)), *arguments])


def test_rows_that_a_killed_process_had_put_aside_are_kept(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv.earlier").write_text("step,train/loss\n1,2.0\n")
    append_to_csv(logger)
    logger.log_metrics({"train/loss": 3.0}, step=2)
    logger.save()
    rows = (tmp_path / "run" / "metrics.csv").read_text().split()
    assert rows == ["step,train/loss", "1,2.0", "2,3.0"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_a_half_written_file_of_hyper_parameters_is_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "hparams.yaml"
    file.write_text("transformer:\n  voc")  # the run was killed
    fit(tmp_path)
    assert yaml.safe_load(file.read_text())["lr"] == runs.PEAK_LR


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_second_run_in_the_folder_is_refused_with_three_ways_on(tmp_path, refused, caplog):
    fit(tmp_path)
    before = content(tmp_path / "run")
    command = ["fit", "-c", str(tmp_path / "config.yaml")]
    line = refused(*command, "--model.lr=1e-5")
    assert all(way in line for way in WAYS)
    assert content(tmp_path / "run") == before
    with caplog.at_level("INFO"):
        main([*command, "--ckpt_path=last"])  # first way: nothing is left to do
    assert "ended at step 2" in caplog.text and content(tmp_path / "run") == before
    main([*command, "--trainer.logger.name=second"])
    assert content(tmp_path / "run") == before and load(tmp_path / "second")["global_step"] == 2
    (tmp_path / "run" / "notes.txt").write_text("mine")
    main([*command, "--overwrite", "--trainer.max_steps=1"])
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step0000001.ckpt",
    ]
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    # The record of the run does not overwrite it when it is used again.
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "overwrite" not in saved
    line = refused(*command, "--overwrite", "--ckpt_path=last")
    assert "leave one of them out" in line


def test_a_run_that_was_moved_is_not_started_anew_by_its_own_configuration(tmp_path, refused):
    fit(tmp_path)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    command = ["fit", "-c", str(moved / "config.yaml"), "--ckpt_path=last"]
    line = refused(*command)
    assert f"names the folder {tmp_path / 'run'}, which has no checkpoint" in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "data", "moved"]
    main([*command, "--trainer.logger.name=new", "--trainer.max_steps=1"])  # as a recipe
    assert load(tmp_path / "new")["global_step"] == 1
    before = content(moved)
    main([*command, "--trainer.logger.name=moved"])  # nothing is left to do
    assert content(moved) == before


def test_two_processes_do_not_train_in_one_folder(tmp_path, refused):
    """The second one changes nothing, such as the link to the newest checkpoint."""
    fit(tmp_path)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    before = content(tmp_path / "run")
    lock = tmp_path / "run" / ".lock"
    hold = f"import fcntl; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, 2); print(); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for options in ([], ["--ckpt_path=last"], ["--overwrite"]):
            line = refused("fit", "-c", runs.write_config(tmp_path, few_steps), *options)
            assert "another process is training in" in line and WAYS[1] in line
        assert content(tmp_path / "run") == before | {".lock": b""}
        other.kill()
    # The lock has ended with its process.
    fit(tmp_path, "--ckpt_path=last", "--trainer.max_steps=3")
    assert load(tmp_path / "run")["global_step"] == 3 and not lock.exists()


def test_a_run_whose_first_checkpoint_cannot_be_written_says_so(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise UserError("no space left on the disk")

    monkeypatch.setattr("tf_lightning.training.checkpoint_io.write_checkpoint", fail)
    with pytest.raises(SystemExit):
        fit(tmp_path)
    told = capsys.readouterr().err
    assert "Nothing was saved, because no checkpoint could be written." in told
    assert "error: no space left on the disk" in told


def two_loggers(name: str):
    """A change of a configuration to two loggers, the first of which has this name."""

    def change(config: dict) -> None:
        few_steps(config)
        second = config["trainer"]["logger"]
        first = copy.deepcopy(second) | {"class_path": "lightning.pytorch.loggers.CSVLogger"}
        first["init_args"].pop("default_hp_metric")
        first["init_args"]["name"] = name
        config["trainer"]["logger"] = [first, second]

    return change


def test_the_way_on_with_several_loggers_is_one_that_works(tmp_path, refused):
    fit(tmp_path, change=two_loggers("run"))
    config = tmp_path / "config.yaml"
    line = refused("fit", "-c", config, "--trainer.logger.name=second")
    assert "--trainer.logger.name does not reach into a list of loggers" in line
    line = refused("fit", "-c", config)
    assert f"its own `name` for the first of trainer.logger ({config} line " in line
    number = int(line.partition(f"{config} line ")[2].partition(")")[0])
    assert config.read_text().splitlines()[number - 1].strip() == "logger:"
    fit(tmp_path, change=two_loggers("second"))
    assert load(tmp_path / "second")["global_step"] == 2


def csv_rows(config: dict) -> None:
    few_steps(config)
    config["trainer"]["logger"]["class_path"] = "lightning.pytorch.loggers.CSVLogger"
    config["trainer"]["logger"]["init_args"].pop("default_hp_metric")


def test_the_rows_of_a_csv_logger_outlive_a_resumption_and_an_evaluation(tmp_path):
    fit(tmp_path, "--trainer.limit_val_batches=1", change=csv_rows)
    rows = tmp_path / "run" / "metrics.csv"

    def steps() -> list[dict]:
        return [row for row in csv.DictReader(rows.open()) if row["train/loss"]]

    before = steps()
    assert [row["step"] for row in before] == ["0", "1"]
    config = str(tmp_path / "config.yaml")
    main(["fit", "-c", config, "--ckpt_path=last", "--trainer.max_steps=3"])
    assert [row["step"] for row in steps()] == ["0", "1", "2"]
    main(["validate", "-c", config, "--ckpt_path=last", "--trainer.limit_val_batches=1"])
    assert [row["step"] for row in steps()] == ["0", "1", "2"]
    assert [row["train/loss"] for row in steps()][:2] == [row["train/loss"] for row in before]


def test_a_run_that_died_before_its_first_checkpoint_is_started_again(tmp_path):
    with pytest.raises(runs.Killed):
        fit(tmp_path, *runs.stop_at("on_train_batch_start", 1, kind="Raise"))
    assert (tmp_path / "run" / "config.yaml").exists()
    fit(tmp_path)
    assert load(tmp_path / "run")["global_step"] == 2


def trial(config: dict) -> None:
    config["trainer"] |= {"fast_dev_run": True}
    for logger in ("save_dir", "name"):
        del config["trainer"]["logger"]["init_args"][logger]


def unlogged(config: dict) -> None:
    few_steps(config)
    config["trainer"]["logger"] = False


def unsaved(config: dict) -> None:
    few_steps(config)
    trial(config)
    config["trainer"] |= {"fast_dev_run": False, "enable_checkpointing": False, "callbacks": []}


@pytest.mark.parametrize(
    ("change", "written", "said"),
    [
        (trial, [], "it saved nothing"),
        (unlogged, ["runs/run"], "runs/run/checkpoints/last.ckpt (step 2)"),
        (unsaved, ["runs/run"], "Trained to step 2; nothing was saved"),
    ],
)
def test_nothing_is_written_outside_the_runs_folder(
    change, written, said, tmp_path, monkeypatch, caplog, capsys
):
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    with caplog.at_level("INFO"):
        fit(tmp_path, change=change)
    assert [str(path.relative_to(there)) for path in there.glob("*/*")] == written
    assert len(list(there.iterdir())) == len(written)
    assert said in caplog.text and "None" not in caplog.text.partition("Next:")[2]
    assert ".ckpt None" not in caplog.text and "generate None" not in caplog.text


def spoil(file: Path) -> None:
    """Flip a bit in the middle of a file, as a bad disk does."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, refused):
    fit(tmp_path, "--trainer.callbacks.every_n_train_steps=1")
    folder = tmp_path / "run" / "checkpoints"
    for name, before in (("step0000002", "step0000001"), ("step0000001", None)):
        file = folder / f"{name}.ckpt"
        spoil(file)
        if before:
            with pytest.warns(UserWarning, match=f"{name}.ckpt.*damaged.*{before}.*is used"):
                found = newest_sound(find_checkpoints(tmp_path / "run", folder), TRANSFUSION)
            assert found == (folder / f"{before}.ckpt").resolve()
    assert "damaged" in refused("fit", "-c", tmp_path / "config.yaml", "--ckpt_path=last")


def test_the_folder_of_a_run_is_its_first_loggers(tmp_path):
    default = Path("runs", "run")
    board = TensorBoardLogger(str(tmp_path), name="board", version="")
    table = CSVLogger(str(tmp_path), name="table", version="v")
    assert folder_of(board, default) == tmp_path / "board"
    assert folder_of([table, board], default) == tmp_path / "table" / "v"
    for none in (False, True, None, []):
        assert folder_of(none, default) == default


def test_the_runs_of_one_project_have_folders_of_their_own(tmp_path):
    logger = SimpleNamespace(save_dir=str(tmp_path), name="project", _name="first")
    assert folder_of([logger], Path("runs", "run")) == tmp_path / "first"
    logger = SimpleNamespace(save_dir=None, name="12", _run_name="second")
    assert folder_of([logger], Path("runs", "run")) == Path("runs", "second")


@pytest.mark.parametrize("version", ["", "v", 0, 3])
def test_a_configuration_names_the_folder_of_its_first_logger(version, tmp_path):
    options = {"save_dir": str(tmp_path), "name": "run", "version": version}
    config = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": options}
    listed = Namespace(trainer=Namespace(logger=[config, "other"]))
    assert configured_folders(listed, [], {}, Path()) == [
        folder_of(CSVLogger(**options), Path("no"))
    ]
    config["class_path"] = "lightning.pytorch.loggers.WandbLogger"
    assert configured_folders(listed, [], {}, Path()) == [tmp_path / "run"]


def test_only_folders_of_runs_are_looked_at_for_a_checkpoint(tmp_path):
    options = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "mine"}}
    listed = Namespace(trainer=Namespace(logger=options))
    values = {"trainer": {"logger": options}}
    found = {}
    for name in ("recipe.yaml", "config.yaml"):
        content = SimpleNamespace(file=tmp_path / name, values=values)
        found[name] = configured_folders(listed, [content], {"version": ""}, Path())
    assert found["recipe.yaml"] == [Path("runs", "mine")]
    assert found["config.yaml"] == [Path("runs", "mine"), tmp_path]


def test_the_files_of_a_run_are_those_that_its_callbacks_write(tmp_path):
    """Also those of RetrievalAccuracy under its names in the recipes."""
    recipe = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    listed = [callback["init_args"] for callback in recipe["trainer"]["callbacks"]]
    names = {RetrievalAccuracy(options["source"], name=options.get("name", "retrieval")).name
             for options in listed}  # fmt: skip
    assert names == {"retrieval", "held_out", "edits"}
    written = {f"{name}.{kind}" for name in names for kind in ("json", "png")}
    written |= {"media", "guidance.png", "samples", "report.json", "progress.json"}
    for name in written | {"mine.json", "notes.png"}:
        (tmp_path / name).touch()
    found = files_of_run(tmp_path, tmp_path / "checkpoints")
    assert {path.name for path in found} == written | {"checkpoints"}


def test_overwriting_keeps_what_the_new_run_starts_from(tmp_path, refused):
    fit(tmp_path)
    before = content(tmp_path / "run")
    command = ["fit", "-c", str(tmp_path / "config.yaml"), "--overwrite"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    line = refused(*command, f"--init_from.checkpoint={last}")
    assert f"--overwrite would remove {last}, which the new run needs" in line
    assert "would remove" in refused(*command, f"--data.tokenizer={last}")
    assert content(tmp_path / "run") == before


def test_a_run_that_does_not_begin_overwrites_nothing(tmp_path):
    fit(tmp_path)
    before = content(tmp_path / "run")
    with pytest.raises(runs.Killed):
        fit(tmp_path, "--overwrite", *runs.stop_at("on_fit_start", 1, kind="Raise"))
    assert before.items() <= content(tmp_path / "run").items()


def test_a_root_directory_is_the_folder_of_a_run_without_a_logger(tmp_path, refused, caplog):
    root = f"--trainer.default_root_dir={tmp_path / 'root'}"
    with caplog.at_level("INFO"):
        fit(tmp_path, root, change=unlogged)
    assert "tf-lightning generate" in caplog.text and "tensorboard" not in caplog.text
    line = refused("fit", "-c", str(tmp_path / "config.yaml"), root)
    assert "its own --trainer.default_root_dir" in line
    assert load(tmp_path / "root")["global_step"] == 2
    assert (tmp_path / "root" / "progress.json").exists()
    assert (tmp_path / "root" / "config.yaml").exists()


def test_the_command_that_resumes_keeps_the_options():
    typed = shlex.split("fit -c 'my run.yaml' --ckpt_path a.ckpt --model.lr=1 --overwrite")
    resumed = "tf-lightning fit -c 'my run.yaml' --model.lr=1 --ckpt_path last"
    assert resume_command(typed) == resumed
    assert resume_command(["fit", "--ckpt_path=a.ckpt"]) == "tf-lightning fit --ckpt_path last"


def test_the_command_that_resumes_shows_no_login():
    resumed = resume_command(["fit", "--data.paths", "https://me:secret@a.org/b.tar"])
    assert resumed == "tf-lightning fit --data.paths https://a.org/b.tar --ckpt_path last"


SMALL = {"image_codec": {}, "state_dict": {}, "tokenizer": torch.ones(1, dtype=torch.uint8)}


def copies(folder: Path, steps: list[int], last: int | None = None) -> None:
    """Write files of these steps, each newer than the one before, and the link to one of them."""
    folder.mkdir(parents=True)
    for place, step in enumerate(steps):
        file = folder / f"step{step}.ckpt"
        write_checkpoint(SMALL | {"global_step": step}, file)
        os.utime(file, (place, place))
    if last is not None:
        (folder / "last.ckpt").symlink_to(f"step{last}.ckpt")


@pytest.mark.parametrize(
    ("steps", "last", "found"),
    [
        ([1, 2, 3], 3, [3, 2, 1]),
        ([1, 2, 3], None, [3, 2, 1]),
        ([1, 2, 3], 2, [3, 2, 1]),  # killed before the link was replaced
        ([3, 1, 2], 3, [3, 2, 1]),  # a copy, whose files have the times of copying
        ([4, 5, 2, 3], 3, [3, 2, 5, 4]),  # a run that went back to step 1
    ],
)
def test_the_newest_checkpoint_is_the_latest_of_the_run(steps, last, found, tmp_path):
    copies(tmp_path / "checkpoints", steps, last)
    files = find_checkpoints(tmp_path, tmp_path / "checkpoints")
    assert [int(file.stem[4:]) for file in files] == found
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints")
    assert find_checkpoint(tmp_path).name == f"step{found[0]}.ckpt"


def test_checkpoints_of_a_preempted_job_and_second_names_are_found(tmp_path):
    copies(tmp_path / "checkpoints", [1, 2], 2)
    os.link(tmp_path / "checkpoints" / "step2.ckpt", tmp_path / "checkpoints" / "best.ckpt")
    write_checkpoint(SMALL | {"global_step": 3}, tmp_path / "hpc_ckpt_1.ckpt")
    found = find_checkpoints(tmp_path, tmp_path / "checkpoints")
    assert [torch.load(file, weights_only=True)["global_step"] for file in found] == [3, 2, 1]


def test_a_sharded_checkpoint_is_found_and_passed_over_when_a_bit_of_it_is_flipped(tmp_path):
    copies(tmp_path / "checkpoints", [1])
    changed = {"global_step": 2, "state_dict": {"net.a": torch.ones(400)}}
    folder = write_sharded(SMALL | changed, tmp_path / "checkpoints" / "step2.ckpt")
    found = find_checkpoints(tmp_path, tmp_path / "checkpoints")
    assert newest_sound(found, TRANSFUSION).name == find_checkpoint(tmp_path).name == "step2.ckpt"
    flip_bit(folder / "__0_0.distcp", 4000)
    assert newest_sound(found, TRANSFUSION, all_shards=False).name == "step2.ckpt"
    with pytest.warns(UserWarning, match="does not have its checksum.*step1.ckpt.*is used"):
        assert find_checkpoint(tmp_path).name == "step1.ckpt"


def test_every_command_takes_the_newest_sound_checkpoint(tmp_path, monkeypatch, capsys, refused):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    fit(tmp_path, "--trainer.callbacks.every_n_train_steps=1", change=unlogged)
    folder = Path("runs", "run")
    validate = ["validate", "-c", str(tmp_path / "config.yaml"), "--trainer.limit_val_batches=1"]
    commands = [
        [*validate, "--ckpt_path=last"],
        [*validate, f"--ckpt_path={folder}"],
        ["export", str(folder), "-o", "exported", "--only", "net"],
        ["generate", str(folder), "a", "--output-modality", "text", "--max-new-tokens", "2"],
    ]
    (folder / "checkpoints" / "last.ckpt").unlink()
    main(commands[2])
    assert "of step 2" in capsys.readouterr().out
    spoil(folder / "checkpoints" / "step0000002.ckpt")
    for command in commands:
        with pytest.warns(UserWarning, match="step0000002.ckpt.*damaged.*step0000001.*is used"):
            main(command)
    assert "of step 1" in capsys.readouterr().out
    spoil(folder / "checkpoints" / "step0000001.ckpt")
    for command in commands:
        assert "step0000002.ckpt" in refused(*command)
