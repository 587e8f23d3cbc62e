"""Random orders and choices that need no memory of the whole: functions of a seed and a place."""

import numpy as np

ROUNDS = 4


def shuffled(places: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """What stands at some places of a random order of 0 .. count - 1; other places cost nothing.

    (A Feistel network permutes the next power of 4; what leaves 0 .. count - 1 goes on until it is
    back: "cycle walking", Black and Rogaway 2002.)

    Args:
        places: in {0..count-1}, (n,).
        count: length of the order, < 2**62.
        seed: names the order, numbers >= 0.
    """
    bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(seed).integers(2**63, size=ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        found[outside] = _feistel(found[outside], bits, keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2 * bits bits."""
    bits, mask = np.uint64(bits), np.uint64(2**bits - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all of x (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose(random: np.random.Generator, among: np.ndarray, share: float) -> np.ndarray:
    """A random choice of exactly this share of the places where `among` is True, (n,) bool.

    A share that is no whole number is rounded up as often as makes its mean right.
    """
    places = np.flatnonzero(among)
    number = int(share * len(places) + random.random())
    chosen = np.zeros(len(among), bool)
    chosen[random.permutation(places)[:number]] = True
    return chosen
