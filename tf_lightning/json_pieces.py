"""Text to ids and back by a `tokenizer.json` (Llama 3, Qwen2), through the library `tokenizers`.

What a checkpoint keeps of it is one JSON object: the file, the ids that the files beside it give to
start, end and padding, and how many rows the language model has, padding rows included.
"""

import json
import re
from typing import Any

import tokenizers

from tf_lightning.errors import UserError

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
