"""A plain Llama, written for speed comparisons only: training (`PlainLlama`) and cached generation.

It has no patches, no sampler, no packing and no mask but the causal one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.model.transformer import TransformerConfig

KeysValues = tuple[Tensor, Tensor]  # (1, H, T, K) each, preallocated


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x (B, H, T, K) with cos, sin (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PlainBlock(nn.Module):
    """A Llama block."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(dim, ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeysValues | None = None, start: int = 0
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), with causal attention.

        With a cache, the T positions attend to the first `start` cached positions and to each
        other, and their keys and values are written into the cache.
        """
        normed = self.attention_norm(x)
        q, k, v = (
            w(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, K)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        if cache is not None:
            keys, values = cache
            end = start + x.shape[1]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))


class PlainLlama(nn.Module):
    """Next-token logits."""

    def __init__(self, config: TransformerConfig, max_length: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            PlainBlock(config.dim, config.num_heads, config.ffn_dim)
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim, 1e-5)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        head_dim = config.dim // config.num_heads
        frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(max_length).unsqueeze(-1) * torch.cat([frequencies, frequencies])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, target_index: Tensor) -> Tensor:
        """ids (B, T) -> logits (K, V) at `target_index` (K,), which indexes the B * T positions."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(self.norm(x).flatten(0, 1)[target_index])

    def allocate_cache(self, length: int) -> list[KeysValues]:
        """Keys and values of every layer for one sequence of `length` positions."""
        config = self.config
        shape = (1, config.num_heads, length, config.dim // config.num_heads)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]

    def hidden_states(self, x: Tensor, cache: list[KeysValues], start: int) -> Tensor:
        """x (1, T, D) after `start` cached positions -> hidden states (1, T, D)."""
        end = start + x.shape[1]
        for block, keys_values in zip(self.blocks, cache, strict=True):
            x = block(x, self.cos[start:end], self.sin[start:end], keys_values, start)
        return self.norm(x)


@torch.no_grad()
def denoise(llama: PlainLlama, prefix_length: int, num_patches: int, evaluations: int) -> None:
    """Evaluate the Llama `evaluations` times on the patch vectors of an image after a prefix."""
    cache = llama.allocate_cache(prefix_length + num_patches + 4)
    x = torch.randn(1, num_patches, llama.config.dim)
    for _ in range(evaluations):
        x = x - 0.01 * llama.hidden_states(x, cache, prefix_length + 2)  # <bos>, <boi>


@torch.no_grad()
def write_text(llama: PlainLlama, prompt: Tensor, count: int) -> None:
    """Generate `count` tokens greedily after a prompt (T,)."""
    cache = llama.allocate_cache(len(prompt) + count + 1)
    hidden = llama.hidden_states(llama.embedding(prompt).unsqueeze(0), cache, 0)
    for position in range(len(prompt), len(prompt) + count):
        token = llama.output(hidden[:, -1]).argmax(-1)
        hidden = llama.hidden_states(llama.embedding(token).unsqueeze(0), cache, position)
