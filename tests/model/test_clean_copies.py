"""Clean copies: a training row gives the outputs that generation computes with clean images."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from support.tiny import (
    LATENT_SHAPE,
    TOKENIZER,
    VOCAB_SIZE,
    all_outputs,
    document,
    packed,
    random_rows,
)
from tf_lightning.batch import Batch, unpack
from tf_lightning.model.attention import (
    DenseAttention,
    VarlenAttention,
    dense_mask,
    hidden_positions,
)
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training.flops import Workload, forward_flops, squared_lengths

SHAPES = ["i3", "2i3", "i2i", "ii1i2", "0i"]  # some images are followed by a part, some are not
CODERS = pytest.mark.parametrize("unet", [None, UNetConfig((8, 16), head_dim=8)], ids=str)
CAUSAL = pytest.mark.parametrize("causal", [False, True])


def net(unet: UNetConfig | None = None, **sizes) -> TransfusionModel:
    """A network with PyTorch's random weights, so that no output is zero."""
    torch.manual_seed(0)
    config = TransformerConfig(VOCAB_SIZE, 32, 2, 4, ffn_dim=48, **sizes)
    return TransfusionModel(config, 2, LATENT_SHAPE[0], unet=unet).requires_grad_(False)


def copies_of(shapes: list[str], row_length: int = 100) -> Batch:
    """Documents of these shapes in one row, with clean copies."""
    row = [document(shape, seed) for seed, shape in enumerate(shapes)]
    return packed([row], row_length=row_length, clean_copies=True)


def noised(batch: Batch) -> Tensor:
    """Images noised by rectified flow."""
    t = batch.t.view(-1, 1, 1, 1)
    return (1 - t) * batch.latents + t * batch.noise


def outputs(made: TransfusionModel, batch: Batch, x_t: Tensor, form=VarlenAttention, causal=False):
    """Logits at every position, and the denoiser's output for `x_t` at the batch's noise levels."""
    everywhere = replace(batch, target_index=torch.arange(batch.input_ids.numel()))
    return made(everywhere, x_t, batch.t, form(batch, causal))


def test_row_layout_equals_one_written_by_hand():
    batch = copies_of(["2i1", "i"], row_length=24)
    assert batch.image_ids[0].tolist() == (
        [-1] * 4 + [0] * 4 + [2] * 4 + [-1] * 3 + [-1] * 2 + [1] * 4 + [-1] * 2 + [-1]
    )
    positions = [0, 1, 2, 3, *[4, 5, 6, 7] * 2, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert batch.positions[0].tolist() == positions
    assert batch.document_ids[0].tolist() == [0] * 15 + [1] * 8 + [-1]
    assert batch.copied.tolist() == [0] and batch.num_images == 2
    assert batch.patch_index.tolist() == [*range(4, 8), *range(17, 21), *range(8, 12)]
    assert batch.text_index.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16, 21, 22, 23]
    assert batch.target_index.tolist() == [0, 1, 2, 12, 13]
    assert batch.row_tokens.tolist() == [23]


@given(rows=random_rows(), causal=st.booleans())
@settings(deadline=None, max_examples=50)
def test_only_its_own_patches_attend_to_a_noised_image_with_a_copy(rows, causal):
    batch = packed(rows, row_length=130, clean_copies=True)
    hidden = hidden_positions(batch)
    mask = dense_mask(batch.document_ids, batch.image_ids, causal, hidden)
    for b, row in enumerate(mask.tolist()):
        real, images = int(batch.row_tokens[b]), batch.image_ids[b].tolist()
        for q in range(real):
            for k in range(real):
                same_image = images[q] == images[k] >= 0
                seen = k <= q or (same_image and not causal)
                seen &= images[k] not in batch.copied or same_image
                seen &= bool(batch.document_ids[b, q] == batch.document_ids[b, k])
                assert row[q][k] == seen


def test_nothing_is_hidden_without_copies():
    assert hidden_positions(copies_of(["3i", "i", "5"])) is None


@CAUSAL
@CODERS
@pytest.mark.parametrize("weights", ["shared", "all"])
def test_text_after_a_copy_equals_text_after_the_clean_image(unet, causal, weights):
    made, batch = net(unet, modality_weights=weights), copies_of(SHAPES)
    logits, _ = outputs(made, batch, noised(batch), causal=causal)
    is_text = batch.image_ids[0] < 0
    for number, shape in enumerate(SHAPES):
        plain = packed([[document(shape, number)]])
        plain.t.zero_()
        expected, _ = all_outputs(made, plain, DenseAttention(plain, causal))
        read = torch.ones(len(expected[0]), dtype=torch.bool)
        if shape.endswith("i"):
            read[-6:] = False  # patches, <eoi> and <eos> of an image without a copy
        read &= plain.image_ids[0] < 0
        ours = logits[(batch.document_ids[0] == number) & is_text]
        torch.testing.assert_close(ours[: read.sum()], expected[0][read], atol=1e-5, rtol=1e-5)


@CAUSAL
@CODERS
@pytest.mark.parametrize("weights", ["shared", "all"])
def test_an_image_is_denoised_as_after_a_prompt_of_clean_images(unet, causal, weights):
    made, batch = net(unet, modality_weights=weights), copies_of(SHAPES)
    x_t = noised(batch)
    _, output = outputs(made, batch, x_t, causal=causal)
    assert output.shape == batch.latents.shape  # copies have no output
    image = 0
    for number, shape in enumerate(SHAPES):
        parts = document(shape, number)
        for end in [i + 1 for i, part in enumerate(parts) if part.ndim == 3]:
            plain = packed([[parts[:end]]])
            plain.t.zero_()[-1] = batch.t[image]
            plain.latents[-1] = x_t[image]
            expected = all_outputs(made, plain, DenseAttention(plain, causal))[1][-1]
            torch.testing.assert_close(output[image], expected, atol=1e-5, rtol=1e-5)
            image += 1
    assert image == batch.num_images


@CAUSAL
def test_a_noised_image_changes_only_its_own_output(causal):
    made, batch = net(), copies_of(["2i2i1"])
    before = outputs(made, batch, x_t := noised(batch), causal=causal)
    x_t[0] += 1
    after = outputs(made, batch, x_t, causal=causal)
    own = batch.image_ids[0] == 0
    assert torch.equal(before[0][~own], after[0][~own])
    assert (before[0][own] != after[0][own]).any(-1).all()
    assert torch.equal(before[1][1], after[1][1])
    assert not torch.equal(before[1][0], after[1][0])


def test_a_copy_changes_everything_after_it_and_nothing_before():
    made, batch = net(), copies_of(["2i2i1"])
    x_t = noised(batch)
    before = outputs(made, batch, x_t)
    batch.latents[0] += 1
    after = outputs(made, batch, x_t)
    changed = (before[0] != after[0]).any(-1)[: batch.row_tokens.item()]
    first = batch.image_ids[0].tolist().index(batch.num_images)  # first position of the first copy
    assert not changed[:first].any() and changed[first:].all()
    assert torch.equal(before[1][0], after[1][0]) and (before[1][1] != after[1][1]).all()


def test_images_with_a_copy_use_all_noise_levels():
    rows = [[document("i1", 0)] * 8 for _ in range(50)]
    limited, copied = packed(rows), packed(rows, row_length=200, clean_copies=True)
    assert limited.t.max() < 0.5 < 0.95 < copied.t.max()
    assert torch.equal(limited.noise, copied.noise)  # the same draws
    shifted = packed(rows, row_length=200, clean_copies=True, timestep_shift=3.0)
    assert shifted.t.median() == pytest.approx(0.75, abs=0.03)  # 3 u / (1 + 2 u) at u = 1/2


@given(rows=random_rows())
@settings(deadline=None, max_examples=30)
def test_unpack_ignores_copies(rows):
    plain = unpack(packed(rows, row_length=130), TOKENIZER)
    copied = unpack(packed(rows, row_length=130, clean_copies=True), TOKENIZER)
    assert [len(parts) for parts in plain] == [len(parts) for parts in copied]
    for ours, theirs in zip(copied, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@CODERS
def test_flops_with_copies_equal_the_counted_flops(unet):
    made, batch = net(unet), copies_of(SHAPES)
    lengths = torch.bincount(batch.document_ids[0][batch.document_ids[0] >= 0]).tolist()
    assert squared_lengths(batch).item() == sum(length**2 for length in lengths)
    work = Workload(
        num_tokens=sum(lengths),
        squared_lengths=sum(length**2 for length in lengths),
        num_targets=len(batch.target_index),
        num_images=batch.num_images,
        num_copies=len(batch.copied),
    )
    with FlopCounterMode(display=False) as counter:
        made(batch, batch.latents, batch.t, VarlenAttention(batch))
    assert forward_flops(made, work, LATENT_SHAPE[1:]) == counter.get_total_flops()
