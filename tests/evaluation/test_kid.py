"""KID equals the definition of the unbiased MMD and torch-fidelity's values."""

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from evaluation.features import Features
from evaluation.gather import canonical_order
from evaluation.kid import KID
from support.extractors import first_pixels


def rows(count: int, seed: int, shift: float = 0.0, size: int = 3) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + shift


def score(real: torch.Tensor, generated: torch.Tensor, **options) -> float:
    kid = KID(first_pixels(real.shape[1]), **options)
    kid.update(Features(real), real=True)
    for part in generated.split(7):
        kid.update(Features(part), real=False)
    return kid.compute().item()


def test_one_subset_of_all_is_the_unbiased_mmd():
    """Mean of k(x, x') + k(y, y') over pairs of different images, minus 2 mean k(x, y)."""
    x, y = rows(12, 0), rows(12, 1, shift=1.0)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1) ** 3

    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(12) for j in range(12) if i != j)
    other = sum(kernel(a, b) for a in x for b in y)
    expected = same / (12 * 11) - 2 * other / 12**2
    assert score(x, y, subset_size=12, subsets=3) == pytest.approx(expected, rel=1e-10)


def test_equals_torch_fidelity_on_random_subsets():
    x, y = rows(40, 0), rows(50, 1, shift=0.5)
    theirs = kid_features_to_metric(
        *(canonical_order(features).double() for features in (x, y)),
        **{"kid_subsets": 20, "kid_subset_size": 10, "verbose": False},
    )
    ours = score(x, y, subsets=20, subset_size=10)
    assert ours == theirs["kernel_inception_distance_mean"]


def test_equal_distributions_score_about_zero_and_distant_ones_score_more():
    near, far = (score(rows(2000, 0), rows(2000, 1, s), subset_size=200) for s in (0.0, 1.0))
    assert abs(near) < 0.05 and far > 20 * abs(near)


def test_the_global_random_state_is_left_unchanged():
    state = torch.get_rng_state()
    score(rows(12, 0), rows(12, 1), subset_size=6)
    assert torch.equal(state, torch.get_rng_state())


def test_the_order_of_images_does_not_matter():
    x, y = rows(30, 0), rows(30, 1, shift=0.3)
    shuffled = y[torch.randperm(30, generator=torch.Generator().manual_seed(3))]
    assert score(x, y, subset_size=10) == score(x, shuffled, subset_size=10)


def test_a_second_metric_reads_the_reference_that_the_first_wrote(tmp_path):
    path, facts = tmp_path / "kid.safetensors", {"dataset": "noise", "count": 12}
    first = KID(first_pixels(3), reference=path, real_facts=facts, subset_size=12)
    first.update(Features(rows(12, 0)), real=True)
    first.keep_real()
    first.reset()
    second = KID(first_pixels(3), reference=path, real_facts=facts, subset_size=12)
    for kid in (first, second):
        kid.update(Features(rows(12, 1)), real=False)
    expected = score(rows(12, 0), rows(12, 1), subset_size=12)
    assert first.compute().item() == second.compute().item() == expected
    assert second.protocol["num_real"] == second.protocol["count"] == 12


def test_fewer_images_than_a_subset_are_refused():
    with pytest.raises(
        ValueError, match=r"kid was given 9 generated and 12 real .* a subset of 10"
    ):
        score(rows(12, 0), rows(9, 1), subset_size=10)
