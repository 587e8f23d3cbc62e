"""Text to token ids and back, by sentencepiece or by a language model's tokenizer.json.

User text cannot forge an image: <boi> and <eoi> are the two ids that follow the vocabulary's own.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.tokenizer import huggingface
from tf_lightning.tokenizer.huggingface import JsonPieces

NUM_IMAGE_TOKENS = 2  # <boi>, <eoi>
SPACE = "\u2581"  # sentencepiece's mark of it


class Tokenizer:
    """A sentencepiece model file, or the tokenizer of a language model, and the two image tokens.

    `decode(encode(text)) == text` for models that `train` made, except that U+2581, sentencepiece's
    own mark of a space, reads back as a space.

    Attributes:
        vocab_size: entries the model's embedding must have: the vocabulary's and two.
        bos_id, eos_id: start and end of a document.
        boi_id, eoi_id: start and end of an image.
        pad_id: the file's padding piece, or its unknown piece where it has none.
        proto: the file's bytes, or `json_pieces`' object.
        is_json: whether it is the latter.
    """

    def __init__(self, path: str | Path):
        """Read a sentencepiece file, a checkpoint (.ckpt), or a language model's folder or name.

        Raises:
            UserError: the file is missing, or is none of these.
        """
        if Path(path).suffix == ".ckpt":
            proto = read_checkpoint(path, mmap=True)["tokenizer"]
            self._load(bytes(proto.numpy()), str(path))
            return
        if huggingface.is_pretrained(path):
            self._load(huggingface.read(path), str(path))
            return
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {path} cannot be read ({error.strerror}); "
                "give a sentencepiece .model file, a checkpoint, or a language model's folder"
            ) from error
        self._load(proto, str(path))

    @classmethod
    def from_proto(cls, proto: bytes) -> "Tokenizer":
        """The tokenizer whose file has these bytes."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(proto, f"of {len(proto)} bytes")
        return tokenizer

    def _load(self, proto: bytes, name: str) -> None:
        self.proto, self.is_json = proto, proto[:1] == b"{"
        if self.is_json:
            self._load_json(JsonPieces(proto, name))
            return
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            num_pieces = self._processor.get_piece_size() if proto else 0
        except RuntimeError:
            num_pieces = 0
        if not num_pieces:
            raise UserError(
                f"tokenizer {name} is not a sentencepiece model; "
                "give another file, or none to train one on the corpus"
            )
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(
                f"tokenizer {name} lacks a bos or eos piece; train it with bos_id and eos_id >= 0"
            )
        pad_id = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self._processor.unk_id()
        self._count(num_pieces)

    def _load_json(self, pieces: JsonPieces) -> None:
        self._processor = pieces
        self.bos_id, self.eos_id, self.pad_id = pieces.bos_id, pieces.eos_id, pieces.pad_id
        self._count(pieces.size)

    def _count(self, num_pieces: int) -> None:
        self.boi_id, self.eoi_id = num_pieces, num_pieces + 1
        self.vocab_size = num_pieces + NUM_IMAGE_TOKENS

    def __reduce__(self):
        """Travels to DataLoader workers as its bytes."""
        return Tokenizer.from_proto, (self.proto,)

    @property
    def fingerprint(self) -> str:
        """Identifies the vocabulary."""
        return hashlib.sha256(self.proto).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no specials among them."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; specials are dropped."""
        specials = {self.bos_id, self.eos_id, self.boi_id, self.eoi_id, self.pad_id}
        return self._processor.decode([int(i) for i in ids if int(i) not in specials])

    def byte_counts(self) -> tuple[list[int], list[int]]:
        """UTF-8 bytes that each id adds to a text: inside it, and where it begins it.

        Over the ids of a text they sum to `len(decode(ids).encode())`. Specials add none. The two
        differ by the space that sentencepiece puts before a text and takes away when it decodes.
        """
        if self.is_json:
            inside, beginning = self._processor.byte_counts()
            none = [0] * NUM_IMAGE_TOKENS
            return inside + none, beginning + none
        spec = sentencepiece_model_pb2.ModelProto.FromString(self.proto).normalizer_spec
        dropped = spec.add_dummy_prefix or spec.remove_extra_whitespaces
        inside = [self._num_bytes(i) for i in range(self.boi_id)] + [0] * NUM_IMAGE_TOKENS
        spaced = [self._processor.id_to_piece(i).startswith(SPACE) for i in range(self.boi_id)]
        spaced += [False] * NUM_IMAGE_TOKENS
        return inside, [n - (dropped and s) for n, s in zip(inside, spaced, strict=True)]

    def _num_bytes(self, piece_id: int) -> int:
        """Of a piece inside a text; an unknown one has none."""
        processor = self._processor
        if processor.is_byte(piece_id):
            return 1
        if processor.is_control(piece_id) or piece_id in (processor.unk_id(), self.pad_id):
            return 0
        return len(processor.id_to_piece(piece_id).replace(SPACE, " ").encode())


def train(texts: Iterator[str], path: str | Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair vocabulary on texts, write it to `path`, and return it.

    Spaces and line ends are kept and characters never seen become bytes, so every text reads back.

    Args:
        texts: any number of texts of any length.
        path: file to write.
        vocab_size: entries of the model and of the result; where the texts have too few different
            pieces, the rest is filled with pieces that are never used.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for its characters.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size - NUM_IMAGE_TOKENS,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            max_sentence_length=2**20,  # bytes; longer lines would be left out
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_fault(str(error), vocab_size)) from error
    unfinished.write_bytes(huggingface.fill(model.getvalue(), vocab_size - NUM_IMAGE_TOKENS))
    os.replace(unfinished, path)
    return Tokenizer(path)


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """The texts' lines, without what UTF-8 cannot hold (half of a surrogate pair)."""
    for text in texts:
        for line in text.splitlines():
            yield line.encode("utf-8", "ignore").decode()


def _training_fault(message: str, vocab_size: int) -> str:
    """Sentencepiece's two likely faults in one sentence each."""
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; give a corpus with text or a tokenizer"
    needed = re.search(r"vs (\d+)", message)
    if not needed:
        return f"a tokenizer of vocab_size={vocab_size} cannot be trained on this text: {message}"
    return (
        f"vocab_size={vocab_size} is too small for the characters of this text; "
        f"give at least {int(needed[1]) + NUM_IMAGE_TOKENS}"
    )
