"""The KV cache: keys and values of all processed positions, so that none is computed twice.

A cache row holds the prefix of one sequence. Two attention objects fill the cache through the
interface of model/attention.py, so the Transformer does not know about it:
    PrefillAttention  reads packed prompts, computed as in training, and caches them
    DecodeAttention   adds positions after each row's prefix: one text token, or an image's patches

Shapes: R rows of `capacity` positions, n rows in use, L new positions, S positions of a batch of
prompts, H query heads, G key/value heads, K head dim.
"""

import torch
from torch import Tensor

from tf_lightning.batch import Batch
from tf_lightning.model.attention import VarlenAttention, sdpa
from tf_lightning.model.transformer import TransformerConfig

MAX_LENGTH_RATIO = 1.25  # longest by shortest prefix in one attention call


class KeyValueCache:
    """Keys and values of every layer, (R, capacity, G, K) each. Callers track row lengths."""

    def __init__(self, config: TransformerConfig, rows: int, capacity: int, like: Tensor):
        """Allocate on the device and in the dtype of `like`, a weight of the network."""
        self.shape = (rows, capacity, config.kv_heads, config.head_size)
        self.capacity, self.device = capacity, like.device
        self.layers = [
            (like.new_zeros(self.shape), like.new_zeros(self.shape))
            for _ in range(config.num_layers)
        ]

    def write(
        self, layer: int, places: slice | Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write k, v (S, G, K) at flat places row * capacity + position, (S,); return the layer."""
        for array, new in zip(self.layers[layer], (k, v), strict=True):
            array.flatten(0, 1)[places] = new.type_as(array)
        return self.layers[layer]


class PrefillAttention(VarlenAttention):
    """Attention over prompts, one document in a row, which caches their keys and values.

    Args:
        cache: receives the keys and values.
        rows: cache row of each row of the batch.
        batch: packed prompts.
        causal: whether the positions of an image see only earlier ones.
    """

    def __init__(self, cache: KeyValueCache, rows: list[int], batch: Batch, causal: bool):
        super().__init__(batch, causal)
        row = torch.tensor(rows, device=cache.device)[self.index // self.length]
        self.places = row * cache.capacity + self.index % self.length  # (S,)
        self.cache, self.layer = cache, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (S, H, K), k and v (S, G, K) -> (S, H, K)."""
        self.cache.write(self.layer, self.places, k, v)
        self.layer += 1
        return super().__call__(q, k, v)


class DecodeAttention:
    """Attention of L new positions in each of n rows.

    L new positions per row attend to the row's cached prefix and to each other. Their keys are
    written after the prefix. Each denoising step overwrites them; raising the row's length keeps
    them.

    Args:
        cache: holds the prefixes.
        rows: n different rows.
        lengths: length of each prefix.
        num_new: L.
        causal: the new positions see only earlier ones among themselves.
        image: the new positions are patches.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rows: list[int],
        lengths: list[int],
        num_new: int,
        causal: bool = False,
        image: bool = False,
    ):
        self.cache, self.layer, self.causal = cache, 0, causal and num_new > 1
        self.image = image
        self.positions = torch.tensor(lengths, device=cache.device).unsqueeze(1)  # (n, 1)
        if num_new > 1:
            self.positions = self.positions + torch.arange(num_new, device=cache.device)  # (n, L)
        self.places = self._places(rows, lengths, num_new)
        self.groups = [
            self._group(members, rows, lengths) for members in group_by_length(lengths, num_new)
        ]

    def _places(self, rows: list[int], lengths: list[int], num_new: int) -> slice | Tensor:
        """Return the flat places of the new positions; for one row a slice, which is faster."""
        if len(rows) == 1:
            first = rows[0] * self.cache.capacity + lengths[0]
            return slice(first, first + num_new)
        starts = torch.tensor(rows, device=self.cache.device).unsqueeze(1) * self.cache.capacity
        return (starts + self.positions).flatten()

    def _group(self, members: list[int], rows: list[int], lengths: list[int]):
        """Return (member index, cache rows, longest end, mask) of one call."""
        among, device = [lengths[i] for i in members], self.cache.device
        places = self.positions[as_index(members, device)]  # (g, L)
        end = max(among) + places.shape[1]
        mask = None
        if self.causal or min(among) < max(among):
            seen = places if self.causal else places[:, -1:]
            mask = (torch.arange(end, device=device) <= seen.unsqueeze(-1)).unsqueeze(1)
        return as_index(members, device), as_index([rows[i] for i in members], device), end, mask

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Return the indices of text and of patches among the n * L positions; one is empty."""
        everyone = torch.arange(self.positions.numel(), device=self.cache.device)
        return (everyone[:0], everyone) if self.image else (everyone, everyone[:0])

    def gather(self, x: Tensor) -> Tensor:
        """(n, L, ...) unchanged."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """(n, L, ...) unchanged."""
        return x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, L, H, K), k and v (n, L, G, K) -> (n, L, H, K)."""
        keys, values = self.cache.write(self.layer, self.places, k.flatten(0, 1), v.flatten(0, 1))
        self.layer += 1
        if len(self.groups) == 1:  # all rows, in order
            _, rows, end, mask = self.groups[0]
            return sdpa(q, keys[rows, :end], values[rows, :end], mask, causal=False)
        out = torch.empty_like(q)
        for members, rows, end, mask in self.groups:
            out[members] = sdpa(
                q[members], keys[rows, :end], values[rows, :end], mask, causal=False
            )
        return out


def group_by_length(lengths: list[int], num_new: int) -> list[list[int]]:
    """Group rows whose prefixes are similar in length, so that they share an attention call.

    This avoids padding short prefixes to the longest. One text token costs less than another call,
    so with `num_new` = 1 all rows share one.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = [[order[0]]]
    for i in order[1:]:
        shortest = lengths[groups[-1][0]] + num_new
        if num_new > 1 and lengths[i] + num_new > MAX_LENGTH_RATIO * shortest:
            groups.append([])
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def as_index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """Return an index that selects these rows; a slice, which copies nothing, if adjacent."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, device=device)
