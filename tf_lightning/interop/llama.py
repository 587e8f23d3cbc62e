"""Pretrained language models: Llama, Mistral and Qwen2 as weights and sizes of our `Transformer`.

In this order: config.json to and from `TransformerConfig`, tensor names, the safetensors files of a
folder, and `LanguageModel`, which opens, checks and loads a whole folder.

The three architectures are one network. Qwen2 adds biases to queries, keys and values. Mistral has
a sliding window, which has no effect on documents that fit into it. Both sides use rotary
embeddings in half-split order, so no weight is permuted.

The vocabulary grows by <boi> and <eoi> (and by image codes). A new row is the mean of the V old
rows (Hewitt 2021), so its logit is the mean of their logits. `NEW_ENTRY_LOGIT` lowers it by 12, so
its probability is at most exp(-12) / V (Jensen's inequality), and the perplexity of a text grows by
a factor below 1 + 2 exp(-12) / V, less than 1 + 1e-6.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tf_lightning.errors import UserError
from tf_lightning.hub import LANGUAGE_MODEL_FILES, find_folder, read_json
from tf_lightning.model.layers import RopeScaling
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.tokenizer.tokenizer import NUM_IMAGE_TOKENS

# --------------------------------------------------------------------------------- config.json

# Default of num_key_value_heads by model_type; None: as many as query heads.
NUM_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32}
# Options that `Transformer` does not have, with the only value that is supported.
FIXED_OPTIONS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
SIZE_NAMES = {  # Hugging Face's name: ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
}
ROPE_SCALING_NAMES = {  # Hugging Face's name: ours
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
# Fields of `TransformerConfig` that a config.json has.
HF_FIELDS = {*SIZE_NAMES.values(), "num_kv_heads", "rope_theta", "rope_scaling", "norm_eps"}
HF_FIELDS |= {"attention_bias", "tie_embeddings"}
# Fields that do not change the function of the text side.
NEUTRAL_FIELDS = {"dropout", "modality_weights", "pretrained_vocab_size"}


def config_from_hf(config: Mapping[str, Any]) -> TransformerConfig:
    """Convert the fields of a config.json to a `TransformerConfig`.

    Raises:
        UserError: the architecture or one of its options is not supported.
    """
    model_type = config.get("model_type")
    if model_type not in NUM_KV_HEADS:
        raise UserError(
            f"the checkpoint has model_type={model_type!r} but only "
            f"{', '.join(map(repr, NUM_KV_HEADS))} are supported; give one of these"
        )
    if absent := [name for name in SIZE_NAMES if not isinstance(config.get(name), int)]:
        raise UserError(f"config.json lacks {', '.join(absent)}; download it again")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _check_fixed_options(config, rope_type)
    return TransformerConfig(
        **{ours: config[theirs] for theirs, ours in SIZE_NAMES.items()},
        num_kv_heads=config.get("num_key_value_heads", NUM_KV_HEADS[model_type]),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope) if rope_type == "llama3" else None,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        attention_bias=model_type == "qwen2",
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _check_fixed_options(config: Mapping[str, Any], rope_type: str) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    supported = FIXED_OPTIONS | {"head_dim": head_dim, "rope_type": "default"}
    found = {name: config.get(name, value) for name, value in FIXED_OPTIONS.items()} | {
        "head_dim": config.get("head_dim") or head_dim,
        "rope_type": rope_type if rope_type != "llama3" else "default",
    }
    for name, value in supported.items():
        if found[name] != value:
            raise UserError(
                f"the checkpoint has {name}={found[name]!r} but only {value!r} is supported; "
                "give a plain Llama, Mistral or Qwen2"
            )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    if absent := [name for name in ROPE_SCALING_NAMES if name not in rope]:
        raise UserError(f"config.json's rope_scaling lacks {', '.join(absent)}; download it again")
    return RopeScaling(**{ours: rope[theirs] for theirs, ours in ROPE_SCALING_NAMES.items()})


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window of a config.json in tokens; None for full attention."""
    if config.get("model_type") == "mistral":
        return config.get("sliding_window", 4096)
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def unsupported_options(config: TransformerConfig) -> dict[str, Any]:
    """Return the non-default options of the text side that no config.json can express."""
    others = [f for f in fields(config) if f.name not in HF_FIELDS | NEUTRAL_FIELDS]
    values = {field.name: getattr(config, field.name) for field in others}
    return {f.name: values[f.name] for f in others if values[f.name] != f.default}


def config_to_hf(config: TransformerConfig, vocab_size: int, max_length: int) -> dict[str, Any]:
    """Convert a `TransformerConfig` to a config.json of Llama, or of Qwen2 with `attention_bias`.

    Args:
        config: sizes, without any of the `unsupported_options`.
        vocab_size: number of vocabulary rows that are exported.
        max_length: maximum document length in tokens; only recorded.
    """
    model_type, name = ("qwen2", "Qwen2") if config.attention_bias else ("llama", "Llama")
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZE_NAMES.items()}
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        **{t: getattr(config.rope_scaling, ours) for t, ours in ROPE_SCALING_NAMES.items()},
    }
    return sizes | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,  # transformers 4 and 5 both read it with rope_theta beside it
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "torch_dtype": "float32",
    }


# -------------------------------------------------------------------------------- tensor names

OUR_NAMES = {  # parts of Hugging Face's tensor names: ours
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "lm_head": "output",
}
HF_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items() if ours}
HF_NAME = re.compile("|".join(map(re.escape, OUR_NAMES)))
OUR_NAME = re.compile("|".join(map(re.escape, HF_NAMES)))
VOCAB_WEIGHTS = ("tok_embeddings.weight", "output.weight")  # one row for each vocabulary entry


def state_dict_from_hf(hf_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of a `LlamaForCausalLM` to those of our `Transformer`."""
    return {
        HF_NAME.sub(lambda match: OUR_NAMES[match[0]], name): value
        for name, value in hf_state_dict.items()
        if not name.endswith("rotary_emb.inv_freq")  # a constant in old checkpoints
    }


def state_dict_to_hf(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of our `Transformer` to those of a `LlamaForCausalLM`."""
    renamed = {
        OUR_NAME.sub(lambda match: HF_NAMES[match[0]], name): value
        for name, value in state_dict.items()
    }
    return {n if n.startswith("lm_head") else f"model.{n}": v for n, v in renamed.items()}


def extend_rows(weight: Tensor, num_rows: int) -> Tensor:
    """Extend a matrix (V, D) to (num_rows, D) with copies of its mean row."""
    new = weight.float().mean(0, keepdim=True).expand(num_rows - len(weight), -1)
    return torch.cat([weight, new.type_as(weight)])


# --------------------------------------------------------------------------- safetensors files


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of every tensor by Hugging Face's name, from the headers of the files.

    Raises:
        UserError: a file is missing or damaged, or lacks a tensor that the index assigns to it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, expected in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); download it again") from error
        if absent := sorted(expected - found.keys()):
            raise UserError(
                f"{file} lacks {len(absent)} of the tensors that its index names "
                f"({absent[0]}, ...); download it again"
            )
        shapes |= found
    return shapes


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor by Hugging Face's name, after `read_tensor_shapes` checked the files."""
    return {k: tensor for file in _weight_files(folder) for k, tensor in load_file(file).items()}


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the safetensors files, each with the tensor names that the index assigns to it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {folder / "model.safetensors": set()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    files: dict[Path, set[str]] = {}
    for name, file in sorted(weight_map.items()):
        files.setdefault(folder / file, set()).add(name)
    return files


# ------------------------------------------------------------------------------ a whole folder


@dataclass
class LanguageModel:
    """A language model's folder whose files match its config.json."""

    folder: Path
    config: TransformerConfig
    """Sizes, before the vocabulary is extended."""
    window: int | None
    """Sliding window in tokens; longer documents are not supported. None: no limit."""
    names: frozenset[str]
    """Names of its tensors in our network; a plain language model has exactly these tensors."""

    @property
    def extended_config(self) -> TransformerConfig:
        """Sizes of a network that starts from this model, with <boi> and <eoi>."""
        size = self.config.vocab_size
        return replace(self.config, vocab_size=size + NUM_IMAGE_TOKENS, pretrained_vocab_size=size)

    def check(self, config: TransformerConfig, row_length: int | None = None) -> None:
        """Check that a network can start from this model.

        Args:
            config: sizes of the network. Its vocabulary may be larger than that of
                `extended_config`, by image codes.
            row_length: length of the training rows in tokens.

        Raises:
            UserError: a size differs, or the rows are longer than the sliding window.
        """
        wanted = self.extended_config
        names = [f.name for f in fields(config) if f.name in HF_FIELDS | {"pretrained_vocab_size"}]
        values = {name: (_field(wanted, name), _field(config, name)) for name in names}
        if config.vocab_size >= wanted.vocab_size:
            del values["vocab_size"]
        differ = [f"{k}={w!r} (not {g!r})" for k, (w, g) in values.items() if w != g]
        differ += [f"no {name}" for name in unsupported_options(config)]
        if differ:
            raise UserError(
                f"{self.folder} needs model.transformer to have {', '.join(differ)}; give --model "
                f"the file that `tf-lightning model-config {self.folder}` prints"
            )
        if row_length and self.window and row_length > self.window:
            raise UserError(
                f"rows of {row_length} tokens are longer than the sliding window of {self.window} "
                f"tokens of {self.folder}; give row_length={self.window} or less"
            )

    def load(self, vocab_size: int) -> dict[str, Tensor]:
        """Load the weights under our names, with `vocab_size` vocabulary rows."""
        weights = state_dict_from_hf(_read_tensors(self.folder))
        if self.config.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        return weights | {name: extend_rows(weights[name], vocab_size) for name in VOCAB_WEIGHTS}


def _field(config: TransformerConfig, name: str) -> Any:
    """Return a field, with the default of num_kv_heads resolved."""
    value = getattr(config, name)
    return config.num_heads if name == "num_kv_heads" and value is None else value


def open_language_model(name: str | Path) -> LanguageModel:
    """Open a language model without reading its weights.

    Args:
        name: a folder, or a hub name.

    Raises:
        UserError: a file is missing or damaged, or the network is not a plain Llama, Mistral or
            Qwen2.
    """
    folder = find_folder(name, LANGUAGE_MODEL_FILES)
    hf_config = read_json(folder / "config.json")
    config = config_from_hf(hf_config)
    with torch.device("meta"):
        expected = {k: tuple(w.shape) for k, w in Transformer(config).state_dict().items()}
    found = state_dict_from_hf(read_tensor_shapes(folder))
    if config.tie_embeddings:  # some folders store the shared matrix twice
        found["output.weight"] = expected["output.weight"]
    _check_shapes(folder, found, expected)
    return LanguageModel(folder, config, sliding_window(hf_config), frozenset(expected))


def _check_shapes(folder: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raise UserError with the number and the names of all tensors that differ."""
    common = expected.keys() & found.keys()
    groups = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {name for name in common if expected[name] != found[name]},
    }
    wrong = [
        f"{title} {len(names)} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
        for title, names in groups.items()
        if names
    ]
    if wrong:
        num_equal = len(common) - len(groups["of another shape"])
        raise UserError(
            f"{folder} holds {num_equal} of the {len(expected)} tensors of its config.json: "
            f"{'; '.join(wrong)}; give the folder of a whole, unquantized checkpoint"
        )
