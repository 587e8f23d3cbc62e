"""The families of language models that our `Transformer` can express, and their config.json.

All supported families are one network. Each differs from Llama in at most two options of
`TransformerConfig`, or in how its file stores the weights. A sliding window has no effect on
documents that fit into it, so it only limits the row length.

The options are read from `model_type` and the other fields of config.json, never guessed from the
weights. A family or an option that our blocks cannot express is refused by name.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tf_lightning.errors import UserError
from tf_lightning.model.layers import RopeScaling
from tf_lightning.model.transformer import TransformerConfig


@dataclass(frozen=True)
class Family:
    """A `model_type` of `transformers` that our `Transformer` can express."""

    name: str
    """Its class in `transformers` is `{name}ForCausalLM`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig` in which it differs from Llama."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values that `transformers` takes where config.json leaves them out, if not Llama's."""


WINDOW_IF_USED = {"use_sliding_window": False, "sliding_window": 4096}
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", {}, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(
        "Qwen2", {"attention_bias": True}, WINDOW_IF_USED | {"num_key_value_heads": 32}
    ),
    "qwen3": Family(
        "Qwen3",
        {"qk_norm": True},
        WINDOW_IF_USED | {"num_key_value_heads": 32, "head_dim": 128},
    ),
    "olmo2": Family("Olmo2", {"qk_norm": "full", "norm_order": "post"}, {"rms_norm_eps": 1e-5}),
    "smollm3": Family(
        "SmolLM3",
        {"nope_interval": 4},
        {
            "use_sliding_window": False,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Family("Phi3", {}, {"rms_norm_eps": 1e-5}),
}
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}

# Features that the Transformer does not have, and the families that need them.
UNSUPPORTED = {
    "a GeGLU feed-forward and scaled embeddings": ["gemma"],
    "norms before and after each branch, and soft caps of attention scores and logits": ["gemma2"],
    "norms before and after each branch, and sliding windows in most blocks": [
        *("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    ],
    "sliding windows in three of four blocks": ["olmo3", "exaone4", "cwm"],
    "multipliers of embeddings, branches, attention scores and logits": ["granite"],
    "layer norms with biases, and rotary positions in a part of each head": ["stablelm"],
    "layer norms, parallel branches, and rotary positions in a part of each head": [
        *("phi", "gpt_neox", "gptj"),
    ],
    "layer norms without weights": ["olmo"],
    "layer norms and parallel branches": ["cohere", "cohere2", "falcon"],
    "layer norms, and positions in the attention scores (ALiBi)": ["bloom", "mpt"],
    "layer norms, learned positions, and a feed-forward without a gate": ["gpt2", "opt"],
    "layer norms, and a feed-forward without a gate": ["starcoder2", "nemotron", "persimmon"],
    "a feed-forward without a gate": ["arcee", "apertus", "nanochat"],
    "rotary positions in interleaved order": ["glm", "glm4", "helium", "ernie4_5"],
    "attention scores that are scaled by position": ["ministral3"],
    "differential attention": ["diffllama"],
    "latent attention": ["minicpm3"],
    "convolutions": ["lfm2"],
    "state-space layers": [
        *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba2"),
    ],
    "linear attention": ["qwen3_next", "qwen3_5", "qwen3_5_text"],
    "a mixture of experts": [
        *("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "granitemoe", "ernie4_5_moe"),
        *("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "llama4_text", "glm4_moe", "dots1"),
    ],
    "its own vision network": [
        *("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "mllama", "smolvlm"),
    ],
}
MISSING_FEATURES = {name: feature for feature, names in UNSUPPORTED.items() for name in names}

# Options of language models that our `Transformer` does not have, with their value in a Llama.
# They are looked up in config.json and in its rotary parameters; null is always accepted.
FIXED_OPTIONS = {
    # feed-forward
    "hidden_act": "silu",
    "hidden_activation": "silu",
    "mlp_bias": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "n_routed_experts": 0,
    # attention
    "attention_bias": False,
    "attention_out_bias": False,
    "qkv_bias": False,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": False,
    "qk_norm": False,
    "attn_output_gate": False,
    "qk_layernorm": False,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "attn_scale": None,
    "attn_temperature_tuning": False,
    "attention_chunk_size": None,
    "use_bidirectional_attention": False,
    "is_causal": True,
    # positions
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "rope_interleave": False,
    "rope_interleaved": False,
    "mrope_section": None,
    "use_mrope": False,
    "alibi": False,
    # residual stream and logits
    "use_parallel_residual": False,
    "parallel_attn": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "scale_emb": 1.0,
    "scale_depth": None,
    "dim_model_base": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "lm_head_bias": False,
}
SIZE_NAMES = {  # Hugging Face's name: ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
}
MAX_SIZE, MAX_SIZES = 10**7, {"num_hidden_layers": 1000}  # refused before memory is taken
KINDS = {  # of the other values that are read, where they are not null
    "model_type": str,
    "architectures": list,
    "layer_types": list,
    "no_rope_layers": list,
    "no_rope_layer_interval": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "sliding_window": int,
    "use_sliding_window": bool,
    "tie_word_embeddings": bool,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_theta": int | float,
    "rms_norm_eps": int | float,
    "original_max_position_embeddings": int | float,
}
ROPE_SCALING_NAMES = {  # Hugging Face's name: ours, by rope_type
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}
# Fields of `TransformerConfig` that do not change the function of the text side.
NEUTRAL_FIELDS = {"dropout", "modality_weights", "pretrained_vocab_size"}


# ---------------------------------------------------------------------------- from a config.json


def config_from_hf(config: Mapping[str, Any]) -> TransformerConfig:
    """Convert the fields of a config.json to a `TransformerConfig`.

    Raises:
        UserError: the architecture or one of its options is not supported.
    """
    _check_kinds(config)
    family = _family(config)
    if absent := [name for name in SIZE_NAMES if not _is_size(config.get(name))]:
        raise UserError(f"config.json lacks {', '.join(absent)}; download it again")
    for name in SIZE_NAMES:
        if config[name] > MAX_SIZES.get(name, MAX_SIZE):
            raise UserError(
                f"config.json has {name}={config[name]}, more than any language model; download it "
                "again"
            )
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if original := config.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = original  # transformers prefers it
    _check_fixed_options(rope)
    _check_fixed_options(config)
    _check_layers(config)
    given = {name: value for name, value in config.items() if value is not None}
    values = LLAMA_DEFAULTS | family.defaults | given
    options = dict(family.options)
    if "nope_interval" in options:
        options["nope_interval"] = _nope_interval(config)
    return TransformerConfig(
        **{ours: config[theirs] for theirs, ours in SIZE_NAMES.items()},
        num_kv_heads=_num_kv_heads(config, family),
        head_dim=_head_dim(config, family),
        rope_theta=rope.get("rope_theta") or values["rope_theta"],
        rope_scaling=_rope_scaling(rope),
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values["tie_word_embeddings"],
        **options,
    )


def _check_kinds(config: Mapping[str, Any]) -> None:
    for name, kind in KINDS.items():
        value = config.get(name)
        is_wrong = not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        if value is not None and is_wrong:
            expected = getattr(kind, "__name__", kind)
            raise UserError(
                f"config.json has {name}={reprlib.repr(value)} but needs a value of type "
                f"{expected}; download it again"
            )


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _family(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its `model_type` and `architectures`."""
    model_type, supported = config.get("model_type"), ", ".join(map(repr, FAMILIES))
    if feature := MISSING_FEATURES.get(model_type):
        raise UserError(
            f"the checkpoint has model_type={model_type!r}, which needs {feature}; only "
            f"{supported} are supported; give one of these"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"the checkpoint has model_type={reprlib.repr(model_type)} but only "
            f"{supported} are supported; give one of these"
        )
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [f"{family.name}ForCausalLM"]
    if str(architectures[0]).lower() != f"{family.name}ForCausalLM".lower():
        raise UserError(
            f"the checkpoint has architectures={reprlib.repr(architectures)} but only "
            f"{family.name}ForCausalLM is supported for model_type={model_type!r}; give a "
            "causal language model"
        )
    return family


def _check_fixed_options(config: Mapping[str, Any]) -> None:
    for name, value in FIXED_OPTIONS.items():
        found = config.get(name)
        if found is not None and found != value:
            raise UserError(
                f"the checkpoint has {name}={reprlib.repr(found)} but only {value!r} is "
                "supported; give a model without this option"
            )


def _check_layers(config: Mapping[str, Any]) -> None:
    """Refuse layers of other kinds, and packed weights."""
    others = {str(kind) for kind in config.get("layer_types") or ()} - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        raise UserError(
            f"the checkpoint has layer_types with {', '.join(sorted(map(repr, others)))} but only "
            "'full_attention' is supported; give a model without such layers"
        )
    if config.get("quantization_config"):
        raise UserError(
            "the checkpoint has a quantization_config but only unquantized weights are supported; "
            "give the unquantized model"
        )
    if config.get("no_rope_layers") and config["model_type"] != "smollm3":
        raise UserError(
            f"the checkpoint has no_rope_layers with model_type={config['model_type']!r} but only "
            "'smollm3' supports it; give a model without this option"
        )


def _num_kv_heads(config: Mapping[str, Any], family: Family) -> int:
    """Return the key/value heads; null means as many as query heads."""
    given = config.get("num_key_value_heads", family.defaults.get("num_key_value_heads"))
    return given or config["num_attention_heads"]


def _head_dim(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the head dim; None for dim / num_heads."""
    head_dim = config.get("head_dim") or family.defaults.get("head_dim")
    usual = config["hidden_size"] / config["num_attention_heads"]
    return None if head_dim == usual else head_dim


def _nope_interval(config: Mapping[str, Any]) -> int | None:
    """Return the interval of SmolLM3's layers without rotary positions; None if all have them."""
    interval, num_layers = config.get("no_rope_layer_interval") or 4, config["num_hidden_layers"]
    by_interval = [(i + 1) % interval for i in range(num_layers)]
    has_rope = [bool(v) for v in (config.get("no_rope_layers") or by_interval)[:num_layers]]
    if all(has_rope):
        return None
    first = has_rope.index(False) + 1
    if first < 2 or has_rope != [bool((i + 1) % first) for i in range(num_layers)]:
        raise UserError(
            f"the checkpoint has no_rope_layers={list(map(int, has_rope))} but only one layer "
            "without rotary positions in every n, the last of them, is supported; give another "
            "model"
        )
    return first


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    rope_type = str(rope.get("rope_type") or rope.get("type") or "default")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(
            "the checkpoint has rope_parameters that differ between layers but only one set is "
            "supported; give another model"
        )
    if rope_type == "default":
        return None
    if rope_type not in ROPE_SCALING_NAMES:
        raise UserError(
            f"the checkpoint has rope_type={reprlib.repr(rope_type)} but only 'default', "
            "'linear' and 'llama3' are supported; give another model, or remove rope_scaling from "
            "config.json if the model was trained without it"
        )
    names = ROPE_SCALING_NAMES[rope_type]
    if absent := [name for name in names if rope.get(name) is None]:
        raise UserError(f"config.json's rope_scaling lacks {', '.join(absent)}; download it again")
    return RopeScaling(
        **{ours: rope[theirs] for theirs, ours in names.items()}, rope_type=rope_type
    )


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window of a config.json in tokens; None for full attention."""
    values = FAMILIES[config["model_type"]].defaults | dict(config)
    return values.get("sliding_window") if values.get("use_sliding_window", True) else None


# ------------------------------------------------------------------------------ to a config.json


def family_options(config: TransformerConfig) -> dict[str, Any]:
    """Return the options in which families differ, where they are not Llama's."""
    llama = TransformerConfig()
    names = sorted({name for family in FAMILIES.values() for name in family.options})
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(llama, n)}


def model_type_of(config: TransformerConfig) -> str | None:
    """Return the `model_type` that expresses the text side of a network; None if there is none."""
    if config.nope_interval:
        config = replace(config, nope_interval=4)  # SmolLM3 expresses every interval
    options = family_options(config)
    if not options and config.num_heads * config.head_size != config.dim:
        return "mistral"  # in a Llama the heads together are as wide as the model
    return next((name for name, family in FAMILIES.items() if family.options == options), None)


def config_to_hf(config: TransformerConfig, vocab_size: int, max_length: int) -> dict[str, Any]:
    """Convert a `TransformerConfig` to the config.json of the family that expresses it.

    Args:
        config: sizes, for which `model_type_of` is not None.
        vocab_size: number of vocabulary rows that are exported.
        max_length: maximum document length in tokens; only recorded.
    """
    model_type = model_type_of(config)
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZE_NAMES.items()}
    made = sizes | {
        "architectures": [f"{FAMILIES[model_type].name}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "pad_token_id": None,  # some families' default is a row that a small vocabulary lacks
        "torch_dtype": "float32",
    }
    if config.nope_interval:
        made["no_rope_layers"] = [int(config.has_rope(i)) for i in range(config.num_layers)]
    return made


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return `rope_scaling`, which transformers 4 and 5 both read with rope_theta beside it."""
    if scaling is None:
        return None
    names = ROPE_SCALING_NAMES[scaling.rope_type]
    return {"rope_type": scaling.rope_type} | {t: getattr(scaling, o) for t, o in names.items()}
