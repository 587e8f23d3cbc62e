"""Images that look alike: perceptual hashes, and the search for an earlier image of the same look.

A perceptual hash (pHash) finds candidates: two of them differ in few bits if their images have the
same coarse structure, whatever their size and compression. It ignores colors and small parts, and
drawings may differ in just these, so the candidates are then compared as thumbnails in color.
Images with different texts must be more alike to count, because their texts may name a small
difference, as "dark" and "medium-dark" do.
"""

import tempfile
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

HASH_SIDE = 8  # the hash has a bit for each of the 8 x 8 lowest frequencies
RESIZED = 4 * HASH_SIDE  # side in pixels of the image that is transformed
THUMBNAIL = 16  # side in pixels
MAX_BITS = 8  # bits of 64 that may differ between hashes
# Largest differences of thumbnails' pixels, in [0, 255]: the mean and the maximum. JPEG of a low
# quality causes half of them.
SAME_TEXT, OTHER_TEXT = (8.0, 64), (4.0, 32)
NUM_BANDS = MAX_BITS + 1
BANDS = [64 * band // NUM_BANDS for band in range(NUM_BANDS + 1)]  # first bits, and the end


class Look(NamedTuple):
    """Features by which images are compared.

    Attributes:
        count: number of images side by side.
        text: a number that stands for their texts.
        hash: perceptual hash, 64 bits.
        thumbnail: RGB in [0, 255], uint8 (THUMBNAIL, THUMBNAIL, 3).
    """

    count: int
    text: int
    hash: int
    thumbnail: np.ndarray


def look_of(images: Sequence[Image.Image], text: int = 0) -> Look:
    """Return the look of the RGB images of a document, placed side by side.

    Args:
        images: the images.
        text: a number that stands for the texts of the document.
    """
    small = side_by_side(images).resize((RESIZED, RESIZED), Image.Resampling.LANCZOS)
    thumbnail = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Look(len(images), text, perceptual_hash(small), np.asarray(thumbnail))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Place images beside each other, from left to right."""
    if len(images) == 1:
        return images[0]
    page = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)))
    left = 0
    for image in images:
        page.paste(image, (left, 0))
        left += image.width
    return page


def perceptual_hash(image: Image.Image) -> int:
    """Compute the pHash of an image, as `imagehash.phash` defines it, 64 bits.

    A bit is set if the coefficient of the discrete cosine transform of the gray image is above the
    median of the 8 x 8 lowest frequencies.
    """
    size = RESIZED, RESIZED
    gray = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), np.float64)
    # Rounding removes the numerical noise of flat images, which would be a random hash.
    low = np.rint(dctn(gray, type=2)[:HASH_SIDE, :HASH_SIDE])
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


class Lookalikes:
    """Finds an earlier image that looks like a given one, without comparing it with all of them.

    A hash is cut into one band more than the bits that may differ, so two similar hashes agree in
    at least one band (multi-index hashing, Norouzi 2012). Only images that share a band are
    compared. It takes about 70 bytes of memory for an image, and 768 bytes of a temporary file.
    """

    def __init__(self):
        self.hashes, self.texts = array("Q"), array("Q")
        self.numbers = array("q")  # the caller's number of each image
        self.sharing: dict[tuple[int, int, int], array] = {}  # images by count, band and its bits
        self.file = tempfile.TemporaryFile()
        self.thumbnails = self._map(1024)

    def find(self, look: Look) -> tuple[int, int] | None:
        """Return the number of the most similar earlier image and the bits that differ, or None."""
        sharing = [self.sharing[key] for key in self._keys(look) if key in self.sharing]
        if not sharing:
            return None
        found = np.concatenate(sharing)
        bits = np.bitwise_count(np.frombuffer(self.hashes, np.uint64)[found] ^ np.uint64(look.hash))
        found = np.unique(found[bits <= MAX_BITS])
        apart = np.abs(self.thumbnails[found].astype(np.int16) - look.thumbnail)
        apart = apart.reshape(len(found), THUMBNAIL * THUMBNAIL * 3)
        mean, largest = apart.mean(1), apart.max(1, initial=0)
        same_text = np.frombuffer(self.texts, np.uint64)[found] == look.text
        limits = np.where(same_text[:, None], SAME_TEXT, OTHER_TEXT)  # (num_found, 2)
        alike = (mean <= limits[:, 0]) & (largest <= limits[:, 1])
        if not alike.any():
            return None
        best = int(found[alike][mean[alike].argmin()])
        return self.numbers[best], (self.hashes[best] ^ look.hash).bit_count()

    def add(self, number: int, look: Look) -> None:
        """Let later images be compared with this one."""
        index = len(self.hashes)
        if index == len(self.thumbnails):
            self.thumbnails = self._map(2 * index)
        self.thumbnails[index] = look.thumbnail
        self.hashes.append(look.hash)
        self.texts.append(look.text)
        self.numbers.append(number)
        for key in self._keys(look):
            self.sharing.setdefault(key, array("i")).append(index)

    def _map(self, count: int) -> np.ndarray:
        """Map a file of at least `count` thumbnails; its content stays."""
        shape = count, THUMBNAIL, THUMBNAIL, 3
        self.file.truncate(int(np.prod(shape)))
        return np.memmap(self.file, np.uint8, "r+", shape=shape)

    def _keys(self, look: Look) -> list[tuple[int, int, int]]:
        return [
            (look.count, first, look.hash >> first & ((1 << end - first) - 1))
            for first, end in zip(BANDS[:-1], BANDS[1:], strict=True)
        ]
