"""The training losses by data source and by noise level, as means since the last log.

Sums are kept on the device and read only when the trainer logs, so that no step waits for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tf_lightning.batch import Batch
from tf_lightning.training.losses import LossSums

LOSSES = ("loss_lm", "loss_codes", "loss_diffusion")
BINS = 4  # equal ranges of the noise level t in [0, 1)


class LossBreakdown:
    """Adds up losses and numbers of their terms, of each source and of each range of t.

    Args:
        sources: names of the data sources.
        device: where to keep the sums.
    """

    def __init__(self, sources: list[str], device: torch.device):
        self.names = [f"{source}/{loss}" for source in sources for loss in LOSSES]
        edges = [f"{n / BINS:.2f}" for n in range(BINS + 1)]
        self.names += [f"loss_diffusion/t{edges[n]}-{edges[n + 1]}" for n in range(BINS)]
        self.sums = torch.zeros(2, len(self.names), device=device)  # of losses, of their terms

    def add(self, batch: Batch, sums: LossSums) -> None:
        """Add one batch.

        Args:
            batch: the batch.
            sums: its losses, computed with `by_image`.
        """
        row_length, num_images = batch.input_ids.shape[1], batch.num_images
        patch_rows = batch.patch_index // row_length
        images = batch.image_ids.flatten()[batch.patch_index]  # from num_images on: clean copies
        image_rows = torch.zeros(num_images + len(batch.copied), dtype=torch.long)
        image_rows = image_rows.to(images.device).scatter_(0, images, patch_rows)[:num_images]
        self._add(0, batch.source_ids[batch.target_index // row_length], sums.nll)
        self._add(1, batch.source_ids[batch.code_index // row_length], sums.code_nll)
        if len(sums.by_image):
            elements = elements_of_images(batch)
            self._add(2, batch.source_ids[image_rows], sums.by_image, elements)
            level = (batch.t * BINS).long().clamp(max=BINS - 1)
            self._add_at(len(self.names) - BINS + level, sums.by_image, elements)

    def _add(self, loss: int, sources: Tensor, values: Tensor, terms: Tensor | None = None) -> None:
        """Add values of one of LOSSES, whose sources are given."""
        self._add_at(sources * len(LOSSES) + loss, values, terms)

    def _add_at(self, places: Tensor, values: Tensor, terms: Tensor | None) -> None:
        """Add values and their numbers of terms, 1 each by default, to the sums at `places`."""
        values = values.detach().to(self.sums.dtype)
        terms = torch.ones_like(values) if terms is None else terms
        self.sums.index_add_(1, places, torch.stack([values, terms]))

    def take_means(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means that have terms, by name, and reset all sums.

        Args:
            over_ranks: returns the sum, or the mean, of a tensor over all ranks.
        """
        totals, terms = over_ranks(self.sums.clone()).tolist()
        self.sums.zero_()
        found = zip(self.names, totals, terms, strict=True)
        return {name: total / count for name, total, count in found if count}


def elements_of_images(batch: Batch) -> Tensor:
    """Return the number of latent elements of each image, without padding, (M,) fp32."""
    channels = batch.latents.shape[1]
    sizes = [
        torch.full((b.num_images,), channels * b.height * b.width, dtype=torch.float32)
        for b in batch.buckets
    ]
    return torch.cat(sizes).to(batch.latents.device, non_blocking=True)
