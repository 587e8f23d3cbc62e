"""The shared Transformer: a Llama with RMSNorm, rotary positions and SwiGLU.

It maps vectors to vectors under any attention of `attention.py`. Llama weights load by renaming
(`interop.llama`). With `modality_weights`, patches have their own weights in each block
(Mixture-of-Transformers); that part follows the plain block below.

Shapes: (..., D) vectors, H query heads, G key/value heads, K head dim, V vocabulary; `...` is
(B, T), or (S,) without padding. With `modality_weights`, L text positions and N patches.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.errors import UserError
from tf_lightning.model.attention import Attention
from tf_lightning.model.layers import RMSNorm, RopeScaling, apply_rotary_emb
from tf_lightning.ranges import Positive, PositiveInt, Range, check_fields

NEW_ENTRY_LOGIT = -12.0  # added to the logits of entries that a pretrained model did not have
QK_NORMS = {False: nn.Identity, True: RMSNorm, "layer": nn.LayerNorm, "full": RMSNorm}


@dataclass
class TransformerConfig:
    """Sizes of the shared Transformer.

    Raises:
        UserError: a size is out of its range, or sizes do not fit each other.
    """

    vocab_size: PositiveInt = 32_002
    """Vocabulary size V, including <boi> and <eoi>; must equal the tokenizer's."""
    dim: PositiveInt = 768
    """Model dim D."""
    num_layers: PositiveInt = 16
    """Number of blocks."""
    num_heads: PositiveInt = 12
    """Query heads H."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads G of grouped-query attention; None: as many as query heads."""
    head_dim: Annotated[int, Range(ge=2)] | None = None
    """Dimension K of each head, an even number; None: dim / num_heads."""
    ffn_dim: PositiveInt = 2048
    """Hidden dim of the SwiGLU feed-forward."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies for a longer context (Llama 3.1); None: no scaling."""
    nope_interval: Annotated[int, Range(ge=2)] | None = None
    """Blocks n, 2n, 3n, ... have no rotary positions (SmolLM3: 4); None: all blocks have them."""
    norm_eps: Positive = 1e-5
    """Epsilon of every norm."""
    qk_norm: bool | Literal["layer", "full"] = False
    """Norm of the queries and keys. Within each head, with weights shared by the heads: true for
    RMSNorm (Qwen3), "layer" for layer norm with weight and bias (Chameleon). Over all heads
    together: "full" for RMSNorm (OLMo 2). false: none (Transfusion)."""
    modality_weights: Literal["shared", "ffn", "all"] = "shared"
    """Separate weights for patches in each block. "shared": none. "ffn": the feed-forward and its
    norm. "all": all weights (Mixture-of-Transformers). Text and patches attend jointly and
    the FLOPs are equal in all three."""
    norm_order: Literal["pre", "post"] = "pre"
    """Position of the norm in a residual branch. "pre": x + f(norm(x)). "post": x + norm(f(x))
    (Chameleon-34B, OLMo 2)."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Dropout probability of the attention and feed-forward outputs (Chameleon-7B: 0.1)."""
    attention_bias: bool = False
    """Use biases in the query, key and value projections (Qwen2)."""
    tie_embeddings: bool = False
    """Share the weights of the token embedding and the vocabulary head (Llama 3.2, small Qwen2)."""
    pretrained_vocab_size: PositiveInt | None = None
    """Vocabulary size of the pretrained language model. The logits of later entries are lowered by
    12, so that the probability of text hardly changes. None: trained from scratch."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # from a checkpoint's hyper-parameters
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        check_fields(self, "transformer.")
        if self.head_dim is None and (self.dim % self.num_heads or self.head_size % 2):
            raise UserError(
                f"transformer.dim={self.dim} does not divide into num_heads={self.num_heads} heads "
                "of an even dim, which rotary positions need; give dim a multiple of "
                f"{2 * self.num_heads}, or change num_heads, or give head_dim"
            )
        if self.head_size % 2:
            raise UserError(
                f"transformer.head_dim={self.head_dim} must be even, because rotary positions "
                "rotate pairs; give another"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise UserError(
                f"transformer.num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}; change one of them"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads G, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Head dim K, with the default resolved."""
        return self.head_dim or self.dim // self.num_heads

    def has_rope(self, layer: int) -> bool:
        """Return whether block `layer`, counted from 0, has rotary positions."""
        return self.nope_interval is None or (layer + 1) % self.nope_interval != 0


# --------------------------------------------------------------------------------------- block

Rope = tuple[Tensor, Tensor]  # cos and sin of the rotary angles


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rope:
    """Compute the rotary angles of positions, in Hugging Face's half-split order.

    Args:
        positions: positions in the document, (...).
        head_dim: K.
        theta: base of the frequencies.
        scaling: scaling of the frequencies.

    Returns:
        cos and sin, (..., 1, K) each; sin is negative in the first half.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1 / theta ** (even / head_dim)  # in this order, to round as Hugging Face does
    frequencies = scaling(frequencies) if scaling else frequencies
    angles = positions.unsqueeze(-1) * frequencies  # (..., K / 2), fp32
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


class SelfAttention(nn.Module):
    """Multi-head or grouped-query attention, with rotary positions or without positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_size
        q_dim, kv_dim = self.head_dim * config.num_heads, self.head_dim * config.kv_heads
        self.wq = nn.Linear(config.dim, q_dim, bias=config.attention_bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)
        self.norm_all_heads = config.qk_norm == "full"
        widths = (q_dim, kv_dim) if self.norm_all_heads else (self.head_dim, self.head_dim)
        norm = QK_NORMS[config.qk_norm]
        self.q_norm, self.k_norm = (norm(width, config.norm_eps) for width in widths)

    def qkv(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (..., D) to q (..., H, K), k and v (..., G, K)."""
        q = self._normalized_heads(self.q_norm, self.wq(x))
        k = self._normalized_heads(self.k_norm, self.wk(x))
        if rope is not None:
            q, k = apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)
        return q, k, self.wv(x).unflatten(-1, (-1, self.head_dim))

    def _normalized_heads(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Split x (..., H * K) into heads (..., H, K), normalized together or one by one."""
        heads = (-1, self.head_dim)
        return norm(x).unflatten(-1, heads) if self.norm_all_heads else norm(x.unflatten(-1, heads))

    def forward(self, x: Tensor, rope: Rope | None, attend: Attention) -> Tensor:
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
        self.pre_norm, self.dropout = config.norm_order == "pre", nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope | None, attend: Attention) -> Tensor:
        """(..., D) -> (..., D)."""
        out = self.attention(self.branch_input(self.attention_norm, x), rope, attend)
        x = x + self.branch_output(self.attention_norm, out)
        out = self.feed_forward(self.branch_input(self.ffn_norm, x))
        return x + self.branch_output(self.ffn_norm, out)

    def forward_by_modality(
        self,
        image: "ImageWeights",
        parts: list[Tensor],
        ropes: list[Rope] | list[None],
        split: "ModalitySplit",
        attend: Attention,
    ) -> list[Tensor]:
        """Apply the block with separate weights for patches; text and patches attend jointly.

        Args:
            image: the weights of patches.
            parts: vectors of text (L, D) and of patches (N, D).
            ropes: rotary angles of text and of patches; None in a block without positions.
            split: splits and joins text and patches.
            attend: attention of this batch.

        Returns:
            The new vectors of text (L, D) and of patches (N, D).
        """
        attention_weights = [self, image if hasattr(image, "attention") else self]
        qkvs = [
            weights.attention.qkv(self.branch_input(weights.attention_norm, x), rope)
            for weights, x, rope in zip(attention_weights, parts, ropes, strict=True)
        ]
        q, k, v = (split.join(*pair) for pair in zip(*qkvs, strict=True))  # (..., H or G, K)
        mixed = split(attend(q, k, v).flatten(-2))
        parts = [
            x + self.branch_output(weights.attention_norm, weights.attention.wo(y))
            for weights, x, y in zip(attention_weights, parts, mixed, strict=True)
        ]
        return [
            x
            + self.branch_output(
                weights.ffn_norm, weights.feed_forward(self.branch_input(weights.ffn_norm, x))
            )
            for weights, x in zip([self, image], parts, strict=True)
        ]

    def branch_input(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return the input of a residual branch: normalized x with pre-norm."""
        return norm(x) if self.pre_norm else x

    def branch_output(self, norm: nn.Module, out: Tensor) -> Tensor:
        """Return the output of a residual branch after dropout, normalized with post-norm."""
        return self.dropout(out if self.pre_norm else norm(out))


# ----------------------------------------------------------------- separate weights for patches


class ModalitySplit:
    """Splits positions (...) into text (L,) and patches (N,), and joins them in the same order.

    Args:
        text_index: flat indices of text positions, (L,).
        patch_index: flat indices of patches, (N,).
        positions: the shape (...), which is (B, T) or (S,).
    """

    def __init__(self, text_index: Tensor, patch_index: Tensor, positions: torch.Size):
        self.positions = positions
        self.order = torch.cat([text_index, patch_index])
        # Counted by the shapes on the CPU, so that the device is not synchronized.
        self.counts = [len(text_index), len(patch_index)]
        arange = torch.arange(len(self.order), device=self.order.device)
        self.inverse = torch.empty_like(self.order).index_copy(0, self.order, arange)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Split x (..., D) into (L, D) and (N, D); D may be several dimensions."""
        flat = x.flatten(0, len(self.positions) - 1)
        return list(flat.index_select(0, self.order).split(self.counts))

    def join(self, text: Tensor, patches: Tensor) -> Tensor:
        """Join (L, D) and (N, D) to (..., D)."""
        return torch.cat([text, patches]).index_select(0, self.inverse).unflatten(0, self.positions)


class ImageWeights(nn.Module):
    """The weights of a block that only patches use: the feed-forward, or attention as well."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.modality_weights == "all":
            self.attention_norm = RMSNorm(config.dim, config.norm_eps)
            self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)


def with_modality_weights(
    state_dict: Mapping[str, Tensor], names: Iterable[str]
) -> Mapping[str, Tensor]:
    """Add the image weights that a state dict lacks, as copies of its text weights.

    This is LMFusion's initialization (Sec. 3.1).

    Args:
        state_dict: weights of a `TransfusionModel`, a `Transformer`, or a LightningModule.
        names: names of all weights of the network that will load the result.
    """
    text_names = {name: name.replace("image_layers.", "layers.") for name in names}
    copies = {
        name: state_dict[text]
        for name, text in text_names.items()
        if text in state_dict and name not in state_dict
    }
    return {**state_dict, **copies} if copies else state_dict


# --------------------------------------------------------------------------------- Transformer


class Transformer(nn.Module):
    """Token embeddings, blocks, final norm and vocabulary head.

    `forward` runs the blocks and the final norm. `TransfusionModel` calls the embeddings and the
    head only where they are needed.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
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
        """Compute the hidden states after the final norm, (B, T, D).

        Args:
            x: input vectors, (B, T, D).
            positions: position of each vector in its document, (B, T).
            attend: attention of this batch, from `attention.build_attention`.
        """
        config = self.config
        x, positions = attend.gather(x), attend.gather(positions)  # (..., D), (...)
        rope = rope_angles(positions, config.head_size, config.rope_theta, config.rope_scaling)
        if config.modality_weights == "shared":
            for i, layer in enumerate(self.layers):
                x = layer(x, rope if config.has_rope(i) else None, attend)
        else:
            x = self._forward_by_modality(x, rope, attend)
        return attend.scatter(self.norm(x))

    def _forward_by_modality(self, x: Tensor, rope: Rope, attend: Attention) -> Tensor:
        split = ModalitySplit(*attend.modality_indices(), x.shape[:-1])
        parts, ropes = split(x), list(zip(*map(split, rope), strict=True))
        for i, (text, image) in enumerate(zip(self.layers, self.image_layers, strict=True)):
            layer_ropes = ropes if self.config.has_rope(i) else [None, None]
            parts = text.forward_by_modality(image, parts, layer_ropes, split, attend)
        return split.join(*parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
        logits = self.output(hidden)
        if self.config.pretrained_vocab_size is not None:
            logits[..., self.config.pretrained_vocab_size :] += NEW_ENTRY_LOGIT
        return logits

    def blocks(self) -> Iterator[tuple[list[nn.Module], str]]:
        """Yield the modules of each block, with the name of the first one's method that runs it."""
        if self.config.modality_weights == "shared":
            yield from (([block], "forward") for block in self.layers)
        else:
            for pair in zip(self.layers, self.image_layers, strict=True):
                yield list(pair), "forward_by_modality"

    def text_parameters(self) -> list[nn.Parameter]:
        """Return all parameters except those that only patches use."""
        return [p for name, p in self.named_parameters() if not name.startswith("image_layers.")]

    def block_matrices(self) -> list[nn.Parameter]:
        """Return the matrices of all blocks, including those that only patches use."""
        prefixes = ("layers.", "image_layers.")
        return [p for n, p in self.named_parameters() if n.startswith(prefixes) and p.ndim == 2]

    def reset_parameters(self) -> None:
        """Initialize matrices by Normal(0, 1 / fan_in), for outputs of unit variance.

        The last matrix of each of the 2 * num_layers residual branches is scaled by
        1 / sqrt(2 * num_layers), as in GPT-2.
        """
        depth_scale = (2 * len(self.layers)) ** -0.5
        nn.init.normal_(self.tok_embeddings.weight)  # unit variance, as for patch vectors
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                scale = depth_scale if name.endswith((".wo", ".w2")) else 1.0
                nn.init.normal_(part.weight, std=scale * part.in_features**-0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.RMSNorm | nn.LayerNorm):
                part.reset_parameters()
