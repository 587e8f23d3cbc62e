"""Random captions with references, for the caption metrics."""

import random

WORDS = "a the red blue cat dog on in of table is n't and two".split()


def captions(count: int, seed: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokenized captions with one to five references each; some are empty, some equal."""
    rng = random.Random(seed)

    def sentence() -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randrange(0, 14))]

    written = [sentence() for _ in range(count)]
    references = [[sentence() for _ in range(rng.randrange(1, 6))] for _ in range(count)]
    for index in range(0, count, 3):
        references[index][0] = written[index]
    return written, references
