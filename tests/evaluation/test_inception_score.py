"""Inception Score has its known extreme values and equals its definition."""

import math

import pytest
import torch

from evaluation.features import Extractor, Features
from evaluation.inception_score import InceptionScore
from support.extractors import first_pixels


def score(logits: torch.Tensor, **options) -> float:
    metric = InceptionScore(first_pixels(logits.shape[1]), **options)
    for part in logits.split(5):
        metric.update(Features(part, part), real=False)
    metric.update(Features(logits, logits.flip(0) * 9), real=True)  # ignored
    return metric.compute().item()


def test_certain_and_varied_images_score_the_number_of_classes():
    logits = torch.eye(6).repeat(4, 1) * 100
    assert score(logits, splits=1) == pytest.approx(6.0, rel=1e-12)


def test_equal_images_score_one():
    assert score(torch.randn(6).repeat(12, 1), splits=3) == pytest.approx(1.0, abs=1e-12)


def test_the_score_is_the_exponential_of_the_mean_divergence():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.double().tolist()]
    marginal = [sum(column) / 12 for column in zip(*p, strict=True)]
    divergence = sum(a * math.log(a / b) for row in p for a, b in zip(row, marginal, strict=True))
    assert score(logits, splits=1) == pytest.approx(math.exp(divergence / 12), rel=1e-12)


def test_the_order_of_images_does_not_matter():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    shuffled = logits[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert score(logits) == score(shuffled)


def test_fewer_images_than_splits_are_refused():
    with pytest.raises(ValueError, match="inception_score was given 9 images, .* its 10 splits"):
        score(torch.randn(9, 4))


def test_an_extractor_without_classes_is_refused():
    extractor = Extractor(torch.nn.Identity(), num_features=3, name="tower", weights_hash="")
    with pytest.raises(ValueError, match="tower has no logits"):
        InceptionScore(extractor)
