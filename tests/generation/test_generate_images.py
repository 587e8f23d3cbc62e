"""Images of latents against full forward passes, which use no cache."""

import pytest
import torch
from torch import Tensor

from support.generation import (
    GUIDANCES,
    PROCESS,
    PROMPT_NAMES,
    PROMPTS,
    STEPS,
    generate_images,
    plan,
)
from support.reference_generation import reference_image
from support.tiny import LATENT_SHAPE, PATCH_SIZE, document, packed, tiny_net
from tf_lightning.diffusion.process import DDPM
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=PROMPT_NAMES)
def test_an_image_equals_full_forward_passes_without_a_cache(prompt, guidance):
    net, how = tiny_net(), plan("image", **guidance)
    expected = reference_image(net, prompt, torch.Generator().manual_seed(3), how)
    torch.testing.assert_close(
        generate_images(net, [prompt], how, 3)[0], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"])
def test_an_image_depends_on_its_own_seed_and_prompt_and_not_on_the_batch(sampler):
    net, how = tiny_net(), plan("image", sampler, guidance_scale=2.0)
    together = generate_images(net, PROMPTS, how, 1, 2, 3, 4)
    alone = torch.cat(
        [generate_images(net, [prompt], how, n) for n, prompt in enumerate(PROMPTS, 1)]
    )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.isclose(generate_images(net, PROMPTS[:1], how, 9), together[0]).all()


def calls(net: TransfusionModel, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Record the latents and noise levels that the network receives from now on."""
    seen, denoise = [], net.denoise
    monkeypatch.setattr(
        net,
        "denoise",
        lambda latents, t, *rest: (seen.append((latents, t)), denoise(latents, t, *rest))[1],
    )
    return seen


def test_only_the_branches_that_guidance_needs_are_computed(monkeypatch):
    net = tiny_net()
    seen = calls(net, monkeypatch)
    generate_images(net, PROMPTS, plan("image"), 1, 2, 3, 4)
    generate_images(net, PROMPTS, plan("image", guidance_scale=2.0), 1, 2, 3, 4)
    generate_images(
        net, PROMPTS, plan("image", guidance_scale=2.0, guidance_interval=(0.5, 1)), 1, 2, 3, 4
    )
    generate_images(
        net, PROMPTS, plan("image", guidance_scale=2.0, image_guidance_scale=1.0), 1, 2, 3, 4
    )
    rows = [len(latents) for latents, _ in seen]
    assert rows == [4] * 5 + [8] * 5 + [8] * 3 + [4] * 2 + [12] * 5


def test_a_step_computes_the_positions_of_the_image_alone(monkeypatch):
    net, lengths = tiny_net(), []
    net.transformer.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[:-1].numel())
    )
    generate_images(net, [document("9i9", 1)], plan("image"), 1)
    prompt, begin, *steps = lengths
    assert prompt == 9 + 6 + 9 + 2 and begin == 1 and steps == [4] * STEPS


def variant_net(
    modality_weights: str = "shared", unet: UNetConfig | None = None, **other
) -> TransfusionModel:
    torch.manual_seed(0)
    config = TransformerConfig(20, 32, 2, 4, 2, ffn_dim=48, modality_weights=modality_weights)
    return TransfusionModel(config, PATCH_SIZE, 3, unet=unet, **other).requires_grad_(False)


VARIANTS = {
    "feed-forward of their own": {"modality_weights": "ffn"},
    "all of their own": {"modality_weights": "all"},
    "U-Net": {"unet": UNetConfig((8, 16), 1, 8)},
    "learned sigma": {"learned_sigma": True},
    "all": {"modality_weights": "all", "unet": UNetConfig((8, 16), 1, 8), "learned_sigma": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_network_equal_full_forward_passes(options):
    net, prompt = variant_net(**options), document("2i1", 3)
    drawn = generate_images(net, [prompt], plan("image", guidance_scale=1.0), 7)
    scheduler = build_scheduler(PROCESS, "DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    x_t = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps:
        batch = packed([[[*prompt, x_t]]])
        t = torch.tensor([0.0, timestep.item() / 1000])
        _, output = net(batch, batch.latents, t, DenseAttention(batch))
        x_t = scheduler.step(output[1, :3], timestep, x_t).prev_sample
    torch.testing.assert_close(drawn.flatten(), x_t.flatten(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ddpm_uses_the_learned_variance_of_the_conditional_branch(scale):
    """Compare with diffusers' loop over full forward passes; the variance is not guided (DiT)."""
    net, prompt = variant_net(learned_sigma=True), document("2i1", 3)
    scheduler = build_scheduler(DDPM("v_prediction", learned_sigma=True), "DDPMScheduler")
    how = plan("image", guidance_scale=scale, scheduler=scheduler)
    drawn = generate_images(net, [prompt], how, 7)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(LATENT_SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        outputs = []
        for parts in ([*prompt, x_t], [x_t]):
            batch = packed([[parts]])
            t = torch.zeros(batch.num_images)
            t[-1] = timestep.item() / 1000
            outputs.append(net(batch, batch.latents, t, DenseAttention(batch))[1][-1])
        cond, uncond = outputs
        guided = torch.cat([uncond[:3] + scale * (cond - uncond)[:3], cond[3:]]).unsqueeze(0)
        step = scheduler.step(guided, timestep, x_t.unsqueeze(0), generator=[generator])
        x_t = step.prev_sample[0]
    torch.testing.assert_close(drawn.flatten(), x_t.flatten(), atol=1e-3, rtol=1e-3)
