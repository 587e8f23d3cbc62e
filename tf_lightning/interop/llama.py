"""Pretrained language models: the same tensors under our names, and two rows for <boi>, <eoi>.

`TransformerConfig` describes the same network, and both keep rotary halves apart, so nothing is
permuted. New rows are the mean of the others (Hewitt 2021): with logits z of the V old entries
theirs is mean(z), so each has a probability of at most exp(NEW_ENTRY_LOGIT) / V (Jensen), and the
perplexity of a text grows by a factor of less than 1 + 2 exp(-12) / V, below 1e-6.

config.json of Llama, Mistral and Qwen2 as our sizes, and our sizes as such a config.json.

The three are one network: Qwen2 has biases on queries, keys and values, Mistral a window of
attention, which does nothing in a document that fits into it.
"""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tf_lightning.errors import UserError
from tf_lightning.interop.hub import find_folder, load_tensors, read_json, tensor_shapes
from tf_lightning.model.layers import RopeScaling
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.tokenizer.tokenizer import NUM_IMAGE_TOKENS

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
BESIDE = {"dropout", "modality_weights", "pretrained_vocab_size"}  # of no concern to a text alone


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


OUR_NAMES = {
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
THEIR_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items() if ours}
THEIR_NAME = re.compile("|".join(map(re.escape, OUR_NAMES)))
OUR_NAME = re.compile("|".join(map(re.escape, THEIR_NAMES)))
ENTRIES = ("tok_embeddings.weight", "output.weight")  # a row for each entry of the vocabulary


@dataclass
class LanguageModel:
    """A folder found whole: the heads of its files agree with its config.json."""

    folder: Path
    config: TransformerConfig
    """Its sizes, before the vocabulary grows."""
    window: int | None
    """Longest document that it reads as a Llama does; None: any."""
    names: frozenset[str]
    """Our names of its tensors: those of a plain language model of these sizes, and no others."""

    @property
    def grown(self) -> TransformerConfig:
        """The sizes of a network that starts from it."""
        size = self.config.vocab_size
        return replace(self.config, vocab_size=size + NUM_IMAGE_TOKENS, pretrained_vocab_size=size)

    def check(self, config: TransformerConfig, row_length: int | None = None) -> None:
        """Refuse a network of other sizes, or rows longer than the window.

        A vocabulary may grow by more than <boi> and <eoi>, by the codes of pictures.
        """
        wanted = self.grown
        names = [f.name for f in fields(config) if f.name in EXPRESSED | {"pretrained_vocab_size"}]
        values = {name: (_value(wanted, name), _value(config, name)) for name in names}
        if config.vocab_size >= wanted.vocab_size:
            del values["vocab_size"]
        differ = [f"{k}={w!r} (not {g!r})" for k, (w, g) in values.items() if w != g]
        differ += [f"no {name}" for name in inexpressible(config)]
        if differ:
            raise UserError(
                f"{self.folder} needs model.transformer to have {', '.join(differ)}; give --model "
                f"the file that `tf-lightning sizes {self.folder}` prints"
            )
        if row_length and self.window and row_length > self.window:
            raise UserError(
                f"rows of {row_length} tokens are longer than the {self.window} that {self.folder} "
                f"attends to; give row_length={self.window} or less"
            )

    def load(self, vocab_size: int) -> dict[str, Tensor]:
        """The weights under our names, the vocabulary grown to `vocab_size` entries."""
        weights = llama_state_dict(load_tensors(self.folder))
        if self.config.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        return weights | {name: grow(weights[name], vocab_size) for name in ENTRIES}


def _value(config: TransformerConfig, name: str):
    value = getattr(config, name)
    return config.num_heads if name == "num_kv_heads" and value is None else value


def open_language_model(name: str | Path) -> LanguageModel:
    """The language model in a folder, or of a name on the hub; weights are not read yet.

    Raises:
        UserError: a file is missing or broken, or the network is not a plain Llama, Mistral or
            Qwen2.
    """
    folder = find_folder(name)
    hf_config = read_json(folder / "config.json")
    config = from_hf(hf_config)
    with torch.device("meta"):
        plain = {k: tuple(weight.shape) for k, weight in Transformer(config).state_dict().items()}
    shapes = llama_state_dict(tensor_shapes(folder))
    if config.tie_embeddings:  # some folders hold the same matrix twice
        shapes["output.weight"] = plain["output.weight"]
    wrong = [
        f"{title} {len(names)} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
        for title, names in {
            "missing": plain.keys() - shapes.keys(),
            "unexpected": shapes.keys() - plain.keys(),
            "of another shape": {k for k in plain.keys() & shapes.keys() if plain[k] != shapes[k]},
        }.items()
        if names
    ]
    if wrong:
        fit = sum(plain[k] == shapes[k] for k in plain.keys() & shapes.keys())
        raise UserError(
            f"{folder} holds {fit} of the {len(plain)} tensors of its config.json: "
            f"{'; '.join(wrong)}; give the folder of a whole, unquantised checkpoint"
        )
    return LanguageModel(folder, config, attention_window(hf_config), frozenset(plain))


def load_llama(name: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Sizes and weights of a language model, its vocabulary as it is.

    Args:
        name: as `open_language_model` takes.

    Returns:
        The config and a state dict that `Transformer(config)` loads strictly.
    """
    model = open_language_model(name)
    return model.config, model.load(model.config.vocab_size)


def llama_state_dict(hf_state_dict: dict) -> dict:
    """The tensors, or what else, of a `LlamaForCausalLM` under our `Transformer`'s names."""
    return {
        THEIR_NAME.sub(lambda match: OUR_NAMES[match[0]], name): weight
        for name, weight in hf_state_dict.items()
        if not name.endswith("rotary_emb.inv_freq")  # a constant that old checkpoints carry
    }


def hf_state_dict(state_dict: dict) -> dict:
    """The inverse: a `Transformer`'s tensors under a `LlamaForCausalLM`'s names."""
    renamed = {
        OUR_NAME.sub(lambda match: THEIR_NAMES[match[0]], name): weight
        for name, weight in state_dict.items()
    }
    return {n if n.startswith("lm_head") else f"model.{n}": w for n, w in renamed.items()}


def grow(weight: Tensor, num_rows: int) -> Tensor:
    """A matrix (V, D) with its mean row repeated behind it, (num_rows, D)."""
    new = weight.float().mean(0, keepdim=True).expand(num_rows - len(weight), -1)
    return torch.cat([weight, new.type_as(weight)])
