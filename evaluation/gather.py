"""Metric states that are lists of rows, gathered from all ranks; N rows of F numbers."""

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat


def fill_if_empty(rows: list[Tensor] | Tensor, empty: Tensor) -> None:
    """Append `empty` to a list without rows, so that this rank can take part in the gathering.

    torchmetrics would fill it with a tensor of one dimension, which does not fit rows (N, F).
    """
    if isinstance(rows, list) and not rows:
        rows.append(empty)


def all_rows(rows: list[Tensor] | Tensor) -> Tensor:
    """Concatenate the rows, (N, F); an empty list gives (0, 0)."""
    return dim_zero_cat(rows) if len(rows) else torch.empty(0, 0)


def canonical_order(rows: Tensor) -> Tensor:
    """Sort rows (N, F) by their sum, so that their order does not depend on the ranks' shares.

    Random subsets of the sorted rows are the same for any number of ranks.
    """
    return rows[rows.double().sum(1).argsort()]
