"""Perplexity and bits per byte have their known values."""

import math

import pytest
import torch

from evaluation.perplexity import Perplexity


def test_a_uniform_prediction_of_256_tokens_has_perplexity_256_and_8_bits_per_byte():
    metric = Perplexity()
    for count in (3, 50, 7):
        logits = torch.zeros(count, 256)
        nll = torch.nn.functional.cross_entropy(logits, torch.arange(count), reduction="none")
        metric.update(nll, num_bytes=count)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx({"perplexity": 256, "bits_per_byte": 8}, rel=1e-6)
    assert metric.protocol == {"num_tokens": 60, "num_bytes": 60}


def test_tokens_have_equal_weight_in_batches_of_any_size():
    metric = Perplexity()
    metric.update(torch.tensor([10.0]))
    metric.update(torch.tensor([2.0] + [0.0] * 8))
    found = metric.compute()
    assert found["perplexity"].item() == pytest.approx(math.exp(12 / 10), rel=1e-12)
    assert "bits_per_byte" not in found


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    letters, words = Perplexity(), Perplexity()
    letters.update(torch.full((80,), 0.75), num_bytes=100)
    words.update(torch.full((20,), 3.0), num_bytes=100)
    assert letters.compute()["perplexity"] < words.compute()["perplexity"]
    assert letters.compute()["bits_per_byte"] == words.compute()["bits_per_byte"]
    expected = 60 / math.log(2) / 100
    assert words.compute()["bits_per_byte"].item() == pytest.approx(expected, rel=1e-12)


def test_sums_are_exact_beyond_float32():
    """In float32 the sum would stop growing at 2^24."""
    metric = Perplexity()
    metric.update(torch.tensor([2.0**24]))
    for _ in range(64):
        metric.update(torch.ones(1))
    assert metric.nll.item() == 2**24 + 64


def test_the_perplexity_of_a_diverged_model_is_nan():
    metric = Perplexity()
    metric.update(torch.tensor([1.0, math.nan]), num_bytes=2)
    assert all(value.isnan() for value in metric.compute().values())


def test_a_text_without_tokens_is_refused():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="^notes has no text tokens"):
        Perplexity("notes").compute()
