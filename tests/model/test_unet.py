"""The U-Net patch coder against diffusers' U-Net, and its sizes against the paper's."""

import pytest
import torch
from torch import nn

from support.paper_models import paper_config
from tf_lightning.errors import UserError
from tf_lightning.model.patches import timestep_embedding
from tf_lightning.model.unet import UNetConfig, UNetPatchCoder

CHANNELS = {1: (16,), 2: (8, 16), 4: (8, 12, 16), 8: (4, 8, 12, 16)}
DIM, LATENT_CHANNELS = 16, 3


def coder(patch_size: int, dim: int = DIM, **arguments) -> UNetPatchCoder:
    """A narrow coder with PyTorch's random weights."""
    torch.manual_seed(0)
    config = UNetConfig(CHANNELS[patch_size], num_blocks=2, head_dim=8)
    made = UNetPatchCoder(config, LATENT_CHANNELS, patch_size, dim, **arguments)
    return made.requires_grad_(False)


class Sinusoids(nn.Module):
    """`timestep_embedding` as a module, to replace diffusers'."""

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timestep_embedding(timesteps)


def library_unet(ours: UNetPatchCoder, patch_size: int) -> nn.Module:
    """diffusers' U-Net without a middle block, with our weights."""
    from diffusers import UNet2DModel

    levels = len(CHANNELS[patch_size])
    unet = UNet2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS[patch_size],
        down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
        mid_block_type=None,
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=1,
        norm_eps=1e-6,
    )
    for name in ("conv_in", "down_blocks", "up_blocks", "conv_out"):
        getattr(unet, name).load_state_dict(getattr(ours, name).state_dict())
    unet.conv_norm_out.load_state_dict(ours.norm_out.state_dict())
    # The width of diffusers' timestep embedding is that of the first channels.
    unet.time_proj, unet.time_embedding = Sinusoids(), ours.time_embedder
    return unet.requires_grad_(False)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_without_a_transformer_it_equals_diffusers_unet(patch_size):
    ours = coder(patch_size)
    ours.row_embedding.weight.zero_()
    ours.column_embedding.weight.zero_()
    for linear in (ours.patch_encoder, ours.patch_decoder):  # identities, as D equals the channels
        nn.init.eye_(linear.weight)
        linear.bias.zero_()
    latents, t = torch.randn(2, LATENT_CHANNELS, 16, 24), torch.tensor([0.1, 0.8])
    patches, skips = ours.encode(latents, t)
    output = ours.decode(patches, (16, 24), skips)

    expected = library_unet(ours, patch_size)(latents, t).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_shapes_equal_those_of_the_linear_coder(patch_size):
    made = coder(patch_size, dim=24, out_channels=2 * LATENT_CHANNELS)
    latents = torch.randn(2, LATENT_CHANNELS, 8, 16)
    patches, skips = made.encode(latents, torch.tensor([0.1, 0.8]))
    assert patches.shape == (2, 8 * 16 // patch_size**2, 24)
    assert all(len(skip) == 2 for skip in skips)
    assert made.decode(patches, (8, 16), skips).shape == (2, 2 * LATENT_CHANNELS, 8, 16)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_patches_are_in_raster_order(patch_size):
    made = coder(patch_size)
    size = (8, 16)
    columns = 16 // patch_size
    kept = made.row_embedding.weight.clone()
    made.row_embedding.weight[1] += 1
    moved, _ = made.encode(torch.zeros(1, LATENT_CHANNELS, *size), torch.tensor([0.5]))
    made.row_embedding.weight.copy_(kept)
    still, _ = made.encode(torch.zeros(1, LATENT_CHANNELS, *size), torch.tensor([0.5]))
    changed = (moved - still).abs().amax(-1)[0] > 0.5
    assert changed.nonzero().flatten().tolist() == list(range(columns, 2 * columns))


def test_the_noise_level_enters_both_paths():
    made = coder(2)
    latents, t = torch.randn(1, LATENT_CHANNELS, 8, 8), torch.tensor([0.2])
    patches, skips = made.encode(latents, t)
    assert not torch.allclose(made.encode(latents, t + 0.5)[0], patches)
    _, other = made.encode(latents, t + 0.5)
    output = made.decode(patches, (8, 8), skips)
    assert not torch.allclose(made.decode(patches, (8, 8), [other[0], *skips[1:]]), output)


@pytest.mark.parametrize("index", range(1, 7))
def test_every_skip_is_read(index):
    made = coder(2)
    patches, skips = made.encode(torch.randn(1, LATENT_CHANNELS, 8, 8), torch.tensor([0.2]))
    assert len(skips) == 7
    output = made.decode(patches, (8, 8), skips)
    skips[index] = skips[index] + 1
    assert not torch.allclose(made.decode(patches, (8, 8), skips), output)


def test_images_do_not_attend_to_each_other():
    made = coder(2)
    latents, t = torch.randn(3, LATENT_CHANNELS, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    patches, skips = made.encode(latents, t)
    output = made.decode(patches, (8, 8), skips)
    alone, own = made.encode(latents[1:2], t[1:2])
    torch.testing.assert_close(alone[0], patches[1], atol=1e-5, rtol=1e-5)
    picked = [skip[1:2] for skip in skips]
    again = made.decode(alone, (8, 8), picked)
    torch.testing.assert_close(again[0], output[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.decode(alone, (8, 8), own), again, atol=1e-5, rtol=1e-5)


def test_norms_are_layer_norms_without_timestep_conditioning():
    norms = [part for part in coder(4).modules() if isinstance(part, nn.GroupNorm)]
    assert norms and all(norm.num_groups == 1 for norm in norms)
    times = [part for name, part in coder(4).named_modules() if name.endswith("time_emb_proj")]
    # a scale and a shift would need two outputs per channel
    resnets = [part for part in coder(4).modules() if type(part).__name__ == "ResnetBlock2D"]
    assert [t.out_features for t in times] == [r.conv1.out_channels for r in resnets]


def test_an_empty_batch_leaves_zero_gradients():
    made = coder(4).requires_grad_(True)
    patches, skips = made.encode(torch.empty(0, LATENT_CHANNELS, 4, 4), torch.empty(0))
    (made.decode(patches, (4, 4), skips).sum() + patches.sum()).backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None or p.grad.any()]
    assert missing == []


def test_patches_have_unit_variance_and_the_output_is_zero_at_the_start():
    torch.manual_seed(0)
    config = UNetConfig((32, 64), num_blocks=2, head_dim=32)
    made = UNetPatchCoder(config, 8, 2, 64).requires_grad_(False)
    for parameter in made.parameters():
        parameter.fill_(float("nan"))
    made.reset_parameters()
    patches, skips = made.encode(torch.randn(8, 8, 16, 16), torch.rand(8))
    assert patches.std().item() == pytest.approx(1, rel=0.2)
    assert not made.decode(patches, (16, 16), skips).any()


@pytest.mark.parametrize("size", ["0.16b", "0.37b", "0.76b", "1.4b", "7b"])
@pytest.mark.parametrize("channels", [(512, 960), (256, 512, 960), (128, 256, 512, 960)])
def test_the_default_sizes_have_the_papers_parameter_count(size, channels):
    """0.256 to 0.276 billion parameters fit the shares of Table 7 at every model dim."""
    with torch.device("meta"):
        made = UNetPatchCoder(
            UNetConfig(channels), 8, 2 ** (len(channels) - 1), paper_config(size).dim
        )
    assert 0.256e9 <= sum(p.numel() for p in made.parameters()) <= 0.276e9


@pytest.mark.parametrize(
    "channels, head_dim, patch_size, message",
    [
        ((512, 960), 64, 4, "make patches of 2 but patch_size=4"),
        ((8, 8, 8), 8, 3, "make patches of 4 but patch_size=3"),
        ((8,), 8, 2, "make patches of 1 but patch_size=2"),
        ((), 8, 1, "channels must have an entry"),
        ((8, 12), 8, 2, "head_dim=8 must divide the last"),
    ],
)
def test_inconsistent_sizes_are_refused(channels, head_dim, patch_size, message):
    with pytest.raises(UserError, match=message):
        UNetPatchCoder(UNetConfig(channels, 1, head_dim), 3, patch_size, 16)
