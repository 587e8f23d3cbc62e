"""Which inputs each output depends on, and which weights each loss trains."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.tiny import PATCH_SIZE, VOCAB_SIZE, all_outputs, document, packed, tiny_net
from tf_lightning.batch import Batch
from tf_lightning.diffusion.process import diffusion_loss_sum
from tf_lightning.model.attention import DenseAttention, VarlenAttention
from tf_lightning.model.transfusion import update_ema
from tf_lightning.training.losses import lm_loss

FORMS = pytest.mark.parametrize("form", [DenseAttention, VarlenAttention])
CAUSAL = pytest.mark.parametrize("causal", [False, True])


def two_rows() -> Batch:
    """Row 0: text-image-text-image-text, then text-image. Row 1: image-text."""
    return packed([[document("2i3i1", 1), document("2i", 2)], [document("i2", 3)]])


def changed(before: Tensor, after: Tensor) -> set[tuple[int, int]]:
    """Positions (b, t) whose logits differ by more than 1e-6."""
    difference = (before - after).abs().amax(-1)
    return {tuple(position) for position in (difference > 1e-6).nonzero().tolist()}


def positions_where(condition: Tensor) -> set[tuple[int, int]]:
    """Positions (b, t) where a condition (B, T) holds."""
    return {tuple(position) for position in condition.nonzero().tolist()}


def influenced_by(batch: Batch, b: int, t: int, causal: bool = False) -> set[tuple[int, int]]:
    """Positions that (b, t) may influence: later ones of its document, and its image."""
    row = torch.arange(len(batch.input_ids)).unsqueeze(1)
    index = torch.arange(batch.input_ids.shape[1])
    image = batch.image_ids[b, t]
    same_image = (batch.image_ids == image) & (image >= 0) & (not causal)
    same_document = (row == b) & (batch.document_ids == batch.document_ids[b, t])
    return positions_where(same_document & ((index >= t) | same_image))


@FORMS
@CAUSAL
def test_a_token_changes_only_its_position_and_later_ones_of_its_document(form, causal):
    net, batch = tiny_net(), two_rows()
    attend = form(batch, causal)
    before, images_before = all_outputs(net, batch, attend)
    for b, t in positions_where((batch.document_ids >= 0) & (batch.image_ids < 0)):
        other = batch.input_ids.clone()
        other[b, t] = (other[b, t] + 1) % VOCAB_SIZE
        after, images_after = all_outputs(net, replace(batch, input_ids=other), attend)
        expected = influenced_by(batch, b, t, causal)
        assert changed(before, after) == expected
        for image in range(batch.num_images):
            follows = positions_where(batch.image_ids == image) <= expected
            difference = (images_before[image] - images_after[image]).abs().max()
            assert (difference > 1e-6) == follows


@FORMS
@CAUSAL
def test_a_patch_changes_only_its_image_and_later_positions_of_its_document(form, causal):
    net, batch = tiny_net(), two_rows()
    attend = form(batch, causal)
    before, images_before = all_outputs(net, batch, attend)
    for index, (b, t) in enumerate(sorted(positions_where(batch.image_ids >= 0))):
        image, patch = divmod(index, 4)
        row, column = (PATCH_SIZE * number for number in divmod(patch, 2))
        latents = batch.latents.clone()
        latents[image, :, row : row + PATCH_SIZE, column : column + PATCH_SIZE] += 1
        after, images_after = all_outputs(net, replace(batch, latents=latents), attend)
        expected = influenced_by(batch, b, t, causal)
        assert changed(before, after) == expected
        earlier = (images_before - images_after).abs()[: image + 1].flatten(1).amax(1) > 1e-6
        assert earlier.tolist() == [
            bool(positions_where(batch.image_ids == other) & expected) for other in range(image + 1)
        ]


def test_with_causal_images_a_patch_does_not_change_earlier_patches():
    net, batch = tiny_net(), two_rows()
    attend = VarlenAttention(batch, causal=True)
    latents = batch.latents.clone()
    latents[0, :, 2:, 2:] += 1  # the last patch
    before, after = (
        all_outputs(net, replace(batch, latents=x), attend)[1] for x in (batch.latents, latents)
    )
    same = (before - after)[0].abs().amax(0) <= 1e-6
    assert same.tolist() == [[True] * 4] * 2 + [[True, True, False, False]] * 2


def test_a_noise_level_changes_only_its_image_and_later_positions_of_its_document():
    net, batch = tiny_net(), two_rows()
    attend = VarlenAttention(batch)
    before, _ = all_outputs(net, batch, attend)
    for image in range(batch.num_images):
        t = batch.t.clone()
        t[image] = 1 - t[image]
        after, _ = all_outputs(net, replace(batch, t=t), attend)
        first = (batch.image_ids == image).nonzero()[0].tolist()
        assert changed(before, after) == influenced_by(batch, *first)


def test_a_document_gives_the_same_outputs_alone_and_packed():
    net = tiny_net()
    documents = [document("2i3i1", 1), document("2i", 2), document("5", 3)]
    batch = packed([documents])
    together, images = all_outputs(net, batch, VarlenAttention(batch))
    logits, outputs, first = [], [], 0
    for parts in documents:
        alone = packed([[parts]])
        count = alone.num_images
        alone = replace(alone, t=batch.t[first : first + count])
        first += count
        alone_logits, alone_images = all_outputs(net, alone, VarlenAttention(alone))
        logits.append(alone_logits)
        outputs += [alone_images] if count else []
    torch.testing.assert_close(together, torch.cat(logits, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images, torch.cat(outputs), atol=1e-5, rtol=1e-5)


def test_logits_are_computed_at_targets_only():
    net, batch = tiny_net(), two_rows()
    attend = VarlenAttention(batch)
    logits, output = net(batch, batch.latents, batch.t, attend)
    everywhere, same_output = all_outputs(net, batch, attend)
    torch.testing.assert_close(logits, everywhere.flatten(0, 1)[batch.target_index])
    assert torch.equal(output, same_output) and output.shape == batch.latents.shape


def test_every_weight_has_a_gradient_without_images_and_without_text():
    net = tiny_net().requires_grad_(True)
    for shape in ("5", "i"):
        batch = packed([[document(shape)]])  # text data does not know the shape of images
        net.zero_grad()
        logits, output = net(batch, batch.latents, batch.t, VarlenAttention(batch))
        assert output.shape == batch.latents.shape
        (logits.sum() + output.sum()).backward()
        # DDP waits for the gradient of every weight
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_a_batch_of_padding_has_no_outputs():
    net, batch = tiny_net(), packed([[]], row_length=4)
    logits, output = net(batch, batch.latents, batch.t, VarlenAttention(batch))
    assert logits.shape == (0, VOCAB_SIZE) and output.shape == batch.latents.shape


def hidden_gradient(batch: Batch, loss_of) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of a loss at the Transformer's output (B, T, D) and of the weights, by name."""
    net = tiny_net().requires_grad_(True)
    kept = []
    net.transformer.register_forward_hook(
        lambda module, args, output: (output.retain_grad(), kept.append(output)) and None
    )
    loss_of(*net(batch, batch.latents, batch.t, VarlenAttention(batch))).backward()
    return kept[0].grad, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def test_the_lm_loss_has_no_gradient_at_boi_and_patches():
    batch = two_rows()
    gradient, weights = hidden_gradient(
        batch, lambda logits, _: lm_loss(logits, batch.labels.flatten()[batch.target_index]).sum()
    )
    trained = positions_where(gradient.abs().amax(-1) > 0)
    assert trained == positions_where(batch.labels >= 0)
    assert not trained & positions_where((batch.image_ids >= 0) | (batch.input_ids == 18))
    assert "transformer.output.weight" in weights
    assert "patch_coder.patch_decoder.weight" not in weights


def test_the_diffusion_loss_has_gradients_at_patches_only():
    batch = two_rows()
    gradient, weights = hidden_gradient(
        batch, lambda _, output: diffusion_loss_sum(output, batch.noise)
    )
    assert positions_where(gradient.abs().amax(-1) > 0) == positions_where(batch.image_ids >= 0)
    assert "transformer.output.weight" not in weights
    assert "patch_coder.patch_decoder.weight" in weights


def test_update_ema_is_the_exponential_moving_average():
    net, ema = tiny_net(), tiny_net()
    start = [parameter.clone() for parameter in ema.parameters()]
    for parameter in net.parameters():
        parameter.fill_(3.0)
    for _ in range(4):
        update_ema(ema, net, 0.9)
    for first, parameter in zip(start, ema.parameters(), strict=True):
        torch.testing.assert_close(parameter, 0.9**4 * first + (1 - 0.9**4) * 3)
