"""Classifier-free guidance: combines outputs with and without the prompt.

Shapes: outputs are (n, C, h, w), or (n, 2 C, h, w) with a learned variance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Strength of classifier-free guidance. The options come from `SamplingConfig`.

    Without `image_scale`, the output is extrapolated away from the unconditional output, which is
    learned from documents without caption. With `image_scale`, the text and the images of the
    prompt are weighted separately, and the network is evaluated three times.

    Attributes:
        scale: guidance scale of the whole prompt, or of its text if `image_scale` is given; 1 turns
            guidance off.
        image_scale: guidance scale of the images in the prompt; None: `scale` for everything.
        interval: lowest and highest noise level at which guidance acts (Kynkaanniemi et al. 2024).
        rescale: phi of the function `rescale`, in [0, 1]; 0 turns it off.
    """

    scale: float
    image_scale: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    @property
    def branches(self) -> list[tuple[bool, bool]]:
        """Whether each evaluation reads the prompt's (text, images); the first reads both."""
        if self.image_scale is not None:
            return [(True, True), (False, True), (False, False)]
        return [(True, True)] if self.scale == 1 else [(True, True), (False, False)]

    def acts_at(self, t: float) -> bool:
        """Return whether noise level t needs more than the first branch."""
        return len(self.branches) > 1 and self.interval[0] <= t <= self.interval[1]

    def combine(self, outputs: list[Tensor], channels: int) -> Tensor:
        """Combine the outputs of the branches, or return the first if it is the only one.

        A learned variance, which follows the first `channels`, is taken from the first branch
        (DiT).
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
    """Interpolate with weight phi towards the standard deviation of `cond`.

    Large guidance scales increase the standard deviation of the output, which overexposes images
    (Lin et al. 2023, Eq. 15-16).
    """
    dims = (1, 2, 3)
    same_spread = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * same_spread + (1 - phi) * guided
