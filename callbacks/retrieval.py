"""Retrieval accuracy: whether a model generates the image that belongs to each prompt."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.media import log_values
from callbacks.prompts import as_image, find_source
from callbacks.results import outside_fit, weights_step
from callbacks.sampling import (
    check_draws,
    check_module,
    check_no_size,
    image_protocol,
    report_on_rank_zero,
    resolve_sampling,
)
from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import Skipped, Source, Split
from tf_lightning.data.images import to_pixels
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import Prompt
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments
from tf_lightning.training.module import Transfusion

BATCH_SIZE = 32  # prompts sampled together
CHUNK = 1_024  # real images that are compared together


class Example(NamedTuple):
    """A prompt and the image that belongs to it."""

    prompt: Prompt
    answer: Image.Image

    @property
    def texts(self) -> list[str]:
        """The texts of the prompt."""
        parts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return [part for part in parts if isinstance(part, str)]

    @property
    def inputs(self) -> list[Image.Image]:
        """The images of the prompt; none in a caption."""
        parts = self.prompt if isinstance(self.prompt, list) else []
        return [part for part in parts if not isinstance(part, str)]


class Verdict(NamedTuple):
    """Whether the nearest image is the right one, and how probable that is by chance."""

    right: bool
    chance: float


class RetrievalAccuracy(L.Callback):
    """Generates images from prompts of a source and finds the nearest real image of each.

    A prompt is the caption of an image, or all that comes before the last image of a document, such
    as an image and an instruction. The image that belongs to the prompt is its answer. An image is
    generated in the size of the answer, and is compared with the real images of this size by
    squared pixel distance. Two shares are measured:

    - `retrieval_accuracy`: share of the prompts whose answer is the nearest of all different images
      in the source, of both splits.
    - `nearest_variant`: share of the prompts with images whose answer is the nearest of the
      variants. These are the images of the prompt and the answers of all prompts with the same
      images, of both splits: for an edit, the image before it and the results of all edits of this
      image. An edit can be right here although another object looks more like the generated image.
      Left out if no prompt has images.

    It runs at the end of `fit`, and in `validate` and `test`. It writes `retrieval.json` and the
    contact sheet `retrieval.png`, and logs `val/retrieval_accuracy[retrieval]` and
    `val/nearest_variant[retrieval]`. The file also has the shares that a random choice of the image
    would give.

    Args:
        source: name of the source in the data's `sources`.
        num_prompts: number of prompts, evenly spread over the split.
        sampling: how images are sampled; without width and height.
        seed: prompt i is sampled with seed + i.
        split: split of the prompts: "train" measures memorization, "val" generalization.
        containing: only prompts with this in their text, such as "skin tone"; null: all prompts.
        name: name of the two files, without suffix, and label of the logged values. Several of
            these callbacks need several names.
    """

    def __init__(
        self,
        source: str,
        num_prompts: PositiveInt = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: NonNegativeInt = 0,
        split: Split = "train",
        containing: str | None = None,
        name: str = "retrieval",
    ):
        check_arguments(RetrievalAccuracy.__init__, locals())
        self.source, self.num_prompts, self.seed = source, num_prompts, seed
        self.sampling, self.split, self.containing, self.name = sampling, split, containing, name

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check the options before data is prepared.

        Raises:
            UserError: an option does not fit the model, or the split has no prompt for an image.
        """
        check_module(model, self)
        check_draws(data, self, "set retrieval_accuracy to null")
        check_no_size(self.sampling, self, "which generates images in the sizes of the real ones")
        self.sampling = resolve_sampling(self.sampling, model)
        found = self._only_containing(examples(find_source(data, self.source), self.split))
        if next(found, None) is None:
            text = "" if self.containing is None else f" with {self.containing!r} in its text"
            raise UserError(
                f"source {self.source!r} has no captioned or edited image{text} to retrieve in its "
                f"{self.split} split; name another"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        self.before_run(trainer, pl_module, trainer.datamodule)

    def examine(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Generate images, find their nearest images and write the results, on rank zero."""
        report_on_rank_zero(trainer, pl_module, f"RetrievalAccuracy of {self.source}", self.report)

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine

    def report(
        self, trainer: L.Trainer, pl_module: Transfusion, pipe: TransfusionPipeline, folder: Path
    ) -> None:
        """Write and log the results of a pipeline with the module's weights."""
        source = trainer.datamodule.sources[self.source]
        of_split = {split: [*examples(source, split)] for split in ("train", "val")}
        known, asked = of_split["train"] + of_split["val"], self.choose(of_split[self.split])
        images = different_images(known)
        with trainer.precision_plugin.forward_context():
            generated = self.generate(pipe, asked)
        verdicts = judge(generated, [example.answer for example in asked], images)
        among_variants = judge_variants(generated, asked, known)
        scores = {"retrieval_accuracy": share_right(verdicts)}
        scores |= {"nearest_variant": share_right(among_variants)} if among_variants else {}
        step = weights_step(trainer, pl_module)
        report = {
            **scores,
            **chances(verdicts, among_variants),
            "num_prompts": len(asked),
            "num_images": len(images),
            "source": self.source,
            "split": self.split,
            "containing": self.containing,
            "seed": self.seed,
            "global_step": step,
            **image_protocol(self.sampling, pl_module),
        }
        chosen = f" with {self.containing!r}" if self.containing else ""
        asked_of = f"{self.source} ({self.split}){chosen}"
        title = summary(verdicts, among_variants, asked_of, len(images))
        with atomic_file(folder / f"{self.name}.png") as file:
            sheet(title, asked, generated, verdicts).save(file, format="PNG")
        with atomic_file(folder / f"{self.name}.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        log_values(trainer, step, {f"val/{name}[{self.name}]": v for name, v in scores.items()})
        rank_zero_info(f"{title}; wrote {folder}/{self.name}.png and {self.name}.json")

    def choose(self, found: Iterable[Example]) -> list[Example]:
        """Choose the prompts, evenly spread."""
        found = [*self._only_containing(found)]
        count = min(self.num_prompts, len(found))
        return [found[i] for i in torch.linspace(0, len(found) - 1, count).round().long().tolist()]

    def _only_containing(self, found: Iterable[Example]) -> Iterator[Example]:
        text = self.containing or ""
        return (example for example in found if any(text in part for part in example.texts))

    def generate(self, pipe: TransfusionPipeline, asked: Sequence[Example]) -> list[Image.Image]:
        """Generate an image from each prompt, in the size of the prompt's own image."""
        generated: dict[int, Image.Image] = {}
        for (width, height), indices in indices_by_size(e.answer for e in asked).items():
            for start in range(0, len(indices), BATCH_SIZE):
                batch = indices[start : start + BATCH_SIZE]
                output = pipe(
                    [asked[index].prompt for index in batch],
                    output_modality="image",
                    seed=[self.seed + index for index in batch],
                    batch_size=BATCH_SIZE,
                    progress=False,
                    sampling=self.sampling.with_options(width=width, height=height),
                )
                generated |= zip(batch, output.images, strict=True)
        return [generated[index] for index in range(len(asked))]


def examples(source: Source, split: Split) -> Iterator[Example]:
    """Yield each document with a caption, or with text before a last image, as an example."""
    for document in source.documents(split):
        parts = [] if isinstance(document, Skipped) else document
        texts = sum(isinstance(part, str) for part in parts)
        if len(parts) == 2 and texts == 1:
            parts = sorted(parts, key=lambda part: not isinstance(part, str))
        if texts and not isinstance(parts[-1], str):
            *prompt, image = (p if isinstance(p, str) else as_image(p) for p in parts)
            yield Example(prompt[0] if len(prompt) == 1 else prompt, image)


def judge(
    generated: Sequence[Image.Image],
    answers: Sequence[Image.Image],
    candidates: Sequence[Image.Image],
) -> list[Verdict]:
    """Judge whether the nearest candidate of each generated image is its answer.

    Args:
        generated: generated images, each in the size of its answer.
        answers: the right image for each of them.
        candidates: different images, with all answers among them. An image is compared with those
            of its size.
    """
    verdicts: dict[int, Verdict] = {}
    for size, indices in indices_by_size(answers).items():
        alike = [image for image in candidates if image.size == size]
        pixels = torch.stack([to_pixels(generated[index]) for index in indices])
        nearest = nearest_images(pixels, map(to_pixels, alike)).tolist()
        for index, found in zip(indices, nearest, strict=True):
            is_right = alike[found].tobytes() == answers[index].tobytes()
            verdicts[index] = Verdict(is_right, 1 / len(alike))
    return [verdicts[index] for index in range(len(answers))]


def judge_variants(
    generated: Sequence[Image.Image], asked: Sequence[Example], known: Iterable[Example]
) -> list[Verdict]:
    """Judge the images of the prompts with images, among the variants of these images.

    Args:
        generated: an image for each prompt.
        asked: the prompts.
        known: all prompts, with those that are asked among them.
    """
    groups: dict[tuple[bytes, ...], list[Example]] = {}
    for example in known:
        groups.setdefault(tuple(map(digest, example.inputs)), []).append(example)
    verdicts = []
    for image, example in zip(generated, asked, strict=True):
        if example.inputs:
            variants = different_images(groups[tuple(map(digest, example.inputs))])
            verdicts += judge([image], [example.answer], variants)
    return verdicts


def different_images(found: Iterable[Example]) -> list[Image.Image]:
    """List the images of prompts and answers, each once."""
    images = (image for example in found for image in (example.answer, *example.inputs))
    return list({digest(image): image for image in images}.values())


def digest(image: Image.Image) -> bytes:
    """Return a hash of the size and the pixels of an image."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def indices_by_size(images: Iterable[Image.Image]) -> dict[Size, list[int]]:
    """Return the indices of the images of each size."""
    indices: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        indices.setdefault(image.size, []).append(index)
    return indices


def share_right(verdicts: Sequence[Verdict]) -> float:
    """Return the share of right verdicts."""
    return fmean(verdict.right for verdict in verdicts)


def chances(
    verdicts: Sequence[Verdict], among_variants: Sequence[Verdict]
) -> dict[str, float | int]:
    """Return the shares that are expected by chance, and the number of prompts with images."""
    found = {"chance": fmean(verdict.chance for verdict in verdicts)}
    if not among_variants:
        return found
    return found | {
        "nearest_variant_chance": fmean(verdict.chance for verdict in among_variants),
        "num_prompts_with_images": len(among_variants),
    }


def summary(
    verdicts: Sequence[Verdict], among_variants: Sequence[Verdict], asked: str, num_images: int
) -> str:
    """Return the scores in words."""
    right = sum(verdict.right for verdict in verdicts)
    text = (
        f"For {right} of {len(verdicts)} prompts of {asked}, the right image is the nearest of its "
        f"size among {num_images} real images"
    )
    if among_variants:
        right, count = sum(verdict.right for verdict in among_variants), len(among_variants)
        text += f"; for {right} of {count}, it is the nearest variant of the input image"
    return text


def sheet(
    title: str,
    asked: Sequence[Example],
    generated: Sequence[Image.Image],
    verdicts: Sequence[Verdict],
) -> Image.Image:
    """Draw the generated images with their captions, or each beside the image before the edit."""
    tiles = []
    for example, image, verdict in zip(asked, generated, verdicts, strict=True):
        text = " ".join(example.texts)
        tiles += [Tile(before, text) for before in example.inputs[-1:]]
        tiles.append(Tile(image, "" if example.inputs else text, verdict.right))
    return contact_sheet([(title, tiles)], columns=5 if len(tiles) == len(asked) else 6)


def nearest_images(generated: Tensor, images: Iterable[Tensor]) -> Tensor:
    """Return the index (n,) of the nearest of `images` (3, H, W) to each of `generated`.

    Args:
        generated: (n, 3, H, W).
        images: read CHUNK at a time.
    """
    images, distances = iter(images), []
    while chunk := [*islice(images, CHUNK)]:
        distances.append(torch.cdist(generated.flatten(1), torch.stack(chunk).flatten(1)))
    return torch.cat(distances, 1).argmin(1)
