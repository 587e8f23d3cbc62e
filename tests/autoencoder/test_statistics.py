"""Statistics of latents, and which latents are refused or only reported."""

import warnings

import pytest
import torch

from tf_lightning.autoencoder.statistics import MIN_IMAGES, Moments, check_latents, check_std
from tf_lightning.errors import UserError


def values(seed: int, count: int = 5, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    return torch.randn(count, 3, 4, 6, generator=generator) * scale * std + mean


def moments(*batches: torch.Tensor) -> Moments:
    found = Moments()
    for batch in batches:
        found.update(batch)
    return found


def test_moments_are_those_of_all_batches_together():
    batches = [values(0, 3), values(1, 8, mean=0.5)]
    found, whole = moments(*batches), torch.cat(batches).double()
    assert found.num_values == 11 * 24
    torch.testing.assert_close(found.mean, whole.mean((0, 2, 3)))
    torch.testing.assert_close(found.std, whole.std((0, 2, 3), correction=0))
    assert found.overall_std == pytest.approx(whole.std(correction=0).item())


def test_recorded_moments_add_up():
    batches = [values(0, 3), values(1, 8, mean=0.5)]
    merged = Moments.merge([moments(batch).to_json() for batch in batches])
    whole = moments(*batches)
    assert merged.num_values == whole.num_values
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.std, whole.std)


def reported(std: float, num_images: int = MIN_IMAGES, pixel_std: float = 0.5) -> str:
    """Warnings of a check of latents of this standard deviation."""
    unit = torch.randn(num_images, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_std(moments(unit * std), moments(unit * pixel_std), num_images)
    return " ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("std", [0.52, 1.0, 1.9])
def test_latents_of_about_unit_variance_are_accepted(std):
    assert not reported(std) and not reported(std, num_images=4) and not reported(std, 99, 0.01)


# Without its scale FLUX.2 has 0.07, FLUX 2.8, SD 5.5, SDXL 7.7.
@pytest.mark.parametrize("std", [0.07, 0.48, 2.1, 5.5])
def test_latents_far_from_unit_variance_are_refused_with_value_and_remedy(std):
    with pytest.raises(UserError) as caught:
        reported(std)
    message = str(caught.value)
    assert f"have standard deviation {std:.2g}"[:-1] in message and "\n" not in message
    factor = float(message.split("config.json by ")[1].split(",")[0])
    assert factor == pytest.approx(1 / std, rel=0.02)


@pytest.mark.parametrize("std", [0.07, 5.5])
def test_few_images_are_only_warned_of(std):
    assert "fewer than 48" in reported(std, num_images=MIN_IMAGES - 1)


def test_images_of_one_color_may_have_latents_of_little_variance_but_not_of_much():
    assert "nearly one color" in reported(0.05, pixel_std=0.01)
    with pytest.raises(UserError):
        reported(5.5, pixel_std=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 7e4, -1001.0])
def test_an_absurd_latent_is_refused_with_its_image(value):
    latents = torch.zeros(3, 2, 1, 4, 2, 2)  # (B, V, S, C, h, w)
    check_latents(latents + 999, str)
    latents[1, 1, 0, 3, 0, 1] = value
    with pytest.raises(UserError, match="the latents of image 1 reach"):
        check_latents(latents, lambda i: f"image {i}")
