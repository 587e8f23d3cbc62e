"""Small corpora that tests make up: no files."""

from PIL import Image


class Words:
    """Texts of a given length: no files, no pictures."""

    def __init__(self, word: str, words: int, num_documents: int = 300, num_val: int = 20):
        self.word, self.words, self.num = word, words, {"train": num_documents, "val": num_val}

    def documents(self, split: str):
        for number in range(self.num[split]):
            yield [f"{self.word} " * self.words + str(number)]

    def fingerprint(self, split: str) -> str:
        return repr((split, vars(self)))


class Pictures:
    """Captioned pictures of one colour."""

    def __init__(self, side: int = 8, num_documents: int = 300, num_val: int = 20):
        self.side, self.num = side, {"train": num_documents, "val": num_val}

    def documents(self, split: str):
        for number in range(self.num[split]):
            grey = number % 256
            yield [f"grey {grey}", Image.new("RGB", (self.side, self.side), (grey, grey, grey))]

    def fingerprint(self, split: str) -> str:
        return repr((split, vars(self)))


class Stories(Pictures):
    """Pictures before, between and behind texts; every tenth has four pictures."""

    def documents(self, split: str):
        picture = Image.new("RGB", (self.side, self.side))
        shapes = ["i{}i", "{}i{}", "i{}i{}", "ii", "i"] * 2
        for number in range(self.num[split]):
            shape = "iiii" if number % 10 == 9 else shapes[number % 10]
            yield [picture if part == "i" else "a word" for part in shape.replace("{}", "t")]
