"""The next text token: the likeliest, or drawn from the likely ones.

Shapes: n sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tf_lightning.errors import UserError


@dataclass(frozen=True)
class TextSampling:
    """How text is written; the limits act in the order of the fields."""

    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 0.0
    """Divides the logits; 0 = always the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this probability together, in (0, 1]."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the likeliest, in [0, 1]."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are left out of it."""

    def __post_init__(self) -> None:
        for name, fits, limit in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or left out"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("stop", "" not in self.stop, "texts that are not empty"),
        ):
            if not fits:
                raise UserError(f"{name}={getattr(self, name)} must be {limit}")


def choose(logits: Tensor, how: TextSampling, generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each row of logits (n, V), drawn with the row's own generator."""
    if how.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.double() / how.temperature).softmax(-1)
    probabilities = keep_likely(probabilities, how.top_k, how.top_p, how.min_p).cpu()
    draws = torch.cat([torch.rand(1, dtype=torch.double, generator=g) for g in generators])
    below = probabilities.cumsum(-1)
    # Inverse of the distribution function; a draw in [0, total) falls on no token of probability 0.
    tokens = torch.searchsorted(below, draws.unsqueeze(1) * below[:, -1:], right=True)
    return tokens.flatten().tolist()


def keep_likely(
    probabilities: Tensor, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Probabilities (n, V) with 0 where a token is not among the likely ones; not normalised."""
    if top_k is None and top_p == 1 and min_p == 0:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
    if top_p < 1:
        ranked = ranked / ranked.sum(-1, keepdim=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the likelier ones suffice
    ranked[ranked < min_p * ranked[:, :1]] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None: there is none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters of an unfinished text can be told: no stop text may begin there.

    The mark of a character whose last bytes are still to come is not told either.
    """
    found = find_stop(text, stop)
    end = len(text.rstrip("\ufffd")) if found is None else found
    held = [n for s in stop for n in range(1, len(s)) if text[:end].endswith(s[:n])]
    return end - max(held, default=0)
