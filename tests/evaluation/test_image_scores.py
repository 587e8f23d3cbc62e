"""The extractor runs once a batch, for any number of metrics."""

import pytest
import torch

from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from support.extractors import first_pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*biased upwards")


def scores_of(extractor, **options) -> ImageScores:
    kid = KID(extractor, subset_size=8, **options)
    return ImageScores(extractor, [FID(extractor, name="fid[x]"), kid, InceptionScore(extractor)])


def make_images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


def test_all_metrics_share_one_pass():
    extractor = first_pixels(5)
    passes = []
    extractor.register_forward_hook(lambda *args: passes.append(1))
    scores = scores_of(extractor)
    assert scores.needs_real
    scores.update(make_images(20, 0), real=True)
    scores.keep_real()
    assert not scores.needs_real
    scores.update(make_images(12, 1), real=False)
    assert len(passes) == 2
    values, _ = scores.compute()
    assert list(values) == list(scores.protocol) == ["fid[x]", "kid", "inception_score"]

    for metric in scores.metrics:  # each metric alone computes the same
        metric.reset()
        metric.update(extractor(make_images(12, 1)), real=False)
        assert float(metric.compute()) == values[metric.name]


def test_reset_keeps_the_real_images():
    scores = scores_of(first_pixels(5))
    scores.update(make_images(20, 0), real=True)
    scores.keep_real()
    found = []
    for seed in (1, 2, 1):
        scores.update(make_images(12, seed), real=False)
        found.append(scores.compute())
        scores.reset()
    assert found[0] == found[2] != found[1]


def test_images_in_minus_one_to_one_are_rounded_to_bytes():
    levels = make_images(20, 1)
    values = []
    for images in (levels, levels.float() / 127.5 - 1):
        scores = scores_of(first_pixels(5))
        scores.update(make_images(20, 0), real=True)
        scores.update(images, real=False)
        values.append(scores.compute())
    assert values[0] == values[1]


def test_images_that_are_not_finite_are_refused_before_any_metric_is_updated():
    scores = scores_of(first_pixels(5))
    images = torch.zeros(3, 3, 4, 4)
    images[1, 2, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="^1 of 3 images contain NaN or infinity because the training"
    ):
        scores.update(images, real=False)
    assert all(not metric.update_called for metric in scores.metrics)


def test_features_that_are_not_finite_are_refused():
    extractor = first_pixels(5)
    extractor.network.num_features = 0
    extractor.register_forward_hook(
        lambda module, given, seen: seen._replace(pooled=torch.full((3, 5), torch.inf))
    )
    with pytest.raises(ValueError, match="first-pixels computed NaN or infinity"):
        scores_of(extractor).update(make_images(3, 0), real=False)
