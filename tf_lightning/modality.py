"""Text and patches apart: the positions of a batch in two parts, and back in their order."""

from collections.abc import Iterable

import torch
from torch import Tensor


def with_image_weights(state_dict: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Weights of a network without image weights of its own, made to fit one that has them.

    They start as copies of the text's, as in LMFusion (Sec. 3.1).

    Args:
        state_dict: of a `Net`, a `Transformer`, or a checkpoint.
        names: of the network that is to load it.
    """
    text = {name: name.replace("image_layers.", "layers.") for name in names}
    copies = {name: state_dict[own] for name, own in text.items() if own in state_dict}
    return state_dict | {name: copies[name] for name in copies.keys() - state_dict.keys()}


class Split:
    """The positions (...) of an attention form as text (L, ...) and patches (N, ...).

    Both are known by index, counted on the CPU, so that no device is asked how many there are.

    Args:
        text_index: flat places of text, (L,).
        patch_index: flat places of patches, (N,).
        positions: the shape (...), (B, T) or (S,).
    """

    def __init__(self, text_index: Tensor, patch_index: Tensor, positions: torch.Size):
        self.positions = positions
        self.order = torch.cat([text_index, patch_index])
        self.counts = [len(text_index), len(patch_index)]
        everyone = torch.arange(len(self.order), device=self.order.device)
        self.inverse = torch.empty_like(self.order).index_copy(0, self.order, everyone)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(..., D) -> (L, D), (N, D); D may be several dimensions."""
        flat = x.flatten(0, len(self.positions) - 1)
        return list(flat.index_select(0, self.order).split(self.counts))

    def join(self, text: Tensor, patches: Tensor) -> Tensor:
        """(L, D), (N, D) -> (..., D)."""
        return torch.cat([text, patches]).index_select(0, self.inverse).unflatten(0, self.positions)
