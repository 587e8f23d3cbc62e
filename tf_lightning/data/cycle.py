"""Which source each row of the stream comes from: asked shares, met by any 1,000 rows."""

import numpy as np

from tf_lightning.errors import UserError

CYCLE = 10_000  # rows after which the order of the sources repeats
EXACT = 1_000  # any so many rows in a row have each source's share, to within one row


def even_cycle(shares: np.ndarray, length: int = CYCLE, exact: int = EXACT) -> np.ndarray:
    """Which source each place of a cycle has, (length,), also when it repeats.

    Of a source's rows in the cycle, `exact` rows have each the whole part, always in the same
    places. K places are left over, and a table of blocks (down) and these places (across) is filled
    with what the sources still lack, column by column (McNaughton's wrap-around rule). A source
    that goes on in the next column does so two blocks earlier at least, so among any K left-over
    places that follow one another no source is twice.

    Args:
        shares: of the rows, summing to 1.
        length: rows in the cycle, a multiple of `exact` or less.
        exact: rows.

    Raises:
        UserError: a share is positive but too small to occur.
    """
    blocks = max(length // exact, 1)
    whole, lacking = np.divmod(_whole_numbers(shares, length), blocks)
    block = _evenly(np.append(whole, lacking.sum() // blocks))
    cycle = np.tile(block, blocks)
    table = np.repeat(np.arange(len(shares)), lacking).reshape(-1, blocks).T
    cycle[cycle == len(shares)] = table.flatten()
    missing = set(np.flatnonzero(shares).tolist()) - set(cycle.tolist())
    if missing:
        raise UserError(
            f"a source's weight is less than 1/{length:,} of all rows; raise it, or make it 0"
        )
    return cycle


def _whole_numbers(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in these shares that sum to `total` (largest remainders are rounded up)."""
    numbers = np.floor(shares * total).astype(np.int64)
    up = np.argsort(numbers - shares * total, kind="stable")[: total - numbers.sum()]
    numbers[up] += 1
    return numbers


def _evenly(counts: np.ndarray) -> np.ndarray:
    """Each source as often as its count, (sum,), spread (smooth weighted round robin)."""
    credit, total = np.zeros_like(counts), int(counts.sum())
    order = np.empty(total, np.int64)
    for place in range(total):
        credit += counts
        order[place] = credit.argmax()
        credit[order[place]] -= total
    return order
