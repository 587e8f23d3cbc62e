"""Checks of the content of a corpus, and the message if one fails."""

import zlib
from collections.abc import Callable
from functools import wraps

import numpy as np

from tf_lightning.data.corpus.parts import CONTEXT_IMAGE, IMAGE, num_tokens
from tf_lightning.errors import UserError

INDEX_CHUNK = 1_000_000  # documents checked at once, to bound the memory of a large index
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


def check_index(parts: np.ndarray, documents: np.ndarray, checks: np.ndarray) -> None:
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


def check_shapes(shapes: np.ndarray, num_images: int) -> None:
    """Raise ValueError unless the array has the right type and shape."""
    if shapes.dtype != np.int64 or shapes.shape != (num_images, 4):
        raise ValueError("shapes.npy has the wrong type or shape")


def check_parts(parts: list[list[int]], total_tokens: int, num_images: int) -> None:
    """Raise ValueError unless all parts lie within the stored tokens and images."""
    for start, length in parts:
        if length in (IMAGE, CONTEXT_IMAGE):
            end, limit = start + 1, num_images
        else:
            end, limit = start + num_tokens(length), total_tokens
        if start < 0 or end > limit:
            raise ValueError("a part lies outside of its file")
