"""Throughput equals tokens and FLOPs counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from callbacks.throughput import Throughput
from support.tiny import document, packed, tiny_net
from tf_lightning.training.flops import Workload, flops_6nd, training_flops


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by one second at each reading."""
    seconds = iter(range(100))
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: float(next(seconds)))


def log_of(
    batches: list,
    every: int,
    world_size: int = 1,
    peak_flops: float | None = None,
    resumed_at: int | None = None,
) -> dict[int, dict[str, float]]:
    """Logged values by step, of a run that was resumed after one of its steps."""
    data = SimpleNamespace(source_names=["images", "text"], epochs=dict)
    trainer = SimpleNamespace(
        datamodule=data, log_every_n_steps=every, global_step=0, world_size=world_size,
        precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    logged = {}
    module = SimpleNamespace(
        device="cpu",
        hparams={},
        log_dict=lambda values, **_: logged.update({trainer.global_step: values}),
        net=tiny_net(),
    )
    callback = Throughput(peak_flops)
    callback.on_train_start(trainer, module)
    for batch in batches:
        if trainer.global_step == resumed_at:
            state, callback = callback.state_dict(), Throughput(peak_flops)
            callback.load_state_dict(state)
            callback.on_train_start(trainer, module)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, torch.zeros(()), batch, 0)
    return logged


def batches() -> list:
    """Three batches of two rows of 20 positions, with 11 and 9, 11 and 11, and 9 and 9 tokens."""
    images, text = [document("3i")], [document("7")]
    assert [packed([row]).row_tokens.item() for row in (images, text)] == [11, 9]
    rows = [[images, text], [images, images], [text, text]]
    sources = [[0, 1], [0, 0], [1, 1]]
    return [packed(r, row_length=20, source_ids=s) for r, s in zip(rows, sources, strict=True)]


def test_padding_and_mixture_are_shares_of_all_tokens_so_far(clock):
    logged = log_of(batches(), every=1)
    assert logged[1]["train/padding_share"] == pytest.approx(1 - 20 / 40)
    assert logged[3]["train/padding_share"] == pytest.approx(1 - 60 / 120)
    assert logged[1]["train/mixture/images"] == pytest.approx(11 / 20)
    assert logged[2]["train/mixture/images"] == pytest.approx(33 / 42)
    assert logged[3]["train/mixture/images"] == pytest.approx(33 / 60)
    assert logged[3]["train/mixture/text"] == pytest.approx(27 / 60)


def test_a_resumed_run_logs_the_same_shares_and_flops(clock):
    whole, resumed = log_of(batches(), every=1), log_of(batches(), every=1, resumed_at=1)
    for step, values in whole.items():
        assert {"train/tokens_per_sec", "train/tflops_per_sec"} < values.keys()
        same = [name for name in values if not name.endswith("_per_sec")]
        assert [values[name] for name in same] == [resumed[step][name] for name in same]


def test_speed_is_of_the_window_and_all_ranks(clock):
    speeds = {step: v["train/tokens_per_sec"] for step, v in log_of(batches(), every=1).items()}
    assert speeds == {1: 20, 2: 22, 3: 18}


def test_counts_are_read_only_at_the_trainers_logging_steps(clock):
    logged = log_of(batches(), every=3, world_size=2)
    assert list(logged) == [3] and logged[3]["train/tokens_per_sec"] == 2 * 60


def test_flops_are_of_the_window_and_mfu_is_their_share_of_the_peak(clock):
    logged = log_of(batches(), every=1, world_size=2, peak_flops=1e9)
    # Targets: three words, <boi> and <eos> of a captioned image, seven words and <eos> of a text.
    work = [
        Workload(20, 11**2 + 9**2, 13, 1),
        Workload(22, 2 * 11**2, 10, 2),
        Workload(18, 2 * 9**2, 16, 0),
    ]
    for step, done in enumerate(work, 1):
        flops = training_flops(tiny_net(), done, (4, 4))
        assert logged[step]["train/flops_per_token"] == pytest.approx(flops / done.num_tokens)
        assert logged[step]["train/images_per_token"] == pytest.approx(
            done.num_images / done.num_tokens
        )
        assert logged[step]["train/tflops_per_sec"] == pytest.approx(2 * flops / 1e12)
        assert logged[step]["train/mfu"] == pytest.approx(flops / 1e9)
        assert logged[step]["train/flops_per_token_6n"] == flops_6nd(tiny_net(), 1)


def test_a_device_of_unknown_speed_has_no_mfu(clock):
    assert "train/mfu" not in log_of(batches(), every=3)[3]


def test_validations_are_timed_and_excluded_from_the_training_window(clock):
    data = SimpleNamespace(source_names=["images", "text"], epochs=dict)
    logger, logged = SimpleNamespace(), {}
    logger.log_metrics = lambda values, step: logged.setdefault(step, {}).update(values)
    trainer = SimpleNamespace(
        datamodule=data, log_every_n_steps=1, global_step=1, world_size=1, loggers=[logger],
        precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    log_train = lambda values, **_: logged.setdefault(trainer.global_step, {}).update(values)  # noqa: E731
    module = SimpleNamespace(device="cpu", hparams={}, net=tiny_net(), log_dict=log_train)
    callback = Throughput()
    callback.on_validation_start(trainer, module)  # 0: the sanity check is not part of the fit
    callback.on_validation_end(trainer, module)
    assert not logged and callback.fit_seconds == 0
    callback.on_train_start(trainer, module)  # 1
    callback.on_validation_start(trainer, module)  # 2
    callback.on_validation_end(trainer, module)  # 3; the fit's time is read at 4
    assert logged[0] == {"val/seconds": 1, "val/time_share": pytest.approx(1 / 3)}
    trainer.global_step = 2
    callback.on_train_batch_end(trainer, module, torch.zeros(()), batches()[0], 0)  # 5
    assert logged[2]["train/tokens_per_sec"] == pytest.approx(20 / (5 - 1 - 1))
    times = {"fit_seconds": 5, "validation_seconds": 1}  # the clock reads 6
    assert callback.state_dict() == times | {"tokens": {"images": 11, "text": 9}, "positions": 40}
    callback.on_train_end(trainer, module)  # 7
    assert callback.fit_seconds == 6


def test_times_continue_from_a_checkpoint(clock):
    resumed = Throughput()
    resumed.load_state_dict({"fit_seconds": 100.0, "validation_seconds": 10.0})
    resumed.started = 0.0
    assert resumed.fit_seconds == 100  # the clock reads 0
    assert resumed.state_dict() == {"fit_seconds": 101, "validation_seconds": 10}


@pytest.mark.parametrize(
    ("precision", "fp8", "dtype"),
    [
        ("32-true", None, torch.float32),
        ("bf16-mixed", None, torch.bfloat16),
        ("bf16-mixed", "rowwise", torch.float8_e4m3fn),
        ("16-mixed", None, torch.float16),
        ("64-true", None, torch.float64),
    ],
)
def test_the_peak_is_that_of_the_type_in_which_the_network_multiplies(
    precision, fp8, dtype, monkeypatch
):
    monkeypatch.setattr("callbacks.throughput.peak_flops", lambda _, kind: (kind, 7))
    data = SimpleNamespace(source_names=["text"])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(
        datamodule=data, precision=precision, strategy=strategy, global_step=0
    )
    callback = Throughput()
    callback.on_train_start(trainer, SimpleNamespace(device="cpu", hparams={"fp8": fp8}))
    assert callback.peak_flops == (dtype, 7)
