"""Perplexity of sums, where its value is known."""

import math

import pytest
import torch

from evaluation.perplexity import Perplexity


def test_uniform_guessing_among_256_has_perplexity_256_and_8_bits_a_byte():
    metric = Perplexity()
    for count in (3, 50, 7):
        logits = torch.zeros(count, 256)
        nll = torch.nn.functional.cross_entropy(logits, torch.arange(count), reduction="sum")
        metric.update(nll, count, num_bytes=count)
    assert metric.compute().item() == pytest.approx(256, rel=1e-6)
    assert metric.bits_per_byte().item() == pytest.approx(8, rel=1e-6)
    assert metric.protocol == {"metric": "perplexity", "num_tokens": 60, "num_bytes": 60}


def test_tokens_weigh_equally_whatever_their_batch():
    metric = Perplexity()
    metric.update(10.0, 1)
    metric.update(torch.tensor(2.0), 9)
    assert metric.compute().item() == pytest.approx(math.exp(12 / 10), rel=1e-12)


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    letters, words = Perplexity(), Perplexity()
    letters.update(60.0, num_tokens=90, num_bytes=100)
    words.update(60.0, num_tokens=20, num_bytes=100)
    assert letters.compute() < words.compute()
    assert letters.bits_per_byte() == words.bits_per_byte()
    assert words.bits_per_byte().item() == pytest.approx(60 / math.log(2) / 100, rel=1e-12)


def test_many_small_sums_are_not_lost():
    """In float32 the sum would stop growing at 2^24."""
    metric = Perplexity()
    metric.update(2.0**24, 2**24)
    for _ in range(64):
        metric.update(1.0, 0)
    assert metric.nll.item() == 2**24 + 64


def test_an_empty_validation_set_is_told_in_one_sentence():
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="^perplexity was given no token"),
    ):
        Perplexity().compute()
    metric = Perplexity()
    metric.update(1.0, 2)
    with pytest.raises(ValueError, match="given no number of bytes"):
        metric.bits_per_byte()
