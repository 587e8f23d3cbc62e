"""A slow reference for generation: every token and every denoising step is a full forward pass.

Sequences are built part by part under the dense mask, without `pack` and without a cache.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from support.generation import BOI, BOS, EOI, EOS, PROCESS, STEPS
from support.tiny import LATENT_SHAPE, PATCH_SIZE
from tf_lightning.batch import Document, num_patches
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.generation.requests import GenerationPlan
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transfusion import TransfusionModel


def hidden_states(
    net: TransfusionModel,
    parts: Document,
    times: dict[int, float] | None = None,
    causal: bool = False,
) -> Tensor:
    """Transformer outputs (T, D) of <bos> and the parts.

    Image i of the parts has the noise level times[i] in [0, 1]; without an entry it is clean.
    """
    vectors, image_ids = [], []

    def tokens(*ids: int) -> None:
        vectors.append(net.transformer.tok_embeddings(torch.tensor(ids, dtype=torch.long)))
        image_ids.extend([-1] * len(ids))

    tokens(BOS)
    for number, part in enumerate(parts):
        if part.ndim == 1:
            tokens(*part.tolist())
            continue
        tokens(BOI)
        t = torch.tensor([(times or {}).get(number, 0.0)])
        vectors.append(net.patch_coder.encode(part.unsqueeze(0), t)[0][0])
        image_ids += [number] * num_patches(part, PATCH_SIZE)
        tokens(EOI)
    x = torch.cat(vectors).unsqueeze(0)
    layout = SimpleNamespace(
        document_ids=torch.zeros(1, x.shape[1], dtype=torch.long),
        image_ids=torch.tensor([image_ids]),
        copied=torch.empty(0),
    )
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    return net.transformer(x, positions, DenseAttention(layout, causal))[0]


def next_token(net: TransfusionModel, parts: Document, causal: bool = False) -> int:
    """The most likely next token."""
    return net.transformer.output(hidden_states(net, parts, causal=causal)[-1]).argmax().item()


def greedy_tokens(net: TransfusionModel, prompt: Document, count: int) -> list[int]:
    """`count` tokens, each the most likely one."""
    ids: list[int] = []
    while len(ids) < count:
        ids.append(next_token(net, [*prompt, torch.tensor(ids, dtype=torch.long)]))
    return ids


def reference_image(
    net: TransfusionModel,
    prompt: Document,
    generator: torch.Generator,
    plan: GenerationPlan,
    causal: bool = False,
) -> Tensor:
    """The image (C, h, w) after a prompt, with a forward pass per step and guidance branch."""
    guidance, scheduler = plan.guidance, build_scheduler(PROCESS, "DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    images = [part for part in prompt if part.ndim == 3]
    shape = plan.latent_shape or (images[-1].shape if images else LATENT_SHAPE)
    x_t = torch.randn(shape, generator=generator)

    def output(parts: Document, t: float) -> Tensor:
        hidden = hidden_states(net, [*parts, x_t], {len(parts): t}, causal)
        patches = hidden[-1 - num_patches(x_t, PATCH_SIZE) : -1].unsqueeze(0)  # then <eoi>
        return net.patch_coder.decode(patches, shape[1:])

    for timestep in scheduler.timesteps:
        t = timestep.item() / 1000
        noise = cond = output(prompt, t)
        low, high = guidance.interval
        if guidance.image_scale is not None:
            seen, unseen = output(images, t), output([], t)
            noise = unseen + guidance.image_scale * (seen - unseen) + guidance.scale * (cond - seen)
        elif low <= t <= high:
            uncond = output([], t)
            noise = uncond + guidance.scale * (cond - uncond)
        x_t = scheduler.step(noise, timestep, x_t.unsqueeze(0)).prev_sample[0]
    return x_t


def reference_document(
    net: TransfusionModel, prompt: Document, seed: int, plan: GenerationPlan, causal: bool = False
) -> Document:
    """The document that continues a prompt, greedily, with images of continuous latents."""
    generator = torch.Generator().manual_seed(seed)
    return continue_document(
        prompt,
        plan,
        lambda parts: next_token(net, parts, causal),
        lambda parts: reference_image(net, parts, generator, plan, causal),
    )


def continue_document(
    prompt: Document,
    plan: GenerationPlan,
    next_token: Callable[[Document], int],
    next_image: Callable[[Document], Tensor],
) -> Document:
    """Continue a prompt with text until <boi>, an image, text again, and so on.

    Args:
        prompt: the document to continue.
        plan: limits of text tokens and images.
        next_token: gives the token after a document.
        next_image: gives the image after a document and <boi>.
    """
    output: Document = []
    count = images = 0
    while count < plan.sampling.max_new_tokens:
        token = next_token([*prompt, *output])
        if token == BOI and images < plan.max_images:
            output.append(next_image([*prompt, *output]))
            images += 1
        elif token in (EOS, BOI):
            break
        else:
            text = [output.pop()] if output and output[-1].ndim == 1 else []
            output.append(torch.cat([*text, torch.tensor([token])]))
            count += 1
    return output
