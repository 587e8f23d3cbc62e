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
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tf_lightning.batch import Document
from tf_lightning.data.corpus.damage import (
    Checksum,
    check_index,
    check_parts,
    check_shapes,
    checksum_seed,
    refuse_damage,
    verified,
)
from tf_lightning.data.corpus.folders import LocalFolder, fetch, open_corpus_folder
from tf_lightning.data.corpus.image_storage import (
    STORED_CODES,
    STORED_LATENTS,
    ImageStorageSpec,
    draw_latents,
)
from tf_lightning.data.corpus.lazy_images import LazyImages
from tf_lightning.data.corpus.parts import (
    CONTEXT_IMAGE,
    IMAGE,
    PartLayout,
    choose_wordings,
    num_tokens,
    select_layout,
)
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file


class Corpus(Dataset):
    """A prepared corpus: a dataset of documents, in the order of their source.

    `corpus[i]` is document i with the first wordings of its texts, see `document`.

    Args:
        path: its folder, or the URL of a folder in a copy of an encoded folder.
        sample_posterior: whether `document` samples latents if their moments are stored.

    Attributes:
        folder: access to the files.
        name: name of the folder.
        image_shape: (C, h, w) of the latents, the most frequent one if they differ; None without
            images.
        image_shapes: the (C, h, w) of all latents, each with its number of images.
        image_storage: the form in which images are stored.
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
            check_shapes(self._shapes, self.num_images)
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
        check_index(self._parts, self._documents, self._checks)

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
        check_parts(parts, len(self._tokens), self.num_images)
        view = self.image_storage.draw_view(random)
        document = []
        for place in choose_wordings([length for _, length in parts], wording):
            start, length = parts[place]
            checksum = checksum_seed(place, len(parts)), checks[place]
            if length in (IMAGE, CONTEXT_IMAGE):
                document.append(self._image(start, checksum, view, random))
            else:
                tokens = verified(self._tokens[start : start + num_tokens(length)], checksum)
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
                blocks += self._tokens.blocks(start, start + num_tokens(length))
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
    ) -> "PartLayout":
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


def _num_positions(shapes: np.ndarray) -> int:
    """Return the sum of h * w over all images of shapes.npy."""
    if not len(shapes):
        return 0
    before, height, width, _ = shapes[-1].tolist()
    return before + height * width
