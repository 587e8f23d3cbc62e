"""Draws and captions what validation asks: each prompt once, whatever the number of processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from callbacks.prompts import Prompt, square
from tf_lightning.diffusion.process import process_from_hparams
from tf_lightning.diffusion.sampler import resolve_sampler
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.training.module import Transfusion

Kind = Literal["generated", "captioned"]
DENOISING = ("num_inference_steps", "sampler", "timestep_shift")
OF_CODES = ("code_temperature", "code_top_k", "code_top_p")
DRAWING = ("guidance_scale", *DENOISING, *OF_CODES)


@dataclass(frozen=True)
class SampleBatch:
    """Some prompts with what the model made of them; n prompts, H x W pixels."""

    prompts: Sequence[Prompt]
    indices: range  # of the prompts in the whole set
    images: Sequence[Image.Image]  # generated images, or the prompts' own when captioned
    captions: Sequence[str] | None = None  # captions generated for `images`

    @cached_property
    def pixels(self) -> Tensor:
        """The pictures, uint8 (n, 3, H, W)."""
        return torch.stack([pil_to_tensor(picture) for picture in self.images])

    def first(self, count: int) -> "SampleBatch":
        """At most `count` of them."""
        parts = (self.prompts, self.indices, self.images, self.captions)
        return SampleBatch(*(part and part[:count] for part in parts))


def model_of(module: Transfusion, weights: str) -> tuple[TransfusionPipeline, str]:
    """The module's model with the weights asked for, "ema" or "raw", and which they really are."""
    model = TransfusionPipeline.of(module)
    if weights == "ema" and module.ema is not None:
        return model, "ema"
    return replace(model, net=module.net), "raw"


def refuse_shards(module: Transfusion, callback: object) -> None:
    """UserError where ranks, which draw unequal numbers of steps, would wait for each other."""
    if module.device_mesh is not None:
        raise UserError(
            f"{type(callback).__name__} cannot sample a sharded model; leave it out of this run "
            "and give it the checkpoint on one device (save_distributed_checkpoint: false)"
        )


def fit_drawing(how: dict, module: Transfusion, default_sampler: str | None = None) -> dict:
    """What of `how` is of this module's kind of pictures, its sampler named.

    Args:
        how: settings of `TransfusionPipeline.draw`.
        module: what is to draw.
        default_sampler: where latents are denoised by DDPM's kind and none is named.

    Raises:
        UserError: the sampler does not fit.
    """
    process = process_from_hparams(module.hparams)
    sampler = how.get("sampler")
    if sampler is None and process is not None and default_sampler in process.samplers:
        sampler = default_sampler
    sampler = resolve_sampler(process, sampler, how.get("timestep_shift", 1.0))
    foreign = DENOISING if process is None else OF_CODES
    return {k: v for k, v in (how | {"sampler": sampler}).items() if k not in foreign}


def shares(count: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """This rank's batches of `count` prompts: whole batches in turn, so that none is repeated.

    The batches are the same for any number of ranks, and so is every picture.
    """
    starts = range(0, count, batch_size)
    return [range(s, min(s + batch_size, count)) for s in starts[rank::world_size]]


def sample(
    model: TransfusionPipeline,
    prompts: Sequence[Prompt],
    batches: Sequence[range],
    how: dict,
    *,
    kind: Kind,
    precision: Callable[[], AbstractContextManager],
    progress: bool,
) -> Iterator[SampleBatch]:
    """One SampleBatch a batch.

    Args:
        model: what is asked.
        prompts: of all ranks.
        batches: this rank's places in them.
        how: of "drawn" pictures guidance_scale, seed (prompt i has the noise of seed + i) and what
            `fit_drawing` leaves; max_new_tokens of "written" captions; the rest is ignored.
        kind: what is made.
        precision: context in which the network computes, the trainer's.
        progress: show a progress bar.
    """
    for places in tqdm(batches, desc=kind.title(), disable=not progress, leave=False):
        asked = [prompts[place] for place in places]
        if kind == "generated":
            options = {key: how[key] for key in DRAWING if key in how}
            seeds = [how["seed"] + place for place in places]
            with precision():
                pictures = model.draw([[prompt.text] for prompt in asked], seeds=seeds, **options)
            yield SampleBatch(asked, places, pictures)
        else:
            pictures = [square(prompt.picture(), model.image_size) for prompt in asked]
            limit = how["max_new_tokens"]
            with precision():
                written = model.write([[picture] for picture in pictures], max_new_tokens=limit)
            yield SampleBatch(asked, places, pictures, written)
