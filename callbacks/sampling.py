"""Draws and captions what validation asks: each prompt once, whatever the number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from callbacks.prompts import Prompt
from tf_lightning.errors import UserError
from tf_lightning.model import Model
from tf_lightning.module import Transfusion


@dataclass(frozen=True)
class Sampled:
    """Some prompts with what the model made of them; n prompts, H x W pixels."""

    prompts: Sequence[Prompt]
    drawn: Sequence[Image.Image] | None  # None: nothing was drawn
    true: Sequence[Image.Image | None]  # as the model reads them
    written: Sequence[str] | None  # captions of `true`; None: nothing was captioned
    numbers: range  # places of the prompts in the whole set

    @cached_property
    def pixels(self) -> Tensor:
        """The drawn pictures, uint8 (n, 3, H, W)."""
        return torch.stack([pil_to_tensor(picture) for picture in self.drawn])

    def first(self, count: int) -> "Sampled":
        """At most `count` of them."""
        parts = (self.prompts, self.drawn, self.true, self.written, self.numbers)
        return Sampled(*(part and part[:count] for part in parts))


class Checked(Model):
    """A model that refuses to show what is not finite."""

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """As `Model.decode`.

        Raises:
            UserError: latents with NaN or infinity.
        """
        broken = int((~latents.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise UserError(
                f"{broken} of {len(latents)} drawn pictures hold NaN or infinity; the weights have "
                "diverged: go back to an earlier checkpoint or lower the learning rate"
            )
        return super().decode(latents)


def model_of(module: Transfusion, weights: str) -> tuple[Model, str]:
    """The module's model with the weights asked for, "ema" or "raw", and which they really are."""
    model = Checked(**vars(Model.of(module)))
    if weights == "ema" and module.ema is not None:
        return model, "ema"
    return replace(model, net=module.net), "raw"


def shares(count: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """This rank's batches of `count` prompts: whole batches in turn, so that none is repeated.

    The batches are the same for any number of ranks, and so is every picture.
    """
    starts = range(0, count, batch_size)
    return [range(s, min(s + batch_size, count)) for s in starts[rank::world_size]]


def sample(
    model: Model,
    prompts: Sequence[Prompt],
    batches: Sequence[range],
    *,
    draw: bool,
    write: bool,
    seed: int,
    max_new_tokens: int,
    progress: bool,
    **how,
) -> Iterator[Sampled]:
    """One Sampled a batch.

    Args:
        model: what is asked.
        prompts: of all ranks.
        batches: this rank's places in them.
        draw: draw the prompts' texts.
        write: caption the prompts' pictures, greedily.
        seed: first noise of prompt 0; prompt i has seed + i.
        max_new_tokens: limit of a caption.
        progress: show a progress bar.
        how: guidance_scale, num_inference_steps, sampler.
    """
    for places in tqdm(batches, desc="Sampling", disable=not progress, leave=False):
        asked = [prompts[place] for place in places]
        drawn = written = None
        if draw:
            seeds = [seed + place for place in places]
            drawn = model.draw([[prompt.text] for prompt in asked], seeds=seeds, **how)
        true = [prompt.picture and readable(prompt.picture(), model) for prompt in asked]
        if write:
            written = model.write([[picture] for picture in true], max_new_tokens=max_new_tokens)
        yield Sampled(asked, drawn, true, written, places)


def readable(picture: Image.Image, model: Model) -> Image.Image:
    """A picture at the size that the model reads: centre cropped, resized by Lanczos."""
    size = (model.image_size, model.image_size)
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
