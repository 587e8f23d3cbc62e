"""Does a model draw the picture it is asked for? For a small corpus that it has seen."""

import json
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.results import outside_fit, run_folder
from callbacks.sampling import image_protocol, refuse_shards, resolve_sampling
from tf_lightning.data.documents import RawDocument, Skipped, Source, Split
from tf_lightning.data.images import to_pixels
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.training.module import Transfusion


class RetrievalAccuracy(L.Callback):
    """Draws captions of training pictures; counts whose nearest training picture is their own.

    Nearest by squared pixel distance among all pictures of the source, as they are on disk and
    held-out ones included, so chance is one by their number. Runs when training ends, and on a
    checkpoint given to `validate` or `test`; writes `retrieval.json` and the contact sheet
    `retrieval.png`.

    Args:
        source: name of the corpus in the data's `sources`.
        num_prompts: captions, evenly spread over the corpus.
        sampling: how images are sampled.
        seed: the first picture's noise; the next pictures' follow.
    """

    def __init__(
        self,
        source: str,
        num_prompts: int = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: int = 0,
    ):
        self.source, self.num_prompts, self.seed = source, num_prompts, seed
        self.sampling = sampling

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a sampler that does not fit before the training, not after it."""
        refuse_shards(pl_module, self)
        self.sampling = resolve_sampling(self.sampling, pl_module)

    def examine(self, trainer: L.Trainer, module: Transfusion) -> None:
        """Draw, compare, write."""
        folder = run_folder(trainer)  # on every rank
        if not trainer.is_global_zero:
            return
        module.eval()
        pipe = TransfusionPipeline.from_module(module)
        source = trainer.datamodule.sources[self.source]
        seen, held_out = (captioned(source, split) for split in ("train", "val"))
        count = min(self.num_prompts, len(seen))
        asked = torch.linspace(0, len(seen) - 1, count).round().long().tolist()
        words = [seen[index][0] for index in asked]
        seeds = [self.seed + number for number in range(count)]
        drawn = []
        for start in range(0, count, 32):
            part = slice(start, start + 32)
            with trainer.precision_plugin.forward_context():
                output = pipe(
                    words[part],
                    output_modality="image",
                    seed=seeds[part],
                    batch_size=32,
                    progress=False,
                    sampling=self.sampling,
                )
            drawn += output.images
        pictures = [picture for _, picture in seen + held_out]
        nearest = nearest_pictures(*(torch.stack([*map(to_pixels, p)]) for p in (drawn, pictures)))
        right = [found == index for found, index in zip(nearest.tolist(), asked, strict=True)]
        tiles = [Tile(*tile) for tile in zip(drawn, words, right, strict=True)]
        title = (
            f"{sum(right)} of {count} drawn pictures are nearest to their own of {len(pictures)}"
        )
        with atomic_file(folder / "retrieval.png") as file:
            contact_sheet([(title, tiles)]).save(file, format="PNG")
        report = {
            "retrieval_accuracy": sum(right) / count,
            "num_prompts": count,
            "num_images": len(pictures),
            "seed": self.seed,
            "global_step": trainer.global_step or module.loaded_step,
            **image_protocol(self.sampling, module),
        }
        with atomic_file(folder / "retrieval.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        rank_zero_info(f"{title}; wrote {folder}/retrieval.png and retrieval.json")

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine


def captioned(source: Source, split: Split) -> list[tuple[str, Image.Image]]:
    """Caption and picture of the documents that are just these."""
    pairs = [
        [*sorted(d, key=lambda part: not isinstance(part, str))] for d in usable(source, split)
    ]
    return [
        (pair[0], pair[1]) for pair in pairs if [isinstance(p, str) for p in pair] == [True, False]
    ]


def usable(source: Source, split: Split) -> Iterator[RawDocument]:
    """The documents of a split that are not skipped."""
    return (d for d in source.documents(split) if not isinstance(d, Skipped))


def nearest_pictures(drawn: Tensor, pictures: Tensor) -> Tensor:
    """For each of drawn (n, 3, H, W) the index of the nearest of pictures (m, 3, H, W), (n,)."""
    return torch.cdist(drawn.flatten(1), pictures.flatten(1)).argmin(1)
