"""Generation: text until <boi>, n patches of noise denoised in place, <eoi> (Transfusion Sec. 3).

A prompt is a Document; what is asked for (text or one image) continues it. Every forward packs the
prompts as training does, one document a row, so training and generation cannot disagree.

Shapes: n prompts, C x h x w latents.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tf_lightning.attention import build_attention
from tf_lightning.batch import Batch, Document, document_length, is_image, pack
from tf_lightning.net import Net
from tf_lightning.sampler import sample_latents


def pack_prompts(documents: Sequence[Document], tokenizer, patch_size: int, device) -> Batch:
    """One document a row; conditioning images stay clean (t = 0)."""
    batch = pack(
        [[document] for document in documents],
        list(range(len(documents))),
        tokenizer=tokenizer,
        row_length=max(document_length(document, patch_size) for document in documents),
        patch_size=patch_size,
    ).to(device)
    return replace(batch, t=torch.zeros_like(batch.t))


def without_text(document: Document) -> Document:
    """The unconditional branch: what training leaves when it drops a caption."""
    return [part for part in document if is_image(part)]


@torch.no_grad()
def generate_images(
    net: Net,
    documents: Sequence[Document],
    scheduler,
    *,
    tokenizer,
    patch_size: int,
    latent_shape: tuple[int, int, int],
    guidance_scale: float,
    num_inference_steps: int,
    seeds: Sequence[int],
    causal_images: bool = False,
    progress: bool = False,
) -> Tensor:
    """One image after each prompt, as latents (n, C, h, w).

    Conditional and unconditional prompts are one batch. A picture depends on its own seed, prompt
    and settings, not on its batch mates.

    Args:
        net: the network, on its device.
        documents: prompts that the image follows.
        scheduler: from `sampler.build_scheduler`.
        tokenizer: special ids.
        patch_size: side of a patch in latent pixels.
        latent_shape: (C, h, w) of the image.
        guidance_scale: 1 = off, which also halves the work.
        num_inference_steps: network evaluations.
        seeds: the first noise of each image.
        causal_images: as trained.
        progress: show a progress bar.
    """
    device = next(net.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(latent_shape, generator=g) for g in generators])
    guided = guidance_scale != 1
    prompts = list(documents) + ([without_text(d) for d in documents] if guided else [])
    blank = torch.zeros(latent_shape)
    batch = pack_prompts([[*p, blank] for p in prompts], tokenizer, patch_size, device)
    images_per_prompt = torch.tensor([1 + sum(map(is_image, p)) for p in prompts], device=device)
    last = images_per_prompt.cumsum(0) - 1  # the image being drawn is each prompt's last
    attend = build_attention(batch, causal_images)
    batch = replace(batch, target_index=batch.target_index[:0])  # no logits while denoising

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        copies = 2 if guided else 1
        latents = batch.latents.index_copy(0, last, x_t.repeat(copies, 1, 1, 1))
        times = batch.t.index_copy(0, last, t.repeat(copies))
        output = net(batch, latents, times, attend)[1][last].chunk(copies)
        return output[0], output[-1]

    return sample_latents(
        denoise,
        noise.to(device),
        scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generators,
        progress=progress,
    )


@torch.no_grad()
def generate_text(
    net: Net,
    documents: Sequence[Document],
    *,
    tokenizer,
    patch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    causal_images: bool = False,
) -> list[list[int]]:
    """Token ids that continue each prompt, up to <eos> or <boi> (excluded) or max_new_tokens.

    Args:
        net: the network, on its device.
        documents: prompts; a prompt that ends in an image asks for its caption.
        tokenizer: special ids.
        patch_size: side of a patch in latent pixels.
        max_new_tokens: limit for each prompt.
        temperature: 0 = greedy.
        seed: of the draws when temperature > 0.
        causal_images: as trained.
    """
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    stops = {tokenizer.eos_id, tokenizer.boi_id}
    written: list[list[int]] = [[] for _ in documents]
    running = list(range(len(documents)))
    for _ in range(max_new_tokens if documents else 0):
        prompts = [[*documents[i], torch.tensor(written[i], dtype=torch.long)] for i in running]
        logits = next_token_logits(net, prompts, tokenizer, patch_size, device, causal_images)
        tokens = choose(logits.float().cpu(), temperature, generator)
        for index, token in zip(running, tokens, strict=True):
            written[index].append(token)
        running = [i for i in running if written[i][-1] not in stops]
        if not running:
            break
    return [ids[:-1] if ids and ids[-1] in stops else ids for ids in written]


def next_token_logits(
    net: Net, prompts: Sequence[Document], tokenizer, patch_size: int, device, causal_images: bool
) -> Tensor:
    """Logits (n, V) after the last position of each prompt; <eos>, which pack adds, comes later."""
    batch = pack_prompts(prompts, tokenizer, patch_size, device)
    rows = torch.arange(len(prompts), device=device) * batch.input_ids.shape[1]
    batch = replace(batch, target_index=rows + batch.row_tokens - 2)
    attend = build_attention(batch, causal_images)
    return net(batch, batch.latents, batch.t, attend)[0]


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    """One token of each row of logits (n, V): the largest, or a draw."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).flatten().tolist()
