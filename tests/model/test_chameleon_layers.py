"""Norm order, QK-norm and dropout against Hugging Face's own layers."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from support.tiny import tiny_net
from tf_lightning.errors import UserError
from tf_lightning.interop.llama import state_dict_from_hf
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transformer import Block, Transformer, TransformerConfig, rope_angles

DIM, HEADS, LENGTH = 32, 4, 7


def ours(state_dict: dict[str, Tensor], **options) -> Block:
    """Our block with the weights of a Hugging Face layer."""
    config = TransformerConfig(
        9, DIM, 1, HEADS, num_kv_heads=2, ffn_dim=48, norm_eps=1e-5, **options
    )
    block = Block(config).eval().requires_grad_(False)
    named = {f"model.layers.0.{name}": weight for name, weight in state_dict.items()}
    renamed = {n.removeprefix("layers.0."): w for n, w in state_dict_from_hf(named).items()}
    block.load_state_dict({n.replace("self_attn", "attention"): w for n, w in renamed.items()})
    return block


def run(block: Block, x: Tensor) -> Tensor:
    layout = SimpleNamespace(
        document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
        image_ids=torch.full((1, LENGTH), -1),
        copied=torch.empty(0),
    )
    rope = rope_angles(torch.arange(LENGTH).unsqueeze(0), DIM // HEADS, 10_000.0)
    return block(x, rope, DenseAttention(layout, True))


def theirs(layer: nn.Module, x: Tensor) -> Tensor:
    cos, sin = (
        part[:, :, 0] for part in rope_angles(torch.arange(LENGTH)[None], DIM // HEADS, 10_000.0)
    )
    # Without the negative sign of the first half.
    sin = torch.cat([sin[..., DIM // HEADS // 2 :]] * 2, -1)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    out = layer(x, attention_mask=mask, position_embeddings=(cos, sin))
    return out if isinstance(out, Tensor) else out[0]


def randomized(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return layer.eval().requires_grad_(False)


def test_post_norm_and_layer_qk_norm_equal_chameleon_34b():
    from transformers import ChameleonConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonSwinDecoderLayer

    config = ChameleonConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=48,
        rms_norm_eps=1e-5, swin_norm=True, attn_implementation="eager",
    )  # fmt: skip
    layer = ChameleonSwinDecoderLayer(config, 0)
    layer, x = randomized(layer), torch.randn(1, LENGTH, DIM)
    weights = layer.state_dict()
    for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
        of_heads = weights[f"self_attn.{name}"]  # (H, K), repeated for each shard
        of_heads.copy_(of_heads[0].expand_as(of_heads))
        weights[f"self_attn.{name}"] = of_heads[0]
    block = ours(weights, norm_order="post", qk_norm="layer")
    torch.testing.assert_close(run(block, x), theirs(layer, x), atol=1e-5, rtol=1e-5)
    other = ours(weights, qk_norm="layer")
    assert not torch.allclose(run(other, x), theirs(layer, x), atol=0.1)


def test_rms_qk_norm_equals_qwen3():
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    config = Qwen3Config(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=48,
        head_dim=DIM // HEADS, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    layer, x = randomized(Qwen3DecoderLayer(config, 0)), torch.randn(1, LENGTH, DIM)
    block = ours(layer.state_dict(), qk_norm=True)
    torch.testing.assert_close(run(block, x), theirs(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_dropout_acts_on_both_branches_only_in_training(norm_order, monkeypatch):
    net = tiny_net(dropout=0.5, norm_order=norm_order)
    block, x = net.transformer.layers[0], torch.randn(1, LENGTH, DIM)
    plain = tiny_net(norm_order=norm_order).transformer.layers[0]
    assert torch.equal(run(block.eval(), x), run(plain, x))
    dropped = []
    monkeypatch.setattr(
        block.dropout, "forward", lambda out: (dropped.append(out), torch.zeros_like(out))[1]
    )
    assert torch.equal(run(block, x), x) and len(dropped) == 2  # the residual gets nothing else
    share = (run(tiny_net(dropout=0.5).transformer.layers[0].train(), x) == x).float().mean()
    assert 0.1 < share < 0.4  # elements where both branches were dropped


@pytest.mark.parametrize("order", ["pre", "post"])
def test_norm_order_is_the_same_for_separate_image_weights(order):
    from support.tiny import document, packed
    from tf_lightning.model.transformer import with_modality_weights

    batch = packed([[document("2i3")]])
    shared = tiny_net(norm_order=order)
    for kind in ("ffn", "all"):
        own = tiny_net(norm_order=order, modality_weights=kind)
        own.load_state_dict(with_modality_weights(shared.state_dict(), own.state_dict()))
        outputs = [
            net(batch, batch.latents, batch.t, DenseAttention(batch)) for net in (shared, own)
        ]
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_unknown_norm_options_and_dropout_are_refused():
    with pytest.raises(UserError, match="qk_norm='rms' must be true or false or 'layer' or 'full'"):
        Transformer(TransformerConfig(9, DIM, 1, HEADS, qk_norm="rms"))
    with pytest.raises(UserError, match="norm_order='both' must be 'pre' or 'post'"):
        Transformer(TransformerConfig(9, DIM, 1, HEADS, norm_order="both"))
    with pytest.raises(UserError, match="dropout=1.0 must be at least 0 and less than 1"):
        Transformer(TransformerConfig(9, DIM, 1, HEADS, dropout=1.0))
