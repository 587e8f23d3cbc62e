"""Retrieval accuracy: whether a model generates the image that belongs to each prompt."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.prompts import as_image, find_source
from callbacks.results import is_trial, outside_fit, run_folder
from callbacks.sampling import (
    check_draws,
    check_module,
    image_protocol,
    resolve_sampling,
)
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


class RetrievalAccuracy(L.Callback):
    """Generates images from prompts of a source and finds the nearest real image of each.

    A prompt is the caption of an image, or all that comes before the last image of a document, such
    as an image and an instruction. The accuracy is the share of generated images whose nearest
    image is the one that the prompt belongs to. An image is generated in the shape of the prompt's
    own image. The search covers all N different images of this shape in the source, of both splits,
    by squared pixel distance, so chance level is 1/N, or the mean of it with several shapes. It
    runs at the end of `fit`, and in `validate` and `test`. It writes `retrieval.json` and the
    contact sheet `retrieval.png`.

    Args:
        source: name of the source in the data's `sources`.
        num_prompts: number of prompts, evenly spread over the split.
        sampling: how images are sampled.
        seed: prompt i is sampled with seed + i.
        split: split of the prompts: "train" measures memorization, "val" generalization.
        name: name of the two files, without suffix. Several of these callbacks need several names.
    """

    def __init__(
        self,
        source: str,
        num_prompts: PositiveInt = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: NonNegativeInt = 0,
        split: Split = "train",
        name: str = "retrieval",
    ):
        check_arguments(RetrievalAccuracy.__init__, locals())
        self.source, self.num_prompts, self.seed = source, num_prompts, seed
        self.sampling, self.split, self.name = sampling, split, name

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check the options before data is prepared.

        Raises:
            UserError: an option does not fit the model, or the split has no prompt for an image.
        """
        check_module(model, self)
        check_draws(data, self, "set retrieval_accuracy to null")
        self.sampling = resolve_sampling(self.sampling, model)
        if next(image_prompts(find_source(data, self.source), self.split), None) is None:
            raise UserError(
                f"source {self.source!r} has no captioned or edited image to retrieve in its "
                f"{self.split} split; name another"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        self.before_run(trainer, pl_module, trainer.datamodule)

    def examine(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Generate images, find their nearest images and write the results, on rank zero."""
        if is_trial(trainer):
            return
        folder = run_folder(trainer)  # on every rank
        pipe = TransfusionPipeline.from_module(pl_module)  # on every rank, if it is sharded
        if not trainer.is_global_zero:
            return
        pl_module.eval()
        source = trainer.datamodule.sources[self.source]
        documents = {split: [*image_prompts(source, split)] for split in ("train", "val")}
        asked = documents[self.split]
        count = min(self.num_prompts, len(asked))
        indices = torch.linspace(0, len(asked) - 1, count).round().long().tolist()
        prompts, answers = map(list, zip(*(asked[index] for index in indices), strict=True))
        images = different_images(documents["train"] + documents["val"])
        sizes = [answer.size for answer in answers]
        is_default = {*sizes} == {pipe.image_sizes.trained[0]}
        generated: dict[int, Image.Image] = {}
        right, chance = [False] * count, 0.0
        for size in dict.fromkeys(sizes):
            alike = [index for index, other in enumerate(sizes) if other == size]
            with trainer.precision_plugin.forward_context():
                made = self._generate(pipe, prompts, alike, None if is_default else size)
            generated |= zip(alike, made, strict=True)
            known = [image for image in images if image.size == size]
            chance += len(alike) / len(known) / count
            nearest = nearest_images(torch.stack([*map(to_pixels, made)]), map(to_pixels, known))
            for index, found in zip(alike, nearest.tolist(), strict=True):
                right[index] = known[found].tobytes() == answers[index].tobytes()
        tiles = [
            tile
            for index, (prompt, verdict) in enumerate(zip(prompts, right, strict=True))
            for tile in prompt_tiles(prompt, generated[index], verdict)
        ]
        title = (
            f"For {sum(right)} of {count} prompts of {self.source} ({self.split}), the nearest of "
            f"its shape among {len(images)} real images is the right one"
        )
        with atomic_file(folder / f"{self.name}.png") as file:
            sheet = contact_sheet([(title, tiles)], columns=5 if len(tiles) == count else 6)
            sheet.save(file, format="PNG")
        report = {
            "retrieval_accuracy": sum(right) / count,
            "chance": chance,
            "num_prompts": count,
            "num_images": len(images),
            "source": self.source,
            "split": self.split,
            "seed": self.seed,
            "global_step": trainer.global_step or pl_module.loaded_step,
            **image_protocol(self.sampling, pl_module),
        }
        with atomic_file(folder / f"{self.name}.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        rank_zero_info(f"{title}; wrote {folder}/{self.name}.png and {self.name}.json")

    def _generate(
        self,
        pipe: TransfusionPipeline,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        size: tuple[int, int] | None,
    ) -> list[Image.Image]:
        """Generate images from some of the prompts, of a size (width, height) or the model's."""
        width, height = size or (self.sampling.width, self.sampling.height)
        sampling = self.sampling.with_options(width=width, height=height)
        images: list[Image.Image] = []
        for start in range(0, len(indices), BATCH_SIZE):
            batch = indices[start : start + BATCH_SIZE]
            output = pipe(
                [prompts[index] for index in batch],
                output_modality="image",
                seed=[self.seed + index for index in batch],
                batch_size=BATCH_SIZE,
                progress=False,
                sampling=sampling,
            )
            images += output.images
        return images

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine


def image_prompts(source: Source, split: Split) -> Iterator[tuple[Prompt, Image.Image]]:
    """Yield (prompt, image) of every document with a caption, or with text before a last image."""
    for document in source.documents(split):
        parts = [] if isinstance(document, Skipped) else document
        texts = sum(isinstance(part, str) for part in parts)
        if len(parts) == 2 and texts == 1:
            parts = sorted(parts, key=lambda part: not isinstance(part, str))
        if texts and not isinstance(parts[-1], str):
            *prompt, image = (p if isinstance(p, str) else as_image(p) for p in parts)
            yield prompt[0] if len(prompt) == 1 else prompt, image


def different_images(documents: Iterable[tuple[Prompt, Image.Image]]) -> list[Image.Image]:
    """List the images of prompts and answers, each once."""
    found = {}
    for prompt, answer in documents:
        for part in [answer, *(prompt if isinstance(prompt, list) else ())]:
            if not isinstance(part, str):
                found.setdefault(hashlib.sha256(part.tobytes()).digest(), part)
    return list(found.values())


def prompt_tiles(prompt: Prompt, generated: Image.Image, right: bool) -> list[Tile]:
    """Return the generated image with its caption, or an image and its edited image."""
    if isinstance(prompt, str):
        return [Tile(generated, prompt, right)]
    before = [part for part in prompt if not isinstance(part, str)][-1:]
    text = " ".join(part for part in prompt if isinstance(part, str))
    return [*(Tile(image, text) for image in before), Tile(generated, "", right)]


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
