"""The attention rule, and three implementations of attention under it.

A position attends to the earlier positions of its own document and to all patches of its own image
(Transfusion Sec. 3): same_document & (k <= q | same_image). With `causal` images, the second half
of the rule is dropped. A noised image that is followed by its clean copy is hidden: only its own
patches attend to it, and all later positions attend to the copy.

Each form is built once per batch, and every layer calls it as `attend(q, k, v)`:
    FlexAttention    CUDA: a compiled kernel that skips the blocks without any allowed pair
    VarlenAttention  CPU: SDPA on documents of equal length, without padding
    DenseAttention   any device: SDPA with the full (T, T) mask; the reference in tests

Shapes: B rows, T positions, H query heads, G key/value heads, K head dim, S positions that are not
padding.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.batch import Batch

# Positions of queries and keys in a block of the mask: multiples of FlashAttention 4's tiles.
FLASH_BLOCK = (256, 128)


def mask_mod(
    document_ids: Tensor, image_ids: Tensor, causal: bool, hidden: Tensor | None = None
) -> Callable:
    """Return the attention rule as a FlexAttention `mask_mod`.

    Args:
        document_ids: document of each position, (B, T).
        image_ids: image of each position, -1 for text, (B, T).
        causal: patches attend only to earlier patches.
        hidden: see `hidden_positions`, (B, T).
    """

    def rule(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        same_document = document_ids[b, q_idx] == document_ids[b, kv_idx]
        same_image = (image_ids[b, q_idx] == image_ids[b, kv_idx]) & (image_ids[b, q_idx] >= 0)
        may_attend = same_document & ((kv_idx <= q_idx) | (same_image & (not causal)))
        return may_attend if hidden is None else may_attend & (same_image | ~hidden[b, kv_idx])

    return rule


def dense_mask(
    document_ids: Tensor, image_ids: Tensor, causal: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """Return the attention rule as a boolean mask (B, T, T), True where q may attend to k.

    The arguments are those of `mask_mod`.
    """
    rows, length = document_ids.shape
    b = torch.arange(rows, device=document_ids.device).view(-1, 1, 1)
    index = torch.arange(length, device=document_ids.device)
    return mask_mod(document_ids, image_ids, causal, hidden)(b, 0, index.view(-1, 1), index)


def hidden_positions(batch: Batch) -> Tensor | None:
    """Return the patches of noised images with a clean copy, (B, T) bool; None without copies."""
    if len(batch.copied) == 0:
        return None
    num_ids = batch.num_images + len(batch.copied)
    hidden = batch.copied.new_zeros(num_ids, dtype=torch.bool).index_fill_(0, batch.copied, True)
    return hidden[batch.image_ids.clamp(min=0)] & (batch.image_ids >= 0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    """Compute scaled dot-product attention with grouped-query heads.

    Args:
        q: queries, (..., L, H, K).
        k: keys, (..., L, G, K).
        v: values, like `k`.
        mask: True where a query may attend to a key, broadcast to (..., H, L, L).
        causal: without a mask, use a causal mask instead of none.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(-3, -2),
        k.transpose(-3, -2),
        v.transpose(-3, -2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[-2] != k.shape[-2],
    )
    return out.transpose(-3, -2)  # (..., L, H, K)


class DenseAttention:
    """Reference implementation: every layer uses the full (B, 1, T, T) mask."""

    def __init__(self, batch: Batch, causal: bool = False):
        self.batch = batch
        hidden = hidden_positions(batch)
        self.mask = dense_mask(batch.document_ids, batch.image_ids, causal, hidden).unsqueeze(1)

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Return the flat indices of text (with padding) and of patches among B * T positions."""
        return self.batch.text_index, self.batch.patch_index

    def gather(self, x: Tensor) -> Tensor:
        """Return x (B, T, ...) unchanged."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """Return x (B, T, ...) unchanged."""
        return x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
        return sdpa(q, k, v, self.mask)


class FlexAttention(DenseAttention):
    """CUDA implementation: the rule is compiled into FlexAttention's kernel.

    Args:
        batch: packed rows.
        causal: patches attend only to earlier patches.
        flash: use the kernels of FlashAttention 4 in place of PyTorch's own.
    """

    def __init__(self, batch: Batch, causal: bool = False, flash: bool = False):
        from torch.nn.attention.flex_attention import create_block_mask  # only needed on CUDA

        self.batch = batch
        self.kernel_options = {"BACKEND": "FLASH"} if flash else None
        sizes = {"BLOCK_SIZE": FLASH_BLOCK} if flash else {}
        rule = mask_mod(batch.document_ids, batch.image_ids, causal, hidden_positions(batch))
        rows, length = batch.document_ids.shape
        build, device = compiled(create_block_mask), batch.document_ids.device
        # Built here, once for all blocks and outside of them.
        self.mask = build(rule, rows, None, length, length, device=device, **sizes)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
        from torch.nn.attention.flex_attention import flex_attention

        # Within a compiled block it is compiled with the block.
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        # Under autocast, QK-norm and rotary embedding return fp32; FlexAttention does not cast.
        q, k = q.type_as(v), k.type_as(v)
        out = flex(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=self.mask,
            enable_gqa=q.shape[2] != k.shape[2],
            kernel_options=self.kernel_options,
        )
        return out.transpose(1, 2)


@cache
def compiled(function: Callable) -> Callable:
    """Return a function that torch.compile compiles at its first use.

    Uncompiled, FlexAttention and its block mask materialize every pair of positions.
    """
    return torch.compile(function)


class VarlenAttention:
    """CPU implementation: the Transformer runs on the S positions that are not padding.

    `gather` sorts the positions by document length. Then all documents of one length are a view
    (count, length, ...), which one SDPA call computes without padding.
    """

    def __init__(self, batch: Batch, causal: bool = False):
        self.rows, self.length = batch.document_ids.shape
        real = (batch.document_ids >= 0).flatten().nonzero().flatten()  # (S,)
        row = real // self.length
        document = row * self.length + batch.document_ids.flatten()[real]  # unique in the batch
        _, number, lengths = document.unique_consecutive(return_inverse=True, return_counts=True)
        order = torch.argsort(lengths[number] * len(lengths) + number, stable=True)
        self.index = real[order]  # (S,) flat index of each gathered position
        self.image_ids = batch.image_ids.flatten()[self.index]
        sizes, counts = lengths.unique(return_counts=True)
        # (count, length) of each group of documents, and its number of positions.
        self.groups = [(int(c), int(s)) for c, s in zip(counts, sizes, strict=True)]
        self.tokens = [count * size for count, size in self.groups]
        self.masks = self._masks(hidden_positions(batch), causal)

    def _masks(self, hidden: Tensor | None, causal: bool) -> list[Tensor | None]:
        """Return the mask of each group."""
        if hidden is None:
            hidden = self.image_ids.new_zeros(len(self.index))
        else:
            hidden = hidden.flatten()[self.index]
        parts = (x.split(self.tokens) for x in (self.image_ids, hidden.bool()))
        return [
            self._group_mask(image_ids.view(group), hides.view(group), causal)
            for image_ids, hides, group in zip(*parts, self.groups, strict=True)
        ]

    @staticmethod
    def _group_mask(image_ids: Tensor, hidden: Tensor, causal: bool) -> Tensor | None:
        """Return a mask (count, 1, L, L); None where the plain causal mask is the rule."""
        has_hidden = bool(hidden.any())
        if bool((image_ids < 0).all()) or (causal and not has_hidden):
            return None
        same_document = torch.zeros_like(image_ids)
        mask = dense_mask(same_document, image_ids, causal, hidden if has_hidden else None)
        return mask.unsqueeze(1)

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Return the indices of text and of patches among the S positions."""
        return (self.image_ids < 0).nonzero().flatten(), (self.image_ids >= 0).nonzero().flatten()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...), without padding."""
        return x.flatten(0, 1).index_select(0, self.index)

    def scatter(self, x: Tensor) -> Tensor:
        """(S, ...) -> (B, T, ...), with zeros at padding."""
        out = x.new_zeros(self.rows * self.length, *x.shape[1:])
        return out.index_copy(0, self.index, x).unflatten(0, (self.rows, self.length))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (S, H, K), k and v (S, G, K) -> (S, H, K)."""
        if not self.groups:  # only padding: a rank without rows left to validate
            return q
        # In fp32, because SDPA's backward on short documents is 4x slower in bf16 on a CPU.
        parts = zip(*(x.float().split(self.tokens) for x in (q, k, v)), strict=True)
        with torch.autocast(q.device.type, enabled=False):
            outputs = [
                sdpa(*(x.unflatten(0, group) for x in qkv), mask).flatten(0, 1)
                for qkv, group, mask in zip(parts, self.groups, self.masks, strict=True)
            ]
        return torch.cat(outputs).type_as(q)


Attention = DenseAttention | FlexAttention | VarlenAttention


def build_attention(batch: Batch, causal: bool = False, flash: bool = False) -> Attention:
    """Build the fast implementation for the device of a batch.

    Args:
        batch: packed rows.
        causal: patches attend only to earlier patches.
        flash: on CUDA, use the kernels of FlashAttention 4.
    """
    if batch.document_ids.is_cuda:
        return FlexAttention(batch, causal, flash)
    return VarlenAttention(batch, causal)
