"""Classifier-free guidance: how outputs under more and less of the prompt are combined.

Shapes: outputs are (n, C, h, w), or (n, 2 C, h, w) with a learned variance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tf_lightning.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its prompt, and at which noise levels.

    Without `image_scale`, the output without any of the prompt is the one that `scale` leads away
    from: what training leaves when it drops a caption. With it, text and pictures of the prompt
    are followed separately, and the network is evaluated three times.
    """

    scale: float = 1.0
    """Of the whole prompt, or of its text; 1 = off."""
    image_scale: float | None = None
    """Of the pictures in the prompt, for editing (1.5 in InstructPix2Pix); None: `scale`."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels t, lowest and highest, between which it acts (Kynkaanniemi et al. 2024)."""
    rescale: float = 0.0
    """phi of `rescale`, in [0, 1]; 0 = off."""

    def __post_init__(self) -> None:
        for name, scale in (("", self.scale), ("image_", self.image_scale)):
            if scale is not None and not math.isfinite(scale):
                raise UserError(f"{name}guidance_scale={scale} must be finite; 1 is off")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"guidance_interval={low} {high} must be two noise levels from 0 to 1, the lower "
                "one first"
            )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale={self.rescale} must be from 0 (off) to 1")

    @property
    def branches(self) -> list[tuple[bool, bool]]:
        """Which parts of the prompt each evaluation reads, (text, pictures); all of it first."""
        if self.image_scale is not None:
            return [(True, True), (False, True), (False, False)]
        return [(True, True)] if self.scale == 1 else [(True, True), (False, False)]

    def acts_at(self, t: float) -> bool:
        """Whether noise level t needs more than the first branch."""
        return len(self.branches) > 1 and self.interval[0] <= t <= self.interval[1]

    def combine(self, outputs: list[Tensor], channels: int) -> Tensor:
        """One output of those of the branches, or of the first alone.

        What follows the first `channels`, a learned variance, stays the first branch's (DiT).
        """
        if len(outputs) == 1:
            return outputs[0]
        variance = outputs[0][:, channels:]
        return torch.cat([self._combine([x[:, :channels] for x in outputs]), variance], dim=1)

    def _combine(self, outputs: list[Tensor]) -> Tensor:
        if self.image_scale is not None:
            guided = guide_edit(*outputs, self.scale, self.image_scale)
        else:
            guided = guide(*outputs, self.scale)
        return rescale(guided, outputs[0], self.rescale) if self.rescale else guided


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + s * (cond - uncond); 1 = no guidance (Classifier-free guidance Eq. 6, s = 1 + w)."""
    return uncond + scale * (cond - uncond)


def guide_edit(
    cond: Tensor, without_text: Tensor, uncond: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """uncond + s_I (without_text - uncond) + s_T (cond - without_text) (InstructPix2Pix Eq. 3)."""
    towards_images = image_scale * (without_text - uncond)
    return uncond + towards_images + text_scale * (cond - without_text)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Give `guided` the spread of `cond`, by share phi (Lin et al. 2023, Eq. 15-16).

    Large scales spread each image's output, which overexposes it.
    """
    dims = (1, 2, 3)
    same_spread = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * same_spread + (1 - phi) * guided
