"""Prompt sets of published protocols, read from local copies in the layout they are shared in."""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
from PIL import Image

from callbacks.prompts import OpenPicture, Prompt, PromptSet, square
from evaluation.composition import read_prompts
from tf_lightning.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


class CocoPrompts(PromptSet):
    """COCO val2014: random captions to draw, compared with the validation pictures.

    `root`/annotations/captions_val2014.json and `root`/val2014/COCO_val2014_*.jpg, as COCO's own
    archives unpack. Captions are drawn without replacement from all 202,654.

    Args:
        root: folder of the two.
        count: captions.
        real: "all" pictures of the folder (40,504; GigaGAN's script), or "matched", those of the
            captions drawn (the DALL-E and Imagen tradition).
        image_size: real and drawn pictures are centre cropped and resized to it by Lanczos.
        seed: of the choice of captions.
    """

    def __init__(
        self,
        root: str,
        count: int = 30_000,
        real: Literal["all", "matched"] = "all",
        image_size: int = 256,
        seed: int = 0,
    ):
        self.root, self.count, self.real = Path(root), count, real
        self.image_size, self.seed = image_size, seed
        self.facts = {
            "dataset": f"coco val2014, {real} pictures, {count} captions, seed {seed}",
            "resize": f"centre crop, lanczos {image_size}",
        }

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """The captions drawn, each with its picture and all captions of that picture."""
        content = read_json(self.root / "annotations" / "captions_val2014.json")
        files = {image["id"]: image["file_name"] for image in content["images"]}
        told: dict[int, list[str]] = {}
        for note in content["annotations"]:
            told.setdefault(note["image_id"], []).append(note["caption"].strip())
        notes = sorted(content["annotations"], key=lambda note: note["id"])
        if len(notes) < self.count:
            raise UserError(f"{self.root} has {len(notes)} captions; give a count of at most that")
        return [
            Prompt(
                note["caption"].strip(),
                self._open(self.root / "val2014" / files[note["image_id"]]),
                tuple(told[note["image_id"]]),
            )
            for note in random.Random(self.seed).sample(notes, self.count)
        ]

    def real_pictures(self, data: L.LightningDataModule) -> list[OpenPicture]:
        """All pictures of the folder, or one for each caption."""
        if self.real == "all":
            return [self._open(path) for path in picture_files(self.root / "val2014")]
        return [prompt.picture for prompt in self.prompts(data)]

    def _open(self, path: Path) -> OpenPicture:
        return partial(open_picture, path, self.image_size)


class KarpathyPrompts(PromptSet):
    """Karpathy's split of COCO: pictures to caption, with their five captions.

    Args:
        annotations: his dataset_coco.json.
        images: folder with val2014/ in it (and train2014/ for some splits).
        split: "test" (5,000 pictures), "val", "train" or "restval".
        count: the first pictures of the split; None: all.
    """

    image_size = None

    def __init__(
        self, annotations: str, images: str, split: str = "test", count: int | None = None
    ):
        self.annotations, self.images = Path(annotations), Path(images)
        self.split, self.count = split, count
        self.facts = {"dataset": f"coco karpathy {split}", "resize": "as the model reads"}

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """The pictures of the split with their captions, the first of which is the text."""
        images = [i for i in read_json(self.annotations)["images"] if i["split"] == self.split]
        if not images:
            raise UserError(f"{self.annotations} has no picture in its split {self.split!r}")
        asked = []
        for image in images[: self.count]:
            told = tuple(sentence["raw"].strip() for sentence in image["sentences"])
            path = self.images / image["filepath"] / image["filename"]
            asked.append(Prompt(told[0], partial(open_picture, path, None), told))
        return asked

    def real_pictures(self, data: L.LightningDataModule) -> list[OpenPicture]:
        """The split's."""
        return [prompt.picture for prompt in self.prompts(data)]


class ImageNetPrompts(PromptSet):
    """ImageNet's classes by name, as MonoFormer is asked for them; no pictures to caption.

    Args:
        synsets: LOC_synset_mapping.txt, a line "n01440764 tench, Tinca tinca" a class.
        images: folder of real pictures, a folder a class.
        per_class: drawn pictures of each class; 50 of 1000 classes make the usual 50,000.
        template: around the class's first name.
        image_size: real and drawn pictures are centre cropped and resized to it by Lanczos.
    """

    def __init__(
        self,
        synsets: str,
        images: str,
        per_class: int = 50,
        template: str = "Please generate an image of {}",
        image_size: int = 256,
    ):
        self.synsets, self.images = Path(synsets), Path(images)
        self.per_class, self.template, self.image_size = per_class, template, image_size
        self.facts = {
            "dataset": f"imagenet {self.images.name}",
            "resize": f"centre crop, lanczos {image_size}",
        }

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Every class in turn, `per_class` times."""
        lines = read_text(self.synsets).splitlines()
        names = [line.split(" ", 1)[1].split(",")[0].strip() for line in lines if " " in line]
        if not names:
            raise UserError(f"{self.synsets} names no class; it needs lines 'n01440764 tench'")
        return [Prompt(self.template.format(name)) for name in names] * self.per_class

    def real_pictures(self, data: L.LightningDataModule) -> list[OpenPicture]:
        """Every picture of every class."""
        return [partial(open_picture, path, self.image_size) for path in picture_files(self.images)]


class GenEvalPrompts(PromptSet):
    """GenEval's 553 prompts, four pictures each, for `callbacks.geneval.GenEvalFolder`.

    Args:
        file: its evaluation_metadata.jsonl.
        copies: pictures of each prompt.
    """

    image_size = None

    def __init__(self, file: str, copies: int = 4):
        self.file, self.copies = Path(file), copies
        self.facts = {"dataset": "geneval", "resize": "none"}

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Each prompt, `copies` times in a row."""
        read_text(self.file)
        return [
            Prompt(metadata["prompt"], about=(number, self.copies), metadata=metadata)
            for number, metadata in enumerate(read_prompts(self.file))
            for _ in range(self.copies)
        ]

    def real_pictures(self, data: L.LightningDataModule) -> list[OpenPicture]:
        """There are none."""
        return []


def open_picture(path: Path, image_size: int | None) -> Image.Image:
    """An RGB picture, centre cropped to a square and resized by Lanczos; None: as it is.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no readable picture; complete the local copy") from error
    return picture if image_size is None else square(picture, image_size)


def picture_files(folder: Path) -> Sequence[Path]:
    """The pictures in a folder and its folders, by name."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"there are no pictures in {folder}; give the folder of a local copy")
    return found


def read_text(path: Path) -> str:
    """A text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read; give the file of a local copy") from error


def read_json(path: Path) -> dict:
    """A JSON file's content."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}); copy it again") from error
