"""Pictures that stay where they are, in tars and files, and are read by number when trained on."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.images import load_picture
from tf_lightning.errors import UserError

OPEN_FILES = 64


class InPlace:
    """The pictures of a corpus.

    Args:
        files: names.
        places: of each picture: the number of its file, first byte and bytes, (num_images, 3).
        image_size: side of the pictures in pixels.
    """

    def __init__(self, files: list[str], places: np.ndarray, image_size: int):
        self.files, self.places, self.image_size = files, places, image_size
        self._opened: OrderedDict[int, int] = OrderedDict()  # descriptors, by number of the file

    def __getitem__(self, number: int) -> np.ndarray:
        """Picture `number`, uint8 (3, H, W).

        Raises:
            UserError: its file is gone, or is no longer the one that was prepared.
        """
        file, offset, size = self.places[number].tolist()
        try:
            content = os.pread(self._open(file), size, offset)
            picture = load_picture(content, self.image_size)
        except (OSError, BadSample) as error:
            raise UserError(
                f"picture {number:,} at byte {offset:,} of {self.files[file]} cannot be read any "
                "more; bring the file back as it was, or run `tf-lightning prepare` again"
            ) from error
        return np.array(picture).transpose(2, 0, 1)

    def _open(self, file: int) -> int:
        if file not in self._opened:
            if len(self._opened) == OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[file] = os.open(Path(self.files[file]), os.O_RDONLY)
        self._opened.move_to_end(file)
        return self._opened[file]
