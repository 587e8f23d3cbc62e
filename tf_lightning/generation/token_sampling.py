"""Choose the next token from its logits, and end texts at stop strings.

Shapes: n sequences, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> list[int]:
    """Choose one token for each row of logits (n, V) with the row's own generator.

    The options come from `SamplingConfig`; top_k, top_p and min_p apply in this order.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities = top_k_top_p(probabilities, top_k, top_p, min_p).cpu()
    draws = torch.cat([torch.rand(1, dtype=torch.double, generator=g) for g in generators])
    cumulative = probabilities.cumsum(-1)
    # Inverse transform sampling. A draw in [0, total) never selects a token of probability 0.
    tokens = torch.searchsorted(cumulative, draws.unsqueeze(1) * cumulative[:, -1:], right=True)
    return tokens.flatten().tolist()


def top_k_top_p(
    probabilities: Tensor, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Set the probabilities (n, V) of improbable tokens to 0; the result is not normalized."""
    if top_k is None and top_p == 1 and min_p == 0:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
    if top_p < 1:
        ranked = ranked / ranked.sum(-1, keepdim=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the more probable tokens reach top_p
    ranked[ranked < min_p * ranked[:, :1]] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins in a text, or None if it contains none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)


def num_streamable(text: str, stop: Sequence[str]) -> int:
    """Return how many characters of an unfinished text can be shown already.

    Characters that may turn out to begin a stop string are held back, and so is the replacement
    character of a UTF-8 sequence whose last bytes are still missing.
    """
    found = find_stop(text, stop)
    end = len(text.rstrip("\ufffd")) if found is None else found
    held = [n for s in stop for n in range(1, len(s)) if text[:end].endswith(s[:n])]
    return end - max(held, default=0)
