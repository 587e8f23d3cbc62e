"""Every option reaches the pipeline: images and texts at unusual values against plain torch.

The denoiser is replaced by a formula, so that each image can be computed here step by step.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.tiny import LATENT_SHAPE, SIZES, TOKENIZER, VOCAB_SIZE, document
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import build_network
from tf_lightning.training.module import Transfusion

T, STEPS, SHIFT = 40, 8, 0.2  # so that the last step is at timestep 0
TEXT_SCALE, IMAGE_SCALE, INTERVAL, PHI = 2.5, 1.4, (0.05, 0.6), 0.7
BRANCH_FACTORS = torch.tensor([1.0, 0.6, 0.3]).view(-1, 1, 1, 1)  # the outputs of the branches
PROMPT = document("2i1", 5)
LETTER, BOI = 5, TOKENIZER.boi_id


class Recorded:
    """A pipeline with formulas in place of its network's outputs, and what it calls.

    Attributes:
        images: the final latents of each image.
        prompts: (row lengths, noise levels) of each pass over prompts.
        denoised: (noise levels, whether patches see only earlier ones) of each denoising step.
        num_tokens: number of tokens that were read one by one.
    """

    def __init__(self, next_token: int = LETTER, **options):
        config = TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES)
        module = Transfusion(config, patch_size=2, latent_channels=3, **options)
        hparams = dict(module.hparams)
        net = build_network(hparams).requires_grad_(False)
        self.images, self.prompts, self.denoised, self.num_tokens = [], [], [], 0
        self.num_outputs, self.next_token = net.num_outputs, next_token
        self.forward, self.next_logits = net.forward, net.next_logits
        net.forward, net.denoise, net.next_logits = self.read, self.denoise, self.read_token
        net.transformer.logits = self.logits
        tokenizer = SimpleNamespace(**vars(TOKENIZER), decode=self.text)
        autoencoder = SimpleNamespace(decode=self.decode, downsample=1)
        codec = {"autoencoder": "pixels", "latent_shape": list(LATENT_SHAPE)}
        checkpoint = {"hyper_parameters": hparams, "image_codec": codec, "row_length": 64}
        self.pipe = TransfusionPipeline(net, tokenizer, checkpoint)
        self.pipe.autoencoder = autoencoder

    def __call__(self, **options):
        return self.pipe([PROMPT], progress=False, **options)

    def read(self, batch, latents: Tensor, t: Tensor, attend) -> tuple[Tensor, Tensor]:
        self.prompts.append((batch.row_tokens.tolist(), t.tolist()))
        return self.forward(batch, latents, t, attend)

    def read_token(self, *arguments) -> Tensor:
        self.num_tokens += 1
        return self.next_logits(*arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        likely = torch.nn.functional.one_hot(torch.tensor(self.next_token), VOCAB_SIZE)
        return (10.0 * likely).expand(*hidden.shape[:-1], -1)

    def denoise(self, x_t: Tensor, t: Tensor, positions: Tensor, attend) -> Tensor:
        self.denoised.append((t.tolist(), attend.causal))
        return formula(x_t, t, BRANCH_FACTORS[: len(x_t)])[:, : self.num_outputs * 3]

    def text(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)

    def decode(self, latents: Tensor) -> Tensor:
        self.images += list(latents)
        return latents.clamp(-1, 1)


def formula(x_t: Tensor, t: Tensor, factors: Tensor) -> Tensor:
    """The denoiser's output and variance, (n, 6, h, w)."""
    return torch.cat([factors * (2 * x_t).sin() + t.view(-1, 1, 1, 1), factors * x_t.cos()], 1)


# ------------------------------------------------------------------------------ by hand


def guided(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """InstructPix2Pix's guidance inside of the interval, rescaled; the variance is unguided."""
    outputs = formula(x_t.expand(3, -1, -1, -1), torch.full((3,), t), BRANCH_FACTORS)
    full, images, nothing = (part[None] for part in outputs[:, :3])
    variance = outputs[:1, 3:]
    if not INTERVAL[0] <= t <= INTERVAL[1]:
        return full, variance
    mixed = nothing + IMAGE_SCALE * (images - nothing) + TEXT_SCALE * (full - images)
    rescaled = mixed * full.std() / mixed.std()
    return PHI * rescaled + (1 - PHI) * mixed, variance


def shifted_levels() -> Tensor:
    even = 1 - torch.arange(STEPS, dtype=torch.float64) / STEPS
    return SHIFT * even / (1 + (SHIFT - 1) * even)


def ancestral_image(seed: int, schedule: str, learned: bool) -> Tensor:
    """DDPM's sampler with v prediction, and iDDPM's variance or the posterior's."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        places = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * torch.pi / 2
        alpha_bar = places.cos() ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    alpha_bars = (1 - betas).cumprod(0)
    timesteps = ((T * shifted_levels()).round().long() - 1).tolist()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(LATENT_SHAPE, generator=generator)[None]
    for step, timestep in enumerate(timesteps):
        v, variance = guided(x, timestep / T)
        alpha_bar = alpha_bars[timestep]
        before = alpha_bars[timesteps[step + 1]] if step + 1 < STEPS else torch.tensor(1.0)
        alpha, beta = alpha_bar / before, 1 - alpha_bar / before
        x_0 = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v
        x = before.sqrt() * beta * x_0 + alpha.sqrt() * (1 - before) * x
        x = (x / (1 - alpha_bar)).float()
        if timestep > 0:
            noise = torch.randn(1, *LATENT_SHAPE, generator=generator)
            log_variance = (beta * (1 - before) / (1 - alpha_bar)).log()
            if learned:
                u = (variance + 1) / 2
                log_variance = u * beta.log() + (1 - u) * log_variance
            x = x + ((log_variance / 2).exp() * noise).float()
    return x[0]


def flow_image(seed: int) -> Tensor:
    """Euler's method from t = 1 to 0."""
    levels = [*shifted_levels().tolist(), 0.0]
    x = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))[None]
    for t, following in zip(levels, levels[1:], strict=False):
        x = x + (following - t) * guided(x, t)[0]
    return x[0]


# ------------------------------------------------------------------------------ images

GUIDANCE = {
    "guidance_scale": TEXT_SCALE,
    "image_guidance_scale": IMAGE_SCALE,
    "guidance_interval": INTERVAL,
    "guidance_rescale": PHI,
}
DENOISING = {"num_inference_steps": STEPS, "timestep_shift": SHIFT}


@pytest.mark.parametrize("how", ["options", "sampling"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_image_of_ddpm_equals_the_one_computed_by_hand(schedule, learned, how):
    recorded = Recorded(
        prediction_type="v_prediction",
        noise_schedule=schedule,
        num_train_timesteps=T,
        learned_sigma=learned,
        causal_images=True,
    )
    options = GUIDANCE | DENOISING | {"sampler": "DDPMScheduler"}
    given = options if how == "options" else {"sampling": SamplingConfig(**options)}
    recorded(output_modality="image", seed=[11], **given)
    (image,) = recorded.images
    torch.testing.assert_close(image, ancestral_image(11, schedule, learned), atol=1e-4, rtol=1e-4)
    # The prompt with text and image, with its image alone, and without both; images are clean.
    assert recorded.prompts == [([11, 8, 2], [0.0, 0.0])]
    levels = [((T * level).round().item() - 1) / T for level in shifted_levels()]
    assert [t[0] for t, _ in recorded.denoised] == pytest.approx(levels)
    inside = [3 if INTERVAL[0] <= t <= INTERVAL[1] else 1 for t in levels]
    assert [len(t) for t, _ in recorded.denoised] == inside and {*inside} == {1, 3}
    assert all(causal for _, causal in recorded.denoised)


def test_an_image_of_a_flow_equals_the_one_computed_by_hand():
    recorded = Recorded(prediction_type="flow")
    recorded(output_modality="image", seed=7, num_outputs=2, batch_size=1, **GUIDANCE, **DENOISING)
    assert len(recorded.images) == 2
    for image, seed in zip(recorded.images, (7, 8), strict=True):
        torch.testing.assert_close(image, flow_image(seed), atol=1e-4, rtol=1e-4)
    assert not any(causal for _, causal in recorded.denoised)


@pytest.mark.parametrize("how", ["options", "sampling"])
@pytest.mark.parametrize("given, shape", [
    ({"height": 2, "width": 6}, (3, 2, 6)), ({"height": 6}, (3, 6, 4)), ({"width": 6}, (3, 4, 6)),
])  # fmt: skip
def test_an_image_has_the_height_and_width_that_are_asked_for(given, shape, how):
    recorded = Recorded()
    others = ((3, 2, 6), (3, 6, 2), (3, 6, 4), (3, 4, 6))
    recorded.pipe.model = replace(recorded.pipe.model, other_shapes=others)
    options = given | {"num_inference_steps": 1}
    options = options if how == "options" else {"sampling": SamplingConfig(**options)}
    recorded(output_modality="image", **options)
    assert tuple(recorded.images[0].shape) == shape


def test_the_schedulers_of_training_and_sampling_have_the_same_noise():
    """For epsilon too, whose sampling skips the end of the cosine schedule."""
    for prediction_type in ("epsilon", "v_prediction"):
        for schedule in ("linear", "cosine"):
            options = {"prediction_type": prediction_type, "noise_schedule": schedule}
            pipe = Recorded(**options, num_train_timesteps=T).pipe
            scheduler = pipe.plan("image", SamplingConfig(num_inference_steps=STEPS)).scheduler
            kept = scheduler.alphas_cumprod
            torch.testing.assert_close(kept, pipe.process.alphas_cumprod[: len(kept)])
            assert scheduler.config.prediction_type == prediction_type
            assert scheduler.num_levels == T and len(scheduler.timesteps) == STEPS


# ------------------------------------------------------------------------------ text and images


def test_a_text_has_at_most_the_number_of_new_tokens():
    recorded = Recorded()
    assert recorded(output_modality="text", max_new_tokens=7).texts == ["f" * 7]


def test_a_text_ends_before_a_stop_string():
    recorded = Recorded()
    options = {"output_modality": "text", "max_new_tokens": 20, "stop": ("gg", "fff")}
    assert recorded(**options).texts == [""]
    assert recorded.num_tokens == 2  # the prompt's logits give the first of three tokens


@pytest.mark.parametrize("max_images", [1, 2, 3])
def test_an_output_has_at_most_max_images(max_images):
    recorded = Recorded(next_token=BOI)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_images": max_images}
    output = recorded(output_modality="any", seed=3, **options)
    assert len(output.images) == len(recorded.images) == max_images


def test_without_image_guidance_the_whole_prompt_has_one_scale():
    recorded = Recorded(prediction_type="flow")
    recorded(output_modality="image", num_inference_steps=1, guidance_scale=2.0)
    assert recorded.prompts == [([11, 2], [0.0])]
    x = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(0))[None]
    full, nothing = formula(x.expand(2, -1, -1, -1), torch.ones(2), BRANCH_FACTORS[:2])[:, :3]
    expected = x[0] - (nothing + 2 * (full - nothing))
    torch.testing.assert_close(recorded.images[0], expected, atol=1e-5, rtol=1e-5)
