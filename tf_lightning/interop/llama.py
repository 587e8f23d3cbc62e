"""Pretrained language models: the weights of the Llama family under the names of our `Transformer`.

In this order: tensor names, the safetensors files of a folder, and `LanguageModel`, which opens,
checks and loads a whole folder. Both sides use rotary embeddings in half-split order, so no weight
is permuted.

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

from tf_lightning.errors import UserError, first_sentence
from tf_lightning.hub import LANGUAGE_MODEL_FILES, find_folder, read_json, read_shard_index
from tf_lightning.interop.families import NEUTRAL_FIELDS, config_from_hf, sliding_window
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.tokenizer.tokenizer import NUM_IMAGE_TOKENS

# -------------------------------------------------------------------------------- tensor names

OUR_NAMES = {  # parts of Hugging Face's tensor names: ours
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "lm_head": "output",
}
PRE_NORM_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
POST_NORM_NAMES = {  # OLMo 2 has its norms after the branches
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "ffn_norm",
}
JOINED_NAMES = {  # Phi-3 stores these matrices joined
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VOCAB_WEIGHTS = ("tok_embeddings.weight", "output.weight")  # one row for each vocabulary entry


def _our_names(model_type: str) -> dict[str, str]:
    """Return the parts of a family's tensor names and ours."""
    return OUR_NAMES | (POST_NORM_NAMES if model_type == "olmo2" else PRE_NORM_NAMES)


def state_dict_from_hf(
    hf_state_dict: Mapping[str, Any], model_type: str = "llama"
) -> dict[str, Any]:
    """Rename the entries of a causal language model to those of our `Transformer`."""
    ours = _our_names(model_type)
    part = re.compile("|".join(map(re.escape, ours)))
    return {
        part.sub(lambda match: ours[match[0]], name): value
        for name, value in hf_state_dict.items()
        if not name.endswith("rotary_emb.inv_freq")  # a constant in old checkpoints
    }


def state_dict_to_hf(state_dict: Mapping[str, Any], model_type: str = "llama") -> dict[str, Any]:
    """Rename the entries of our `Transformer` to those of a causal language model."""
    theirs = {o: t for t, o in _our_names(model_type).items() if o}
    part = re.compile("|".join(map(re.escape, theirs)))
    renamed = {
        part.sub(lambda match: theirs[match[0]], name): value for name, value in state_dict.items()
    }
    return {n if n.startswith("lm_head") else f"model.{n}": v for n, v in renamed.items()}


def split_joined(weights: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Split the matrices of JOINED_NAMES by rows.

    A matrix with another number of rows is left as it is, so that it is reported under its name.
    """
    q_dim, kv_dim = (count * config.head_size for count in (config.num_heads, config.kv_heads))
    rows = {"q_proj": q_dim, "k_proj": kv_dim, "v_proj": kv_dim}
    rows |= {"gate_proj": config.ffn_dim, "up_proj": config.ffn_dim}
    separate = {}
    for name, weight in weights.items():
        joined = next((part for part in JOINED_NAMES if f".{part}." in name), None)
        sizes = [rows[part] for part in JOINED_NAMES.get(joined, ())]
        if not sizes or weight.shape[:1] != (sum(sizes),):
            separate[name] = weight
            continue
        for part, matrix in zip(JOINED_NAMES[joined], weight.split(sizes), strict=True):
            separate[name.replace(joined, part)] = matrix
    return separate


def extend_rows(weight: Tensor, num_rows: int) -> Tensor:
    """Extend a matrix (V, D) to (num_rows, D) with copies of its mean row."""
    new = weight.float().mean(0, keepdim=True).expand(num_rows - len(weight), -1)
    return torch.cat([weight, new.type_as(weight)])


# --------------------------------------------------------------------------- safetensors files


def read_tensor_shapes(folder: Path) -> dict[str, Tensor]:
    """Read every tensor's shape, as a tensor without data, by Hugging Face's name.

    Only the headers of the files are read.

    Raises:
        UserError: a file is missing or damaged, or lacks a tensor that the index assigns to it.
    """
    shapes: dict[str, Tensor] = {}
    for file, expected in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                sizes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be read ({first_sentence(error)}); download it again"
            ) from error
        if absent := sorted(expected - sizes.keys()):
            raise UserError(
                f"{file} lacks {len(absent)} of the tensors that its index names "
                f"({absent[0]}, ...); download it again"
            )
        shapes |= {key: torch.empty(size, device="meta") for key, size in sizes.items()}
    return shapes


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor by Hugging Face's name, after `read_tensor_shapes` checked the files."""
    return {k: tensor for file in _weight_files(folder) for k, tensor in load_file(file).items()}


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the safetensors files, each with the tensor names that the index assigns to it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth")])
        if pickles and not single.is_file():
            raise UserError(
                f"{folder} has its weights only as {pickles[0].name}, a pickle, which can run "
                "code; write them as safetensors with transformers: "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r})"
            )
        return {single: set()}
    return read_shard_index(index)


# ------------------------------------------------------------------------------ a whole folder


@dataclass
class LanguageModel:
    """A language model's folder whose files match its config.json."""

    folder: Path
    model_type: str
    """Its family, a key of `families.FAMILIES`."""
    config: TransformerConfig
    """Sizes, before the vocabulary is extended."""
    window: int | None
    """Sliding window in tokens; longer documents are not supported. None: no limit."""
    names: frozenset[str]
    """Names of its tensors in our network."""

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
        neutral = NEUTRAL_FIELDS - {"pretrained_vocab_size"}
        names = [f.name for f in fields(config) if f.name not in neutral]
        values = {name: (_field(wanted, name), _field(config, name)) for name in names}
        if config.vocab_size >= wanted.vocab_size:
            del values["vocab_size"]
        differ = [f"{k}={w!r} (not {g!r})" for k, (w, g) in values.items() if w != g]
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
        weights = split_joined(_read_tensors(self.folder), self.config)
        weights = state_dict_from_hf(weights, self.model_type)
        if self.config.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        return weights | {name: extend_rows(weights[name], vocab_size) for name in VOCAB_WEIGHTS}


def _field(config: TransformerConfig, name: str) -> Any:
    """Return a field in its shortest form, so that equal networks have equal fields."""
    if name == "num_kv_heads":
        return config.kv_heads
    if name == "head_dim" and config.num_heads * config.head_size == config.dim:
        return None
    return getattr(config, name)


def open_language_model(name: str | Path) -> LanguageModel:
    """Open a language model without reading its weights.

    Args:
        name: a folder, or a hub name.

    Raises:
        UserError: a file is missing or damaged, or the network is not of the Llama family or has
            an option that our blocks cannot express.
    """
    folder = find_folder(name, LANGUAGE_MODEL_FILES, lambda f: any(f.glob("model*.safetensors")))
    hf_config = read_json(folder / "config.json")
    config = config_from_hf(hf_config)
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    model_type = hf_config["model_type"]
    found = state_dict_from_hf(split_joined(read_tensor_shapes(folder), config), model_type)
    if config.tie_embeddings:  # some folders store the shared matrix twice
        found["output.weight"] = expected["output.weight"]
    _check_shapes(
        folder,
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
    )
    window = sliding_window(hf_config)
    return LanguageModel(folder, model_type, config, window, frozenset(expected))


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
