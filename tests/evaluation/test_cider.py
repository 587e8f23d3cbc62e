"""CIDEr-D equals values computed by hand, a dense implementation and pycocoevalcap."""

import math
from itertools import chain

import numpy as np
import pytest

from evaluation.cider import CIDEr, cider_d
from support.caption_pairs import captions

PLAIN = "cat dog red blue two bird tree lake road hill"  # one token each


def test_by_hand():
    """Two images whose references have five words each and share none.

    The first caption is right except for its last word: 4 of 5, 3 of 4, 2 of 3 and 1 of 2 n-grams
    match the reference. All n-grams have the weight log 2, also those in no reference.
    """
    references = [[PLAIN.split()[:5]], [PLAIN.split()[5:]]]
    generated = [[*PLAIN.split()[:4], "car"], PLAIN.split()[5:]]
    expected = 10 * (4 / 5 + 3 / 4 + 2 / 3 + 1 / 2) / 4
    assert cider_d(generated, references) == pytest.approx([expected, 10.0], rel=1e-12)


def test_length_penalty_and_clipping_by_hand():
    references = [[PLAIN.split()[:5]], [PLAIN.split()[5:]]]
    generated = [PLAIN.split()[:5] * 2, PLAIN.split()[5:]]
    penalty = math.exp(-(5**2) / (2 * 6**2))
    # The caption is the reference twice: all 5 words occur twice, and 4 of its 2-grams, 3 of its
    # 3-grams and 2 of its 4-grams do; 1, 2 and 3 more n-grams span the two halves.
    cosines = [
        own / math.sqrt(own * square)
        for own, square in ((5, 5 * 4), (4, 4 * 4 + 1), (3, 3 * 4 + 2), (2, 2 * 4 + 3))
    ]
    assert cider_d(generated, references)[0] == pytest.approx(10 * penalty * sum(cosines) / 4)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_equals_a_second_implementation_on_dense_vectors(count):
    generated, references = captions(count, seed=count)
    everything = list(chain(generated, *references))
    total = np.zeros(count)
    for n in range(1, 5):
        vocabulary = sorted({gram for tokens in everything for gram in windows(tokens, n)})
        column = {gram: i for i, gram in enumerate(vocabulary)}

        def counts(tokens, column=column, n=n):
            vector = np.zeros(len(column))
            for gram in windows(tokens, n):
                vector[column[gram]] += 1
            return vector

        present = [sum(counts(other) for other in others) > 0 for others in references]
        idf = math.log(count) - np.log(np.maximum(1, np.sum(present, axis=0)))
        for i, (tokens, others) in enumerate(zip(generated, references, strict=True)):
            ours = counts(tokens) * idf
            for other in others:
                theirs = counts(other) * idf
                norm = np.linalg.norm(ours) * np.linalg.norm(theirs)
                cosine = np.minimum(ours, theirs) @ theirs / norm if norm else 0
                delta = len(windows(tokens, 2)) - len(windows(other, 2))
                total[i] += cosine * np.exp(-(delta**2) / 72) / len(others)
    assert cider_d(generated, references) == pytest.approx(list(10 * total / 4), abs=1e-9)


def windows(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_equals_pycocoevalcap(count):
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs pycocoevalcap")
    generated, references = captions(count, seed=count)
    truth = {i: [" ".join(other) for other in others] for i, others in enumerate(references)}
    result = {i: [" ".join(tokens)] for i, tokens in enumerate(generated)}
    _, theirs = cider.Cider().compute_score(truth, result)
    assert cider_d(generated, references) == pytest.approx(list(theirs), abs=1e-9)


def test_captions_are_tokenized_and_averaged():
    metric = CIDEr()
    metric.update(["A cat's on the mat.", "A dog!"], [["a CAT'S on the mat"], ["two birds sing"]])
    expected = cider_d(
        [["a", "cat", "'s", "on", "the", "mat"], ["a", "dog"]],
        [[["a", "cat", "'s", "on", "the", "mat"]], [["two", "birds", "sing"]]],
    )
    assert expected[0] == pytest.approx(10) and expected[1] == 0
    assert metric.compute().item() == pytest.approx(5)
    assert metric.protocol["num_captions"] == 2


def test_missing_captions_and_references_are_refused():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="^cider was given no caption"):
        CIDEr().compute()
    with pytest.raises(ValueError, match="^the caption 'a cat' has no reference"):
        CIDEr().update(["a cat"], [[]])
    with pytest.raises(ValueError):
        CIDEr().update(["a cat"], [["a cat"], ["a dog"]])
