"""config.json of Llama, Mistral and Qwen2 as our sizes, and our sizes as such a config.json.

The three are one network: Qwen2 has biases on queries, keys and values, Mistral a window of
attention, which does nothing in a document that fits into it.
"""

from dataclasses import fields
from typing import Any

from tf_lightning.errors import UserError
from tf_lightning.rope_scaling import RopeScaling
from tf_lightning.transformer import TransformerConfig

KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32}  # where a config.json does not say it
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
SIZES = {  # theirs: ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
}
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
EXPRESSED = {*SIZES.values(), "num_kv_heads", "rope_theta", "rope_scaling", "norm_eps"} | {
    "attention_bias",
    "tie_embeddings",
}
BESIDE = {"dropout", "image_weights", "pretrained_vocab_size"}  # of no concern to a text alone


def from_hf(config: dict[str, Any]) -> TransformerConfig:
    """Our sizes from the fields of a config.json.

    Raises:
        UserError: it is of another architecture, or of an option that we lack.
    """
    kind = config.get("model_type")
    if kind not in KV_HEADS:
        raise UserError(
            f"the checkpoint has model_type={kind!r} but only {', '.join(map(repr, KV_HEADS))} are "
            "supported; give one of these"
        )
    if absent := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise UserError(f"config.json lacks {', '.join(absent)}; download it again")
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).copy()
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    found = {name: config.get(name, plain) for name, plain in PLAIN.items()} | {
        "head_dim": config.get("head_dim") or head_dim,
        "rope_type": rope_type if rope_type != "llama3" else "default",
    }
    for name, plain in (PLAIN | {"head_dim": head_dim, "rope_type": "default"}).items():
        if found[name] != plain:
            raise UserError(
                f"the checkpoint has {name}={found[name]!r} but only {plain!r} is supported; "
                "give a plain Llama, Mistral or Qwen2"
            )
    return TransformerConfig(
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
        num_kv_heads=config.get("num_key_value_heads", KV_HEADS[kind]),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        rope_scaling=_scaling(rope) if rope_type == "llama3" else None,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        attention_bias=kind == "qwen2",
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _scaling(rope: dict[str, Any]) -> RopeScaling:
    if absent := [name for name in SCALING if name not in rope]:
        raise UserError(f"config.json's rope_scaling lacks {', '.join(absent)}; download it again")
    return RopeScaling(**{ours: rope[theirs] for theirs, ours in SCALING.items()})


def attention_window(config: dict[str, Any]) -> int | None:
    """How many positions back a config.json lets a token see; None: all of its document."""
    if config.get("model_type") == "mistral":
        return config.get("sliding_window", 4096)
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def inexpressible(config: TransformerConfig) -> dict[str, Any]:
    """The options that are set and that no config.json of the three can say, with their values."""
    others = [f for f in fields(config) if f.name not in EXPRESSED | BESIDE]
    values = {field.name: getattr(config, field.name) for field in others}
    return {f.name: values[f.name] for f in others if values[f.name] != f.default}


def to_hf(config: TransformerConfig, vocab_size: int, max_length: int) -> dict[str, Any]:
    """A config.json: a Llama's, or with `attention_bias` a Qwen2's.

    Args:
        config: without what is `inexpressible`.
        vocab_size: entries that are kept.
        max_length: of a document, in positions; nothing is computed from it.
    """
    kind, name = ("qwen2", "Qwen2") if config.attention_bias else ("llama", "Llama")
    ours = {theirs: getattr(config, own) for theirs, own in SIZES.items()}
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        **{theirs: getattr(config.rope_scaling, own) for theirs, own in SCALING.items()},
    }
    return ours | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,  # with rope_theta beside it, transformers 4 and 5 read both
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "torch_dtype": "float32",
    }
