"""The linear patch coder: patch order, round trip, timestep embedding and the paper's sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support.paper_models import PAPER_SIZES, paper_config
from tf_lightning.model.patches import LinearPatchCoder, patchify, timestep_embedding, unpatchify

PAPER_SHARES = {"0.16b": 0.5, "0.37b": 0.4, "0.76b": 0.4, "1.4b": 0.4, "7b": 0.3}  # percent


@given(
    patch_size=st.sampled_from([1, 2, 4, 8]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 4),
    images=st.integers(0, 2),
)
@settings(deadline=None, max_examples=50)
def test_patchify_round_trip(patch_size, grid, channels, images):
    size = grid[0] * patch_size, grid[1] * patch_size
    latents = torch.randn(images, channels, *size)
    patches = patchify(latents, patch_size)
    assert patches.shape == (images, grid[0] * grid[1], channels * patch_size**2)
    assert torch.equal(unpatchify(patches, patch_size, size), latents)


def test_patches_are_in_raster_order():
    latents = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = patchify(latents, 2)
    for row in range(2):
        for column in range(3):
            window = latents[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[0, 3 * row + column], window.flatten())


def test_timestep_embedding_equals_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 37, 500, 999])
    expected = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    ours = timestep_embedding(timesteps / 1000)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_encoding_adds_timestep_and_position_embedding_to_each_patch():
    coder = LinearPatchCoder(latent_channels=3, patch_size=2, dim=16).requires_grad_(False)
    latents, t = torch.randn(2, 3, 4, 6), torch.tensor([0.0, 0.7])
    time = coder.time_embedder(timestep_embedding(t))
    encoded, skips = coder.encode(latents, t)
    assert not skips
    for image in range(2):
        for patch in range(6):
            expected = (
                coder.patch_encoder(patchify(latents, 2)[image, patch])
                + time[image]
                + coder.row_embedding.weight[patch // 3]
                + coder.column_embedding.weight[patch % 3]
            )
            torch.testing.assert_close(encoded[image, patch], expected, atol=1e-5, rtol=1e-5)


def test_decoding_keeps_the_order_of_patches():
    coder = LinearPatchCoder(latent_channels=3, patch_size=2, dim=16).requires_grad_(False)
    hidden = torch.randn(1, 6, 16)
    output = coder.decode(hidden, (4, 6))
    expected = coder.patch_decoder(hidden[0, 4]).view(3, 2, 2)  # second row, second column
    torch.testing.assert_close(output[0, :, 2:4, 2:4], expected)


def test_the_output_is_zero_and_patches_have_unit_variance_at_the_start():
    coder = LinearPatchCoder(latent_channels=3, patch_size=2, dim=64).requires_grad_(False)
    coder.reset_parameters()
    assert not coder.decode(torch.randn(1, 6, 64), (4, 6)).any()
    assert coder.patch_encoder(torch.randn(500, 12)).std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name, percent", PAPER_SHARES.items())
def test_the_coder_has_the_papers_share_of_parameters(name, percent):
    """Table 7 of the paper, without our learned row and column embeddings."""
    with torch.device("meta"):
        coder = LinearPatchCoder(latent_channels=8, patch_size=2, dim=paper_config(name).dim)
    linears = [part for part in coder.modules() if isinstance(part, nn.Linear)]
    extra = sum(p.numel() for part in linears for p in part.parameters())
    assert round(100 * extra / (PAPER_SIZES[name] * 1e6), 1) == percent
