"""Optimizer steps that are left out, because one NaN would end up in every weight.

A step whose loss or gradient is not finite changes nothing: no weight, no state of the optimizer,
no moving average. All ranks leave out the same steps. The step still counts, so that the position
in the data stays a function of the number of steps. Optionally, steps whose gradient is much larger
than usual are left out too.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tf_lightning.errors import UserError
from tf_lightning.training.optim import MuonAdamW
from tf_lightning.training.precision import loss_scale

WINDOW = 100  # gradient norms from which the usual size is estimated


class StepGuard:
    """Decides which steps to leave out, and counts them.

    Args:
        max_bad_steps: number of steps in a row that are not finite after which the run ends.
        spike_sigma: leave out a step whose gradient norm is more than this many standard deviations
            above the mean of the last WINDOW steps; None: leave out no finite step.
    """

    def __init__(self, max_bad_steps: int = 5, spike_sigma: float | None = None):
        self.max_bad_steps, self.spike_sigma = max_bad_steps, spike_sigma
        self.left_out = self.in_a_row = 0  # steps in all, and last steps that were not finite
        self.leaves_out = False  # whether the current step is left out
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def check(self, module: L.LightningModule, loss: Tensor, norm: Tensor) -> None:
        """Drop the gradients of a step that is to be left out, so that no optimizer uses them.

        Args:
            module: the trained module, with its gradients; it logs `train/steps_left_out`, the
                number of steps since the run began.
            loss: this rank's loss of the step.
            norm: the norm of its gradient, the same on every rank.

        Raises:
            UserError: `max_bad_steps` steps in a row were not finite.
        """
        agree = module.trainer.strategy.reduce_boolean_decision
        is_finite = agree(bool(torch.isfinite(loss.detach().to(norm.device) + 0 * norm)), all=True)
        # In fp16 the trainer finds the scale of the loss by steps whose gradients overflow.
        scaled = not is_finite and loss_scale(module.trainer) > 1
        is_search = scaled and agree(bool(torch.isfinite(loss)), all=True)
        self.leaves_out = not is_finite or self.is_spike(norm.item())
        self.in_a_row = 0 if is_finite or is_search else self.in_a_row + 1
        if self.leaves_out:
            self.left_out += 1
            module.zero_grad()
        module.log("train/steps_left_out", float(self.left_out), batch_size=1)
        if self.in_a_row >= self.max_bad_steps:
            raise UserError(describe_end(module.trainer, self.in_a_row))

    def mark(self, module: L.LightningModule, loss: Tensor, norm: Tensor) -> None:
        """Let the optimizer leave out a step by itself, so that the host need not wait for it.

        `leaves_out` and the counts are then tensors, which are read when the trainer logs.

        Args:
            module: see `check`; `can_mark` must be true.
            loss: this rank's loss of the step.
            norm: the norm of its gradient.

        Raises:
            UserError: `max_bad_steps` steps in a row or more were not finite.
        """
        trainer = module.trainer
        is_bad = ~torch.isfinite(loss.detach() + 0 * norm)
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.float(), reduce_op="sum") > 0
        self.leaves_out = is_bad
        for optimizer in trainer.optimizers:
            optimizer.found_inf = is_bad.float()  # the name that torch's GradScaler uses
        self.left_out = self.left_out + is_bad
        self.in_a_row = (self.in_a_row + 1) * is_bad
        module.log("train/steps_left_out", self.left_out.float(), batch_size=1)
        is_read = (trainer.global_step + 1) % (trainer.log_every_n_steps or 1) == 0
        if is_read and self.in_a_row >= self.max_bad_steps:
            raise UserError(describe_end(trainer, int(self.in_a_row)))

    def can_mark(self, trainer: L.Trainer, norm: Tensor) -> bool:
        """Return whether `mark` can replace `check` in a run, and is faster."""
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        leave_out_alone = all(map(leaves_out_alone, trainer.optimizers))
        return norm.is_cuda and leave_out_alone and not is_scaled and self.spike_sigma is None

    def is_spike(self, norm: float) -> bool:
        """Return whether a norm is a spike, far above the last WINDOW norms; then store it.

        The first WINDOW norms are never spikes. A spike is stored as the limit that it exceeds, so
        a single spike hardly moves the limit, while norms that stay large raise it step by step.
        """
        if self.spike_sigma is None:
            return False
        limit = math.inf
        if len(self.norms) == WINDOW:
            std, mean = torch.std_mean(torch.tensor(self.norms, dtype=torch.float64))
            limit = (mean + self.spike_sigma * std).item()
        self.norms.append(min(norm, limit))
        return norm > limit

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the last norms, for the checkpoint."""
        counts = {"left_out": int(self.left_out), "in_a_row": int(self.in_a_row)}
        return counts | {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.left_out, self.in_a_row = state["left_out"], state["in_a_row"]
        self.norms = deque(state["norms"], maxlen=WINDOW)


def leaves_out_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer leaves out steps that its `found_inf` marks."""
    is_adamw = type(optimizer) is torch.optim.AdamW and bool(optimizer.defaults["fused"])
    return is_adamw or isinstance(optimizer, MuonAdamW)


def describe_end(trainer: L.Trainer, in_a_row: int) -> str:
    """Return the error message for a run whose last steps were not finite."""
    data, last = trainer.datamodule, trainer.global_step
    first_row = data.next_row() - (in_a_row - 1) * data.rows_per_step()
    last_row = data.next_row() + data.rows_per_step() - 1  # of the current step
    return (
        f"the loss or the gradient was not finite in {in_a_row} steps in a row (steps "
        f"{last - in_a_row + 2:,} to {last + 1:,}, rows {first_row:,} to {last_row:,} of the data);"
        " the weights are those before these steps: resume with a lower lr, or look at these rows"
    )


def check_finite(checkpoint: dict[str, Any], trainer: L.Trainer, alone: bool = False) -> None:
    """Refuse to save a checkpoint with a weight or an optimizer state that is not finite.

    It is found before anything is written, so the checkpoints on the disk stay as they are.

    Args:
        checkpoint: the checkpoint that will be saved.
        trainer: trainer of the run.
        alone: the other ranks do not call this.

    Raises:
        UserError: on every rank that calls it, if a tensor of one of them is not finite.
    """
    parts = {name: checkpoint.get(name) for name in ("state_dict", "optimizer_states")}
    named, device = list(floating_tensors(parts)), trainer.strategy.root_device
    flags = [torch.isfinite(x).all().to(device) for _, x in named]
    flags = torch.stack(flags).tolist() if flags else []  # FSDP: rank 0 may hold all of them
    finite = all(flags)
    if not alone:
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
    if finite:
        return
    names = [name for (name, _), is_finite in zip(named, flags, strict=True) if not is_finite]
    first = f", the first is {names[0]}" if names else " on another rank"
    raise UserError(
        f"{len(names) or 'some'} weights or optimizer states are not finite{first}; no checkpoint "
        f"is written at step {trainer.global_step:,}, so resume from the last one with a lower lr"
    )


def floating_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in nested dicts and lists, with their path."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value.to_local() if isinstance(value, DTensor) else value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from floating_tensors(part, f"{name}.{key}" if name else str(key))
