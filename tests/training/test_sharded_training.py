"""Sharded runs have the losses of one device: FSDP2 and HSDP, with and without checkpointing."""

import pytest

from support.sharded_fits import STEPS, losses_of

PLAIN = {"sizes": {"qk_norm": True, "tie_embeddings": True}}
SEPARATE = {"sizes": {"modality_weights": "all"}, "z_loss_weight": 1e-4}
MUON = SEPARATE | {"muon": True}
TWO = [
    PLAIN,
    SEPARATE | {"activation_checkpointing": "full", "accumulate": 2},
    PLAIN | {"precision": "bf16-mixed", "activation_checkpointing": "selective"},
]
FOUR = [  # two groups of two ranks
    SEPARATE | {"shard_size": 2, "activation_checkpointing": "selective"},
    MUON | {"shard_size": 2, "reshard_after_forward": False},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def expected(folder):
    return losses_of(folder, 1, [PLAIN, SEPARATE, MUON])


def same(found: dict, expected: dict, rel: float) -> None:
    for name, values in expected.items():
        assert len(values) == STEPS and values == pytest.approx(found[name], rel=rel), name


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(folder, expected):
    plain, separate, half = losses_of(folder, 2, TWO)
    same(plain, expected[0], 1e-6)
    same(separate, expected[1], 1e-6)
    same(half, expected[0], 5e-2)
    assert half["loss"] != pytest.approx(expected[0]["loss"], rel=1e-5)  # it did compute in bf16


@pytest.mark.slow
def test_four_ranks_have_the_losses_of_one(folder, expected):
    adamw, muon = losses_of(folder, 4, FOUR)
    same(adamw, expected[1], 1e-6)
    same(muon, expected[2], 1e-6)
