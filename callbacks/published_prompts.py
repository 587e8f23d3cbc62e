"""Prompt sets of published protocols, read from local copies in their original layout."""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
from PIL import Image

from callbacks.prompts import OpenImage, Prompt, PromptSet, center_crop_resize
from evaluation.composition import read_prompts
from tf_lightning.data.readers.folders import CLASS_PROMPT
from tf_lightning.data.readers.formats import is_ignored
from tf_lightning.errors import UserError
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments

# `callbacks.sampling.sample` crops and resizes images to caption.
RESIZED_BY_SAMPLE = "center crop, lanczos to the model's image size"

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class CocoPrompts(PromptSet):
    """COCO val2014: images generated from random captions, compared with the validation images.

    It reads `root`/annotations/captions_val2014.json and `root`/val2014/COCO_val2014_*.jpg, the
    layout of COCO's own archives. Captions are drawn without replacement from all 202,654.

    Args:
        root: folder with annotations/ and val2014/.
        count: number of captions.
        real: "all" images of the folder (40,504; as in GigaGAN's script), or "matched": the images
            of the drawn captions (as in DALL-E and Imagen).
        image_size: real and generated images are center cropped and resized to it with Lanczos.
        seed: seed of the choice of captions.
    """

    def __init__(
        self,
        root: str,
        count: PositiveInt = 30_000,
        real: Literal["all", "matched"] = "all",
        image_size: PositiveInt = 256,
        seed: NonNegativeInt = 0,
    ):
        check_arguments(CocoPrompts.__init__, locals())
        self.root, self.count, self.real = Path(root), count, real
        self.image_size, self.seed = image_size, seed
        self.facts = {
            "dataset": f"coco val2014, {real} pictures, {count} captions, seed {seed}",
            "resize": f"centre crop, lanczos {image_size}",
        }

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Draw captions, each with its image and all captions of that image."""
        content = read_json(self.root / "annotations" / "captions_val2014.json")
        files = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        annotations = sorted(content["annotations"], key=lambda annotation: annotation["id"])
        if len(annotations) < self.count:
            raise UserError(
                f"{self.root} has {len(annotations)} captions, fewer than count={self.count}; "
                "lower count"
            )
        drawn = random.Random(self.seed).sample(annotations, self.count)
        paths = [self.root / "val2014" / files[annotation["image_id"]] for annotation in drawn]
        check_files(paths)
        return [
            Prompt(
                annotation["caption"].strip(),
                self._open(path),
                tuple(captions[annotation["image_id"]]),
            )
            for annotation, path in zip(drawn, paths, strict=True)
        ]

    def real_images(self, data: L.LightningDataModule) -> list[OpenImage]:
        """Return all images of the folder, or the image of each drawn caption."""
        if self.real == "all":
            return [self._open(path) for path in image_files(self.root / "val2014")]
        return [prompt.image for prompt in self.prompts(data)]

    def _open(self, path: Path) -> OpenImage:
        return partial(open_image, path, self.image_size)


class KarpathyPrompts(PromptSet):
    """Karpathy's split of COCO: images to caption, each with five reference captions.

    Args:
        annotations: the file dataset_coco.json.
        images: folder with val2014/, and with train2014/ for the splits that use it.
        split: "test" (5,000 images), "val", "train" or "restval".
        count: number of images, from the start of the split; None: all.
    """

    image_size = None

    def __init__(
        self, annotations: str, images: str, split: str = "test", count: PositiveInt | None = None
    ):
        check_arguments(KarpathyPrompts.__init__, locals())
        self.annotations, self.images = Path(annotations), Path(images)
        self.split, self.count = split, count
        self.facts = {"dataset": f"coco karpathy {split}", "resize": RESIZED_BY_SAMPLE}

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Return the images of the split with their captions; the first caption is the text."""
        images = [i for i in read_json(self.annotations)["images"] if i["split"] == self.split]
        if not images:
            raise UserError(
                f"{self.annotations} has no image in the split {self.split!r}; name another split"
            )
        images = images[: self.count]
        paths = [self.images / image["filepath"] / image["filename"] for image in images]
        check_files(paths)
        found = []
        for image, path in zip(images, paths, strict=True):
            captions = tuple(sentence["raw"].strip() for sentence in image["sentences"])
            found.append(Prompt(captions[0], partial(open_image, path, None), captions))
        return found

    def real_images(self, data: L.LightningDataModule) -> list[OpenImage]:
        """Return the images of the split."""
        return [prompt.image for prompt in self.prompts(data)]


class ImageNetPrompts(PromptSet):
    """ImageNet's classes by name, with MonoFormer's prompt; there are no images to caption.

    Args:
        synsets: the file LOC_synset_mapping.txt, with a line "n01440764 tench, Tinca tinca" for
            each class.
        images: folder of real images, with a folder for each class.
        per_class: generated images of each class; 50 of 1000 classes make the usual 50,000.
        template: prompt, in which {} is replaced by the first name of the class.
        image_size: real and generated images are center cropped and resized to it with Lanczos.
    """

    def __init__(
        self,
        synsets: str,
        images: str,
        per_class: PositiveInt = 50,
        template: str = CLASS_PROMPT,
        image_size: PositiveInt = 256,
    ):
        check_arguments(ImageNetPrompts.__init__, locals())
        if "{}" not in template:
            raise UserError(f"template={template!r} has no place {{}} for the name of the class")
        self.synsets, self.images = Path(synsets), Path(images)
        self.per_class, self.template, self.image_size = per_class, template, image_size
        self.facts = {
            "dataset": f"imagenet {self.images.name}",
            "resize": f"centre crop, lanczos {image_size}",
        }

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Return the prompts of all classes, `per_class` times."""
        lines = read_text(self.synsets).splitlines()
        names = [line.split(" ", 1)[1].split(",")[0].strip() for line in lines if " " in line]
        if not names:
            raise UserError(
                f"{self.synsets} has no class; it needs lines such as 'n01440764 tench'"
            )
        return [Prompt(self.template.format(name)) for name in names] * self.per_class

    def real_images(self, data: L.LightningDataModule) -> list[OpenImage]:
        """Return all images of all classes."""
        return [partial(open_image, path, self.image_size) for path in image_files(self.images)]


class GenEvalPrompts(PromptSet):
    """GenEval's 553 prompts with four images each, for `callbacks.geneval.GenEvalFolder`.

    Args:
        file: the file evaluation_metadata.jsonl.
        copies: number of images of each prompt.
    """

    image_size = None

    def __init__(self, file: str, copies: PositiveInt = 4):
        check_arguments(GenEvalPrompts.__init__, locals())
        self.file, self.copies = Path(file), copies
        self.facts = {"dataset": "geneval", "resize": "none"}

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Return each prompt `copies` times in a row."""
        read_text(self.file)  # raises the error for an unreadable file
        return [
            Prompt(metadata["prompt"], about=(number, self.copies), metadata=metadata)
            for number, metadata in enumerate(read_prompts(self.file))
            for _ in range(self.copies)
        ]

    def real_images(self, data: L.LightningDataModule) -> list[OpenImage]:
        """Return no images: GenEval does not compare distributions."""
        return []


def open_image(path: Path, image_size: int | None) -> Image.Image:
    """Open an RGB image; center crop and resize it with Lanczos if `image_size` is given.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image; complete the local copy") from error
    return image if image_size is None else center_crop_resize(image, image_size)


def check_files(paths: Sequence[Path]) -> None:
    """Refuse an incomplete local copy before anything is generated.

    Raises:
        UserError: files are missing.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(paths):,} images are missing, the first is {missing[0]}; "
            "complete the local copy"
        )


def image_files(folder: Path) -> Sequence[Path]:
    """List the image files in a folder and its subfolders, sorted by path.

    Raises:
        UserError: there are none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_ignored(path.name)
    )
    if not found:
        raise UserError(f"there are no images in {folder}; give the folder of a local copy")
    return found


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: the file is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read; give the file of a local copy") from error


def read_json(path: Path) -> dict:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}); copy it again") from error
