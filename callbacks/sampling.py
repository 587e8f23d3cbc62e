"""Sampling for callbacks: each prompt once, for any number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from callbacks.prompts import Prompt, center_crop_resize
from callbacks.results import is_trial, run_folder, warn_in_fit
from tf_lightning.data.buckets import nearest_size
from tf_lightning.diffusion.sampler import build_scheduler, resolve_sampler, set_timesteps
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig, not_for_codes
from tf_lightning.progress import progress_bar
from tf_lightning.training.module import Transfusion

Kind = Literal["generated", "captioned"]


@dataclass(frozen=True)
class SampleBatch:
    """Prompts with the images generated from them, or with the captions of their images."""

    prompts: Sequence[Prompt]
    indices: range  # indices of the prompts in the whole set
    images: Sequence[Image.Image]  # generated images, or the prompts' own images
    captions: Sequence[str] | None = None  # captions generated for `images`

    @cached_property
    def pixels(self) -> Tensor:
        """The images, uint8 (B, 3, H, W)."""
        return torch.stack([pil_to_tensor(image) for image in self.images])

    def first(self, count: int) -> "SampleBatch":
        """Return the first `count` samples, or all of fewer."""
        parts = (self.prompts, self.indices, self.images, self.captions)
        return SampleBatch(*(part and part[:count] for part in parts))


def check_module(module: L.LightningModule, callback: object, kind: type = Transfusion) -> None:
    """Refuse a callback in the run of a module that it was not written for.

    Raises:
        UserError: the module is not of this kind.
    """
    if not isinstance(module, kind):
        raise UserError(
            f"{type(callback).__name__} works with {kind.__name__}, but the model is "
            f"{type(module).__name__}; remove the callback"
        )


def check_draws(data: L.LightningDataModule, callback: object, remedy: str) -> None:
    """Refuse images of a model that is trained without images.

    Raises:
        UserError: the data has no autoencoder.
    """
    if getattr(data, "autoencoder_name", None) is None:
        raise UserError(
            f"{type(callback).__name__} needs a model of images, but the data has no autoencoder; "
            f"name data.autoencoder, such as 'pixels', or {remedy}"
        )


def check_no_size(sampling: SamplingConfig, callback: object, reason: str) -> None:
    """Refuse a size of images for a callback that generates them in sizes of its own.

    Args:
        sampling: options of the callback.
        callback: the callback.
        reason: the sizes, for the message.

    Raises:
        UserError: a width or a height is given.
    """
    for name, value in (("width", sampling.width), ("height", sampling.height)):
        if value is not None:
            raise UserError(
                f"sampling.{name}={value} does not fit {type(callback).__name__}, {reason}; leave "
                f"sampling.{name} out"
            )


def resolve_sampling(
    sampling: SamplingConfig, module: Transfusion, default_sampler: str | None = None
) -> SamplingConfig:
    """Check sampling options against a module before it is trained, and name the sampler.

    Args:
        sampling: options of a callback.
        module: the model that will be sampled.
        default_sampler: used where none is named, if it fits the model.

    Raises:
        UserError: an option does not fit the model.
    """
    process = module.process
    if process is None:
        not_for_codes(sampling)
        return sampling
    preferred = default_sampler if default_sampler in process.samplers else None
    sampler = resolve_sampler(process, sampling.sampler or preferred, sampling.timestep_shift)
    scheduler = build_scheduler(process, sampler, sampling.timestep_shift)
    set_timesteps(scheduler, sampling.num_inference_steps)  # refuses too many steps
    return sampling.with_options(sampler=sampler)


def image_protocol(sampling: SamplingConfig, module: Transfusion) -> dict[str, Any]:
    """Return the sampling options that the module's images depend on, for a report."""
    return sampling.used("image", makes_codes=module.process is None)


def shares(count: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """Return a rank's batches of the indices of `count` prompts.

    The ranks take whole batches in turn, so no prompt is repeated, and the batches are the same for
    any number of ranks.
    """
    starts = range(0, count, batch_size)
    return [range(s, min(s + batch_size, count)) for s in starts[rank::world_size]]


def sample(
    pipe: TransfusionPipeline,
    prompts: Sequence[Prompt],
    batches: Sequence[range],
    sampling: SamplingConfig,
    *,
    seed: int,
    kind: Kind,
    precision: Callable[[], AbstractContextManager],
    progress: bool,
) -> Iterator[SampleBatch]:
    """Yield one SampleBatch for each batch.

    Args:
        pipe: the model.
        prompts: prompts of all ranks.
        batches: this rank's indices of them, from `shares`.
        sampling: how to sample.
        seed: prompt i is sampled with seed + i.
        kind: "generated" images of the prompts' text, or "captioned" images of the prompts.
        precision: context in which the network computes, the trainer's.
        progress: show a progress bar.
    """
    for indices in progress_bar(batches, desc=kind.title(), disable=not progress, leave=False):
        batch = [prompts[i] for i in indices]
        how = {"seed": [seed + i for i in indices], "batch_size": len(batch), "progress": False}
        if kind == "generated":
            texts = [prompt.text for prompt in batch]
            with precision():
                output = pipe(texts, output_modality="image", sampling=sampling, **how)
            yield SampleBatch(batch, indices, output.images)
        else:
            sizes, images = pipe.image_sizes.trained, [prompt.image() for prompt in batch]
            images = [center_crop_resize(i, nearest_size(i.size, sizes)) for i in images]
            with precision():
                output = pipe(images, output_modality="text", sampling=sampling, **how)
            yield SampleBatch(batch, indices, images, output.texts)


def report_on_rank_zero(
    trainer: L.Trainer,
    module: Transfusion,
    name: str,
    report: Callable[[L.Trainer, Transfusion, TransfusionPipeline, Path], None],
) -> None:
    """Let rank zero report on a pipeline with the module's weights; do nothing in a trial run.

    Call it on every rank, because all ranks find the run's folder and gather sharded weights.

    Args:
        trainer: trainer of the run.
        module: the trained module.
        name: name of the report, for the warning if it fails in `fit`.
        report: receives the trainer, the module, the pipeline and the folder for the results.

    Raises:
        UserError: the report failed in another command than `fit`.
    """
    if is_trial(trainer):
        return
    folder = run_folder(trainer)
    with warn_in_fit(trainer, name):
        pipe = TransfusionPipeline.from_module(module)
        if trainer.is_global_zero:
            module.eval()
            report(trainer, module, pipe, folder)
