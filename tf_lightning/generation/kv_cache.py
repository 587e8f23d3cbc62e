"""Keys and values of what was read, so that nothing is read twice.

A cache has rows of preallocated places; a row holds one prefix. Two attention objects fill it,
through the protocol of attention.py, so the Transformer does not know that it is there:
    ReadAttention    packed prompts, computed as training computes them, and remembered
    AppendAttention  new positions behind each row's prefix: one text token, or an image's patches

Shapes: R rows of `capacity` places, n rows in use, L new positions, H query heads, G key/value
heads, K head dim.
"""

import torch
from torch import Tensor

from tf_lightning.batch import Batch
from tf_lightning.model.attention import VarlenAttention, sdpa
from tf_lightning.model.transformer import TransformerConfig

SIMILAR = 1.25  # prefixes share an attention call up to this ratio of longest to shortest


class KeyValueCache:
    """Keys and values of every layer, (R, capacity, G, K) each; who uses it counts the lengths."""

    def __init__(self, config: TransformerConfig, rows: int, capacity: int, like: Tensor):
        """Allocate on the device and in the precision of `like`, a weight of the network."""
        num_kv_heads = config.num_kv_heads or config.num_heads
        self.shape = (rows, capacity, num_kv_heads, config.dim // config.num_heads)
        self.capacity, self.device = capacity, like.device
        self.layers = [
            (like.new_zeros(self.shape), like.new_zeros(self.shape))
            for _ in range(config.num_layers)
        ]

    def write(
        self, layer: int, places: slice | Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put k, v (S, G, K) into flat places (row * capacity + place) (S,); the layer's arrays."""
        for array, new in zip(self.layers[layer], (k, v), strict=True):
            array.flatten(0, 1)[places] = new.type_as(array)
        return self.layers[layer]


class ReadAttention(VarlenAttention):
    """One document a row, from its first position on; its keys and values are kept.

    Args:
        cache: where they are kept.
        rows: the cache's row of each row of the batch.
        batch: the prompts.
        causal: as in training.
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


class AppendAttention:
    """L positions behind the prefix of each of n rows; they see it and each other.

    They stand in the places after the prefix until something else is written there: a noised image
    overwrites itself at every step, and stays once its row's length is raised.

    Args:
        cache: what the rows have read.
        rows: n rows, all different.
        lengths: of their prefixes.
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
        self.groups = [self._group(members, rows, lengths) for members in similar(lengths, num_new)]

    def _places(self, rows: list[int], lengths: list[int], num_new: int) -> slice | Tensor:
        """Flat places of the new positions; a slice, which is written faster, for one row."""
        if len(rows) == 1:
            first = rows[0] * self.cache.capacity + lengths[0]
            return slice(first, first + num_new)
        starts = torch.tensor(rows, device=self.cache.device).unsqueeze(1) * self.cache.capacity
        return (starts + self.positions).flatten()

    def _group(self, members: list[int], rows: list[int], lengths: list[int]):
        """Who attends together: places among the n, rows, end of the longest, mask."""
        among, device = [lengths[i] for i in members], self.cache.device
        places = self.positions[index(members, device)]  # (g, L)
        end = max(among) + places.shape[1]
        mask = None
        if self.causal or min(among) < max(among):
            seen = places if self.causal else places[:, -1:]
            mask = (torch.arange(end, device=device) <= seen.unsqueeze(-1)).unsqueeze(1)
        return index(members, device), index([rows[i] for i in members], device), end, mask

    def modality_indices(self) -> tuple[Tensor, Tensor]:
        """Places of text and of patches among the n * L new positions: all are of one kind."""
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
        if len(self.groups) == 1:  # of everyone, in order
            _, rows, end, mask = self.groups[0]
            return sdpa(q, keys[rows, :end], values[rows, :end], mask, causal=False)
        out = torch.empty_like(q)
        for members, rows, end, mask in self.groups:
            out[members] = sdpa(
                q[members], keys[rows, :end], values[rows, :end], mask, causal=False
            )
        return out


def similar(lengths: list[int], num_new: int) -> list[list[int]]:
    """The places of rows that share an attention call, as their prefixes are of similar length.

    A short prefix would pay for a long one's places. One text token costs less than a call.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = [[order[0]]]
    for i in order[1:]:
        shortest = lengths[groups[-1][0]] + num_new
        if num_new > 1 and lengths[i] + num_new > SIMILAR * shortest:
            groups.append([])
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """What selects these of an array: a slice, which copies nothing, where they are in a row."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, device=device)
