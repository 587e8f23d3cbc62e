"""Tokenizers of pretrained language models: reading and writing their folders.

A folder in Hugging Face's layout has a `tokenizer.model` (sentencepiece: Llama 2, Mistral) or a
`tokenizer.json` (byte-pair: Llama 3, Qwen2), beside config.json and tokenizer_config.json. Of a
folder with both, the tokenizer.json counts if it adds tokens that the other lacks (Phi-3).

The vocabulary gets as many entries as the model has embedding rows, which are often padded (Qwen2
has 151,936 rows for 151,646 pieces). So <boi> and <eoi> follow the last row, and every existing row
keeps its id.

A tokenizer.json is stored in checkpoints and prepared data as one JSON object:
    {"size", "bos_id", "eos_id", "pad_id", "tokenizer": the content of tokenizer.json}
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from tf_lightning.errors import UserError, first_sentence
from tf_lightning.hub import LANGUAGE_MODEL_FILES, find_folder, is_hub_name, read_json

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # stands for a space in sentencepiece's pieces
MAX_PADDING = 0.05  # maximum share of embedding rows without a piece; known models have < 0.02


# ----------------------------------------------------------------------------------- one JSON file


class JsonTokenizer:
    """A `tokenizer.json` with the methods of a sentencepiece processor.

    Attributes:
        size: number of embedding rows of the language model, at least the number of pieces.
        bos_id, eos_id: start and end of a document.
        pad_id: padding.
    """

    def __init__(self, proto: bytes, name: str):
        """Parse the JSON object described in the module docstring.

        Args:
            proto: its bytes.
            name: name of the tokenizer in error messages.

        Raises:
            UserError: the bytes are damaged, or a text could produce a special token.
        """
        try:
            content = json.loads(proto)
            ids: dict[str, int] = {k: content[k] for k in ("size", "bos_id", "eos_id", "pad_id")}
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise UserError(
                f"tokenizer {name} is not a valid tokenizer.json; download the folder again"
            ) from error
        self.size, self.pad_id = ids["size"], ids["pad_id"]
        self.bos_id, self.eos_id = ids["bos_id"], ids["eos_id"]
        # Encode the text of a special token as plain text, so that users cannot forge it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {i for i, token in added.items() if token.special}
        self._controls |= {self.bos_id, self.eos_id, self.pad_id}
        self._added = added.keys()
        self._byte_level = "ByteLevel" in json.dumps(content["tokenizer"].get("decoder"))
        self._check_not_forgeable(name)

    def _check_not_forgeable(self, name: str) -> None:
        for special in {self.bos_id, self.eos_id}:
            text = self._tokenizer.id_to_token(special)
            if text is not None and special in self.encode(text):
                raise UserError(
                    f"tokenizer {name} encodes the text {text!r} as a special token, so a "
                    'document could forge it; set "special": true for it in tokenizer.json'
                )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        text.encode()  # raises UnicodeError for a lone surrogate; `tokenizers` raises TypeError
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; ids without a piece are skipped."""
        known = [i for i in ids if self._tokenizer.id_to_token(i) is not None]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def byte_counts(self) -> tuple[list[int], list[int]]:
        """Return `Tokenizer.byte_counts` without the two image tokens."""
        pieces = [self._tokenizer.id_to_token(i) or "" for i in range(self.size)]
        inside = [self._num_bytes(i, piece) for i, piece in enumerate(pieces)]
        spaced = [i for i, piece in enumerate(pieces) if piece.startswith(SPACE)]
        drops_space = bool(spaced) and not self._byte_level and self.decode(spaced[:1])[:1] != " "
        return inside, [
            n - (drops_space and piece.startswith(SPACE))
            for n, piece in zip(inside, pieces, strict=True)
        ]

    def _num_bytes(self, i: int, piece: str) -> int:
        if i in self._controls:
            return 0
        if i in self._added:
            return len(piece.encode())
        if self._byte_level:
            return len(piece)  # a byte-level piece has one character for each byte
        return 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())


# ----------------------------------------------------------------------------- reading a folder


def is_pretrained(path: str | Path) -> bool:
    """Return whether `read_pretrained` reads this path."""
    return Path(path).is_dir() or Path(path).suffix == ".json" or is_hub_name(path)


def read_pretrained(path: str | Path) -> bytes:
    """Read the tokenizer of a language model as the bytes that `Tokenizer.from_proto` takes.

    Args:
        path: a folder, a tokenizer.json in such a folder, or a hub name.

    Returns:
        A sentencepiece model, or the JSON object described in the module docstring.

    Raises:
        UserError: a file is missing or damaged, or the vocabulary does not fit the model.
    """
    is_json = Path(path).suffix == ".json"
    if is_json:
        folder = Path(path).parent
    else:
        folder = find_folder(path, LANGUAGE_MODEL_FILES, lambda f: any(f.glob("tokenizer*")))
    config = read_json(folder / "config.json")
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{folder}/config.json lacks vocab_size; download it again")
    try:
        return _read_folder(folder, size, config, is_json)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the tokenizer files in {folder} are damaged ({type(error).__name__}: "
            f"{first_sentence(error)}); download them again"
        ) from error


def _read_folder(folder: Path, size: int, config: dict[str, Any], is_json: bool) -> bytes:
    if (folder / "tokenizer.model").is_file() and not is_json:
        num_pieces = _num_pieces(folder)
        if not _adds_tokens(folder / "tokenizer.json", num_pieces):
            return _read_sentencepiece(folder, num_pieces, size, config)
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder, size, config)
    raise UserError(
        f"{folder} has neither tokenizer.model nor tokenizer.json; copy the tokenizer of the model "
        "into that folder"
    )


def _num_pieces(folder: Path) -> int:
    """Return the number of pieces of tokenizer.model."""
    proto = (folder / "tokenizer.model").read_bytes()
    try:
        return len(sentencepiece_model_pb2.ModelProto.FromString(proto).pieces)
    except Exception as error:  # protobuf has two implementations with different errors
        raise UserError(
            f"tokenizer {folder}/tokenizer.model is not a sentencepiece model; download it again"
        ) from error


def _adds_tokens(file: Path, num_pieces: int) -> bool:
    """Return whether a tokenizer.json has added tokens after the pieces of tokenizer.model."""
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    return any(token["id"] >= num_pieces for token in added)


def _read_sentencepiece(folder: Path, num_pieces: int, size: int, config: dict[str, Any]) -> bytes:
    """Read tokenizer.model and pad it to `size` pieces."""
    eos_id = _first(config.get("eos_token_id"))
    if eos_id is not None and num_pieces <= eos_id < size:
        raise UserError(
            f"{folder} ends texts with token {eos_id}, which its tokenizer.model of {num_pieces:,} "
            "pieces lacks; write the whole tokenizer with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    _check_size(num_pieces, size, folder)
    proto = (folder / "tokenizer.model").read_bytes()
    return pad_vocabulary(proto, size) if num_pieces < size else proto


def _read_json(folder: Path, size: int, config: dict[str, Any]) -> bytes:
    """Read tokenizer.json, and the special tokens from tokenizer_config.json or config.json."""
    content = read_json(folder / "tokenizer.json")
    file = folder / "tokenizer_config.json"
    names = read_json(file) if file.is_file() else {}
    _add_tokens(content, names.get("added_tokens_decoder") or {})
    ids = _piece_ids(content)
    added_ids = {token["id"] for token in content.get("added_tokens", [])}
    _check_size(max(ids.values(), default=-1) + 1, size, folder)
    bos_id, eos_id, pad_id = (
        _special_id(names.get(f"{kind}_token"), config.get(f"{kind}_token_id"), ids, added_ids)
        for kind in ("bos", "eos", "pad")
    )
    if eos_id is None:
        raise UserError(
            f"{folder} does not name an end-of-text token; give eos_token_id in config.json or "
            "eos_token in tokenizer_config.json"
        )
    special_ids = {
        "size": size,
        "bos_id": eos_id if bos_id is None else bos_id,  # Qwen2 separates documents by its eos
        "eos_id": eos_id,
        "pad_id": eos_id if pad_id is None else pad_id,
    }
    return json.dumps(special_ids | {"tokenizer": content}, ensure_ascii=False).encode()


def _add_tokens(content: dict[str, Any], tokens: dict[str, dict[str, Any]]) -> None:
    """Add the tokens of tokenizer_config.json that a tokenizer.json lacks, as `transformers` does.

    Args:
        content: the content of tokenizer.json, changed in place.
        tokens: `added_tokens_decoder` of tokenizer_config.json, by id.
    """
    added = content.get("added_tokens", [])
    known = {token["id"] for token in added}
    missing = [{"id": int(i)} | token for i, token in tokens.items() if int(i) not in known]
    if missing:
        content["added_tokens"] = sorted(added + missing, key=lambda token: token["id"])


def _piece_ids(content: dict[str, Any]) -> dict[str, int]:
    """Return the id of every piece of a tokenizer.json."""
    vocab = content.get("model", {}).get("vocab")
    if not isinstance(vocab, dict):
        raise UserError(
            "tokenizer.json has no vocabulary that maps pieces to ids; give a byte-pair tokenizer"
        )
    return vocab | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _special_id(
    token: str | dict | None,
    config_id: int | list[int] | None,
    ids: dict[str, int],
    added_ids: set[int],
) -> int | None:
    """Return the id of a special token, or None if the folder does not define it.

    Args:
        token: its entry in tokenizer_config.json.
        config_id: its id in config.json; the first one of a list counts. An id that is not an added
            token is ignored, because configs without the entry get the defaults 1 and 2.
        ids: ids of all pieces.
        added_ids: ids of the added tokens.
    """
    name = token.get("content") if isinstance(token, dict) else token
    if name in ids:
        return ids[name]
    config_id = _first(config_id)
    return config_id if config_id in added_ids else None


def _first(ids: int | list[int] | None) -> int | None:
    """Return the first of several ids, or the only one."""
    return ids[0] if isinstance(ids, list) else ids


def _check_size(num_pieces: int, size: int, folder: Path) -> None:
    if not (1 - MAX_PADDING) * size <= num_pieces <= size:
        raise UserError(
            f"the tokenizer in {folder} has {num_pieces:,} entries but its model has {size:,} "
            "embedding rows; copy the tokenizer of the model into that folder"
        )


def pad_vocabulary(proto: bytes, num_pieces: int) -> bytes:
    """Return a sentencepiece model with `num_pieces` pieces; added ones are of type UNUSED."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    for number in range(len(model.pieces), num_pieces):
        unused = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
        model.pieces.add(piece=f"<unused{number}>", score=0.0, type=unused)
    return model.SerializeToString()


# ----------------------------------------------------------------------------- writing a folder


def write_pretrained(tokenizer, folder: Path) -> None:
    """Write the files that `transformers` and `read_pretrained` read.

    Args:
        tokenizer: a `Tokenizer`.
        folder: an existing folder.
    """
    if tokenizer.is_json:
        content = json.loads(tokenizer.proto)["tokenizer"]
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        pieces = {i: piece for piece, i in _piece_ids(content).items()}
        class_name, piece_of = "PreTrainedTokenizerFast", pieces.get
    else:
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        protos = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto).pieces
        class_name, piece_of = "LlamaTokenizer", lambda i: protos[i].piece
    config = {"tokenizer_class": class_name, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": piece_of(tokenizer.bos_id), "eos_token": piece_of(tokenizer.eos_id)}
    if tokenizer.pad_id != tokenizer.eos_id:
        key = "pad_token" if tokenizer.is_json else "unk_token"
        config[key] = piece_of(tokenizer.pad_id)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
