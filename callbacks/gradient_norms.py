"""The gradient norm of each loss, which shows how much each of them moves the weights."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tf_lightning.batch import Batch
from tf_lightning.data.stream import as_batches
from tf_lightning.ranges import PositiveInt, check_arguments
from tf_lightning.training.module import Transfusion
from tf_lightning.training.precision import loss_scale
from tf_lightning.training.steps import mean_over_ranks


class GradientNorms(L.Callback):
    """Logs `train/grad_norm_lm`, `train/grad_norm_diffusion` and so on, of the whole network.

    They are the norms of the unweighted losses: the image side of a step has `diffusion_weight`
    times the norm of the diffusion loss. Each costs a forward and a backward pass of its own,
    because the gradients of a training step are already added up. With two losses and the defaults
    (every 4th log of one in 25 steps), training takes 2 % longer.

    Args:
        every_n_logs: measure at every n-th step at which the trainer logs.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, every_n_logs: PositiveInt = 4):
        check_arguments(GradientNorms.__init__, locals())
        self.every_n_logs = every_n_logs

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: Transfusion,
        batch: Batch | list[Batch],
        batch_idx: int,
    ) -> None:
        """Measure before the step, with the weights and the rows that it will use."""
        interval = self.every_n_logs * trainer.log_every_n_steps
        if (trainer.global_step + 1) % interval:
            return
        batches = as_batches(batch)
        counts, norms = pl_module.step_counts(batches), {}
        for name in pl_module.loss_names:
            pl_module.zero_grad()
            scale = 1.0
            for part in batches:
                with trainer.precision_plugin.forward_context():
                    sums = pl_module.loss_sums(pl_module.net, part)
                    loss = pl_module.loss_shares(sums, counts)[name]
                scale = loss_scale(trainer)
                if loss.requires_grad:  # not of rows of text with frozen text weights
                    (loss * scale).backward()
            norm = gradient_norm(pl_module.net) / scale
            norms[f"train/grad_norm_{name.removeprefix('loss_')}"] = norm.item()
        # `self.log` would repeat the values at every log until the next measurement.
        for logger in trainer.loggers:
            logger.log_metrics(norms, step=trainer.global_step)


def gradient_norm(net: nn.Module) -> Tensor:
    """Return the norm of the gradients' mean over ranks; DDP has not averaged them."""
    # Every rank needs the same list, also where its rows leave some weights without a gradient.
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    gradients = [g if isinstance(g, DTensor) else mean_over_ranks(g) for g in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
