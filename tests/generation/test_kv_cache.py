"""Prefill and decode attention against the mask rule on whole documents."""

import pytest
import torch

from support.tiny import PATCH_SIZE, TOKENIZER, document, packed, tiny_net
from tf_lightning.generation.engine import pack_prompts
from tf_lightning.generation.kv_cache import (
    DecodeAttention,
    KeyValueCache,
    PrefillAttention,
    as_index,
    group_by_length,
)
from tf_lightning.model.attention import DenseAttention

ROWS = [3, 0, 4]  # of five: any order
CAPACITY = 40


def vectors(batch, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch.input_ids.shape, width, generator=generator)


def cache_of(net) -> KeyValueCache:
    weight = next(net.parameters())
    return KeyValueCache(net.transformer.config, rows=5, capacity=CAPACITY, like=weight)


def whole(net, batch, causal) -> torch.Tensor:
    """Return the outputs of whole documents, one in each row, under the dense mask."""
    return net.transformer(vectors(batch), batch.positions, DenseAttention(batch, causal))


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_equals_the_forward_pass_of_training(causal):
    net = tiny_net()
    batch = packed([[document("2i1", 1)], [document("3", 2)], [document("", 3)]])
    attend = PrefillAttention(cache_of(net), ROWS, batch, causal)
    out = net.transformer(vectors(batch), batch.positions, attend)
    real = batch.document_ids >= 0
    torch.testing.assert_close(out[real], whole(net, batch, causal)[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", [("9i3i", "1i", "i"), ("2i", "3i", "2i"), ("2i",)])
def test_an_image_after_unequal_prefixes_equals_the_whole_document(shapes, causal):
    """The same holds after other values were written at these positions."""
    net, cache = tiny_net(), None
    documents = [document(shape, seed) for seed, shape in enumerate(shapes)]
    batch = packed([[d] for d in documents])
    x, expected = vectors(batch), whole(net, batch, causal)
    cache = cache_of(net)
    attend = PrefillAttention(cache, ROWS[: len(shapes)], batch, causal)
    net.transformer(x, batch.positions, attend)
    starts = [int(n) - 2 - 4 for n in batch.row_tokens]  # then 4 patches, <eoi>, <eos>
    patches = torch.stack([x[row, s : s + 4] for row, s in enumerate(starts)])
    for values in (torch.randn_like(patches), patches):
        attend = DecodeAttention(cache, ROWS[: len(shapes)], starts, 4, causal)
        out = net.transformer(values, attend.positions, attend)
    for row, start in enumerate(starts):
        same = expected[row, start : start + 4]
        torch.testing.assert_close(out[row], same, atol=1e-5, rtol=1e-5)


def test_tokens_after_unequal_prefixes_equal_the_whole_document():
    net = tiny_net(head_dim=6, nope_interval=2)
    batch = packed([[document(shape, seed)] for seed, shape in enumerate(("9i3", "1", "i4"))])
    x, expected = vectors(batch), whole(net, batch, False)
    cache = cache_of(net)
    net.transformer(x, batch.positions, PrefillAttention(cache, ROWS, batch, False))
    starts = [int(n) - 2 for n in batch.row_tokens]  # the last token, then <eos>
    for _ in range(2):
        tokens = torch.stack([x[row, s : s + 1] for row, s in enumerate(starts)])
        attend = DecodeAttention(cache, ROWS, starts, 1)
        out = net.transformer(tokens, attend.positions, attend)
        for row, start in enumerate(starts):
            torch.testing.assert_close(out[row, 0], expected[row, start], atol=1e-5, rtol=1e-5)
        starts = [start + 1 for start in starts]


def test_unused_rows_are_not_written():
    net = tiny_net()
    cache = cache_of(net)
    for keys, values in cache.layers:
        keys.fill_(7), values.fill_(7)
    batch = pack_prompts([document("3", 1)] * 3, TOKENIZER, PATCH_SIZE, "cpu")
    net.transformer(vectors(batch), batch.positions, PrefillAttention(cache, ROWS, batch, False))
    for keys, _ in cache.layers:
        assert (keys[[1, 2]] == 7).all() and (keys[ROWS, 5:] == 7).all()
        assert (keys[ROWS, :5] != 7).any(-1).all()


def test_prefixes_of_similar_length_share_a_call_and_tokens_always_do():
    assert group_by_length([100, 2, 110, 2], num_new=4) == [[1, 3], [0, 2]]
    assert group_by_length([10, 40, 10], num_new=1000) == [[0, 1, 2]]
    assert group_by_length([100, 2, 110, 2], num_new=1) == [[0, 1, 2, 3]]


def test_adjacent_rows_are_selected_by_a_slice():
    assert as_index([2, 3, 4], torch.device("cpu")) == slice(2, 5)
    assert as_index([2, 4], torch.device("cpu")).tolist() == [2, 4]
