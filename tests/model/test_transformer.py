"""Rotary positions, sizes and initialization; interop/test_llama.py compares the logits."""

import pytest
import torch

from support.paper_models import PAPER_SIZES, paper_config
from support.tiny import document, packed, tiny_net
from tf_lightning.model.attention import build_attention
from tf_lightning.model.layers import apply_rotary_emb
from tf_lightning.model.transformer import Transformer, TransformerConfig, rope_angles


@pytest.mark.parametrize("name, millions", PAPER_SIZES.items())
def test_the_papers_sizes_have_the_papers_parameter_counts(name, millions):
    with torch.device("meta"):
        transformer = Transformer(paper_config(name))
    assert sum(p.numel() for p in transformer.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05
    )


def test_rotary_embedding_equals_hugging_face():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = LlamaConfig(hidden_size=32, num_attention_heads=2)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    positions = torch.tensor([[0, 1, 2, 0, 1, 700]])
    q, k = torch.randn(2, 1, 6, 2, 16)  # (B, T, H, K)
    expected = apply_rotary_pos_emb(
        q.transpose(1, 2), k.transpose(1, 2), *LlamaRotaryEmbedding(config)(q, positions)
    )
    rope = rope_angles(positions, 16, 5000.0)
    for ours, theirs in zip(
        (apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    scores = [
        (apply_rotary_emb(q, *rope_angles(torch.tensor([[a]]), 16, 1e4))
         * apply_rotary_emb(k, *rope_angles(torch.tensor([[b]]), 16, 1e4))).sum()
        for a, b in ((3, 1), (103, 101))
    ]  # fmt: skip
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_rotation_is_computed_in_fp32_and_keeps_the_dtype():
    x = torch.randn(1, 4, 2, 16)
    rope = rope_angles(torch.tensor([[0, 1, 500, 4095]]), 16, 1e4)
    low = apply_rotary_emb(x.bfloat16(), *rope)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, apply_rotary_emb(x.bfloat16().float(), *rope).bfloat16())


@pytest.mark.parametrize("qk_norm", [True, "layer", "full"])
def test_every_weight_is_initialized(qk_norm):
    net = tiny_net(qk_norm=qk_norm)
    for parameter in net.parameters():
        parameter.fill_(float("nan"))
    net.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_outputs_start_at_unit_variance():
    config = TransformerConfig(vocab_size=500, dim=256, num_layers=4, num_heads=4, ffn_dim=704)
    torch.manual_seed(0)
    transformer = Transformer(config).requires_grad_(False)
    transformer.reset_parameters()
    batch = packed([[document("9" * 20)]])
    hidden = transformer(
        transformer.tok_embeddings(batch.input_ids), batch.positions, build_attention(batch)
    )
    assert transformer.output(hidden).std() == pytest.approx(1, rel=0.1)


def test_residual_branches_are_scaled_by_depth():
    transformer = tiny_net().transformer
    transformer.reset_parameters()
    last = transformer.layers[0].feed_forward.w2.weight
    assert last.std() == pytest.approx((4 * 48) ** -0.5, rel=0.1)  # 2 layers, 4 branches


@pytest.mark.parametrize("qk_norm", [True, "layer"])
def test_qk_norm_removes_the_scale_of_queries_and_keys(qk_norm):
    net, batch = tiny_net(qk_norm=qk_norm), packed([[document("2i3")]])
    x, attend = torch.randn(*batch.input_ids.shape, 32), build_attention(batch)
    before = net.transformer(x, batch.positions, attend)
    for name in ("wq", "wk"):
        getattr(net.transformer.layers[0].attention, name).weight *= 7
        after = net.transformer(x, batch.positions, attend)
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
