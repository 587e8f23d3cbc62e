"""The tokenizer of a language model's folder, in and out again.

Its vocabulary is as large as the model's, which is often padded (Qwen2 has 151,936 rows for 151,646
pieces), so that <boi> and <eoi> follow the last row and no row changes its meaning.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from tf_lightning.errors import UserError
from tf_lightning.hf_folder import find_folder, is_hub_name, read_json
from tf_lightning.json_pieces import pack_json

MAX_PADDING = 0.05  # share of a model's rows without a piece; known models have less than 0.02


def is_pretrained(path: str | Path) -> bool:
    """Whether `read` takes it: a folder, a tokenizer.json, or a name on the hub."""
    return Path(path).is_dir() or Path(path).suffix == ".json" or is_hub_name(path)


def read(path: str | Path) -> bytes:
    """What `Tokenizer.from_proto` takes: a sentencepiece model, or `json_pieces`' object.

    Raises:
        UserError: there is no tokenizer, or its vocabulary is not the model's.
    """
    folder = Path(path).parent if Path(path).suffix == ".json" else find_folder(path)
    config = read_json(folder / "config.json")
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{folder}/config.json lacks vocab_size; download it again")
    if (folder / "tokenizer.model").is_file() and Path(path).suffix != ".json":
        return _padded((folder / "tokenizer.model").read_bytes(), size, folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; put the model's own there"
        )
    content = read_json(folder / "tokenizer.json")
    ids, marks = _ids(content), {token["id"] for token in content.get("added_tokens", [])}
    _check_size(max(ids.values(), default=-1) + 1, size, folder)
    names = folder / "tokenizer_config.json"
    said = read_json(names) if names.is_file() else {}
    eos_id = _special(said.get("eos_token"), ids, config.get("eos_token_id"), marks)
    bos_id = _special(said.get("bos_token"), ids, config.get("bos_token_id"), marks)
    if eos_id is None:
        raise UserError(
            f"{folder} names no end of a text; give eos_token_id in config.json, or eos_token in "
            "tokenizer_config.json"
        )
    bos_id = eos_id if bos_id is None else bos_id  # as Qwen2 separates documents
    pad_id = _special(said.get("pad_token"), ids, config.get("pad_token_id"), marks)
    return pack_json(content, size, bos_id, eos_id, eos_id if pad_id is None else pad_id)


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """The id of every piece of a tokenizer.json."""
    vocab = content.get("model", {}).get("vocab")
    if not isinstance(vocab, dict):
        raise UserError("tokenizer.json has no vocabulary by name; give a byte-pair tokenizer")
    return vocab | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _special(
    token: str | dict | None,
    ids: dict[str, int],
    otherwise: int | list[int] | None,
    marks: set[int],
) -> int | None:
    """The id of a special token: by its name, or config.json's, the first of many.

    A number that is no mark of the tokenizer is not meant: configs that do not say it hold 1 and 2.
    """
    name = token.get("content") if isinstance(token, dict) else token
    if name in ids:
        return ids[name]
    otherwise = otherwise[0] if isinstance(otherwise, list) else otherwise
    return otherwise if otherwise in marks else None


def _padded(proto: bytes, size: int, folder: Path) -> bytes:
    """A sentencepiece model with as many pieces as the language model has rows."""
    try:
        num_pieces = len(sentencepiece_model_pb2.ModelProto.FromString(proto).pieces)
    except Exception as error:  # protobuf's, of which two implementations exist
        raise UserError(
            f"tokenizer {folder}/tokenizer.model is not a sentencepiece model; download it again"
        ) from error
    _check_size(num_pieces, size, folder)
    return fill(proto, size) if num_pieces < size else proto


def _check_size(num_pieces: int, size: int, folder: Path) -> None:
    if not (1 - MAX_PADDING) * size <= num_pieces <= size:
        raise UserError(
            f"the tokenizer of {folder} has {num_pieces:,} entries but its model {size:,} rows; "
            "put the model's own tokenizer there"
        )


def fill(proto: bytes, num_pieces: int) -> bytes:
    """A model with as many pieces as asked for; those added are of the type that is never used."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    for number in range(len(model.pieces), num_pieces):
        unused = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
        model.pieces.add(piece=f"<unused{number}>", score=0.0, type=unused)
    return model.SerializeToString()


def write(tokenizer, folder: Path) -> None:
    """The files that `transformers` and `read` read, in a folder that is there."""
    proto = tokenizer.proto
    if tokenizer.is_json:
        content = json.loads(proto)["tokenizer"]
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        names = {v: k for k, v in _ids(content).items()}
        kind, name = "PreTrainedTokenizerFast", names.get
    else:
        (folder / "tokenizer.model").write_bytes(proto)
        pieces = sentencepiece_model_pb2.ModelProto.FromString(proto).pieces
        kind, name = "LlamaTokenizer", lambda i: pieces[i].piece
    facts = {"tokenizer_class": kind, "add_bos_token": True, "add_eos_token": False}
    facts |= {"bos_token": name(tokenizer.bos_id), "eos_token": name(tokenizer.eos_id)}
    if tokenizer.pad_id != tokenizer.eos_id:
        facts |= {"pad_token" if tokenizer.is_json else "unk_token": name(tokenizer.pad_id)}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
