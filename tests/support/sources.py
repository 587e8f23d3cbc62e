"""Synthetic sources of documents: no files."""

import os
import signal

import numpy as np
from PIL import Image


class RepeatedWord:
    """Texts of one word repeated `words` times and the document's number."""

    def __init__(self, word: str, words: int, num_documents: int = 300, num_val: int = 20):
        self.word, self.words, self.num = word, words, {"train": num_documents, "val": num_val}

    def documents(self, split: str):
        for number in range(self.num[split]):
            yield [f"{self.word} " * self.words + str(number)]

    def fingerprint(self, split: str) -> str:
        return repr((split, vars(self)))


class GreyImages:
    """Captioned square images of one grey level."""

    def __init__(self, side: int = 8, num_documents: int = 300, num_val: int = 20):
        self.side, self.num = side, {"train": num_documents, "val": num_val}

    def documents(self, split: str):
        for number in range(self.num[split]):
            grey = number % 256
            yield [f"grey {grey}", Image.new("RGB", (self.side, self.side), (grey, grey, grey))]

    def fingerprint(self, split: str) -> str:
        return repr((split, vars(self)))


class InterleavedImages(GreyImages):
    """Images before, between and after texts; every tenth document has four images."""

    def documents(self, split: str):
        image = Image.new("RGB", (self.side, self.side))
        shapes = ["i{}i", "{}i{}", "i{}i{}", "ii", "i"] * 2
        for number in range(self.num[split]):
            shape = "iiii" if number % 10 == 9 else shapes[number % 10]
            yield [image if part == "i" else "a word" for part in shape.replace("{}", "t")]


class ShardedNoise:
    """Captioned noise in shards of 4 documents.

    If the environment variable KILL is "SPLIT NUMBER", the process kills itself with SIGKILL before
    that document.
    """

    def __init__(self, num_documents: int = 14, num_val: int = 3, image_size: int = 64):
        self.num, self.image_size = {"train": num_documents, "val": num_val}, image_size
        self.first, self.end = 0, None

    def documents(self, split: str):
        for number in range(self.num[split])[self.first : self.end]:
            if os.environ.get("KILL") == f"{split} {number}":
                os.kill(os.getpid(), signal.SIGKILL)
            yield [f"noise {number}", self.image(split, number)]

    def image(self, split: str, number: int) -> Image.Image:
        random = np.random.default_rng((number, split == "val"))
        size = self.image_size // 8
        colors = random.integers(0, 256, (size, size, 3), np.uint8)
        return Image.fromarray(colors).resize((self.image_size, self.image_size))

    def shards(self, split: str) -> list["ShardedNoise"]:
        found = []
        for first in range(0, self.num[split], 4):
            found.append(ShardedNoise(*self.num.values(), self.image_size))
            found[-1].first, found[-1].end = first, first + 4
        return found

    def fingerprint(self, split: str) -> str:
        return repr((split, vars(self)))
