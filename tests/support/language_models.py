"""Tiny random language models of `transformers`, their tokenizers, and our logits."""

import json
from pathlib import Path

import torch

from tf_lightning.batch import Batch
from tf_lightning.model.attention import VarlenAttention
from tf_lightning.model.transformer import Transformer
from tf_lightning.tokenizer.tokenizer import train_tokenizer

TEXTS = ["a red circle above a blue square", "the lobster is blue , and the circle is not ."] * 20
END = "<|endoftext|>"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny(kind: str = "Llama", **sizes):
    """A random causal language model of `transformers`; its norm weights are random too."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | sizes
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


def with_sentencepiece(folder: Path, vocab_size: int = 300) -> None:
    """Write a tokenizer.model of `vocab_size` pieces."""
    made = train_tokenizer(iter(TEXTS), folder / "made.model", vocab_size + 2)
    (folder / "made.model").unlink()
    (folder / "tokenizer.model").write_bytes(made.proto)


def with_json(folder: Path, vocab_size: int = 290) -> None:
    """Write a tokenizer.json like Qwen2's: byte-level BPE, one special token, no <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def train_byte_level(pattern: str | None = None, normalizer=None):
    """Train a byte-level BPE like Llama 3's and Qwen's, with a pattern that splits texts first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated")]
        parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def train_byte_fallback(prepend: str):
    """Train a BPE like Llama 2's and Mistral's, in which unknown characters become bytes.

    Args:
        prepend: where a space is added before a text: "normalizer", or "first" of a Metaspace.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    model = json.loads(pieces.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    vocab = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    ids = {piece: i for i, piece in enumerate(vocab)}
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prepend == "normalizer":
        parts = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(specials)
    return tokenizer


def edit_json(file: Path, change: dict) -> None:
    """Change values of the JSON object in a file; None removes a key."""
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def our_logits(transformer: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Our logits (B, T, V) for rows of one document each."""
    rows, length = ids.shape
    empty = torch.empty(0)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        positions=torch.arange(length).expand(rows, length),
        document_ids=torch.zeros_like(ids),
        image_ids=torch.full_like(ids, -1),
        **dict.fromkeys(
            (
                "patch_index",
                "text_index",
                "target_index",
                "code_index",
                "latents",
                "noise",
                "t",
                "copied",
                "source_ids",
                "row_tokens",
            ),
            empty,
        ),
    )
    x = transformer.tok_embeddings(ids)
    return transformer.output(transformer(x, batch.positions, VarlenAttention(batch)))
