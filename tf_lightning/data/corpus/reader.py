"""What a source of documents is, and a prepared corpus on disk: memory-mapped, read by number.

A corpus is a directory of
    tokens.bin     int32, all text ids one after another, ~id where it is read and not learned
    latents.bin    float16 (num_images, V, S, C, h, w), unit variance; V: the picture's crops, and
                   these mirrored (if asked); S: the latents, or mean and standard deviation (if
                   asked); codes are uint32, C = 1
    pictures.npy   instead, if asked: int64 (num_images, 4), file, first byte and bytes of each
                   picture, and whether it is read_alike (in_place.py)
    pictures.bin   then too: the files of pictures that lie in parquet and packed tars, as they are
    parts.npy      int64 (num_parts, 2): text is (first token, length), an image (its number, -1)
    documents.npy  int64 (num_documents + 1,): document i is parts[documents[i] : documents[i + 1]]
    checks.npy     uint32 (num_parts,): CRC-32 of what each part is made of, begun with `seed_of`
    corpus.json    counts, image shape, codes in the codebook if there is one, and how many samples
                   were skipped for what reason
    answer-*.json  how many rows it takes, once that was asked

What documents look like before they are read: which parts they have and how long these are.

Pictures that stay where they are, in tars and files, and are read by number when trained on.

Those in parquet and packed tars lie nowhere by themselves: the corpus has a copy of their files.
Pillow, which every picture is prepared with, takes as long again to hand over an array as to decode
a small picture. Where torchcodec was seen to make the same pixels, it reads them.
"""

import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchcodec.decoders import decode_jpeg, decode_png

from tf_lightning.batch import Document
from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import CROP_POSITIONS, load_image
from tf_lightning.errors import UserError

Check = tuple[int, int]  # what a part's CRC-32 begins and ends with
IMAGE = -1  # stands where a text part has its length


@dataclass(frozen=True)
class Layout:
    """The parts of some documents.

    Attributes:
        part_lengths: tokens of each text, IMAGE for an image, (num_parts,), document by document.
        starts: document i is parts starts[i] .. starts[i + 1] - 1, (num_documents + 1,).
    """

    part_lengths: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def lengths(self, num_patches: int) -> np.ndarray:
        """Positions each document takes in a row, (num_documents,), with N patches an image."""
        image = self.part_lengths == IMAGE
        return 2 + self._sums(np.where(image, num_patches + 2, self.part_lengths))

    def pairs(self) -> np.ndarray:
        """Which documents are exactly one text and one image, (num_documents,) bool."""
        images = self._sums(self.part_lengths == IMAGE)
        return (images == 1) & (np.diff(self.starts) == 2)

    def edits(self) -> np.ndarray:
        """Which documents are exactly picture, instruction, picture, (num_documents,) bool."""
        found = np.diff(self.starts) == 3
        first = self.starts[:-1][found]
        image = self.part_lengths == IMAGE
        found[found] = image[first] & ~image[first + 1] & image[first + 2]
        return found

    def read_images(self) -> np.ndarray:
        """How many images of each document have a part after them, (num_documents,)."""
        image = self.part_lengths == IMAGE
        return self._sums(image) - image[self.starts[1:] - 1]

    def _sums(self, of_parts: np.ndarray) -> np.ndarray:
        """Sums over the parts of each document."""
        totals = np.concatenate([[0], np.cumsum(of_parts)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]


def select(parts: np.ndarray, starts: np.ndarray, documents: np.ndarray) -> Layout:
    """The layout of some documents of a corpus, reading no others.

    Args:
        parts: of the corpus, (num_parts, 2), the second column as `Layout.part_lengths`.
        starts: of the corpus, (num_documents + 1,).
        documents: their numbers, (n,).
    """
    first = starts[documents]
    counts = starts[documents + 1] - first
    chosen = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(chosen[-1]) + np.repeat(first - chosen[:-1], counts)
    return Layout(parts[places, 1], chosen)


OPEN_FILES = 64
OWN = -1  # the number of the corpus's own file of pictures
JPEG = 0xFF  # the first byte of its files
UNREADABLE = RuntimeError, ValueError  # what torchcodec raises of bytes that it makes no picture of


class InPlace:
    """The pictures of a corpus.

    Args:
        files: names.
        places: of each picture: the number of its file, first byte, bytes, and whether it is
            `read_alike`, (num_images, 4).
        image_size: side of the pictures in pixels.
        own: the corpus's file of pictures that have no other.
    """

    def __init__(self, files: list[str], places: np.ndarray, image_size: int, own: Path):
        self.files = [*files, str(own)]  # OWN is the last
        self.places, self.image_size = places, image_size
        self._opened: OrderedDict[int, int] = OrderedDict()  # descriptors, by number of the file

    def read(self, number: int, check: Check, crop: int = 0) -> Tensor:
        """Picture `number`, uint8 (3, H, W).

        Args:
            number: of the picture.
            check: of the bytes of its file.
            crop: which of CROP_POSITIONS; those of what is `read_alike` are one.

        Raises:
            UserError: its file is gone, or is no longer the one that was prepared.
            ValueError: it is the corpus that is damaged.
        """
        file, offset, size, alike = self.places[number].tolist()
        if not OWN <= file < len(self.files):
            raise ValueError("picture in a file that is not listed")
        content = np.empty(size, np.uint8)
        try:
            if os.preadv(self._open(file), [content], offset) != size:
                raise BadSample("truncated file")
            if alike:
                return decoded(intact(content, check))
            picture = load_image(
                intact(content, check).tobytes(), self.image_size, CROP_POSITIONS[crop]
            )
        except (OSError, *UNREADABLE, BadSample) as error:
            if file == OWN:
                raise ValueError("damaged image") from error
            raise UserError(
                f"picture {number:,} at byte {offset:,} of {self.files[file]} cannot be read any "
                "more; bring the file back as it was, or run `tf-lightning prepare` again"
            ) from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def _open(self, file: int) -> int:
        if file not in self._opened:
            if len(self._opened) == OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[file] = os.open(Path(self.files[file]), os.O_RDONLY)
        self._opened.move_to_end(file)
        return self._opened[file]


def decoded(content: np.ndarray) -> Tensor:
    """A JPEG or PNG as it is, uint8 (3, H, W), of its file's bytes; UNREADABLE if damaged."""
    decode = decode_jpeg if content[0] == JPEG else decode_png
    return decode(torch.from_numpy(content), mode="RGB")


def read_alike(picture: Image.Image, content: bytes) -> bool:
    """Whether `decoded` makes exactly this picture of its file."""
    try:
        pixels = decoded(np.frombuffer(bytearray(content), np.uint8))
    except UNREADABLE:  # of another kind than JPEG and PNG
        return False
    return np.array_equal(pixels.numpy(), np.asarray(picture).transpose(2, 0, 1))


CHUNK = 1_000_000  # documents checked at once
STORED_LATENTS, STORED_CODES = (np.float16, np.float32), (np.uint32, np.int64)  # and as they serve


@dataclass(frozen=True)
class Latents:
    """What is kept of each picture.

    Attributes:
        mirrored: its mirror image too, for training on either.
        crops: how many squares of it, the middle first and then the ends of the longer side.
        moments: mean and standard deviation of its latents, for training on samples.
        in_place: nothing; it is read where it lies whenever it is trained on.
    """

    mirrored: bool = False
    moments: bool = False
    in_place: bool = False
    crops: int = 1

    def __post_init__(self) -> None:
        if self.crops not in (1, 2, 3):
            raise UserError(f"crops={self.crops} must be 1 (the middle), 2 or 3 (and both ends)")

    @property
    def shape(self) -> tuple[int, int]:
        """V, S."""
        return (1 + self.mirrored) * self.crops, 1 + self.moments

    def draw(self, random: np.random.Generator | None) -> tuple[int, int]:
        """Which of the kept views a document is read with: mirrored or not, number of the crop."""
        if random is None:
            return 0, 0
        mirrored = int(self.mirrored and random.random() < 0.5)
        return mirrored, int(random.integers(self.crops)) if self.crops > 1 else 0


def draw_latents(kept: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Latents (C, h, w) of what is kept of them, (S, C, h, w): a sample, or the mean."""
    mean, *std = kept
    if random is None or not std:
        return mean
    return mean + std[0] * random.standard_normal(mean.shape, dtype=np.float32)


def refuse_damage(method: Callable) -> Callable:
    """A method of a folder's reader that says which folder is damaged, whatever that raises."""

    @wraps(method)
    def reading(self, *args):
        try:
            return method(self, *args)
        except (IndexError, UserError):  # also how a sequence ends; told already
            raise
        except Exception as error:
            raise UserError(
                f"{self.path} is damaged; delete the folder and have it made again"
            ) from error

    return reading


class Corpus:
    """A prepared corpus.

    Args:
        path: its directory.
        sample_posterior: whether `document` samples latents whose spread is kept too.

    Attributes:
        name: the directory's name.
        image_shape: (C, h, w) of its latents, None where it has none.
        skipped: how many samples were left out, by reason.
        origin: what it was made of, as `shards.plan_corpus` lists it.

    Raises:
        UserError: the files are not what they were written as.
    """

    @refuse_damage
    def __init__(self, path: str | Path, sample_posterior: bool = True):
        self.path, self.sample_posterior = Path(path), sample_posterior
        facts = json.loads((self.path / "corpus.json").read_text())
        self.name = self.path.name
        self.image_shape = tuple(facts["image_shape"]) if facts["image_shape"] else None
        self.skipped: dict[str, int] = facts["skipped"]
        self.num_images, self.origin = facts["num_images"], facts["made_from"]
        self._tokens = _memmap(self.path / "tokens.bin", np.int32, (facts["num_tokens"],))
        self.latents = Latents(**facts.get("latents", {}))
        shape = facts["num_images"], *self.latents.shape, *(self.image_shape or ())
        stored, self._dtype = STORED_CODES if facts.get("num_codes") else STORED_LATENTS
        if self.latents.in_place:
            places = np.asarray(np.load(self.path / "pictures.npy", mmap_mode="r"))
            size, own = (self.image_shape or [0])[-1], self.path / "pictures.bin"
            self._pictures = InPlace(facts["files"], places, size, own)
        else:
            self._latents = _memmap(self.path / "latents.bin", stored, shape)
        self._parts = np.asarray(np.load(self.path / "parts.npy", mmap_mode="r"))
        self._documents = np.asarray(np.load(self.path / "documents.npy", mmap_mode="r"))
        self._checks = np.asarray(np.load(self.path / "checks.npy", mmap_mode="r"))
        _check_index(self._parts, self._documents, self._checks)

    def __reduce__(self):
        """Travels to DataLoader workers as its path, not its content."""
        return Corpus, (self.path, self.sample_posterior)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    @refuse_damage
    def document(self, index: int, random: np.random.Generator | None = None) -> Document:
        """Texts (L,) int64 and latents (C, h, w) float32, or codes (1, h, w) int64, in order.

        Pictures in place are pixels, uint8 (3, H, W).

        Args:
            index: its number.
            random: draws latents from their posterior, and one crop and all pictures of the
                document or none mirrored, where the corpus has what that needs; None: the means of
                the pictures' middles.
        """
        where = slice(self._documents[index], self._documents[index + 1])
        parts, checks = self._parts[where].tolist(), self._checks[where].tolist()
        _check_parts(parts, len(self._tokens), self.num_images)
        view = self.latents.draw(random)
        document = []
        for place, ((start, length), end) in enumerate(zip(parts, checks, strict=True)):
            check = seed_of(place, len(parts)), end
            if length == IMAGE:
                document.append(self._picture(start, check, view, random))
            else:
                tokens = intact(self._tokens[start : start + length], check)
                document.append(torch.from_numpy(tokens.astype(np.int64)))
        return document

    def _picture(
        self, number: int, check: Check, view: tuple[int, int], random: np.random.Generator | None
    ) -> Tensor:
        """Of a picture, latents (C, h, w) float32, codes (1, h, w) int64 or pixels uint8."""
        mirrored, crop = view
        if self.latents.in_place:
            picture = self._pictures.read(number, check, crop)
            return picture.flip(-1) if mirrored else picture
        kept = intact(self._latents[number], check)[mirrored * self.latents.crops + crop]
        kept = kept.astype(self._dtype)
        return torch.from_numpy(draw_latents(kept, random if self.sample_posterior else None))

    @refuse_damage
    def layout(self, documents: np.ndarray | None = None) -> Layout:
        """The parts of some documents, by number, or of all."""
        if documents is None:
            documents = np.arange(len(self))
        return select(self._parts, self._documents, documents)

    def remembered(self, question: str, answer: Callable[[], dict]) -> dict:
        """What was found out about the corpus once, kept beside it; JSON.

        Args:
            question: all that the answer depends on, but for the corpus.
            answer: finds it out.
        """
        digest = hashlib.sha256(question.encode()).hexdigest()[:12]
        path = self.path / f"answer-{digest}.json"
        with suppress(OSError, ValueError):  # not there, or damaged
            return json.loads(path.read_text())
        found = answer()
        with suppress(OSError):  # a folder that can only be read is none the worse
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(found))
            os.replace(part, path)
        return found


def _memmap(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file; an empty file, which cannot be mapped, is an empty array."""
    if 0 in shape:
        return np.empty(shape, dtype)
    if path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError("file of another size than corpus.json says")
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))  # plain arrays slice faster


def seed_of(place: int, count: int) -> int:
    """What the CRC-32 of part `place` of `count` begins with: among other parts, it is another."""
    return (place << 16 | count) & 0xFFFFFFFF


def intact(content: np.ndarray, check: Check) -> np.ndarray:
    """What was read; ValueError unless it is what was written there."""
    seed, end = check
    if zlib.crc32(content, seed) != end:
        raise ValueError("part of another content")
    return content


def _check_index(parts: np.ndarray, documents: np.ndarray, checks: np.ndarray) -> None:
    """ValueError unless the documents divide the parts."""
    kinds = [(array.dtype, array.shape[1:]) for array in (parts, documents, checks)]
    if kinds != [(np.int64, (2,)), (np.int64, ()), (np.uint32, ())] or len(documents) == 0:
        raise ValueError("index of another kind")
    if len(checks) != len(parts):
        raise ValueError("parts without a check")
    if documents[0] != 0 or documents[-1] != len(parts):
        raise ValueError("documents of more or fewer parts")
    for start in range(0, len(documents), CHUNK):  # never all of a large one in memory
        if (np.diff(documents[start : start + CHUNK + 1]) < 0).any():
            raise ValueError("documents out of order")


def _check_parts(parts: list[list[int]], num_tokens: int, num_images: int) -> None:
    """ValueError unless texts and images are where they are said to be."""
    for start, length in parts:
        end, limit = (start + 1, num_images) if length == IMAGE else (start + length, num_tokens)
        if start < 0 or length < IMAGE or end > limit:
            raise ValueError("part outside of its file")
