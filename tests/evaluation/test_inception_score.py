"""Inception Score at its two ends, where its value is known, and against its definition."""

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
    metric.update(Features(logits, logits.flip(0) * 9), real=True)  # passed over
    return metric.compute().item()


def test_sure_and_varied_pictures_score_the_number_of_classes():
    logits = torch.eye(6).repeat(4, 1) * 100
    assert score(logits, splits=1) == pytest.approx(6.0, rel=1e-12)


def test_pictures_that_all_look_alike_score_one():
    assert score(torch.randn(6).repeat(12, 1), splits=3) == pytest.approx(1.0, abs=1e-12)


def test_it_is_the_exponential_of_the_mean_divergence():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.double().tolist()]
    marginal = [sum(column) / 12 for column in zip(*p, strict=True)]
    divergence = sum(a * math.log(a / b) for row in p for a, b in zip(row, marginal, strict=True))
    assert score(logits, splits=1) == pytest.approx(math.exp(divergence / 12), rel=1e-12)


def test_the_order_of_pictures_does_not_matter():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    shuffled = logits[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert score(logits) == score(shuffled)


def test_fewer_pictures_than_splits():
    with pytest.raises(ValueError, match="inception_score was given 9 pictures, .* its 10 splits"):
        score(torch.randn(9, 4))


def test_an_extractor_without_classes_is_refused():
    extractor = Extractor(torch.nn.Identity(), num_features=3, name="tower", weights_hash="")
    with pytest.raises(ValueError, match="tower has no logits"):
        InceptionScore(extractor)
