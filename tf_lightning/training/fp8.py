"""Matrix products of the blocks in fp8, by torchao.

In training, each linear layer of a block rounds its input, its weight and the gradient of its
output to 8 bits, scaled so that the largest value of a tensor, or of each of its rows, just fits
(Micikevicius et al. 2022, arXiv 2209.05433). Weights, gradients and optimizer states keep their
types, so checkpoints are the same with and without fp8. Validation and generation do not use it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def convert_linears(modules: Iterable[nn.Module], recipe: Recipe, emulate: bool = False) -> None:
    """Let the linear layers within modules multiply in fp8 where gradients are computed.

    Weights keep their names. Call it before `checkpoint_activations`, `compile_blocks` and
    `apply_fsdp`.

    Args:
        modules: modules with linear layers, such as blocks, changed in place.
        recipe: torchao's name of a way to scale. "tensorwise": one scale for each tensor, the
            fastest. "rowwise": one for each row. "rowwise_with_gw_hp": the same, with gradients of
            weights in bf16, the most accurate.
        emulate: round to fp8, but multiply in the type of the input; for devices without fp8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # optional package

    # A weight's gradient sums over all positions, whose number need not be a multiple of 16.
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True, emulate=emulate
    )
    for module in modules:
        convert_to_float8_training(module, config=config)
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.forward = fp8_in_training(part)


def fp8_in_training(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a converted layer's forward pass, which is not in fp8 where no gradient is needed."""
    in_fp8 = linear.forward

    def forward(x: Tensor) -> Tensor:
        # In a batch without images, weights for patches get no rows, and so no largest value.
        has_work = torch.is_grad_enabled() and x.numel() > 0
        return in_fp8(x) if has_work else nn.Linear.forward(linear, x)

    return forward
