"""Tokens counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import document, packed

from callbacks.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes one second further each time it is read."""
    seconds = iter(range(100))
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: float(next(seconds)))


def log_of(batches: list, every: int, world_size: int = 1) -> dict[int, dict[str, float]]:
    """What is logged at which step."""
    data = SimpleNamespace(source_names=["pictures", "text"])
    trainer = SimpleNamespace(
        datamodule=data, log_every_n_steps=every, global_step=0, world_size=world_size
    )
    logged = {}
    module = SimpleNamespace(
        device="cpu", log_dict=lambda values, **_: logged.update({trainer.global_step: values})
    )
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for batch in batches:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, torch.zeros(()), batch, 0)
    return logged


def batches() -> list:
    """Three batches of two rows of 20: 11, 9; 11, 11; 9, 9 tokens."""
    pictures, text = [document("3i")], [document("7")]
    assert [packed([row]).row_tokens.item() for row in (pictures, text)] == [11, 9]
    rows = [[pictures, text], [pictures, pictures], [text, text]]
    sources = [[0, 1], [0, 0], [1, 1]]
    return [packed(r, row_length=20, source_ids=s) for r, s in zip(rows, sources, strict=True)]


def test_padding_and_mixture_are_shares_of_all_tokens_so_far(clock):
    logged = log_of(batches(), every=1)
    assert logged[1]["train/padding_share"] == pytest.approx(1 - 20 / 40)
    assert logged[3]["train/padding_share"] == pytest.approx(1 - 60 / 120)
    assert logged[1]["train/mixture/pictures"] == pytest.approx(11 / 20)
    assert logged[2]["train/mixture/pictures"] == pytest.approx(33 / 42)
    assert logged[3]["train/mixture/pictures"] == pytest.approx(33 / 60)
    assert logged[3]["train/mixture/text"] == pytest.approx(27 / 60)


def test_speed_is_that_of_the_window_over_all_ranks(clock):
    speeds = {step: v["train/tokens_per_sec"] for step, v in log_of(batches(), every=1).items()}
    assert speeds == {1: 20, 2: 22, 3: 18}


def test_nothing_is_read_between_the_trainers_logging_steps(clock):
    logged = log_of(batches(), every=3, world_size=2)
    assert list(logged) == [3] and logged[3]["train/tokens_per_sec"] == 2 * 60
