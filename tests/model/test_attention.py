"""The attention rule against its definition, and each implementation against DenseAttention."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.tiny import document, layout, mixed_batch, packed, random_rows, tiny_module, tiny_net
from tf_lightning.model import attention
from tf_lightning.model.attention import (
    DenseAttention,
    FlexAttention,
    VarlenAttention,
    build_attention,
    dense_mask,
)
from tf_lightning.model.transformer import Transformer
from tf_lightning.training import losses

VARIANTS = pytest.mark.parametrize(
    "causal, copies, sizes",
    [
        (False, False, {"num_kv_heads": None}),
        (False, False, {"num_kv_heads": 2}),
        (False, False, {"num_kv_heads": 1, "qk_norm": True}),
        (False, False, {"num_kv_heads": 2, "qk_norm": "full", "head_dim": 24, "nope_interval": 2}),
        (True, False, {"num_kv_heads": 2}),
        (False, True, {"num_kv_heads": 2}),
        (True, True, {"num_kv_heads": 2}),
    ],
)


def ragged_batch(copies: bool = False) -> SimpleNamespace:
    """Documents of equal, unequal and minimal length, with and without images, and padding."""
    batch = packed(
        [
            [document("9"), document("3i"), document("i2"), document("3i", 1), document("")],
            [document("5"), document("0ii1"), document("5", 2)],
            [],
        ],
        row_length=64,
        clean_copies=copies,
    )
    batch.document_ids[1, -9:-7] = torch.tensor([7, 8])  # two documents of one position
    return batch


def run(
    transformer: Transformer, batch, attend, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs without padding, and the gradients of their weighted sum."""
    transformer.requires_grad_(True).zero_grad()
    x = transformer.tok_embeddings(batch.input_ids) + weights
    out = transformer(x, batch.positions, attend)[batch.document_ids >= 0]
    (out * weights[batch.document_ids >= 0]).sum().backward()
    grads = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    return out.detach(), grads


@given(rows=random_rows(), causal=st.booleans())
@settings(deadline=None, max_examples=50)
def test_dense_mask_equals_the_rule_for_every_pair(rows, causal):
    length = 1 + max(len(layout(row)) for row in rows)
    batch = packed(rows, row_length=length)
    mask = dense_mask(batch.document_ids, batch.image_ids, causal)
    for b, row in enumerate(rows):
        positions = layout(row)
        expected = torch.zeros(length, length, dtype=torch.bool)
        for q, (query_document, query_image) in enumerate(positions):
            for k, (key_document, key_image) in enumerate(positions):
                same_image = query_image is not None and query_image == key_image
                seen = k <= q or (same_image and not causal)
                expected[q, k] = query_document == key_document and seen
        real = len(positions)
        assert torch.equal(mask[b, :real], expected[:real])
        assert not mask[b, real:, :real].any()


@VARIANTS
def test_varlen_attention_equals_dense_attention(causal, copies, sizes):
    batch = ragged_batch(copies)
    transformer = tiny_net(**sizes).transformer
    weights = torch.randn(*batch.input_ids.shape, 32)
    dense, dense_grads = run(transformer, batch, DenseAttention(batch, causal), weights)
    ours, our_grads = run(transformer, batch, VarlenAttention(batch, causal), weights)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    assert dense_grads.keys() == our_grads.keys() and "layers.0.attention.wk.weight" in our_grads
    for name, grad in dense_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-4, rtol=1e-4)


@given(rows=random_rows(), causal=st.booleans(), copies=st.booleans())
@settings(deadline=None, max_examples=60)
def test_varlen_attention_equals_dense_attention_on_any_rows(rows, causal, copies):
    rows = [*rows, [document("1")]]
    batch = packed(rows, row_length=130, clean_copies=copies)
    q, k, v = torch.randn(3, *batch.input_ids.shape, 2, 4)
    dense = DenseAttention(batch, causal)(q, k, v)
    attend = VarlenAttention(batch, causal)
    ours = attend.scatter(attend(attend.gather(q), attend.gather(k), attend.gather(v)))
    real = batch.document_ids >= 0
    torch.testing.assert_close(ours[real], dense[real], atol=1e-5, rtol=1e-5)
    assert (ours[~real] == 0).all()


def test_varlen_attention_computes_no_padding():
    batch = ragged_batch()
    attend = VarlenAttention(batch)
    gathered = attend.gather(torch.ones(*batch.input_ids.shape, 1))
    assert len(gathered) == (batch.document_ids >= 0).sum()
    assert sum(attend.tokens) == len(gathered)


def test_the_cpu_uses_varlen_attention():
    assert isinstance(build_attention(ragged_batch()), VarlenAttention)


@VARIANTS
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_dense_attention_forward(monkeypatch, causal, copies, sizes):
    monkeypatch.setattr(attention, "compiled", lambda function: function)  # it takes 20 s
    batch, transformer = ragged_batch(copies), tiny_net(**sizes).transformer
    x = torch.randn(*batch.input_ids.shape, 32)
    with torch.no_grad():
        flex = transformer(x, batch.positions, FlexAttention(batch, causal))
        dense = transformer(x, batch.positions, DenseAttention(batch, causal))
    real = batch.document_ids >= 0
    torch.testing.assert_close(flex[real], dense[real], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_kernels_of_flash_attention_get_their_name_and_blocks_and_the_same_mask(monkeypatch):
    """The formulas for a CPU, which know no kernels, give the same numbers for both masks."""
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    options, sizes, formulas = [], [], flex.flex_attention

    def attend(*tensors, kernel_options, **others):
        options.append(kernel_options)
        return formulas(*tensors, **others)

    monkeypatch.setattr(flex, "flex_attention", attend)
    rows = [[document("50i50i"), document("9i90i")], [document("i99")]]
    batch = packed([row * 6 for row in rows])  # more than one block of 256 queries
    q, k, v = torch.randn(3, *batch.input_ids.shape, 2, 8)
    assert q.shape[1] > 256
    outputs = []
    for flash in (False, True):
        form = FlexAttention(batch, flash=flash)
        outputs.append(form(q, k, v))
        sizes.append(form.mask.BLOCK_SIZE)
    assert options == [None, {"BACKEND": "FLASH"}]
    assert sizes == [(128, 128), (256, 128)]
    real = batch.document_ids >= 0
    torch.testing.assert_close(outputs[1][real], outputs[0][real])


@pytest.mark.gpu
@VARIANTS
def test_compiled_flex_attention_equals_dense_attention_with_gradients(causal, copies, sizes):
    batch = ragged_batch(copies).to("cuda")
    transformer = tiny_net(num_heads=2, **(sizes | {"num_kv_heads": 1})).transformer.cuda()
    weights = torch.randn(*batch.input_ids.shape, 32, device="cuda")
    assert isinstance(build_attention(batch), FlexAttention)
    dense, dense_grads = run(transformer, batch, DenseAttention(batch, causal), weights)
    ours, our_grads = run(transformer, batch, FlexAttention(batch, causal), weights)
    torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-3)
    for name, grad in dense_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-2, rtol=1e-2)


def test_block_masks_are_built_compiled_and_once_for_all_blocks(monkeypatch):
    """In a step of several batches, with blocks that run again in the backward pass."""
    built, compiled = [], []

    def build(rule, *sizes, device):
        built.append((sizes, device.type))
        return "mask"

    class Flex(FlexAttention):
        def __call__(self, q, k, v):
            assert self.mask == "mask"
            return super(FlexAttention, self).__call__(q, k, v)

    def compile_fake(function):
        compiled.append(function.__name__)
        return build

    monkeypatch.setattr(attention, "compiled", compile_fake)
    monkeypatch.setattr(losses, "build_attention", Flex)
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v, mask: q)
    module, batch = tiny_module(activation_checkpointing="full"), mixed_batch()
    rows, length = batch.input_ids.shape
    for _ in range(2):
        module.loss_sums(module.net, batch).nll.sum().backward()
    assert built == [((rows, None, length, length), "cpu")] * 2
    assert compiled == ["create_block_mask"] * 2
