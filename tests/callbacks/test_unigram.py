"""The unigram baseline equals a count by hand."""

import math
from collections import Counter

import torch

from callbacks.unigram import unigram_perplexity


class Documents(list):
    """A corpus in memory."""

    def document(self, index):
        return [torch.tensor(self[index])]


def test_unigram_perplexity_equals_that_of_smoothed_frequencies():
    train, val, eos = [[3, 3, 4], [5]], [[4, 3, 6], [5, 5]], 1
    counts = Counter({token: 1 for token in range(8)})
    for document in train:
        counts.update([*document, eos])
    scored = [token for document in val for token in [*document[1:], eos]]
    nll = [-math.log(counts[token] / counts.total()) for token in scored]
    expected = math.exp(sum(nll) / len(nll))
    found = unigram_perplexity(Documents(train), Documents(val), vocab_size=8, eos_id=eos)
    assert math.isclose(found, expected, rel_tol=1e-12)
