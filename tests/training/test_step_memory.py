"""The planned memory of a training step, against allocations of two ranks that train."""

import pytest

from support.measured_steps import HPARAMS, TRANSFORMER, measured_peaks, small_batch
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.training.step_memory import plan_memory

CASES = {
    "fp32": ("32-true", HPARAMS),
    "separate weights, computed again": (
        "bf16-mixed",
        {
            **HPARAMS,
            "transformer": {**TRANSFORMER, "modality_weights": "all"},
            "activation_checkpointing": "full",
        },
    ),
}


@pytest.mark.slow
def test_the_planned_peak_is_that_of_two_ranks_within_5_percent(tmp_path):
    measured = measured_peaks(CASES, tmp_path / "peaks.json")
    planned = {
        name: plan_memory(hparams, small_batch(), 2, precision).peak
        for name, (precision, hparams) in CASES.items()
    }
    assert planned == pytest.approx(measured, rel=0.05)


def test_what_a_rank_keeps_is_divided_by_the_ranks_and_a_checkpoint_is_not():
    net = TransfusionModel(TransformerConfig(**TRANSFORMER), 2, 8)
    num_bytes = 4 * sum(p.numel() for p in net.parameters())
    two, four = (plan_memory(HPARAMS, small_batch(), ranks, "32-true") for ranks in (2, 4))
    for memory, ranks in ((two, 2), (four, 4)):
        assert memory.weights == pytest.approx(num_bytes / ranks, rel=0.02)  # odd sizes are padded
        assert (memory.ema, memory.optimizer) == (memory.weights, 2 * memory.weights)
        assert memory.checkpoint == 4 * num_bytes
    assert four.peak < two.peak
    groups = plan_memory({**HPARAMS, "shard_size": 2}, small_batch(), 4, "32-true")  # HSDP
    assert (groups.weights, groups.checkpoint) == (two.weights, two.checkpoint)
