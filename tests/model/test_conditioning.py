"""Options of the linear patch coder, against the formulas of their papers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.generation import PROCESS, STEPS, collect, generation_model, plan
from support.tiny import LATENT_SHAPE, PATCH_SIZE, SIZES, TOKENIZER, VOCAB_SIZE, document
from tf_lightning.batch import document_length, pack
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.errors import UserError
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import GenerationPlan
from tf_lightning.model.attention import DenseAttention, VarlenAttention
from tf_lightning.model.patches import (
    AdaptiveNorm,
    LinearConfig,
    LinearPatchCoder,
    check_linear_config,
    patchify,
    sincos_pos_embed,
    timestep_embedding,
)
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training.module import Transfusion

TIMES = pytest.mark.parametrize("time", ["added", "token", "adaln"])
POS_EMBEDS = pytest.mark.parametrize("pos_embed", ["learned", "sincos"])


def made_net(learned_sigma: bool = False, **linear) -> TransfusionModel:
    """A network with PyTorch's random weights, so that nothing is zero."""
    torch.manual_seed(0)
    config = TransformerConfig(VOCAB_SIZE, 32, 2, 4, 2, ffn_dim=48)
    net = TransfusionModel(
        config, PATCH_SIZE, 3, learned_sigma=learned_sigma, linear=LinearConfig(**linear)
    )
    return net.requires_grad_(False)


def coder(**linear) -> LinearPatchCoder:
    torch.manual_seed(0)
    return LinearPatchCoder(3, 2, 32, config=LinearConfig(**linear)).requires_grad_(False)


def packed(parts, net: TransfusionModel):
    length = document_length(parts, PATCH_SIZE, net.time_token)
    return pack([[parts]], [0], tokenizer=TOKENIZER, row_length=length, patch_size=PATCH_SIZE,
                time_token=net.time_token)  # fmt: skip


# Formulas


@pytest.mark.parametrize("grid, dim", [((4, 4), 32), ((2, 3), 8)])
def test_sincos_pos_embed_equals_masked_autoencoders(grid, dim):
    """MAE's formula: columns in the first half, rows in the second, sines before cosines."""

    def one(positions: np.ndarray) -> np.ndarray:
        omega = 1 / 10_000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
        out = np.einsum("m,d->md", positions, omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    columns, rows = np.meshgrid(np.arange(grid[1]), np.arange(grid[0]))
    expected = np.concatenate([one(columns.reshape(-1)), one(rows.reshape(-1))], axis=1)
    np.testing.assert_allclose(sincos_pos_embed(*grid, dim).numpy(), expected, atol=1e-6)


def test_sincos_pos_embed_equals_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(64, 8, base_size=8, output_type="pt").float()
    torch.testing.assert_close(sincos_pos_embed(8, 8, 64), expected, atol=1e-5, rtol=0)


def test_adaptive_norm_equals_dits_final_layer():
    torch.manual_seed(0)
    norm = AdaptiveNorm(16).requires_grad_(False)
    x, time = torch.randn(2, 5, 16), torch.randn(2, 16)
    weight, bias = norm.modulation[1].weight, norm.modulation[1].bias
    shift, scale = (F.silu(time) @ weight.T + bias).split(16, dim=1)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    for image in range(2):
        expected = normed[image] * (1 + scale[image]) + shift[image]
        torch.testing.assert_close(norm(x, time)[image], expected, atol=1e-5, rtol=1e-5)


@POS_EMBEDS
def test_each_time_option_equals_its_formula(pos_embed):
    latents, t = torch.randn(2, 3, 4, 6), torch.tensor([0.1, 0.7])
    for time in ("added", "token", "adaln"):
        made = coder(time=time, pos_embed=pos_embed)
        if pos_embed == "sincos":
            expected_pos = sincos_pos_embed(2, 3, 32)
        else:
            expected_pos = made.row_embedding.weight[:2].repeat_interleave(3, 0)
            expected_pos = expected_pos + made.column_embedding.weight[:3].repeat(2, 1)
        patches = made.patch_encoder(patchify(latents, 2)) + expected_pos
        embedded = made.time_embedder(timestep_embedding(t))
        encoded, skips = made.encode(latents, t)
        expected = {
            "added": lambda p=patches, e=embedded: p + e[:, None],
            "token": lambda p=patches, e=embedded: torch.cat([e[:, None], p], 1),
            "adaln": lambda p=patches, e=embedded, m=made: m.input_norm(p, e),
        }[time]()
        torch.testing.assert_close(encoded, expected)
        output = made.decode(encoded, (4, 6), skips)
        assert output.shape == latents.shape
        if time == "token":  # the output at the time token is ignored
            encoded[:, 0] = 7
            assert torch.equal(made.decode(encoded, (4, 6), skips), output)


def test_adaln_with_zero_weights_ignores_the_noise_level():
    """The result is that of plain layer norms, at every noise level."""
    net = made_net(time="adaln")
    for norm in (net.patch_coder.input_norm, net.patch_coder.output_norm):
        norm.modulation[1].weight.zero_()
        norm.modulation[1].bias.zero_()
    batch = packed(document("2i1"), net)
    attend = VarlenAttention(batch)
    low, high = (net(batch, batch.latents, torch.tensor([t]), attend) for t in (0.0, 0.9))
    assert torch.equal(low[0], high[0]) and torch.equal(low[1], high[1])

    made = net.patch_coder
    plain, skips = made.encode(batch.latents, torch.tensor([0.9]))
    content = made.patch_encoder(patchify(batch.latents, 2)) + made._pos_embed(batch.latents)
    torch.testing.assert_close(plain, F.layer_norm(content, (32,), eps=1e-6))
    hidden = torch.randn(1, 4, 32)
    expected = made.patch_decoder(F.layer_norm(hidden, (32,), eps=1e-6))
    torch.testing.assert_close(patchify(made.decode(hidden, (4, 4), skips), 2), expected)


@TIMES
def test_the_noise_level_changes_the_image_and_later_text_only(time):
    net = made_net(time=time)
    batch = packed(document("3i2"), net)
    at = torch.arange(batch.input_ids.numel())
    batch.target_index = at
    low, high = (
        net(batch, batch.latents, torch.tensor([t]), DenseAttention(batch)) for t in (0.0, 0.9)
    )
    first = batch.image_ids[0].tolist().index(0)
    assert torch.equal(low[0][:first], high[0][:first])
    assert ((low[0] - high[0])[-3:].abs().amax(1) > 1e-4).all()
    assert not torch.isclose(low[1], high[1], atol=1e-4).all()


# Initialization


@TIMES
@POS_EMBEDS
@pytest.mark.parametrize("zero_init", ["output", "input"])
def test_zero_init_zeroes_the_output_or_the_input(time, pos_embed, zero_init):
    made = coder(time=time, pos_embed=pos_embed, zero_init=zero_init)
    for parameter in made.parameters():
        parameter.fill_(float("nan"))
    made.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    latents, other = torch.randn(2, 1, 3, 4, 4).unbind(0)
    (one, skips), (two, _) = (
        made.encode(latents, torch.tensor([0.1])),
        made.encode(other, torch.tensor([0.9])),
    )
    hidden = torch.randn(1, 4 + made.config.time.count("token"), 32)
    output = made.decode(hidden, (4, 4), skips)
    assert torch.equal(one, two) == (zero_init == "input")
    assert output.any() == (zero_init == "input")


@TIMES
def test_zero_input_layers_have_gradients(time):
    """The layers that start at zero have gradients, so they do not stay zero."""
    torch.manual_seed(0)
    config = TransformerConfig(VOCAB_SIZE, 32, 2, 4, 2, ffn_dim=48)
    linear = LinearConfig(time=time, pos_embed="sincos", zero_init="input")
    net = TransfusionModel(config, PATCH_SIZE, 3, linear=linear, learned_sigma=True)
    net.reset_parameters()
    batch = packed(document("2i1"), net)
    net(batch, batch.latents, batch.t, VarlenAttention(batch))[1].square().sum().backward()
    coder = net.patch_coder
    assert coder.patch_encoder.weight.grad.any() and coder.time_embedder[2].weight.grad.any()


# Generation


def draw(net: TransfusionModel, parts, how: GenerationPlan) -> torch.Tensor:
    (answer,) = collect(generate(generation_model(net), [parts], [7], how), 1)
    return answer[0]


@TIMES
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_denoising_with_the_cache_equals_full_forwards(time, scale):
    """The prompt has a clean image, at t = 0."""
    net, prompt = made_net(time=time, pos_embed="sincos", learned_sigma=True), document("2i1", 3)
    drawn = draw(net, prompt, plan("image", guidance_scale=scale))
    scheduler = build_scheduler(PROCESS, "DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    x_t = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps:
        outputs = []
        for parts in ([*prompt, x_t], [x_t]):
            batch = packed(parts, net)
            t = torch.zeros(batch.num_images)
            t[-1] = timestep.item() / 1000
            outputs.append(net(batch, batch.latents, t, DenseAttention(batch))[1][-1, :3])
        output = outputs[1] + scale * (outputs[0] - outputs[1])
        x_t = scheduler.step(output, timestep, x_t).prev_sample
    torch.testing.assert_close(drawn, x_t, atol=1e-3, rtol=1e-3)


class Chooser:
    """A vocabulary head that makes <boi> the first token and no later one."""

    def __init__(self, head: torch.nn.Linear):
        self.head, self.seen = head, []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        self.seen.append(logits.flatten())
        chosen = logits.clone()
        chosen[..., [TOKENIZER.boi_id, TOKENIZER.eos_id]] = -1e4
        chosen[..., TOKENIZER.boi_id] *= -1 if len(self.seen) == 1 else 1
        return chosen


@TIMES
def test_text_after_a_generated_image_reads_it_at_t_0(time):
    """Its logits equal a full forward with the image at t = 0, and at no other t."""
    net, prompt = made_net(time=time), document("3", 1)
    net.patch_coder.time_embedder[2].weight *= 10  # so that t matters
    head = net.transformer.output
    chooser = net.transformer._modules["output"] = Chooser(head)
    how = plan("any", max_new_tokens=2)
    (answer,) = collect(generate(generation_model(net), [prompt], [7], how), 1)
    image, text = answer
    net.transformer._modules["output"] = head
    batch = packed([*prompt, image, text], net)
    batch.target_index = torch.tensor([len(batch.input_ids[0]) - 4, len(batch.input_ids[0]) - 3])
    clean, noised = (
        net(batch, batch.latents, torch.tensor([t]), DenseAttention(batch))[0] for t in (0.0, 0.5)
    )
    _, _, *seen = chooser.seen  # after the prompt, <boi>; then after <eoi> and one token
    torch.testing.assert_close(torch.stack(seen), clean, atol=1e-5, rtol=1e-4)
    assert (noised - clean).abs().max() > 1e-2


# Errors


@pytest.mark.parametrize(
    "linear, words",
    [
        ({"time": "film"}, "linear.time='film' must be 'added' or 'token' or 'adaln'"),
        ({"pos_embed": "rope"}, "linear.pos_embed='rope' must be 'learned' or 'sincos'"),
        ({"zero_init": "all"}, "linear.zero_init='all' must be 'output' or 'input'"),
        ({"pos_embed": "sincos"}, "needs a multiple of 4 as transformer.dim, which is 30"),
    ],
)
def test_unknown_options_are_refused(linear, words):
    with pytest.raises(UserError, match=words):
        check_linear_config(LinearConfig(**linear), 30)


def test_unet_and_linear_together_are_refused():
    config = TransformerConfig(VOCAB_SIZE, **SIZES)
    with pytest.raises(UserError, match="unet and linear are both given"):
        Transfusion(config, unet=UNetConfig((8, 16), 1, 8), linear=LinearConfig())
