"""Pictures that stay where they are, in tars and files, and are read by number when trained on.

Those in parquet and packed tars lie nowhere by themselves: the corpus has a copy of their files.
Pillow, which every picture is prepared with, takes as long again to hand over an array as to decode
a small picture. Where torchcodec was seen to make the same pixels, it reads them.
"""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchcodec.decoders import decode_jpeg, decode_png

from tf_lightning.data.corpus import BadSample, Check, intact
from tf_lightning.data.images import CROPS, load_picture
from tf_lightning.errors import UserError

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
            crop: which of CROPS; those of what is `read_alike` are one.

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
            picture = load_picture(intact(content, check).tobytes(), self.image_size, CROPS[crop])
        except (OSError, *UNREADABLE, BadSample) as error:
            if file == OWN:
                raise ValueError("damaged picture") from error
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
