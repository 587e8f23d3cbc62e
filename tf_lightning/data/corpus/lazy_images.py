"""Images that a corpus reads from their source files whenever they are needed."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchcodec.decoders import decode_jpeg, decode_png

from tf_lightning.data.buckets import Size
from tf_lightning.data.corpus.damage import Checksum, verified
from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import CROP_POSITIONS, load_image
from tf_lightning.errors import UserError

OPEN_FILES = 64
OWN_FILE = -1  # file number of pictures.bin
JPEG = 0xFF  # first byte of a JPEG file
DECODE_ERRORS = RuntimeError, ValueError  # raised by torchcodec for bytes that it cannot decode


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
