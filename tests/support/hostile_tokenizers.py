"""Changed tokenizers and language models, as another person may have written them."""

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from support import language_models
from support.hostile_folders import damage_folder, exported
from support.mutations import damaged, mutated
from tf_lightning.interop.families import FAMILIES
from tf_lightning.interop.llama import open_language_model
from tf_lightning.tokenizer.tokenizer import NUM_IMAGE_TOKENS, Tokenizer

TEXTS = ("", "a red circle", "<s></s><unk><|endoftext|>", "é🏽\u202e\0\n  x", "a" * 2000)
SIZES = (0, -1, 1, 2, 289, 291, 300, 10**6, 10**12, None, "290", 290.0, [290], True)


def use(tokenizer: Tokenizer) -> None:
    """Encode and decode texts; ids are in the vocabulary, and none is of an image."""
    ordinary = tokenizer.vocab_size - NUM_IMAGE_TOKENS
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if not all(0 <= i < ordinary for i in ids):
            raise AssertionError(f"{text[:20]!r} has ids {ids[:9]} of a vocabulary of {ordinary}")
        tokenizer.decode(ids)
    specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    if not all(0 <= i < ordinary for i in specials):
        raise AssertionError(f"special ids {specials} of a vocabulary of {ordinary}")
    if any(len(counts) != tokenizer.vocab_size for counts in tokenizer.byte_counts()):
        raise AssertionError("byte counts are not those of the vocabulary")


@cache
def folder_of(kind: str) -> Path:
    """Write the folder of a small language model once: "sentencepiece" or "json"."""
    folder = Path(tempfile.mkdtemp())
    config = {"vocab_size": 290, "eos_token_id": 2}
    if kind == "sentencepiece":
        language_models.with_sentencepiece(folder, 290)
    else:
        language_models.with_json(folder, 290)
        config["eos_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_tokenizer(folder: Path, rng: random.Random) -> None:
    """Load a changed tokenizer, and encode and decode with what loads."""
    kind = rng.choice(["sentencepiece", "json", "json"])
    copy = shutil.copytree(folder_of(kind), folder / "copy")
    if kind == "sentencepiece" and rng.random() < 0.8:
        file = copy / "tokenizer.model"
        file.write_bytes(changed_model(file.read_bytes(), rng))
        path = rng.choice([copy, file])
    elif rng.random() < 0.2:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"vocab_size": rng.choice(SIZES)}))
        path = copy
    else:
        file = rng.choice(sorted(copy.iterdir()))
        file.write_bytes(mutated(file.read_bytes(), rng))
        path = rng.choice([copy, file])
    use(Tokenizer(path))


def changed_model(content: bytes, rng: random.Random) -> bytes:
    """Damage a sentencepiece model, or change its pieces and options."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    for _ in range(rng.randint(1, 3)):
        piece = rng.choice(model.pieces)
        match rng.randrange(7):
            case 0:
                piece.piece = rng.choice(
                    ["", "a", "<s>", "▁", "\0", "x" * 10**4, "<0xFF>", "<0xZZ>"]
                )
            case 1:
                piece.type = rng.choice([1, 2, 3, 4, 5, 6])
            case 2:
                piece.score = rng.choice([float("nan"), float("inf"), -1e38, 1e38, 0.0])
            case 3:
                del model.pieces[rng.randrange(len(model.pieces)) :]
            case 4:
                field = rng.choice(["unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"])
                setattr(model.trainer_spec, field, rng.choice([-1, 0, 1, 2, 289, 290, 2**31 - 1]))
            case 5:
                model.trainer_spec.model_type = rng.choice([1, 2, 3, 4])
            case 6:
                size = rng.choice([1, 4, 99])
                model.normalizer_spec.precompiled_charsmap = rng.choice(
                    [b"\xff" * 4, b""]
                ) + rng.randbytes(size)
    return model.SerializePartialToString()


def read_language_model(folder: Path, rng: random.Random) -> None:
    """Open a changed folder of a language model, and load what opens."""
    copy = shutil.copytree(exported() / "text", folder / "copy")
    if rng.random() < 0.3:
        config = json.loads((copy / "config.json").read_text())
        family = rng.choice(list(FAMILIES))
        config |= {"model_type": family, "architectures": [f"{FAMILIES[family].name}ForCausalLM"]}
        (copy / "config.json").write_text(json.dumps(config))
    if rng.random() < 0.3:
        file = copy / "model.safetensors"
        file.write_bytes(changed_safetensors(file.read_bytes(), rng))
    else:
        damage_folder(copy, rng)
    model = open_language_model(copy)
    size = model.extended_config.vocab_size
    weights = model.load(size)
    if weights.keys() != model.names or len(weights["output.weight"]) != size:
        raise AssertionError(f"the weights of {sorted(weights)} are not those of the model")
    use(Tokenizer(copy))


def changed_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, or the length of it."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + content[8:]
    if rng.random() < 0.4:
        content = json.loads(header)
        entry = content[rng.choice([name for name in content if name != "__metadata__"])]
        match rng.randrange(3):
            case 0:
                entry["dtype"] = rng.choice(["F64", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "?"])
            case 1:
                entry["shape"] = rng.choice([[], [0], [2**40, 2**40], [-1], entry["shape"][::-1]])
            case 2:
                entry["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [9, 1], [0, 4], [-1, 3]])
        header = json.dumps(content).encode()
    else:
        header = mutated(header, rng)
    return len(header).to_bytes(8, "little") + header + rest
