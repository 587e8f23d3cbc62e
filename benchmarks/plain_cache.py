"""A plain Llama with preallocated keys and values: what generation is timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from step_time import CONFIG, PlainBlock, PlainLlama, rotate_half


class PlainCache:
    """Preallocated keys and values of one sequence."""

    def __init__(self, llama: PlainLlama, length: int):
        shape = (1, CONFIG.num_heads, length, CONFIG.dim // CONFIG.num_heads)
        self.layers = [(torch.zeros(shape), torch.zeros(shape)) for _ in llama.blocks]


def plain_block(block: PlainBlock, x: Tensor, cache: tuple, start: int, llama) -> Tensor:
    """`PlainBlock.forward` for L positions behind `start` cached ones; they see each other."""
    normed, end = block.attention_norm(x), start + x.shape[1]
    q, k, v = (
        w(normed).unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
        for w in (block.wq, block.wk, block.wv)
    )
    cos, sin = llama.cos[start:end], llama.sin[start:end]
    keys, values = cache
    keys[:, :, start:end], values[:, :, start:end] = rotate_half(k, cos, sin), v
    q = rotate_half(q, cos, sin)
    attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end])
    x = x + block.wo(attended.transpose(1, 2).flatten(2))
    normed = block.ffn_norm(x)
    return x + block.w2(F.silu(block.w1(normed)) * block.w3(normed))


@torch.no_grad()
def plain_trunk(llama: PlainLlama, x: Tensor, cache: PlainCache, start: int) -> Tensor:
    """Hidden states (1, L, D) of L vectors behind `start` cached ones."""
    for block, layer in zip(llama.blocks, cache.layers, strict=True):
        x = plain_block(block, x, layer, start, llama)
    return llama.norm(x)


def plain_image(llama: PlainLlama, prefix: int, num_patches: int, evaluations: int) -> None:
    """As many evaluations of the trunk on an image's patches, each on the last one's outcome."""
    cache = PlainCache(llama, prefix + num_patches + 4)
    x = torch.randn(1, num_patches, CONFIG.dim)
    for _ in range(evaluations):
        x = x - 0.01 * plain_trunk(llama, x, cache, prefix + 2)  # <bos>, <boi>


@torch.no_grad()
def plain_text(llama: PlainLlama, prompt: Tensor, count: int) -> None:
    """Greedy text."""
    cache = PlainCache(llama, len(prompt) + count + 1)
    hidden = plain_trunk(llama, llama.embedding(prompt).unsqueeze(0), cache, 0)
    for place in range(len(prompt), len(prompt) + count):
        token = llama.output(hidden[:, -1]).argmax(-1)
        hidden = plain_trunk(llama, llama.embedding(token).unsqueeze(0), cache, place)
