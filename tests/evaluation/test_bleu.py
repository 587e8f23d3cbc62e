"""BLEU-4 equals values computed by hand and pycocoevalcap."""

import math

import pytest

from evaluation.bleu import BLEU4
from support.caption_pairs import captions


def score(generated, references) -> float:
    metric = BLEU4()
    metric.update([" ".join(tokens) for tokens in generated], joined(references))
    return metric.compute().item()


def joined(references):
    return [[" ".join(tokens) for tokens in others] for others in references]


def test_by_hand():
    """6 of 7 words, 4 of 6, 2 of 5 and 1 of 4 n-grams match the reference; lengths are equal."""
    generated = ["the cat sat on a red mat".split()]
    references = [["the cat sat on the red mat".split()]]
    expected = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score(generated, references) == pytest.approx(expected, rel=1e-6)


def test_counts_are_clipped_by_the_largest_count_of_a_reference():
    metric = BLEU4()
    metric.update(["the the the the"], [["the cat", "the the dog"]])
    metric.compute()
    assert metric.matched.tolist() == [2, 1, 0, 0]
    assert metric.proposed.tolist() == [4, 3, 2, 1]


def test_brevity_is_measured_against_the_closest_reference():
    words = "one two three four five six seven eight nine ten".split()
    found = score([words[:6]], [[words[:8], words]])
    assert found == pytest.approx(math.exp(1 - 8 / 6), rel=1e-6)
    assert score([words[:6]], [[words, words[:6]]]) == pytest.approx(1, rel=1e-6)
    tied = BLEU4()
    tied.update([" ".join(words[:6])], [[" ".join(words[:7]), " ".join(words[:5])]])
    assert tied.reference_length == 5  # the shorter of two references equally close in length


def test_the_score_is_of_the_corpus_and_not_a_mean_over_captions():
    words = "one two three four five six".split()
    both = score([words, ["seven"]], [[words], [["eight"]]])
    expected = (6 / 7) ** 0.25  # the second caption adds one wrong word and no 2-gram
    assert both == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 40])
def test_equals_pycocoevalcap(count):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="needs pycocoevalcap")
    generated, references = captions(count, seed=count)
    truth = dict(enumerate(joined(references)))
    result = {i: [" ".join(tokens)] for i, tokens in enumerate(generated)}
    theirs, _ = bleu.Bleu(4).compute_score(truth, result, verbose=0)
    assert score(generated, references) == pytest.approx(theirs[3], abs=1e-9)


def test_a_score_without_captions_is_refused():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="^bleu4 was given no caption"):
        BLEU4().compute()
