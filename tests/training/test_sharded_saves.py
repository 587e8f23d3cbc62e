"""Sharded checkpoints are written while training goes on, and resume on any number of ranks."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from support import ranks, runs, same_runs
from tf_lightning.checkpoint import read_checkpoint, select_weights
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.sharded import check_sharded
from tf_lightning.training.sharded_saves import Saves, ShardedStrategy


def test_saves_are_done_in_order_and_nothing_after_one_that_failed():
    saves, done = Saves(), []
    saves.submit(done.append, 1)
    saves.submit(done.append, 2)
    saves.wait()
    assert done == [1, 2]
    saves.submit(done.append, 3)
    saves.submit(done.index, 4)
    saves.submit(done.append, 5)
    with pytest.raises(ValueError, match="4 is not in list"):
        saves.wait()
    assert done == [1, 2, 3]
    saves.wait()
    saves.submit(done.append, 6)
    saves.wait()
    assert done == [1, 2, 3, 6]


def test_a_wait_that_times_out_keeps_the_save_and_its_error():
    saves, go, done = Saves(), threading.Event(), []

    def fail() -> None:
        go.wait(60)
        raise ValueError("the disk is full")

    saves.submit(fail)
    with pytest.raises(TimeoutError):
        saves.wait(0)
    saves.submit(done.append, 1)
    go.set()
    with pytest.raises(ValueError, match="the disk is full"):
        saves.wait()
    assert done == []


def test_a_failure_is_known_without_waiting():
    saves, go = Saves(), threading.Event()
    assert saves.failure is None
    saves.submit(go.wait, 60)
    assert saves.failure is None  # it is not done
    saves.submit([].index, 4)
    go.set()
    with pytest.raises(ValueError) as first:
        saves.last.result()
    saves.submit(print)  # nothing is done after it
    with pytest.raises(ValueError):
        saves.last.result()
    assert saves.failure is first.value
    with pytest.raises(ValueError):
        saves.wait()
    assert saves.failure is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        CheckpointException("save", {1: (OSError(errno.ENOSPC, "No space left on device"), None)}),
    ],
)
def test_a_save_that_fails_is_told_at_once_and_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dcp, "save", fail)
    strategy = SimpleNamespace(is_global_zero=True, group=None)
    (tmp_path / "partial").mkdir()
    writer = SimpleNamespace(path=tmp_path / "partial", folder=tmp_path / "a.ckpt")
    told = r"a.ckpt could not be written \(.*[Nn]o space left on .*; the earlier ones are whole"
    with pytest.warns(UserWarning, match=told), pytest.raises(UserError, match=told):
        ShardedStrategy.write(strategy, {}, writer)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_gets_sharded_checkpoints(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    saved = []
    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(dcp, "save", lambda state, **_: saved.append(state))
    strategy = SimpleNamespace(is_global_zero=True, group=None)
    (tmp_path / "partial").mkdir()
    writer = SimpleNamespace(path=tmp_path / "partial", folder=tmp_path / "a.ckpt")
    ShardedStrategy.write(strategy, {"step": 1}, writer)
    assert saved == [{"step": 1}]


def test_a_strategy_keeps_the_arguments_of_lightnings():
    arguments = {"data_parallel_size": 3, "tensor_parallel_size": 1, "process_group_backend": "a"}
    arguments |= {"save_distributed_checkpoint": False, "timeout": 5}
    made = vars(ShardedStrategy.like(ModelParallelStrategy(**arguments)))
    assert {name: made[f"_{name}"] for name in arguments} == arguments


def every_other(config: dict) -> None:
    """Save every second step and keep the newest."""
    ranks.two_rank_config(config)
    saver = config["trainer"]["callbacks"][0]["init_args"]
    saver |= {"every_n_train_steps": 2, "save_top_k": 1}
    config["trainer"]["limit_val_batches"] = 1
    config["trainer"]["max_steps"] = 6
    config["model"]["min_lr_ratio"] = 1.0  # the schedule is the same for any number of steps


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a sharded run of two ranks, and of one that resumed twice, on one rank and on two.

    The first goes on while its checkpoints are written. The other gets a signal meanwhile.
    """
    base = tmp_path_factory.mktemp("sharded")
    whole, resumed = (base / name for name in ("whole", "resumed"))
    data = [f"--data.init_args.cache_dir={base}/data"]

    def fit(folder: Path, number: int, *more: str) -> list[str]:
        config = runs.write_config(folder, every_other)
        command = ["fit", "-c", str(config), f"--trainer.devices={number}", *data, *more]
        command += [f"--data.init_args.batch_size={4 // number}"]
        return command + [f"--trainer.strategy={ranks.sharded(2)}"] * (number == 2)

    hold, stop = (
        [f"--trainer.callbacks+=support.held_saves.{name}"]
        for name in ("HoldSaves", "SignalInSave")
    )
    ranks.run_ranks(fit(whole, 2, *hold), 2)
    ends = ranks.ends_of_ranks(fit(resumed, 2, *stop), resumed / "log")
    assert [code for code, _ in ends] == [143, 143], ends
    check_sharded(resumed / "run" / "checkpoints" / "last.ckpt")
    assert read_checkpoint(resumed / "run")["global_step"] == 3
    main(fit(resumed, 1, "--ckpt_path=last", "--trainer.max_steps=5"))
    assert (resumed / "run" / "checkpoints" / "last.ckpt").is_file()
    ranks.run_ranks(fit(resumed, 2, "--ckpt_path=last"), 2)
    return whole / "run", resumed / "run"


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written_and_resumes_on_other_ranks(folders):
    """The same losses and weights, so the same rows; a second resume continues the data too."""
    names = ("loss", "loss_lm", "loss_diffusion", "grad_norm")
    logs = [same_runs.logged(run) for run in folders]
    whole, resumed = ({name: log[f"train/{name}"] for name in names} for log in logs)
    for name in names:
        assert [*whole[name]] == [*resumed[name]] == [*range(6)]
        for step, values in whole[name].items():
            assert [*values] == pytest.approx([*resumed[name][step]], rel=1e-5)
    whole, resumed = (read_checkpoint(run)["state_dict"] for run in folders)
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_ranks_end_at_the_next_step_after_a_save_that_failed_on_one(tmp_path):
    """They would otherwise train on until the next save, here after step 6."""
    config = runs.write_config(tmp_path, every_other)
    fit = ["fit", "-c", str(config), "--trainer.devices=2", "--data.init_args.batch_size=2"]
    fit += [f"--trainer.strategy={ranks.sharded(2)}"]
    fit += ["--trainer.callbacks+=support.held_saves.FailSaves"]
    ends = ranks.ends_of_ranks(fit, tmp_path / "log")
    assert [code for code, _ in ends] == [1, 1], ends
    failed = "step0000004.ckpt could not be written ([Errno 28] No space left on device); the earl"
    for rank, (_, text) in enumerate(ends):
        error = [line for line in text.splitlines() if line.startswith("tf-lightning: error: ")]
        assert len(error) == 1 and failed in error[0]
        assert text.count(failed) == 2 - rank  # rank zero also warns
    run = tmp_path / "run"
    assert [*same_runs.logged(run)["train/loss"]] == [*range(5)]
    check_sharded(run / "checkpoints" / "last.ckpt")
    assert read_checkpoint(run)["global_step"] == 2


@pytest.mark.slow
def test_every_command_reads_a_sharded_checkpoint_as_the_same_one_in_a_file(folders, tmp_path):
    sharded = folders[0] / "checkpoints" / "last.ckpt"
    file = tmp_path / "file.ckpt"
    torch.save(same_runs.read(sharded), file)
    config = ["-c", str(folders[0].parent / "config.yaml")]
    config += [f"--data.init_args.cache_dir={folders[0].parents[1]}/data"]
    results = []
    trained, _ = select_weights(read_checkpoint(file)["state_dict"])
    for name, path in (("a", sharded), ("b", file)):
        out = tmp_path / name
        sampling = ["--num-inference-steps", "2", "-n1"]
        main(["generate", str(path), "a red circle", *sampling, "-o", str(out / "images")])
        main(["export", str(path), "-o", str(out / "exported"), "--only", "net"])
        logger = ["--trainer.logger.save_dir", str(out)]
        more = [*logger, f"--trainer.default_root_dir={out}"]
        main(["validate", *config, "--ckpt_path", str(path), *more])
        begin = [*config, *more, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
        begin += ["--trainer.callbacks+=callbacks.init_from.InitFrom"]
        main(["fit", *begin, f"--trainer.callbacks.checkpoint={path}"])
        log = same_runs.logged(out / "run")
        started = read_checkpoint(out / "run")["state_dict"]
        for key, weight in trained.items():  # a step changes a weight by half of the peak rate
            torch.testing.assert_close(started[f"net.{key}"], weight, atol=2e-3, rtol=0)
        results.append(
            {
                "image": (out / "images" / "0000.png").read_bytes(),
                "weights": (out / "exported" / "net.safetensors").read_bytes(),
                "losses": {k: v for k, v in log.items() if "loss" in k},
            }
        )
    assert results[0] == results[1]
    assert {"train/loss", "val/captions/loss_lm"} <= results[0]["losses"].keys()
