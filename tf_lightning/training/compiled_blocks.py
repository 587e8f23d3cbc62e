"""torch.compile of the blocks of a Transformer, one by one.

All blocks run the same code on weights of the same shapes, so the first one is compiled and the
others reuse its code: a deep network takes no longer to compile than a shallow one.
"""

from collections.abc import Callable
from typing import Any

import torch

from tf_lightning.model.transformer import Transformer


def compile_blocks(transformer: Transformer, **options: Any) -> None:
    """Compile the training passes of the blocks at their first use.

    Modules and their weights keep their names. Call it after `checkpoint_activations`, so that the
    compiler sees what to compute again, and before `apply_fsdp`, whose communication stays outside.

    Args:
        transformer: the Transformer, changed in place.
        options: options of torch.compile.
    """
    for (block, *_), method in transformer.blocks():
        setattr(block, method, compiled_in_training(getattr(block, method), **options))


def compiled_in_training(run: Callable, **options: Any) -> Callable:
    """Return a function that runs compiled where gradients are computed, else as it was.

    Validation and generation have other shapes, and a cache of another length at each token.
    """
    compiled = torch.compile(run, **options)

    def call(*args: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else run)(*args)

    return call
