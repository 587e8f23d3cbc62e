"""Retrieval accuracy: whether a model has learnt to generate each image of a small training set."""

import json

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.prompts import caption_pairs, find_source
from callbacks.results import is_trial, outside_fit, run_folder
from callbacks.sampling import (
    check_draws,
    check_module,
    image_protocol,
    refuse_shards,
    resolve_sampling,
)
from tf_lightning.data.images import to_pixels
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments
from tf_lightning.training.module import Transfusion

BATCH_SIZE = 32  # prompts sampled together


class RetrievalAccuracy(L.Callback):
    """Generates images from captions of training images and finds the nearest real image of each.

    The accuracy is the share of generated images whose nearest image is the one that the caption
    belongs to. The search covers all N images of the source, validation images included, by squared
    pixel distance, so chance level is 1/N. It runs at the end of `fit`, and in `validate` and
    `test`. It writes `retrieval.json` and the contact sheet `retrieval.png`.

    Args:
        source: name of the source in the data's `sources`.
        num_prompts: number of captions, evenly spread over the training split.
        sampling: how images are sampled.
        seed: prompt i is sampled with seed + i.
    """

    def __init__(
        self,
        source: str,
        num_prompts: PositiveInt = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: NonNegativeInt = 0,
    ):
        check_arguments(RetrievalAccuracy.__init__, locals())
        self.source, self.num_prompts, self.seed = source, num_prompts, seed
        self.sampling = sampling

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check the options before data is prepared.

        Raises:
            UserError: an option does not fit the model, or the source has no captioned images.
        """
        check_module(model, self)
        check_draws(data, self, "set retrieval_accuracy to null")
        self.sampling = resolve_sampling(self.sampling, model)
        if next(caption_pairs(find_source(data, self.source), "train"), None) is None:
            raise UserError(
                f"source {self.source!r} has no captioned image to retrieve; name another"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        self.before_run(trainer, pl_module, trainer.datamodule)
        refuse_shards(pl_module, self)

    def examine(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Generate images, find their nearest images and write the results, on rank zero."""
        if is_trial(trainer):
            return
        folder = run_folder(trainer)  # on every rank
        if not trainer.is_global_zero:
            return
        pl_module.eval()
        pipe = TransfusionPipeline.from_module(pl_module)
        source = trainer.datamodule.sources[self.source]
        train, val = ([*caption_pairs(source, split)] for split in ("train", "val"))
        count = min(self.num_prompts, len(train))
        indices = torch.linspace(0, len(train) - 1, count).round().long().tolist()
        captions = [train[index][0] for index in indices]
        generated = []
        for start in range(0, count, BATCH_SIZE):
            with trainer.precision_plugin.forward_context():
                output = pipe(
                    captions[start : start + BATCH_SIZE],
                    output_modality="image",
                    seed=self.seed + start,
                    batch_size=BATCH_SIZE,
                    progress=False,
                    sampling=self.sampling,
                )
            generated += output.images
        images = [image for _, image in train + val]
        pixels = (torch.stack([*map(to_pixels, some)]) for some in (generated, images))
        nearest = nearest_images(*pixels)
        right = [found == index for found, index in zip(nearest.tolist(), indices, strict=True)]
        tiles = [Tile(*tile) for tile in zip(generated, captions, right, strict=True)]
        title = (
            f"For {sum(right)} of {count} captions, the nearest of {len(images)} real images is "
            "the right one"
        )
        with atomic_file(folder / "retrieval.png") as file:
            contact_sheet([(title, tiles)]).save(file, format="PNG")
        report = {
            "retrieval_accuracy": sum(right) / count,
            "num_prompts": count,
            "num_images": len(images),
            "seed": self.seed,
            "global_step": trainer.global_step or pl_module.loaded_step,
            **image_protocol(self.sampling, pl_module),
        }
        with atomic_file(folder / "retrieval.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        rank_zero_info(f"{title}; wrote {folder}/retrieval.png and retrieval.json")

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine


def nearest_images(generated: Tensor, images: Tensor) -> Tensor:
    """Return the index (n,) of the nearest of `images` (m, 3, H, W) to each of `generated`."""
    return torch.cdist(generated.flatten(1), images.flatten(1)).argmin(1)
