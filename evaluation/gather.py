"""Rows that a metric keeps as they come and gathers from all ranks; N rows, F numbers each."""

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat


def take_part(kept: list[Tensor] | Tensor, empty: Tensor) -> None:
    """Lets a rank that has no rows take part in the gathering; torchmetrics' own filler is 1-D."""
    if isinstance(kept, list) and not kept:
        kept.append(empty)


def all_rows(kept: list[Tensor] | Tensor) -> Tensor:
    """The rows kept, (N, F); before the first there are none."""
    return dim_zero_cat(kept) if len(kept) else torch.empty(0, 0)


def canonical(rows: Tensor) -> Tensor:
    """The rows (N, F) in an order that depends on them alone, not on which rank had which.

    What draws random subsets then draws the same ones however the rows were shared out.
    """
    return rows[rows.double().sum(1).argsort()]
