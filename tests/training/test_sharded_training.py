"""Sharded runs have the losses of one device: FSDP2 and HSDP, with and without checkpointing.

`benchmarks/sharded_matrix.py` trains all combinations.
"""

import pytest

from support.sharded_fits import STEPS, train

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
HALF = STEPS // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def expected(folder):
    return train(folder, 1, [{"options": options} for options in (PLAIN, SEPARATE, MUON)])


def same(found: dict, expected: dict, rel: float, first: int = 0) -> None:
    for name in ("loss", "grad_norm"):
        assert len(expected[name]) == STEPS
        assert found[name] == pytest.approx(expected[name][first:], rel=rel), name
    assert found["rows"] == expected["rows"][first:]


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(folder, expected):
    plain, separate, half = train(folder, 2, [{"options": options} for options in TWO])
    same(plain, expected[0], 1e-6)
    same(separate, expected[1], 1e-6)
    same(half, expected[0], 5e-2)
    assert half["loss"] != pytest.approx(expected[0]["loss"], rel=1e-5)  # it did compute in bf16


@pytest.mark.slow
def test_four_ranks_with_replicas_have_the_losses_of_one_and_resume_on_four_two_and_one(
    folder, expected
):
    """On four ranks bit by bit. FSDP2 and one rank resume a sharded checkpoint of HSDP."""
    saved = [folder / f"{number}.ckpt" for number in range(len(FOUR))]
    legs = [{"options": options} for options in FOUR]
    cut = [leg | {"save": save, "stop": HALF} for leg, save in zip(legs, saved, strict=True)]
    again = [leg | {"start": save} for leg, save in zip(legs, saved, strict=True)]
    found = train(folder, 4, legs + cut + again)
    parts = found[:2], found[2:4], found[4:], expected[1:]
    for whole, half, rest, one in zip(*parts, strict=True):
        same(whole, one, 1e-6)
        assert half["loss"] + rest["loss"] == whole["loss"]
        for name in ("weights", "optimizer"):
            assert rest[name] == whole[name] != half[name]
            assert whole[name][:2] == whole[name][2:] and whole[name][0] != whole[name][1]
    for ranks in (2, 1):
        [rest] = train(folder, ranks, [{"options": SEPARATE, "start": saved[0]}])
        same(rest, expected[1], 1e-6, first=HALF)
