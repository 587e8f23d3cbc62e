"""Interrupted runs: what is saved, the exit code, what a resumed run makes up."""

import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from support import ranks, runs
from support.compare import bit_equal
from tf_lightning.cli.main import main
from tf_lightning.data import Mixture
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.training import module
from tf_lightning.training.interrupts import Interrupts, group_of_hosts
from tf_lightning.training.last_checkpoint import LastCheckpoint

PARTS = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "Mixture")
SAVED = "Go on with:\n  tf-lightning fit -c "


def no_period(config: dict) -> None:
    """Let nothing but the end of the run save a checkpoint."""
    runs.only_checkpoints(config)
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1_000


def end_of(folder: Path, *arguments: str, change=no_period) -> int:
    """Train in `folder`; return the exit code."""
    try:
        main(["fit", "-c", str(runs.write_config(folder, change)), *arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert end_of(folder) == 0
    return folder / "run"


def check_equal(run: Path, whole: Path) -> None:
    """Assert that a resumed run ends in the same state, and validated at the same steps."""
    one, other = load(run), load(whole)
    for part in PARTS:
        assert bit_equal(one[part], other[part]), part
    assert validations(run) == validations(whole)
    assert steps_of(run, "train/loss") == steps_of(whole, "train/loss")


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def validations(run: Path) -> list[int]:
    """The steps whose validation was logged, in the order of time."""
    return steps_of(run, "val/captions/loss_lm")


def steps_of(run: Path, name: str) -> list[int]:
    """The steps at which a value was logged, in the order of time."""
    events = EventAccumulator(str(run)).Reload().Scalars(name)
    # Files of one second are read in any order.
    return [event.step for event in sorted(events, key=lambda event: event.wall_time)]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)],
)
def test_a_signal_saves_the_step_and_the_resumed_run_equals_an_uninterrupted_one(
    signum, code, whole, tmp_path, capsys
):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = runs.stop_at("on_train_batch_start", 4, signum)
    assert end_of(tmp_path, *stop) == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    said = capsys.readouterr().err
    assert f"interrupted by {signal.Signals(signum).name}" in said and SAVED in said
    saved = load(tmp_path / "run")
    assert saved["global_step"] == 4
    assert end_of(tmp_path, "--ckpt_path=last") == 0
    check_equal(tmp_path / "run", whole)


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(whole, tmp_path):
    stop = runs.stop_at("on_save_checkpoint")
    assert end_of(tmp_path, *stop, change=runs.only_checkpoints) == 143
    assert load(tmp_path / "run", "step0000003")["global_step"] == 3
    assert load(tmp_path / "run")["global_step"] in (3, 4)
    assert end_of(tmp_path, "--ckpt_path=last", change=runs.only_checkpoints) == 0
    check_equal(tmp_path / "run", whole)


def test_a_signal_in_a_save_of_a_resumed_run_waits_until_the_step_is_logged(whole, tmp_path):
    assert end_of(tmp_path, *runs.stop_at("on_train_batch_start", 4)) == 143
    assert end_of(tmp_path, "--ckpt_path=last", *runs.stop_at("on_save_checkpoint")) == 143
    assert end_of(tmp_path, "--ckpt_path=last") == 0
    check_equal(tmp_path / "run", whole)


def test_a_closed_terminal_does_not_end_a_run_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = runs.stop_at("on_train_batch_start", 4, signal.SIGHUP)
        assert end_of(tmp_path, *stop) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_printed_command_resumes(tmp_path, capsys):
    end_of(tmp_path, "--ckpt_path", "last", *runs.stop_at("on_train_batch_start", 2))
    command = re.search(r"  tf-lightning (fit .*)", capsys.readouterr().err)[1].split()
    assert command.count("--ckpt_path") == 1 and command[-2:] == ["--ckpt_path", "last"]
    main([argument for argument in command if "callbacks" not in argument])
    assert load(tmp_path / "run")["global_step"] == runs.MAX_STEPS


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward"])
def test_an_error_in_a_step_saves_the_step_before(hook, whole, tmp_path, capsys):
    with pytest.raises(runs.Killed):
        end_of(tmp_path, *runs.stop_at(hook, 5, kind="Raise"))
    assert SAVED in capsys.readouterr().err
    assert load(tmp_path / "run")["global_step"] == 4
    end_of(tmp_path, "--ckpt_path=last")
    check_equal(tmp_path / "run", whole)


def test_gradients_that_are_not_finite_end_the_run_with_its_last_weights_saved(
    whole, tmp_path, capsys
):
    spoil = ["--trainer.callbacks+=support.runs.SpoilGradients", "--trainer.callbacks.nth=3"]
    assert end_of(tmp_path, *spoil, "--model.max_bad_steps=2") == 1
    said = capsys.readouterr().err
    assert "2 steps in a row (steps 4 to 5" in said and SAVED in said
    saved, never_spoilt = load(tmp_path / "run"), load(whole)
    assert saved["global_step"] == 4 and saved["step_guard"]["left_out"] == 2
    # The weights are those of step 3, and the run goes on from the rows after step 4.
    assert saved["optimizer_states"][0]["state"][0]["step"] == 3
    assert end_of(tmp_path, "--ckpt_path=last", "--model.max_bad_steps=2") == 0
    assert load(tmp_path / "run")["Mixture"] == never_spoilt["Mixture"]


class Breaks(BoringModel):
    """A module of another project, whose second step fails in its update."""

    def configure_gradient_clipping(self, *args, **kwargs) -> None:
        if self.global_step == 1:
            raise ArithmeticError("the update failed")


def test_the_error_of_a_module_of_another_project_is_raised_as_it_is(tmp_path):
    saver = ModelCheckpoint(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, callbacks=[saver, LastCheckpoint(saver)],
    )  # fmt: skip
    with pytest.raises(ArithmeticError, match="the update failed"):
        trainer.fit(Breaks())


def test_a_state_in_the_middle_of_an_update_is_not_saved(tmp_path, monkeypatch, capsys):
    update, count = module.update_ema, []

    def fail_at_third(*args):
        count.append(update(*args))
        if len(count) == 3:
            raise runs.Killed

    monkeypatch.setattr(module, "update_ema", fail_at_third)
    with pytest.raises(runs.Killed):
        end_of(tmp_path)
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert "Nothing was saved" in capsys.readouterr().err


def examined(config: dict) -> None:
    no_period(config)
    config["trainer"]["callbacks"].append({"class_path": "support.runs.Examine"})


@pytest.mark.parametrize(
    ("hook", "nth", "step"),
    [("on_validation_batch_start", 1, 3), ("on_validation_end", 2, 6), ("on_train_end", 1, 6)],
)
def test_a_resumed_run_makes_up_its_validation_and_its_end(
    hook, nth, step, whole, tmp_path, caplog
):
    def stopped(config: dict) -> None:
        examined(config)
        signal_at = {"class_path": "support.runs.SignalAt", "init_args": {"hook": hook, "nth": nth}}
        config["trainer"]["callbacks"].insert(1, signal_at)

    run = tmp_path / "run"
    assert end_of(tmp_path, change=stopped) == 143
    assert load(run)["global_step"] == step and not (run / "examined").exists()
    (run / "checkpoints" / "last.ckpt").unlink()  # as if killed before the link was set
    assert end_of(tmp_path, "--ckpt_path=last", change=examined) == 0
    assert (run / "examined").read_text() == "6"
    assert (run / "checkpoints" / "last.ckpt").is_symlink()  # not written again
    steps = validations(run)
    assert sorted(set(steps)) == validations(whole)
    # Once complete, nothing is done again.
    (run / "examined").unlink()
    with caplog.at_level("INFO"):
        assert end_of(tmp_path, "--ckpt_path=last", change=examined) == 0
    assert not (run / "examined").exists() and validations(run) == steps
    assert "ended at step 6, and nothing is missing" in caplog.text


def test_a_signal_before_the_first_step_of_a_resumed_run_leaves_its_checkpoint(
    tmp_path, monkeypatch
):
    assert end_of(tmp_path, *runs.stop_at("on_train_end")) == 143
    saved = (tmp_path / "run" / "checkpoints" / "step0000006.ckpt").read_bytes()
    load_data = Mixture.train_dataloader

    def signalled(data):
        os.kill(os.getpid(), signal.SIGTERM)
        return load_data(data)

    monkeypatch.setattr(Mixture, "train_dataloader", signalled)
    assert end_of(tmp_path, "--ckpt_path=last") == 143
    assert (tmp_path / "run" / "checkpoints" / "step0000006.ckpt").read_bytes() == saved


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UserError("no such file"), 1, "no such file"), (Interrupted(15), 143, "by SIGTERM")],
)
def test_what_ends_a_run_while_its_loader_begins_is_told(
    error, code, said, tmp_path, monkeypatch, capsys
):
    def fail(loader):
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    assert end_of(tmp_path) == code
    assert said in capsys.readouterr().err


def test_a_run_shorter_than_the_period_has_its_last_checkpoint_before_it_validates(tmp_path):
    def killed_in_validation(config: dict) -> None:
        no_period(config)
        config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}

    stop = runs.stop_at("on_validation_start", kind="Raise")
    with pytest.raises(runs.Killed):
        end_of(tmp_path, *stop, change=killed_in_validation)
    assert load(tmp_path / "run")["global_step"] == 2


def test_a_run_that_its_time_limit_ends_makes_up_its_end(tmp_path, monkeypatch):
    is_over = []  # at once when training has started, and from then on
    elapsed = lambda timer, *args: 1_000 if is_over or timer.start_time() else 0  # noqa: E731
    monkeypatch.setattr(Timer, "time_elapsed", elapsed)
    limit = ["--trainer.max_time=00:00:10:00"]
    with pytest.raises(runs.Killed):
        end_of(tmp_path, *limit, *runs.stop_at("on_train_end", kind="Raise"))
    step = load(tmp_path / "run")["global_step"]
    assert 0 < step < runs.MAX_STEPS
    is_over.append(True)
    assert end_of(tmp_path, *limit, "--ckpt_path=last", change=examined) == 0
    assert (tmp_path / "run" / "examined").read_text() == str(step)


SLURM = {
    "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of SLURM with a `scontrol` that writes what it was asked into a file."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "asked"
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_the_signal_by_which_slurm_preempts_can_be_chosen(slurm, tmp_path):
    plugin = ["--trainer.plugins=SLURMEnvironment", "--trainer.plugins.requeue_signal=SIGUSR2"]
    stop = runs.stop_at("on_train_batch_start", 2, signal.SIGUSR2)
    assert end_of(tmp_path, *plugin, *stop) == 128 + signal.SIGUSR2
    assert slurm.read_text() == "requeue 7\n"
    assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").exists()


def test_a_preempted_slurm_job_is_queued_again_and_goes_on_from_its_own_folder(
    slurm, whole, tmp_path, monkeypatch
):
    stop = runs.stop_at("on_train_batch_start", 4, signal.SIGUSR1)
    assert end_of(tmp_path, *stop) == 138
    assert slurm.read_text() == "requeue 7\n"
    saved = tmp_path / "run" / "hpc_ckpt_1.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    assert list(tmp_path.rglob("*.ckpt")) == [saved]
    # Another run takes nothing from it.
    assert end_of(tmp_path, "--trainer.logger.name=other", "--trainer.max_steps=2") == 0
    assert load(tmp_path / "other")["global_step"] == 2
    # The same command is refused, unless SLURM repeats it.
    assert end_of(tmp_path) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert end_of(tmp_path) == 0
    check_equal(tmp_path / "run", whole)


def without_validation(config: dict) -> None:
    no_period(config)
    config["trainer"]["limit_val_batches"] = 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_signal_that_reaches_one_of_two_ranks_saves_and_ends_both(strategy, tmp_path):
    config = runs.write_config(tmp_path, without_validation)
    stop = [*runs.stop_at("on_train_batch_start", 4), "--trainer.callbacks.rank=1"]
    strategy = json.dumps(ranks.SHARDED) if strategy == "sharded" else strategy
    with pytest.raises(ProcessExitedException) as ended:
        ranks.fit(config, 2, strategy, *stop)
    assert ended.value.exit_code == 143
    assert load(tmp_path / "run")["global_step"] == 4
    ranks.fit(config, 2, strategy, "--ckpt_path=last")
    assert load(tmp_path / "run")["global_step"] == runs.MAX_STEPS


def test_ranks_with_gpus_agree_on_their_hosts():
    if dist.is_initialized():  # Lightning leaves the group of a run of one rank
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        strategy = SimpleNamespace(root_device=torch.device("cuda"), _timeout=timedelta(hours=2))
        trainer = SimpleNamespace(world_size=2, strategy=strategy)
        interrupts = Interrupts()
        interrupts.group, interrupts.received = group_of_hosts(trainer), signal.SIGTERM
        interrupts.find_out(trainer)
        assert (dist.get_backend(interrupts.group), interrupts.agreed) == ("gloo", signal.SIGTERM)
        of_hosts = interrupts.group._get_backend(torch.device("cpu"))
        assert of_hosts.options._timeout == timedelta(hours=2)
    finally:
        dist.destroy_process_group()


def two_ranks(folder: Path, *arguments: str, strategy: str = "ddp", change=no_period) -> list:
    """Train with two ranks; return the exit code and the output of each."""
    command = ["fit", "-c", str(runs.write_config(folder, change)), "--trainer.devices=2"]
    command += [f"--trainer.strategy={strategy}", "--data.init_args.batch_size=1", *arguments]
    return ranks.ends_of_ranks(command, folder / "log")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once_with_its_workers(tmp_path):
    config = runs.write_config(tmp_path, runs.only_checkpoints)
    twice = runs.stop_at("on_train_batch_start", 5, signal.SIGINT) * 2
    command = ["fit", "-c", str(config), "--data.init_args.num_workers=1", *twice]
    ((code, _),) = ranks.ends_of_ranks(command, tmp_path / "log", ranks=1)
    assert code == -signal.SIGINT
    assert load(tmp_path / "run")["global_step"] == 3
    assert not list((tmp_path / "run").rglob("*.partial"))


BUSY = runs.stop_at("on_validation_epoch_end", kind="Sleep", rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], BUSY], ids=["waiting", "busy"])
def test_a_signal_to_one_rank_in_a_validation_ends_both_and_saves(others, tmp_path):
    began = time.monotonic()
    stop = runs.stop_at("on_validation_epoch_end", rank=1)
    (code, said), (other_code, _) = two_ranks(tmp_path, *stop, *others)
    assert code == other_code == 143 and time.monotonic() - began < 60
    assert "interrupted by SIGTERM" in said and SAVED in said
    assert load(tmp_path / "run")["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_end", "on_train_end"])
def test_an_error_of_one_rank_ends_both_and_rank_zero_saves(hook, tmp_path):
    nth, step = (4, 3) if hook == "on_train_batch_start" else (1, 3 if "val" in hook else 6)
    stop = runs.stop_at(hook, nth, kind="Raise", rank=1)
    (code, said), (other_code, _) = two_ranks(tmp_path, *stop)
    assert code == 1 and other_code == 1
    assert "tf-lightning: error: rank 1 failed: Killed: no message" in said and SAVED in said
    run = tmp_path / "run"
    assert load(run)["global_step"] == step
    assert json.loads((run / "progress.json").read_text())["finished_step"] is None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, None], ids=["one", "all"])
def test_with_sharded_weights_an_error_of_all_ranks_is_saved_and_one_of_one_rank_is_not(
    rank, tmp_path
):
    def few_checkpoints(config: dict) -> None:
        without_validation(config)
        config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 2

    stop = runs.stop_at("on_train_batch_start", 4, kind="Raise", rank=rank)
    sharded = json.dumps(ranks.SHARDED)
    ends = two_ranks(tmp_path, *stop, strategy=sharded, change=few_checkpoints)
    assert [code for code, _ in ends] == [1, 1]
    step = 3 if rank is None else 2
    assert load(tmp_path / "run")["global_step"] == step
    assert f"step000000{step}.ckpt" in ends[0][1] and SAVED in ends[0][1]
