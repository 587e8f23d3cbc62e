"""A Llama: RMSNorm, rotary positions, SwiGLU; so Llama weights load by renaming.

It maps vectors to vectors under whatever attention it is given; of images it knows at most which
positions are patches, when these have weights of their own (Mixture-of-Transformers).

Shapes: (..., D) vectors, H query heads, G key/value heads, K head dim; `...` is (B, T) or (S,).

Text and patches apart: the positions of a batch in two parts, and back in their order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.errors import UserError
from tf_lightning.model.attention import Attention
from tf_lightning.model.layers import RMSNorm, RopeScaling, apply_rotary_emb


def with_modality_weights(state_dict: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Weights of a network without image weights of its own, made to fit one that has them.

    They start as copies of the text's, as in LMFusion (Sec. 3.1).

    Args:
        state_dict: of a `TransfusionModel`, a `Transformer`, or a checkpoint.
        names: of the network that is to load it.
    """
    text = {name: name.replace("image_layers.", "layers.") for name in names}
    copies = {name: state_dict[own] for name, own in text.items() if own in state_dict}
    return state_dict | {name: copies[name] for name in copies.keys() - state_dict.keys()}


class ModalitySplit:
    """The positions (...) of an attention form as text (L, ...) and patches (N, ...).

    Both are known by index, counted on the CPU, so that no device is asked how many there are.

    Args:
        text_index: flat places of text, (L,).
        patch_index: flat places of patches, (N,).
        positions: the shape (...), (B, T) or (S,).
    """

    def __init__(self, text_index: Tensor, patch_index: Tensor, positions: torch.Size):
        self.positions = positions
        self.order = torch.cat([text_index, patch_index])
        self.counts = [len(text_index), len(patch_index)]
        everyone = torch.arange(len(self.order), device=self.order.device)
        self.inverse = torch.empty_like(self.order).index_copy(0, self.order, everyone)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(..., D) -> (L, D), (N, D); D may be several dimensions."""
        flat = x.flatten(0, len(self.positions) - 1)
        return list(flat.index_select(0, self.order).split(self.counts))

    def join(self, text: Tensor, patches: Tensor) -> Tensor:
        """(L, D), (N, D) -> (..., D)."""
        return torch.cat([text, patches]).index_select(0, self.inverse).unflatten(0, self.positions)


NEW_ENTRY_LOGIT = -12.0  # of entries that a pretrained language model did not have
QK_NORMS = {False: nn.Identity, True: RMSNorm, "layer": nn.LayerNorm}


@dataclass
class TransformerConfig:
    """Sizes of the shared Transformer."""

    vocab_size: int = 32_002
    """Entries of the vocabulary, <boi> and <eoi> included; must equal the tokenizer's."""
    dim: int = 768
    """Width D."""
    num_layers: int = 16
    """Number of blocks."""
    num_heads: int = 12
    """Query heads H; the head dim is dim / num_heads."""
    num_kv_heads: int | None = None
    """Key/value heads G of grouped-query attention; None: as many as query heads."""
    ffn_dim: int = 2048
    """Inner width of SwiGLU."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How they were stretched for a longer context (Llama 3.1); None: not."""
    norm_eps: float = 1e-5
    """Epsilon of every norm."""
    qk_norm: bool | Literal["layer"] = False
    """Norm of each head's queries and keys, its weights shared by the heads: true is RMSNorm
    (Qwen3), "layer" a layer norm with weight and bias (Chameleon); off in the paper."""
    modality_weights: Literal["shared", "ffn", "all"] = "shared"
    """What patches have of their own in each block: nothing, the feed-forward and its norm, or all
    (Mixture-of-Transformers); attention is joint always, and the FLOPs are the same."""
    norm_order: Literal["pre", "post"] = "pre"
    """Where a branch has its norm: x + f(norm(x)), or x + norm(f(x)) (Chameleon-34B, Swin v2)."""
    dropout: float = 0.0
    """Share of the elements dropped behind attention and feed-forward (Chameleon-7B: 0.1)."""
    attention_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    tie_embeddings: bool = False
    """The vocabulary head is the token embedding (Llama 3.2, small Qwen2)."""
    pretrained_vocab_size: int | None = None
    """Entries that a pretrained language model brought along. The logits of those behind them start
    12 lower, so that its text stays as likely as it was; None: trained from scratch."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # a checkpoint written by the command line
            self.rope_scaling = RopeScaling(**self.rope_scaling)


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and signed sin (..., 1, K) at `positions` (...), in Hugging Face's half-split order."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1 / theta ** (even / head_dim)  # rounded as Hugging Face rounds them
    frequencies = scaling(frequencies) if scaling else frequencies
    angles = positions.unsqueeze(-1) * frequencies  # (..., K / 2), fp32
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


class SelfAttention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        kv_dim = self.head_dim * (config.num_kv_heads or config.num_heads)
        self.wq = nn.Linear(config.dim, config.dim, bias=config.attention_bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        norm = QK_NORMS[config.qk_norm]
        self.q_norm, self.k_norm = (norm(self.head_dim, config.norm_eps) for _ in range(2))

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> q (..., H, K), k and v (..., G, K)."""
        heads = (-1, self.head_dim)
        q = apply_rotary_emb(self.q_norm(self.wq(x).unflatten(-1, heads)), *rope)
        k = apply_rotary_emb(self.k_norm(self.wk(x).unflatten(-1, heads)), *rope)
        return q, k, self.wv(x).unflatten(-1, heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.wo(attend(*self.qkv(x, rope)).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm and a residual."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.pre, self.dropout = config.norm_order == "pre", nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """(..., D) -> (..., D)."""
        out = self.attention(self.branch_input(self.attention_norm, x), rope, attend)
        x = x + self.branch_output(self.attention_norm, out)
        return x + self.branch_output(
            self.ffn_norm, self.feed_forward(self.branch_input(self.ffn_norm, x))
        )

    def branch_input(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What a branch reads of x."""
        return norm(x) if self.pre else x

    def branch_output(self, norm: nn.Module, out: Tensor) -> Tensor:
        """What a branch adds to x."""
        return self.dropout(out if self.pre else norm(out))


class ImageWeights(nn.Module):
    """What patches have of their own in a block; without attention they use the text's."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.modality_weights == "all":
            self.attention_norm = RMSNorm(config.dim, config.norm_eps)
            self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)


def modality_block(
    text: Block,
    image: ImageWeights,
    parts: list[Tensor],
    ropes: list[tuple[Tensor, Tensor]],
    split: ModalitySplit,
    attend: Attention,
) -> list[Tensor]:
    """A block on text and patches apart, each with its own weights, which meet in attention.

    Args:
        text: the block, whose weights are the text's.
        image: the patches' weights.
        parts: vectors of text (L, D) and of patches (N, D).
        ropes: their rotary angles.
        split: which of the positions they are.
        attend: attention built for this batch.
    """
    attends = [text, image if hasattr(image, "attention") else text]
    qkvs = [
        own.attention.qkv(text.branch_input(own.attention_norm, x), rope)
        for own, x, rope in zip(attends, parts, ropes, strict=True)
    ]
    mixed = split(attend(*(split.join(*pair) for pair in zip(*qkvs, strict=True))).flatten(-2))
    parts = [
        x + text.branch_output(own.attention_norm, own.attention.wo(y))
        for own, x, y in zip(attends, parts, mixed, strict=True)
    ]
    return [
        x + text.branch_output(own.ffn_norm, own.feed_forward(text.branch_input(own.ffn_norm, x)))
        for own, x in zip([text, image], parts, strict=True)
    ]


class Transformer(nn.Module):
    """Token embeddings, blocks, final norm, vocabulary head; used part by part by `TransfusionModel`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.modality_weights not in ("shared", "ffn", "all"):
            raise UserError(
                f"modality_weights={config.modality_weights!r} must be 'shared', 'ffn' or 'all'"
            )
        if config.norm_order not in ("pre", "post"):
            raise UserError(f"norm_order={config.norm_order!r} must be 'pre' or 'post'")
        if config.qk_norm not in QK_NORMS:
            raise UserError(f"qk_norm={config.qk_norm!r} must be false, true or 'layer'")
        if not 0 <= config.dropout < 1:
            raise UserError(f"dropout={config.dropout} must be from 0 (none) to less than 1")
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.modality_weights != "shared":
            self.image_layers = nn.ModuleList(ImageWeights(config) for _ in self.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, x: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x: input vectors, (B, T, D).
            positions: place of each vector in its document, (B, T).
            attend: attention built for this batch by `attention.build_attention`.
        """
        config = self.config
        x, positions = attend.gather(x), attend.gather(positions)
        head_dim = config.dim // config.num_heads
        rope = rope_angles(positions, head_dim, config.rope_theta, config.rope_scaling)
        if config.modality_weights == "shared":
            for layer in self.layers:
                x = layer(x, rope, attend)
        else:
            x = self._forward_by_modality(x, rope, attend)
        return attend.scatter(self.norm(x))

    def _forward_by_modality(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attention
    ) -> Tensor:
        split = ModalitySplit(*attend.modality_indices(), x.shape[:-1])
        parts, ropes = split(x), list(zip(*map(split, rope), strict=True))
        for text, image in zip(self.layers, self.image_layers, strict=True):
            parts = modality_block(text, image, parts, ropes, split, attend)
        return split.join(*parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
        logits = self.output(hidden)
        if self.config.pretrained_vocab_size is not None:
            logits[..., self.config.pretrained_vocab_size :] += NEW_ENTRY_LOGIT
        return logits

    def text_parameters(self) -> list[nn.Parameter]:
        """All but the patches' own."""
        return [p for name, p in self.named_parameters() if not name.startswith("image_layers.")]

    def block_matrices(self) -> list[nn.Parameter]:
        """The matrices of all blocks, the patches' own too."""
        inner = ("layers.", "image_layers.")
        return [p for name, p in self.named_parameters() if name.startswith(inner) and p.ndim == 2]

    def reset_parameters(self) -> None:
        """Unit-variance outputs at the start: Normal(0, 1 / fan_in), residual ends by depth.

        The last matrix of each of the 2 * num_layers residual branches is scaled by
        1 / sqrt(2 * num_layers), as in GPT-2.
        """
        depth_scale = (2 * len(self.layers)) ** -0.5
        nn.init.normal_(self.tok_embeddings.weight)  # unit variance, as patch vectors have
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                scale = depth_scale if name.endswith((".wo", ".w2")) else 1.0
                nn.init.normal_(part.weight, std=scale * part.in_features**-0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.RMSNorm | nn.LayerNorm):
                part.reset_parameters()
