"""The benchmark of training steps counts, times and prints every case."""

import importlib
from pathlib import Path

import pytest

from tf_lightning.model.transformer import TransformerConfig

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = TransformerConfig(vocab_size=4096, dim=32, num_layers=2, num_heads=2, ffn_dim=48)


@pytest.fixture
def step_time(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as for `python benchmarks/step_time.py`
    return importlib.import_module("step_time")


def test_mfu_is_the_share_of_the_peak(step_time):
    timing = step_time.Timing(2.0, 0.5, 1.0, flops=(3e12, 4e12), gib=(0.0, 0.0))
    assert timing.mfu(1e13) == "30.0% / 20.0%" and timing.mfu(None) == "unknown"


def test_flops_of_both_models_follow_the_6nd_rule(step_time):
    """Up to attention and the head, which is not computed at all of our positions."""
    config = TransformerConfig(vocab_size=64, dim=256, num_layers=4, num_heads=4, ffn_dim=704)
    batch = step_time.packed(step_time.CASES["64-patch images, captions of 20-30 tokens"], 128)
    net, _ = step_time.build(config, 128, "cpu", compiled=False)
    ours, plain = step_time.count_flops(net, batch)
    blocks = sum(p.numel() for p in net.transformer.layers.parameters())
    assert plain == pytest.approx(6 * blocks * batch.input_ids.numel(), rel=0.1)
    assert ours == pytest.approx(6 * blocks * batch.row_tokens.sum().item(), rel=0.1)
