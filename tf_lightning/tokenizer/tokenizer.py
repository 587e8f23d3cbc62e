"""Tokenizer: text to token ids and back, with two extra ids for the start and end of an image.

The text part is a sentencepiece model or a language model's tokenizer.json. <boi> and <eoi> are the
two ids after its vocabulary, so no text can encode to them.
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
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.files import atomic_file
from tf_lightning.tokenizer import huggingface
from tf_lightning.tokenizer.huggingface import SPACE, JsonTokenizer

NUM_IMAGE_TOKENS = 2  # <boi>, <eoi>
EXPORTED = "tokenizer.bin"  # the tokenizer in a folder of `tf-lightning export`


class Tokenizer:
    """A text tokenizer and the two image tokens.

    `decode(encode(text)) == text` for a vocabulary of `train_tokenizer`, with one exception:
    U+2581, which sentencepiece uses for a space, decodes to a space.

    Attributes:
        vocab_size: number of ids, including <boi> and <eoi>; the model's `vocab_size`.
        bos_id, eos_id: start and end of a document.
        boi_id, eoi_id: start and end of an image.
        pad_id: padding; the unknown piece if the file has no padding piece.
        proto: the tokenizer as bytes: a sentencepiece model, or the JSON object of `huggingface`.
        is_json: whether `proto` is the JSON object.
    """

    def __init__(self, path: str | Path):
        """Load a tokenizer.

        Args:
            path: a sentencepiece file, a checkpoint (.ckpt), the folder of a run or of an export,
                the folder or the tokenizer.json of a language model, or its hub name.

        Raises:
            UserError: the file is missing or is not a tokenizer.
        """
        path = os.path.expanduser(path)
        if Path(path).suffix == ".ckpt" or Path(path, "checkpoints").is_dir():
            proto = bytes(read_checkpoint(path, mmap=True)["tokenizer"].numpy())
        elif Path(path, EXPORTED).is_file():
            proto = Path(path, EXPORTED).read_bytes()
        elif huggingface.is_pretrained(path):
            proto = huggingface.read_pretrained(path)
        else:
            try:
                proto = Path(path).read_bytes()
            except OSError as error:
                raise UserError(
                    f"tokenizer {path} cannot be read ({error.strerror}); give a sentencepiece "
                    ".model file, a checkpoint, or a language model's folder"
                ) from error
        self._load(proto, str(path))

    @classmethod
    def from_proto(cls, proto: bytes) -> "Tokenizer":
        """Create a tokenizer from the bytes of `proto`."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(proto, f"of {len(proto)} bytes")
        return tokenizer

    def _load(self, proto: bytes, name: str) -> None:
        self.proto, self.is_json = proto, proto[:1] == b"{"
        if self.is_json:
            num_pieces = self._load_json(name)
        else:
            num_pieces = self._load_sentencepiece(name)
        self.boi_id, self.eoi_id = num_pieces, num_pieces + 1
        self.vocab_size = num_pieces + NUM_IMAGE_TOKENS

    def _load_json(self, name: str) -> int:
        """Load the JSON object and return its number of pieces."""
        json_tokenizer = self._processor = JsonTokenizer(self.proto, name)
        self.bos_id, self.eos_id = json_tokenizer.bos_id, json_tokenizer.eos_id
        self.pad_id = json_tokenizer.pad_id
        return json_tokenizer.size

    def _load_sentencepiece(self, name: str) -> int:
        """Load a sentencepiece model and return its number of pieces."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
            num_pieces = self._processor.get_piece_size() if self.proto else 0
            self._processor.id_to_piece(list(range(num_pieces)))
        except (RuntimeError, ValueError):  # ValueError: a message or a piece is not UTF-8
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
        return num_pieces

    def __reduce__(self):
        """Pickle as `proto`, because sentencepiece's processor cannot be pickled."""
        return Tokenizer.from_proto, (self.proto,)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `proto` as hexadecimal digits."""
        return hashlib.sha256(self.proto).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; special tokens are dropped."""
        specials = {self.bos_id, self.eos_id, self.boi_id, self.eoi_id, self.pad_id}
        return self._processor.decode([int(i) for i in ids if int(i) not in specials])

    def byte_counts(self) -> tuple[list[int], list[int]]:
        """Return the number of UTF-8 bytes that each id adds to a decoded text.

        The sum over the ids of a text is `len(decode(ids).encode())`. Special tokens add 0.

        Returns:
            The bytes of each id inside a text, and those of each id as the first token of a text.
            They differ by the space that sentencepiece adds before a text and removes in decoding.
        """
        no_bytes = [0] * NUM_IMAGE_TOKENS
        if self.is_json:
            inside, first = self._processor.byte_counts()
            return inside + no_bytes, first + no_bytes
        spec = sentencepiece_model_pb2.ModelProto.FromString(self.proto).normalizer_spec
        drops_space = spec.add_dummy_prefix or spec.remove_extra_whitespaces
        inside = [self._num_bytes(i) for i in range(self.boi_id)]
        first = [
            n - (drops_space and self._processor.id_to_piece(i).startswith(SPACE))
            for i, n in enumerate(inside)
        ]
        return inside + no_bytes, first + no_bytes

    def _num_bytes(self, piece_id: int) -> int:
        """Return the bytes of a piece inside a text; the unknown piece has none."""
        processor = self._processor
        if processor.is_byte(piece_id):
            return 1
        if processor.is_control(piece_id) or piece_id in (processor.unk_id(), self.pad_id):
            return 0
        return len(processor.id_to_piece(piece_id).replace(SPACE, " ").encode())


def train_tokenizer(texts: Iterator[str], path: str | Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair vocabulary, write it to `path`, and return the tokenizer.

    Spaces and line ends are kept, and unseen characters become bytes, so that every text
    round-trips.

    Args:
        texts: texts of any length.
        path: sentencepiece file to write.
        vocab_size: number of ids, including <boi> and <eoi>. If the texts have too few different
            pieces, the vocabulary is padded with unused pieces.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for its characters.
    """
    path = Path(path)
    model = io.BytesIO()
    raised: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, raised),
            model_writer=model,
            vocab_size=vocab_size - NUM_IMAGE_TOKENS,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            max_sentence_length=2**20,  # bytes; longer lines are skipped
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        raise UserError(_training_error(str(error), vocab_size)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        padded = huggingface.pad_vocabulary(model.getvalue(), vocab_size - NUM_IMAGE_TOKENS)
        partial.write_bytes(padded)
    return Tokenizer(path)


def _lines(texts: Iterator[str], raised: list[BaseException]) -> Iterator[str]:
    """Yield the lines of the texts, without lone surrogates, which UTF-8 cannot encode.

    An error or a signal is added to `raised`, because sentencepiece keeps only its message.
    """
    try:
        for text in texts:
            for line in text.splitlines():
                yield line.encode("utf-8", "ignore").decode()
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        raised.append(error)
        raise


def _training_error(message: str, vocab_size: int) -> str:
    """Translate sentencepiece's error message to a sentence with a remedy."""
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; give a corpus with text or a tokenizer"
    needed = re.search(r"vs (\d+)", message)
    if not needed:
        return f"a tokenizer of vocab_size={vocab_size} cannot be trained on this text: {message}"
    return (
        f"vocab_size={vocab_size} is too small for the characters of this text; "
        f"give at least {int(needed[1]) + NUM_IMAGE_TOKENS}"
    )
