"""A data module that serves an endless stream, whose place is one integer: the next row."""

import warnings

import lightning as L

from tf_lightning.data.rows import ENDLESS


class StreamData(L.LightningDataModule):
    """Where a run is in its stream, for the sampler and for the checkpoint.

    Args:
        batch_size: rows in a batch of one rank.
    """

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self._first_row = self._first_step = 0

    @property
    def rank(self) -> int:
        """Of this process, in {0..world_size-1}."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.trainer.world_size if self.trainer else 1

    def num_batches(self) -> int:
        """Batches of one rank in the whole run."""
        if self.trainer is None or self.trainer.max_steps < 0:
            return ENDLESS
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def next_row(self) -> int:
        """The first row that no optimizer step has seen; computed, never counted."""
        if self.trainer is None:
            return self._first_row
        rows_per_step = self.batch_size * self.world_size * self.trainer.accumulate_grad_batches
        steps = self.trainer.global_step - self._first_step
        return self._first_row + steps * rows_per_step

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, for the checkpoint; valid for any number of ranks."""
        step = self.trainer.global_step if self.trainer else self._first_step
        return {"next_row": self.next_row(), "global_step": step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint's place."""
        # Lightning, which looks for a loader with a state of its own, would warn of the opposite.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        self._first_row, self._first_step = state_dict["next_row"], state_dict["global_step"]
