"""Separate weights for patches: equal copies give the plain block, others act on patches only."""

import pytest
import torch
from torch import Tensor, nn

from support.tiny import all_outputs, document, packed, tiny_net
from tf_lightning.batch import Batch
from tf_lightning.model.attention import DenseAttention, VarlenAttention
from tf_lightning.model.transformer import (
    FeedForward,
    ModalitySplit,
    rope_angles,
    with_modality_weights,
)
from tf_lightning.model.transfusion import TransfusionModel

FORMS = pytest.mark.parametrize("form", [DenseAttention, VarlenAttention])
KINDS = pytest.mark.parametrize("kind", ["ffn", "all"])


def mixed_batch() -> Batch:
    """Long and short documents, so that `gather` reorders them, and padding."""
    return packed([[document("2i3i1", 1), document("2", 2)], [document("i2", 3), document("7", 4)]])


def tied(kind: str, **sizes) -> tuple[TransfusionModel, TransfusionModel]:
    """A plain network, and one whose image weights are copies of its text weights."""
    plain, own = tiny_net(**sizes), tiny_net(modality_weights=kind, **sizes)
    own.load_state_dict(with_modality_weights(plain.state_dict(), own.state_dict()))
    return plain, own


def test_with_modality_weights_keeps_existing_weights_and_invents_none():
    own = tiny_net(modality_weights="all").state_dict()
    assert with_modality_weights(own, own).keys() == own.keys()
    assert all(value is own[name] for name, value in with_modality_weights(own, own).items())
    del own["transformer.layers.1.ffn_norm.weight"]
    del own["transformer.image_layers.1.ffn_norm.weight"]
    assert (
        with_modality_weights(own, tiny_net(modality_weights="all").state_dict()).keys()
        == own.keys()
    )


@FORMS
@KINDS
@pytest.mark.parametrize("qk_norm", [False, True, "layer", "full"])
def test_copied_weights_equal_the_plain_block(form, kind, qk_norm):
    plain, own = tied(kind, qk_norm=qk_norm, head_dim=6, nope_interval=2)
    batch = mixed_batch()
    attend = form(batch)
    for ours, expected in zip(
        all_outputs(own, batch, attend), all_outputs(plain, batch, attend), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@FORMS
@KINDS
def test_separate_weights_equal_both_computed_at_every_position(form, kind):
    """The second implementation applies both weights everywhere and selects by position."""
    net, batch = tiny_net(modality_weights=kind), mixed_batch()
    attend, dense = form(batch), DenseAttention(batch)
    logits, output = all_outputs(net, batch, attend)

    transformer, is_patch = net.transformer, (batch.image_ids >= 0).unsqueeze(-1)
    take = lambda patch, text: torch.where(is_patch, patch, text)  # noqa: E731
    patches, _ = net.patch_coder.encode(batch.latents, batch.t)
    x = transformer.tok_embeddings(batch.input_ids).flatten(0, 1)
    x = x.index_copy(0, batch.patch_index, patches.flatten(0, 1)).view(2, -1, 32)
    rope = rope_angles(batch.positions, 8, 10_000.0)
    for text, image in zip(transformer.layers, transformer.image_layers, strict=True):
        other = image if kind == "all" else text
        q, k, v = (
            torch.where(is_patch.unsqueeze(-1), a, b)
            for a, b in zip(
                other.attention.qkv(other.attention_norm(x), rope),
                text.attention.qkv(text.attention_norm(x), rope),
                strict=True,
            )
        )
        mixed = dense(q, k, v).flatten(-2)
        x = x + take(other.attention.wo(mixed), text.attention.wo(mixed))
        x = x + take(image.feed_forward(image.ffn_norm(x)), text.feed_forward(text.ffn_norm(x)))
    hidden = transformer.norm(x)
    real = batch.document_ids >= 0
    torch.testing.assert_close(logits[real], transformer.output(hidden)[real], atol=1e-5, rtol=1e-4)
    hidden_patches = hidden.flatten(0, 1)[batch.patch_index].unflatten(0, patches.shape[:2])
    expected = net.patch_coder.decode(hidden_patches, (4, 4))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@KINDS
def test_image_weights_get_gradients_from_images_only(kind):
    net = tiny_net(modality_weights=kind).requires_grad_(True)
    batch = packed([[document("5")]])
    logits, _ = net(batch, batch.latents, batch.t, VarlenAttention(batch))
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in own_weights(net))
    net.zero_grad()
    batch = packed([[document("i")]])
    _, output = net(batch, batch.latents, batch.t, VarlenAttention(batch))
    output.square().sum().backward()
    assert all(p.grad.any() for p in own_weights(net))


def own_weights(net: TransfusionModel) -> list[nn.Parameter]:
    return list(net.transformer.image_layers.parameters())


def test_text_before_any_image_does_not_depend_on_image_weights():
    net, batch = tiny_net(modality_weights="all"), packed([[document("3i2")]])
    before, _ = all_outputs(net, batch, VarlenAttention(batch))
    for parameter in own_weights(net):
        parameter.add_(0.1)
    after, _ = all_outputs(net, batch, VarlenAttention(batch))
    same = (before - after).abs().amax(-1)[0] == 0
    first = batch.image_ids[0].tolist().index(0)
    assert same.tolist() == [True] * first + [False] * (len(same) - first)


@FORMS
def test_modality_split_round_trip(form):
    batch = mixed_batch()
    attend = form(batch)
    x = attend.gather(torch.arange(batch.input_ids.numel()).view(2, -1, 1).double())
    image_ids = attend.gather(batch.image_ids)
    split = ModalitySplit(*attend.modality_indices(), x.shape[:-1])
    text, patches = split(x)
    assert torch.equal(split.join(text, patches), x)
    assert torch.equal(text, x[image_ids < 0]) and torch.equal(patches, x[image_ids >= 0])


def test_text_index_and_patch_index_cover_all_positions():
    batch = mixed_batch()
    everywhere = torch.cat([batch.text_index, batch.patch_index]).sort().values
    assert everywhere.tolist() == list(range(batch.input_ids.numel()))
    assert (batch.image_ids.flatten()[batch.text_index] < 0).all()


def test_rows_of_only_padding_or_only_text_run():
    net = tiny_net(modality_weights="all")
    for batch in (packed([[]], row_length=4), packed([[document("3")]])):
        for form in (DenseAttention, VarlenAttention):
            logits, output = all_outputs(net, batch, form(batch))
            assert logits.shape[:2] == batch.input_ids.shape and len(output) == 0


@KINDS
def test_every_weight_is_initialized(kind):
    net = tiny_net(modality_weights=kind, qk_norm=True)
    for parameter in net.parameters():
        parameter.fill_(float("nan"))
    net.reset_parameters()
    assert all(p.isfinite().all() for p in net.parameters())
    ends = [m.w2.weight for m in net.transformer.modules() if isinstance(m, FeedForward)]
    scales: list[Tensor] = [end.std() * 48**0.5 * 2 for end in ends]  # 1 / sqrt(2 * 2 layers)
    assert len(ends) == 4 and all(scale.item() == pytest.approx(1, rel=0.1) for scale in scales)


def test_image_layers_have_the_weights_of_their_option():
    names = {
        kind: {
            n.split(".", 1)[1]
            for n, _ in tiny_net(modality_weights=kind).transformer.image_layers.named_parameters()
        }
        for kind in ("ffn", "all")
    }
    ffn = {"ffn_norm.weight", *(f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3"))}
    attention = {
        "attention_norm.weight",
        *(f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")),
    }
    assert names == {"ffn": ffn, "all": ffn | attention}


def test_modality_weights_do_not_rename_text_weights():
    text = {name for name in tiny_net().state_dict()}
    for kind in ("ffn", "all"):
        own = {name for name in tiny_net(modality_weights=kind).state_dict()}
        assert {name for name in own if "image_layers" not in name} == text
