"""The tokenizer of a language model's folder, in and out again.

Its vocabulary is as large as the model's, which is often padded (Qwen2 has 151,936 rows for 151,646
pieces), so that <boi> and <eoi> follow the last row and no row changes its meaning.

Text to ids and back by a `tokenizer.json` (Llama 3, Qwen2), through the library `tokenizers`.

What a checkpoint keeps of it is one JSON object: the file, the ids that the files beside it give to
start, end and padding, and how many rows the language model has, padding rows included.
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from tf_lightning.errors import UserError
from tf_lightning.interop.hub import find_folder, is_hub_name, read_json

BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "\u2581"


class JsonPieces:
    """The pieces of a `tokenizer.json`.

    Attributes:
        size: entries of the language model's vocabulary, at least the file's.
        bos_id, eos_id, pad_id: start and end of a document, and padding.
    """

    def __init__(self, proto: bytes, name: str):
        try:
            content = json.loads(proto)
            facts: dict[str, int] = {k: content[k] for k in ("size", "bos_id", "eos_id", "pad_id")}
            self._processor = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise UserError(
                f"tokenizer {name} is no tokenizer.json; download the folder again"
            ) from error
        self.size, self.pad_id = facts["size"], facts["pad_id"]
        self.bos_id, self.eos_id = facts["bos_id"], facts["eos_id"]
        self._processor.encode_special_tokens = True  # as text: nobody forges a special token
        self._processor.no_truncation()
        self._processor.no_padding()
        added = self._processor.get_added_tokens_decoder()
        self._controls = {i for i, token in added.items() if token.special}
        self._controls |= {self.bos_id, self.eos_id, self.pad_id}
        self._added = added.keys()
        self._byte_level = "ByteLevel" in json.dumps(content["tokenizer"].get("decoder"))
        for special in {self.bos_id, self.eos_id}:
            text = self._processor.id_to_token(special)
            if text is not None and special in self.encode(text):
                raise UserError(
                    f"tokenizer {name} reads the text {text!r} as a mark of its own, so that a "
                    'text could forge it; set "special": true for it in tokenizer.json'
                )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no specials among them."""
        text.encode()  # half of a surrogate pair is a UnicodeError here, a TypeError there
        return self._processor.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; what the file gives no piece has none."""
        known = [i for i in ids if self._processor.id_to_token(i) is not None]
        return self._processor.decode(known, skip_special_tokens=False)

    def byte_counts(self) -> tuple[list[int], list[int]]:
        """As `Tokenizer.byte_counts`, without the image tokens."""
        pieces = [self._processor.id_to_token(i) or "" for i in range(self.size)]
        inside = [self._num_bytes(i, piece) for i, piece in enumerate(pieces)]
        spaced = [i for i, piece in enumerate(pieces) if piece.startswith(SPACE)]
        dropped = bool(spaced) and not self._byte_level and self.decode(spaced[:1])[:1] != " "
        return inside, [
            n - (dropped and piece.startswith(SPACE))
            for n, piece in zip(inside, pieces, strict=True)
        ]

    def _num_bytes(self, i: int, piece: str) -> int:
        if i in self._controls:
            return 0
        if i in self._added:
            return len(piece.encode())
        if self._byte_level:
            return len(piece)  # each byte is written as one character
        return 1 if BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())


def pack_json(content: dict[str, Any], size: int, bos_id: int, eos_id: int, pad_id: int) -> bytes:
    """The bytes that `JsonPieces` reads."""
    facts = {"size": size, "bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
    return json.dumps(facts | {"tokenizer": content}, ensure_ascii=False).encode()


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
