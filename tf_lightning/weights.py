"""Llama checkpoints in Hugging Face's layout: the same tensors under our names.

`TransformerConfig` describes the same network, and both keep rotary halves apart, so nothing is
permuted.
"""

import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tf_lightning.errors import UserError
from tf_lightning.transformer import TransformerConfig

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
THEIR_NAME = re.compile("|".join(map(re.escape, OUR_NAMES)))

PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def llama_state_dict(hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `LlamaForCausalLM` under the names of our `Transformer`."""
    return {
        THEIR_NAME.sub(lambda match: OUR_NAMES[match[0]], name): weight
        for name, weight in hf_state_dict.items()
        if not name.endswith("rotary_emb.inv_freq")  # a constant that old checkpoints carry
    }


def load_llama(folder: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Sizes and weights of a Llama in a local folder.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.

    Returns:
        The config and a state dict that `Transformer(config)` loads strictly.

    Raises:
        UserError: a file is missing or broken, or the network is not a plain Llama.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    sizes = llama_config(config)
    state_dict: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            state_dict |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if config.get("tie_word_embeddings"):
        state_dict.setdefault("lm_head.weight", state_dict["model.embed_tokens.weight"])
    return sizes, llama_state_dict(state_dict)


def llama_config(config: dict) -> TransformerConfig:
    """Our sizes from the fields of a Llama's config.json."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    found = {name: config.get(name, plain) for name, plain in PLAIN.items()} | {
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": config.get("head_dim") or head_dim,
    }
    for name, plain in (PLAIN | {"rope_type": "default", "head_dim": head_dim}).items():
        if found[name] != plain:
            raise UserError(
                f"the checkpoint has {name}={found[name]!r} but only {plain!r} is supported; "
                "give a plain Llama"
            )
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        ffn_dim=config["intermediate_size"],
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or many."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give the folder of a Hugging Face Llama checkpoint"
        ) from error
