"""The one mask rule, and the three ways to compute attention under it.

A position attends to the earlier positions of its own document and to all patches of its own image
(Transfusion Sec. 3): same_document & (k <= q | same_image). `causal` images drop the second half.
Noised images that a clean copy follows are hidden: all but their own patches read the copy.

Each form is built once per batch and is called by every layer as `attend(q, k, v)`:
    FlexAttention      CUDA: compiled kernel, skips blocks that the rule leaves empty
    VarlenAttention  CPU: documents of one length are one SDPA call; padding is not computed
    DenseAttention     any device: the whole (T, T) mask; the reference in tests

Shapes: B rows, T positions, H query heads, G key/value heads, K head dim, S = real positions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.batch import Batch


def hidden_positions(batch: Batch) -> Tensor | None:
    """Patches that only their own image reads, (B, T) bool; None where there are no copies."""
    if len(batch.copied) == 0:
        return None
    num_ids = batch.num_images + len(batch.copied)
    hidden = batch.copied.new_zeros(num_ids, dtype=torch.bool).index_fill_(0, batch.copied, True)
    return hidden[batch.image_ids.clamp(min=0)] & (batch.image_ids >= 0)


def mask_mod(
    document_ids: Tensor, image_ids: Tensor, causal: bool, hidden: Tensor | None = None
) -> Callable:
    """The rule in FlexAttention's form, for ids and `hidden` (B, T)."""

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_document = document_ids[b, q] == document_ids[b, k]
        same_image = (image_ids[b, q] == image_ids[b, k]) & (image_ids[b, q] >= 0)
        may_attend = same_document & ((k <= q) | (same_image & (not causal)))
        return may_attend if hidden is None else may_attend & (same_image | ~hidden[b, k])

    return rule


def dense_mask(
    document_ids: Tensor, image_ids: Tensor, causal: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """The rule as a boolean mask (B, T, T), True = may attend."""
    batch, length = document_ids.shape
    b = torch.arange(batch, device=document_ids.device).view(-1, 1, 1)
    place = torch.arange(length, device=document_ids.device)
    return mask_mod(document_ids, image_ids, causal, hidden)(b, 0, place.view(-1, 1), place)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    """Scaled dot-product attention on (..., L, H, K); without a mask causal, or of everything."""
    out = F.scaled_dot_product_attention(
        q.transpose(-3, -2),
        k.transpose(-3, -2),
        v.transpose(-3, -2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[-2] != k.shape[-2],
    )
    return out.transpose(-3, -2)


class DenseAttention:
    """Reference: every layer sees the full (B, 1, T, T) mask."""

    def __init__(self, batch: Batch, causal: bool = False):
        self.batch = batch
        hidden = hidden_positions(batch)
        self.mask = dense_mask(batch.document_ids, batch.image_ids, causal, hidden).unsqueeze(1)

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Places of text (padding too) and of patches among B * T positions."""
        return self.batch.text_index, self.batch.patch_index

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) unchanged."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """(B, T, ...) unchanged."""
        return x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
        return sdpa(q, k, v, self.mask)


class FlexAttention(DenseAttention):
    """CUDA: the rule compiled into the kernel. The block mask is built here, outside the graph."""

    def __init__(self, batch: Batch, causal: bool = False):
        from torch.nn.attention.flex_attention import create_block_mask

        self.batch = batch
        rule = mask_mod(batch.document_ids, batch.image_ids, causal, hidden_positions(batch))
        rows, length = batch.document_ids.shape
        self.mask = create_block_mask(
            rule, rows, None, length, length, device=batch.document_ids.device
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
        q, k = q.type_as(v), k.type_as(v)  # autocast leaves norms in fp32, and this call alone
        out = _flex(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=self.mask,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)


def _flex(*args, **kwargs) -> Tensor:
    """Eager FlexAttention materialises the scores, so it is compiled at its first use."""
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    _compiled_flex = _compiled_flex or torch.compile(flex_attention)
    return _compiled_flex(*args, **kwargs)


_compiled_flex: Callable | None = None


class VarlenAttention:
    """CPU: the trunk runs on real positions only, documents of one length side by side.

    `gather` gathers (B, T, ...) into (S, ...), ordered by document length, so that documents of one
    length are a view (count, length, ...): one exact SDPA call for all of them, without padding.
    """

    def __init__(self, batch: Batch, causal: bool = False):
        rows, self.length = batch.document_ids.shape
        real = (batch.document_ids >= 0).flatten().nonzero().flatten()  # (S,)
        row = real // self.length
        document = row * self.length + batch.document_ids.flatten()[real]
        _, number, lengths = document.unique_consecutive(return_inverse=True, return_counts=True)
        order = torch.argsort(lengths[number] * len(lengths) + number, stable=True)
        self.index, self.rows = real[order], rows
        image_ids = self.image_ids = batch.image_ids.flatten()[self.index]
        sizes, counts = lengths.unique(return_counts=True)
        self.groups = [(int(c), int(s)) for c, s in zip(counts, sizes, strict=True)]
        self.tokens = [count * size for count, size in self.groups]
        hidden = hidden_positions(batch)
        hidden = image_ids.new_zeros(len(real)) if hidden is None else hidden.flatten()[self.index]
        parts = (x.split(self.tokens) for x in (image_ids, hidden.bool()))
        self.masks = [
            self._mask(ids.view(group), hides.view(group), causal)
            for ids, hides, group in zip(*parts, self.groups, strict=True)
        ]

    @staticmethod
    def _mask(image_ids: Tensor, hidden: Tensor, causal: bool) -> Tensor | None:
        """Mask (count, 1, L, L) of a group; None (causal) if it has no image or needs none."""
        hides = bool(hidden.any())
        if bool((image_ids < 0).all()) or (causal and not hides):
            return None
        same_document = torch.zeros_like(image_ids)
        return dense_mask(same_document, image_ids, causal, hidden if hides else None).unsqueeze(1)

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Places of text and of patches among the S positions."""
        return (self.image_ids < 0).nonzero().flatten(), (self.image_ids >= 0).nonzero().flatten()

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (S, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def scatter(self, x: Tensor) -> Tensor:
        """(S, ...) -> (B, T, ...), zero at padding."""
        out = x.new_zeros(self.rows * self.length, *x.shape[1:])
        return out.index_copy(0, self.index, x).unflatten(0, (self.rows, self.length))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (S, H, K), k and v (S, G, K) -> (S, H, K)."""
        if not self.groups:  # padding alone: ranks without rows left to validate
            return q
        # In fp32: the backward of a short document is 4x slower in bf16 on a CPU that has it.
        parts = zip(*(x.float().split(self.tokens) for x in (q, k, v)), strict=True)
        with torch.autocast(q.device.type, enabled=False):
            outputs = [
                sdpa(*(x.unflatten(0, group) for x in qkv), mask).flatten(0, 1)
                for qkv, group, mask in zip(parts, self.groups, self.masks, strict=True)
            ]
        return torch.cat(outputs).type_as(q)


Attention = DenseAttention | FlexAttention | VarlenAttention


def build_attention(batch: Batch, causal: bool = False) -> Attention:
    """The fast form for the batch's device."""
    form = FlexAttention if batch.document_ids.is_cuda else VarlenAttention
    return form(batch, causal)
