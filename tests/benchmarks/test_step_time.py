"""The benchmark of training steps counts, times and prints every case."""

import importlib
from pathlib import Path

import pytest
import torch

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
    net, _ = step_time.build(config, 128, "cpu")
    ours, plain = step_time.count_flops(net, batch)
    blocks = sum(p.numel() for p in net.transformer.layers.parameters())
    assert plain == pytest.approx(6 * blocks * batch.input_ids.numel(), rel=0.1)
    assert ours == pytest.approx(6 * blocks * batch.row_tokens.sum().item(), rel=0.1)


def test_the_table_of_a_gpu_has_all_cases_for_each_kind_of_blocks(step_time, monkeypatch, capsys):
    pytest.importorskip("torchao")
    compiled, converted, convert = [], [], step_time.convert_linears

    def record(blocks, recipe, emulate):
        converted.append(len(blocks))
        convert(blocks, recipe, emulate)

    monkeypatch.setattr(step_time, "compile_blocks", compiled.append)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.append(block))
    monkeypatch.setattr(step_time, "convert_linears", record)
    monkeypatch.setattr(step_time, "NUM_ROWS", 1)
    peaks = {"eager": 1e12, "compiled": 1e12, "fp8": 2e12}
    step_time.show_table(CONFIG, 512, "cpu", repeats=1, peaks=peaks)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [(row[1].strip(), row[2].strip()) for row in rows]
    assert names == [(case, how) for how in peaks for case in step_time.CASES]
    # Twice our blocks, and each block of the plain Llama; once both models.
    assert len(compiled) == 2 * (1 + CONFIG.num_layers) and converted == [2 * CONFIG.num_layers]
    for row in rows:
        ratio, strict, seconds = map(float, row[3:6])
        assert min(ratio, strict, seconds) > 0 and row[6].count("%") == 2


def test_a_gpu_without_fp8_has_the_other_rows(step_time, capsys):
    """Such as none: fp8 is checked as for a run."""
    peaks = step_time.peaks_of(torch.device("cpu"))
    assert peaks == {"eager": None, "compiled": None}
    assert "Without rows of fp8: fp8=tensorwise needs" in capsys.readouterr().out
