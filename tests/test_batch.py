"""Packing: the layout of rows, their targets, and their noise."""

import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from support.tiny import PATCH_SIZE, document, layout, packed, random_rows
from tf_lightning.batch import (
    IGNORE_INDEX,
    document_length,
    max_noise_levels,
)

BOS, EOS, BOI, EOI = 1, 2, 18, 19
NONE = IGNORE_INDEX


def test_a_row_has_the_layout_written_by_hand():
    a, b, c = torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 10])
    picture = document("i")[0]
    batch = packed([[[a, picture, b], [c]]], row_length=18)
    expected = [
        # id, label, position, document, image
        (BOS, 5, 0, 0, -1),
        (5, 6, 1, 0, -1),
        (6, BOI, 2, 0, -1),
        (BOI, NONE, 3, 0, -1),
        (0, NONE, 4, 0, 0),
        (0, NONE, 5, 0, 0),
        (0, NONE, 6, 0, 0),
        (0, NONE, 7, 0, 0),
        (EOI, 7, 8, 0, -1),
        (7, EOS, 9, 0, -1),
        (EOS, NONE, 10, 0, -1),
        (BOS, 8, 0, 1, -1),
        (8, 9, 1, 1, -1),
        (9, 10, 2, 1, -1),
        (10, EOS, 3, 1, -1),
        (EOS, NONE, 4, 1, -1),
        (0, NONE, 0, -1, -1),
        (0, NONE, 0, -1, -1),
    ]
    fields = (
        batch.input_ids, batch.labels, batch.positions, batch.document_ids, batch.image_ids,
    )  # fmt: skip
    assert list(zip(*(field[0].tolist() for field in fields), strict=True)) == expected
    assert batch.patch_index.tolist() == [4, 5, 6, 7]
    assert batch.target_index.tolist() == [0, 1, 2, 8, 9, 11, 12, 13, 14]
    assert batch.row_tokens.tolist() == [16]
    assert torch.equal(batch.latents[0], picture)


@given(rows=random_rows())
@settings(deadline=None, max_examples=50)
def test_positions_of_any_row_equal_those_of_a_simpler_layout(rows):
    batch = packed(rows, row_length=100)
    places = [layout(row) for row in rows]
    assert batch.row_tokens.tolist() == [len(row) for row in places]
    assert [len(row) for row in places] == [
        sum(document_length(d, PATCH_SIZE) for d in row) for row in rows
    ]
    first_image = 0
    for b, row in enumerate(places):
        images = [-1 if image is None else image + first_image for _, image in row]
        first_image += len({image for _, image in row} - {None})
        padding = [-1] * (100 - len(row))
        assert batch.document_ids[b].tolist() == [number for number, _ in row] + padding
        assert batch.image_ids[b].tolist() == images + padding
    in_order = torch.arange(batch.num_images).repeat_interleave(4)
    assert torch.equal(batch.image_ids.flatten()[batch.patch_index], in_order)


@given(rows=random_rows())
@settings(deadline=None, max_examples=50)
def test_a_target_is_the_next_text_token_of_its_document(rows):
    batch = packed(rows, row_length=100)
    places = set(batch.target_index.tolist())
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    assert all(labels[place] == ids[place + 1] for place in places)
    for b, row in enumerate(rows):
        for number, parts in enumerate(row):
            here = (batch.document_ids[b] == number).nonzero().flatten() + 100 * b
            has_text = any(part.ndim == 1 for part in parts)
            silent = {here[-1].item()} | {
                i for i in here.tolist() if ids[i] == BOI or batch.image_ids.flatten()[i] >= 0
            }
            expected = set(here.tolist()) - silent if has_text else set()
            assert places & set(here.tolist()) == expected


def test_a_masked_token_is_read_but_not_a_target():
    """It is stored as ~id, and everything else in the batch stays the same."""
    learned = [torch.tensor([5, 6, 7, 8]), document("i")[0], torch.tensor([9, 10])]
    given = [torch.tensor([5, ~6, ~7, 8]), learned[1], torch.tensor([~9, 10])]
    one, two = packed([[learned]]), packed([[given]])
    same = ("input_ids", "positions", "document_ids", "image_ids", "patch_index", "text_index")
    for name in same:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    differ = (one.labels != two.labels)[0].nonzero().flatten()
    assert one.labels[0, differ].tolist() == [6, 7, 9]
    assert (two.labels[0, differ] == IGNORE_INDEX).all()
    assert len(two.target_index) == len(one.target_index) - 3


def test_a_document_without_text_has_no_targets():
    batch = packed([[document("i"), document("2")]])
    assert batch.target_index.tolist() == [8, 9, 10]
    assert batch.num_images == 1


@pytest.mark.parametrize(
    "shape, limits",
    [
        ("i3", [0.5]),  # captioned afterwards
        ("3i", [1.0]),
        ("i", [1.0]),  # its caption was dropped
        ("i3i", [0.5, 1.0]),  # an edit
        ("ii", [0.5, 1.0]),  # an edit whose instruction was dropped
        ("iii", [0.5, 0.5, 1.0]),
        ("ii3", [0.5, 0.5]),
        ("3ii", [1.0, 1.0]),
        ("3i3", [1.0]),
    ],
)
def test_an_image_that_is_read_and_that_no_text_precedes_has_a_limit_on_t(shape, limits):
    assert max_noise_levels(document(shape), 0.5) == limits


def test_the_source_of_an_edit_without_its_instruction_stays_readable():
    rows = [[document("ii"), document("i")]] * 500
    t = packed(rows, max_caption_t=0.2).t.view(-1, 3)
    assert t[:, 0].max() < 0.2 and t[:, 0].median() == pytest.approx(0.1, abs=0.02)
    assert t[:, 1:].median() == pytest.approx(0.5, abs=0.05)


def test_both_distributions_use_the_same_random_numbers():
    """The order of a row's noise levels and the noise sampled after them are equal."""
    uniform, other = (
        packed([[document("iii")]], timestep_distribution=name)
        for name in ("uniform", "logit_normal")
    )
    assert torch.equal(uniform.t.argsort(), other.t.argsort())
    assert torch.equal(uniform.noise, other.noise)
    assert not torch.allclose(uniform.t, other.t)


def test_the_noise_of_a_row_does_not_depend_on_its_batch():
    first, second = [document("2i", 1), document("i", 2)], [document("i3", 3)]
    together = packed([first, second], row_ids=[7, 40], seed=5)
    alone = packed([second], row_ids=[40], seed=5)
    assert torch.equal(together.noise[2:], alone.noise)
    assert torch.equal(together.t[2:], alone.t)


@pytest.mark.parametrize("other", [{"row_ids": [8], "seed": 5}, {"row_ids": [7], "seed": 6}])
def test_noise_differs_between_rows_and_seeds(other):
    rows = [[document("2i")]]
    one, two = packed(rows, row_ids=[7], seed=5), packed(rows, **other)
    assert not torch.isclose(one.noise, two.noise).any()
    assert one.t != two.t


def test_noise_is_standard_normal():
    rows = [[document("iiii")] for _ in range(50)]
    assert stats.kstest(packed(rows).noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_rows_without_documents_are_padding():
    batch = packed([[]], row_length=4)
    assert batch.latents.shape == batch.noise.shape == (0, 1, 1, 1)
    assert batch.t.shape == (0,)
    assert (batch.document_ids == -1).all() and batch.row_tokens.tolist() == [0]


def test_documents_longer_than_the_row_are_refused():
    with pytest.raises(ValueError, match="7 positions exceed row_length=6"):
        packed([[document("5")]], row_length=6)


def test_a_batch_is_moved_with_all_its_fields():
    batch = packed([[document("2i")]], source_ids=[3])
    moved = batch.to("cpu")
    assert moved.buckets == batch.buckets == [(1, 0, 4, 4)]
    tensors = {name: value for name, value in vars(batch).items() if name != "buckets"}
    assert all(torch.equal(getattr(moved, name), value) for name, value in tensors.items())
    assert moved.source_ids.tolist() == [3]


def test_the_shift_of_noise_levels_reaches_them():
    rows = [[document("2i", 1), document("3i", 2)], [document("1i", 3)]]
    plain, shifted = packed(rows), packed(rows, timestep_shift=3.0)
    torch.testing.assert_close(shifted.t, 3 * plain.t / (1 + 2 * plain.t))  # SD3 Eq. 23
