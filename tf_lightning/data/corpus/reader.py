"""A prepared corpus, memory-mapped from a disk or read from an object store by document number.

A corpus is a folder with these files:
    corpus.json    counts, shapes of the images, codebook size, what is stored of each image
                   (`ImageStorageSpec`), how many samples were skipped for each reason, and mean
                   and standard deviation of latents and of pixels by channel
    documents.npy  int64 (num_documents + 1,): document i is parts[documents[i] : documents[i + 1]]
    parts.npy      int64 (num_parts, 2): (first token, length) of a text, (number, -1) of an image,
                   (number, -2) of an image that is read but never generated. A length of -2 - n
                   is another wording, of n tokens, of the text before it
    checks.npy     uint32 (num_parts,): CRC-32 of the content of each part, see `checksum_seed`.
                   For an image with a row in shapes.npy, the CRC covers h, w and positions, then
                   the content
    tokens.bin     int32: all token ids, one text after another; ~id for text outside of the loss
    latents.bin    float16 (num_images, V, S, C, h, w), unit variance. V views: the crops, then the
                   flipped crops. S: the latents, or their mean and standard deviation. Codes are
                   uint32 with C = 1.
    answer-*.json  results that depend on the whole corpus, such as the number of rows it fills

With images of several shapes (`max_aspect_ratio` above 1) there is also:
    shapes.npy     int64 (num_images, 4): sum of h * w over the images before it, h and w of its
                   latents, and its positions in a row

With lazy images, latents.bin is empty and there are also:
    pictures.npy   int64 (num_images, 4): file number, first byte, number of bytes, and whether
                   `decode` gives the prepared image
    pictures.bin   copies of image files that have no byte range in the source: images in parquet
                   files and compressed tars
and corpus.json lists the source files, and the folder that was current when they were read

Shapes: C x h x w latents, 3 x H x W pixels.
"""

import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchcodec.decoders import decode_jpeg, decode_png

from tf_lightning.batch import Document
from tf_lightning.data.buckets import Size
from tf_lightning.data.corpus.folders import LocalFolder, fetch, open_corpus_folder
from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import CROP_POSITIONS, load_image
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file

IMAGE = -1  # the length of a part that is an image
CONTEXT_IMAGE = -2  # the length of an image that is never generated, such as one in a question
ALTERNATIVE = -2  # minus the tokens: the length of another wording of the text before it
# Data types in the file and in memory.
STORED_LATENTS, STORED_CODES = (np.float16, np.float32), (np.uint32, np.int64)
INDEX_CHUNK = 1_000_000  # documents checked at once, to bound the memory of a large index

OPEN_FILES = 64
OWN_FILE = -1  # file number of pictures.bin
JPEG = 0xFF  # first byte of a JPEG file
DECODE_ERRORS = RuntimeError, ValueError  # raised by torchcodec for bytes that it cannot decode

Checksum = tuple[int, int]  # initial value and result of a part's CRC-32


def refuse_damage(method: Callable) -> Callable:
    """Make a method report any error as damage of `self.folder`.

    Raises:
        UserError: the method raised an error other than IndexError and UserError.
    """

    @wraps(method)
    def reading(self, *args, **options):
        try:
            return method(self, *args, **options)
        except (IndexError, UserError):  # IndexError also ends an iteration over a sequence
            raise
        except Exception as error:
            raise UserError(f"{self.folder} is damaged; {self.folder.remedy}") from error

    return reading


@dataclass(frozen=True)
class ImageStorageSpec:
    """How a corpus stores each image.

    Attributes:
        hflip: also store a horizontally flipped copy; training draws one of the two.
        moments: store mean and standard deviation of the posterior, for training on samples.
        lazy: store only the position of the image file, which is read when the image is needed.
        crops: number of crops in {1, 2, 3}: the center, then the ends of the side that is cropped.
        max_aspect_ratio: longer side of an image divided by the shorter at most; 1: all images have
            one size.
    """

    hflip: bool = False
    moments: bool = False
    lazy: bool = False
    crops: int = 1
    max_aspect_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.crops not in (1, 2, 3):
            raise UserError(
                f"crops={self.crops} must be 1 (the center), 2 or 3 (also the ends of the longer "
                "side)"
            )

    @classmethod
    def from_json(cls, values: dict) -> "ImageStorageSpec":
        """Read what `to_json` wrote."""
        names = {"mirrored": "hflip", "in_place": "lazy"}
        return cls(**{names.get(name, name): value for name, value in values.items()})

    def to_json(self) -> dict:
        """Convert to the keys of corpus.json; they are part of the corpus's hash."""
        values = {
            "mirrored": self.hflip,
            "moments": self.moments,
            "in_place": self.lazy,
            "crops": self.crops,
        }
        # Corpora of images of one size have the same hash as in older versions.
        return values | ({"max_aspect_ratio": self.max_aspect_ratio} if self.has_shapes else {})

    @property
    def has_shapes(self) -> bool:
        """Whether images may differ in shape, so that the shape of each is stored."""
        return self.max_aspect_ratio > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Number of views and of stored statistics of an image, (V, S)."""
        return (1 + self.hflip) * self.crops, 1 + self.moments

    def draw_view(self, random: np.random.Generator | None) -> tuple[int, int]:
        """Draw whether to flip (0 or 1) and the number of the crop; (0, 0) without generator."""
        if random is None:
            return 0, 0
        flipped = int(self.hflip and random.random() < 0.5)
        return flipped, int(random.integers(self.crops)) if self.crops > 1 else 0


def draw_latents(stored: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Sample latents (C, h, w) from stored moments (2, C, h, w).

    Without a generator or a standard deviation, (1, C, h, w), the mean is returned.
    """
    mean, *std = stored
    if random is None or not std:
        return mean
    return mean + std[0] * random.standard_normal(mean.shape, dtype=np.float32)


class Corpus(Dataset):
    """A prepared corpus: a dataset of documents, in the order of their source.

    `corpus[i]` is document i with the first wordings of its texts, see `document`.

    Args:
        path: its folder, or the URL of a folder in a copy of an encoded folder.
        sample_posterior: whether `document` samples latents if their moments are stored.

    Attributes:
        folder: access to the files.
        name: name of the folder.
        image_shape: (C, h, w) of the latents, of most of them if they differ; None if there are no
            images.
        image_shapes: the (C, h, w) of all latents, each with its number of images.
        image_storage: what is stored of each image.
        skipped: number of skipped samples by reason.
        origin: everything that determined the content, as `PrepareJob.origin` lists it.
        num_images: number of images.
        num_tokens: number of tokens of all texts, in all wordings.

    Raises:
        UserError: the files are damaged.
    """

    @refuse_damage
    def __init__(self, path: str | Path, sample_posterior: bool = True):
        self.path, self.sample_posterior = path, sample_posterior
        folder = self.folder = open_corpus_folder(path)
        facts = json.loads(folder.file("corpus.json").read_text())
        self.name = Path(path).name
        self.image_shape = tuple(facts["image_shape"]) if facts["image_shape"] else None
        self.skipped: dict[str, int] = facts["skipped"]
        self.num_images, self.origin = facts["num_images"], facts["made_from"]
        self.num_tokens = facts["num_tokens"]
        self._tokens = folder.array("tokens.bin", np.int32, (facts["num_tokens"],))
        self.image_storage = ImageStorageSpec.from_json(facts.get("latents", {}))
        self.image_shapes = {self.image_shape: self.num_images} if self.image_shape else {}
        self._shapes: np.ndarray | None = None
        shape = facts["num_images"], *self.image_storage.shape, *(self.image_shape or ())
        if self.image_storage.has_shapes:
            self._shapes = self._load("shapes.npy")
            _check_shapes(self._shapes, self.num_images)
            self.image_shapes = {tuple(shape): count for *shape, count in facts["image_shapes"]}
            shape = (self._position_size * _num_positions(self._shapes),)
        stored, self._dtype = STORED_CODES if facts.get("num_codes") else STORED_LATENTS
        if self.image_storage.lazy and not isinstance(folder, LocalFolder):
            raise UserError(
                f"{folder} was prepared with lazy_images=true, which leaves the images in other "
                "files; prepare it with lazy_images=false"
            )
        if self.image_storage.lazy:
            locations, own_file = self._load("pictures.npy"), folder.file("pictures.bin")
            files_in = facts.get("folder")
            self._lazy_images = LazyImages(facts["files"], locations, own_file, files_in)
        else:
            self._latents = folder.array("latents.bin", stored, shape)
        self._parts, self._documents = self._load("parts.npy"), self._load("documents.npy")
        self._checks = self._load("checks.npy")
        _check_index(self._parts, self._documents, self._checks)

    def _load(self, name: str) -> np.ndarray:
        """Map a file that numpy saved."""
        return np.asarray(np.load(self.folder.file(name), mmap_mode="r"))

    def __reduce__(self):
        """Pickle the path, not the content, so that DataLoader workers open the files again."""
        return Corpus, (self.path, self.sample_posterior)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    @property
    def num_texts(self) -> int:
        """Number of texts, counting each wording."""
        return len(self._parts) - self.num_images

    def __getitem__(self, index: int) -> Document:
        """Read document `index` without any choice that is made at random.

        Raises:
            IndexError: there is no such document.
        """
        return self.document(range(len(self))[index])

    @property
    def _position_size(self) -> int:
        """Numbers in latents.bin for each position of an image's latents."""
        return math.prod(self.image_storage.shape) * (self.image_shape or (0,))[0]

    @refuse_damage
    def document(
        self, index: int, random: np.random.Generator | None = None, wording: float = 0.0
    ) -> Document:
        """Read a document.

        Args:
            index: number of the document.
            random: draws the crop, the flip (the same for all images of the document) and the
                sample of the posterior, as far as the corpus stores them. None: the center crop,
                unflipped, and the mean.
            wording: chooses one of several wordings of a text, in [0, 1); 0: the first.

        Returns:
            The parts in order: texts (L,) int64; latents (C, h, w) float32, codes (1, h, w) int64,
            or lazy images (3, H, W) uint8.
        """
        where = slice(self._documents[index], self._documents[index + 1])
        parts, checks = self._parts[where].tolist(), self._checks[where].tolist()
        _check_parts(parts, len(self._tokens), self.num_images)
        view = self.image_storage.draw_view(random)
        document = []
        for place in choose_wordings([length for _, length in parts], wording):
            start, length = parts[place]
            checksum = checksum_seed(place, len(parts)), checks[place]
            if length in (IMAGE, CONTEXT_IMAGE):
                document.append(self._image(start, checksum, view, random))
            else:
                length = length if length >= 0 else ALTERNATIVE - length
                tokens = verified(self._tokens[start : start + length], checksum)
                document.append(torch.from_numpy(tokens.astype(np.int64)))
        return document

    @refuse_damage
    def fetch(self, documents: np.ndarray) -> None:
        """Fetch the content of documents (n,) of a remote corpus together, before they are read."""
        if isinstance(self.folder, LocalFolder):
            return
        where = zip(self._documents[documents], self._documents[documents + 1], strict=True)
        parts, blocks = np.concatenate([self._parts[first:end] for first, end in where]), []
        for start, length in parts.tolist():
            if length in (IMAGE, CONTEXT_IMAGE):
                blocks += self._latents.blocks(*self._place(start))
            else:
                length = length if length >= 0 else ALTERNATIVE - length
                blocks += self._tokens.blocks(start, start + length)
        fetch(blocks)

    def _image(
        self,
        number: int,
        checksum: Checksum,
        view: tuple[int, int],
        random: np.random.Generator | None,
    ) -> Tensor:
        """Read one image as latents, codes or pixels, see `document`."""
        flipped, crop = view
        height, width = self.image_shape[1:]
        if self._shapes is not None:
            height, width = self._shapes[number, 1:3].tolist()
            seed = zlib.crc32(self._shapes[number, 1:].tobytes(), checksum[0])
            checksum = seed, checksum[1]
        if self.image_storage.lazy:
            image = self._lazy_images.read(number, checksum, (width, height), crop)
            return image.flip(-1) if flipped else image
        views = self._latents[number] if self._shapes is None else self._views(number)
        views = verified(views, checksum)
        stored = views[flipped * self.image_storage.crops + crop].astype(self._dtype)
        return torch.from_numpy(draw_latents(stored, random if self.sample_posterior else None))

    def _views(self, number: int) -> np.ndarray:
        """Return the stored views of an image of its own shape, (V, S, C, h, w)."""
        first, end = self._place(number)
        channels, (height, width) = self.image_shape[0], self._shapes[number, 1:3].tolist()
        return self._latents[first:end].reshape(*self.image_storage.shape, channels, height, width)

    def _place(self, number: int) -> tuple[int, int]:
        """Return the first item of an image in the array of latents, and the one after its last."""
        if self._shapes is None:
            return number, number + 1
        start, height, width, _ = self._shapes[number].tolist()
        return start * self._position_size, (start + height * width) * self._position_size

    @refuse_damage
    def layout(
        self, documents: np.ndarray | None = None, wordings: np.ndarray | None = None
    ) -> "Layout":
        """Describe the parts of these documents (n,), or of all, without reading them.

        Args:
            documents: numbers of the documents; None: all.
            wordings: as `wording` of `document`, for each of these documents (n,); None: the first
                wordings.
        """
        if documents is None:
            documents = np.arange(len(self))
        shapes = self._shapes
        positions = None if shapes is None else shapes[:, 3]
        return select_layout(self._parts, self._documents, documents, wordings, positions)

    def cached(self, question: str, compute: Callable[[], dict]) -> dict:
        """Return a result from the corpus folder, or compute it and store it there as JSON.

        Args:
            question: everything besides the corpus that the result depends on.
            compute: computes the result.
        """
        digest = hashlib.sha256(question.encode()).hexdigest()[:12]
        path = self.folder.file(f"answer-{digest}.json")
        with suppress(OSError, ValueError):  # missing or damaged
            return json.loads(path.read_text())
        result = compute()
        with suppress(OSError), atomic_file(path) as partial:  # the folder may be read-only
            partial.write_text(json.dumps(result))
        return result


@dataclass(frozen=True)
class Layout:
    """The kinds and lengths of the parts of some documents.

    Attributes:
        part_lengths: tokens of each text, IMAGE or CONTEXT_IMAGE for each image, document by
            document, (num_parts,).
        starts: document i has parts starts[i] to starts[i + 1] - 1, (num_documents + 1,).
        image_positions: positions of the patches of each part, 0 for texts, (num_parts,); None:
            all images have the same number.
    """

    part_lengths: np.ndarray
    starts: np.ndarray
    image_positions: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def lengths(self, num_patches: int) -> np.ndarray:
        """Count the positions of each document in a row, (num_documents,).

        Args:
            num_patches: positions of an image's patches, if all images have the same number.
        """
        image = self.part_lengths < 0
        patches = self._patches(num_patches)
        return 2 + self._sums(np.where(image, patches + 2, self.part_lengths))

    def image_patches(self, num_patches: int) -> "ImagePatches":
        """Count the positions of the images' patches in each document.

        Args:
            num_patches: as in `lengths`.
        """
        patches = self._patches(num_patches)
        ends = self.starts[1:]
        last = np.maximum.accumulate(np.where(self.part_lengths < 0, np.arange(len(patches)), -1))
        found = last[ends - 1]  # the last image up to the end of each document
        own = found >= self.starts[:-1]
        final = patches[ends - 1]
        return ImagePatches(self._sums(patches), np.where(own, patches[found], 0), final)

    def _patches(self, num_patches: int) -> np.ndarray:
        """Return the positions of the patches of each part, 0 for texts, (num_parts,)."""
        if self.image_positions is not None:
            return self.image_positions
        return np.where(self.part_lengths < 0, num_patches, 0)

    def pairs(self) -> np.ndarray:
        """Find documents of exactly one text and one image, (num_documents,) bool."""
        images = self._sums(self.part_lengths < 0)
        return (images == 1) & (np.diff(self.starts) == 2)

    def edits(self) -> np.ndarray:
        """Find documents of exactly image, instruction, image, (num_documents,) bool."""
        found = np.diff(self.starts) == 3
        first = self.starts[:-1][found]
        image = self.part_lengths < 0
        found[found] = image[first] & ~image[first + 1] & image[first + 2]
        return found

    def prompted(self) -> np.ndarray:
        """Find documents whose last image is generated after a text, (num_documents,) bool."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.starts))
        is_image = self.part_lengths < 0
        images, texts = np.flatnonzero(is_image), np.flatnonzero(~is_image)
        last_image, first_text = np.full(len(self), -1), np.full(len(self), len(owner))
        last_image[owner[images]] = images
        first_text[owner[texts[::-1]]] = texts[::-1]
        found = first_text < last_image
        found[found] = self.part_lengths[last_image[found]] == IMAGE
        return found

    def num_images(self) -> np.ndarray:
        """Count the images of each document, (num_documents,)."""
        return self._sums(self.part_lengths < 0)

    def _sums(self, of_parts: np.ndarray) -> np.ndarray:
        """Sum a value per part over each document, (num_documents,)."""
        totals = np.concatenate([[0], np.cumsum(of_parts)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]


class ImagePatches(NamedTuple):
    """Positions of the images' patches in each document, (num_documents,) each."""

    total: np.ndarray  # of all images
    last: np.ndarray  # of the last image
    final: np.ndarray  # of the last part, which nothing in the document reads; 0 if it is a text


def select_layout(
    parts: np.ndarray,
    starts: np.ndarray,
    documents: np.ndarray,
    wordings: np.ndarray | None,
    image_positions: np.ndarray | None = None,
) -> Layout:
    """Describe some documents of a corpus; the index of other documents is not read.

    Args:
        parts: parts.npy of the corpus, (num_parts, 2).
        starts: documents.npy of the corpus, (num_documents + 1,).
        documents: numbers of the documents, (n,).
        wordings: as in `Corpus.layout`, (n,).
        image_positions: positions of the patches of each image of the corpus, (num_images,); None:
            all images have the same number.
    """
    first = starts[documents]
    counts = starts[documents + 1] - first
    chosen = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(chosen[-1]) + np.repeat(first - chosen[:-1], counts)
    lengths = parts[places, 1]
    other = lengths < ALTERNATIVE
    positions = None
    if image_positions is not None:
        image = (lengths == IMAGE) | (lengths == CONTEXT_IMAGE)
        positions = np.zeros(len(places), np.int64)
        positions[image] = image_positions[parts[places[image], 0]]
    if not other.any():
        return Layout(lengths, chosen, positions)
    firsts = np.flatnonzero(~other)  # parts without the other wordings
    owner = np.repeat(np.arange(len(documents)), counts)[firsts]
    number = np.diff(np.append(firsts, len(lengths)))  # wordings of each part
    drawn = np.zeros(len(documents)) if wordings is None else wordings
    picked = lengths[firsts + (drawn[owner] * number).astype(np.int64)]
    picked = np.where(picked < ALTERNATIVE, ALTERNATIVE - picked, picked)
    positions = None if positions is None else positions[firsts]
    return Layout(picked, np.searchsorted(owner, np.arange(len(documents) + 1)), positions)


def choose_wordings(lengths: list[int], wording: float) -> Iterator[int]:
    """Yield the places of the parts of a document, with one wording of each text."""
    place = 0
    while place < len(lengths):
        end = place + 1
        while end < len(lengths) and lengths[end] < ALTERNATIVE:
            end += 1
        yield place + int(wording * (end - place))
        place = end


class LazyImages:
    """The images of a corpus, read from their source files whenever they are needed.

    Pillow takes as long to hand over an array as to decode a small image, so torchcodec decodes the
    files for which it gave the same pixels when the corpus was prepared.

    Args:
        files: paths of the source files.
        locations: file number, first byte, number of bytes and whether `decode` gives the prepared
            image, (num_images, 4).
        own_file: pictures.bin, with copies of images that have no byte range in a source file.
        folder: the current folder when the corpus was prepared; None: it is not known. A file that
            is missing is looked for at the same place relative to the present current folder, so
            that a project moves with its images.
    """

    def __init__(
        self,
        files: list[str],
        locations: np.ndarray,
        own_file: Path,
        folder: str | None = None,
    ):
        self.files = [*files, str(own_file)]  # OWN_FILE is the last
        self.folder = folder
        self.locations = locations
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # by file number, oldest first

    def read(self, number: int, checksum: Checksum, size: Size, crop: int = 0) -> Tensor:
        """Read image `number`, uint8 (3, H, W).

        Args:
            number: number of the image.
            checksum: checksum of the file's bytes.
            size: width W and height H of the image.
            crop: index into CROP_POSITIONS; ignored for images that `decode` reads, which have the
                right size.

        Raises:
            UserError: the source file is missing or has changed since it was prepared.
            ValueError: the corpus is damaged.
        """
        file, offset, num_bytes, decodes_alike = self.locations[number].tolist()
        if not OWN_FILE <= file < len(self.files):
            raise ValueError("image in a file that is not listed")
        content = np.empty(num_bytes, np.uint8)
        try:
            if os.preadv(self._open(file), [content], offset) != num_bytes:
                raise BadSample("truncated file")
            if decodes_alike:
                return decode(verified(content, checksum))
            file_bytes = verified(content, checksum).tobytes()
            image = load_image(file_bytes, [size], CROP_POSITIONS[crop])
        except (OSError, *DECODE_ERRORS, BadSample) as error:
            if file == OWN_FILE:
                raise ValueError("damaged image") from error
            raise UserError(
                f"image {number:,} at byte {offset:,} of {self.files[file]} cannot be read any "
                "more; restore the file, or run `tf-lightning prepare` again"
            ) from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _open(self, file: int) -> int:
        """Return a file's descriptor; the least recently used one is closed if there are many."""
        if file not in self._descriptors:
            if len(self._descriptors) == OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            path = Path(self.files[file])
            if self.folder and not path.exists():
                path = Path(os.path.relpath(path, self.folder))
            self._descriptors[file] = os.open(path, os.O_RDONLY)
        self._descriptors.move_to_end(file)
        return self._descriptors[file]


def decode(content: np.ndarray) -> Tensor:
    """Decode the bytes of a JPEG or PNG file with torchcodec, uint8 (3, H, W).

    Raises:
        RuntimeError, ValueError: the bytes cannot be decoded (DECODE_ERRORS).
    """
    decoder = decode_jpeg if content[0] == JPEG else decode_png
    return decoder(torch.from_numpy(content), mode="RGB")


def decodes_alike(image: Image.Image, content: bytes) -> bool:
    """Check whether `decode` gives exactly this image from the bytes of its file."""
    try:
        pixels = decode(np.frombuffer(bytearray(content), np.uint8))
    except DECODE_ERRORS:  # neither JPEG nor PNG
        return False
    return np.array_equal(pixels.numpy(), np.asarray(image).transpose(2, 0, 1))


def checksum_seed(place: int, count: int) -> int:
    """Initial value of the CRC-32 of part `place` of `count`.

    It differs between parts, so a checksum also finds parts that were exchanged.
    """
    return (place << 16 | count) & 0xFFFFFFFF


def verified(content: np.ndarray, checksum: Checksum) -> np.ndarray:
    """Return the content of a part; raise ValueError if its CRC-32 is wrong."""
    seed, crc = checksum
    if zlib.crc32(content, seed) != crc:
        raise ValueError("the checksum of a part is wrong")
    return content


def _check_index(parts: np.ndarray, documents: np.ndarray, checks: np.ndarray) -> None:
    """Raise ValueError unless the arrays have the right types and `documents` divides the parts."""
    kinds = [(array.dtype, array.shape[1:]) for array in (parts, documents, checks)]
    if kinds != [(np.int64, (2,)), (np.int64, ()), (np.uint32, ())] or len(documents) == 0:
        raise ValueError("an index array has the wrong type or shape")
    if len(checks) != len(parts):
        raise ValueError("the numbers of checksums and parts differ")
    if documents[0] != 0 or documents[-1] != len(parts):
        raise ValueError("the documents do not cover the parts")
    for start in range(0, len(documents), INDEX_CHUNK):
        if (np.diff(documents[start : start + INDEX_CHUNK + 1]) < 0).any():
            raise ValueError("the documents are out of order")


def _check_shapes(shapes: np.ndarray, num_images: int) -> None:
    """Raise ValueError unless the array has the right type and shape."""
    if shapes.dtype != np.int64 or shapes.shape != (num_images, 4):
        raise ValueError("shapes.npy has the wrong type or shape")


def _num_positions(shapes: np.ndarray) -> int:
    """Return the sum of h * w over all images of shapes.npy."""
    if not len(shapes):
        return 0
    before, height, width, _ = shapes[-1].tolist()
    return before + height * width


def _check_parts(parts: list[list[int]], num_tokens: int, num_images: int) -> None:
    """Raise ValueError unless all parts lie within the stored tokens and images."""
    for start, length in parts:
        if length in (IMAGE, CONTEXT_IMAGE):
            end, limit = start + 1, num_images
        else:
            tokens = length if length >= 0 else ALTERNATIVE - length
            end, limit = start + tokens, num_tokens
        if start < 0 or end > limit:
            raise ValueError("a part lies outside of its file")
