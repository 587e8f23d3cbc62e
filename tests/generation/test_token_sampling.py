"""Frequencies of sampled tokens against probabilities that are given in the test."""

import pytest
import torch

from tf_lightning.generation.token_sampling import (
    find_stop,
    num_streamable,
    sample_tokens,
    top_k_top_p,
)

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15], dtype=torch.double)


def drawn(count: int = 20_000, **how) -> torch.Tensor:
    """Sample from PROBABILITIES and return the frequency of each token."""
    generators = [torch.Generator().manual_seed(i) for i in range(100)]
    how = {"temperature": 1.0} | how
    logits = PROBABILITIES.log().repeat(100, 1)
    tokens = [
        token for _ in range(count // 100) for token in sample_tokens(logits, generators, **how)
    ]
    return torch.tensor(tokens).bincount(minlength=5) / count


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.7}, [1, 3]),  # exactly 0.7 is enough
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),  # of 0.4: at least 0.12
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),  # of 0.85: 0.4 is less than half of it
        ({"top_k": 4, "min_p": 0.3}, [1, 3, 4]),
    ],
)
def test_tokens_are_sampled_from_the_kept_ones_in_proportion(how, kept):
    expected = torch.zeros(5, dtype=torch.double)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    likely = top_k_top_p(PROBABILITIES.unsqueeze(0).clone(), **how)[0]
    torch.testing.assert_close(likely / likely.sum(), expected)
    torch.testing.assert_close(drawn(**how).double(), expected, atol=0.015, rtol=0)


def test_temperature_divides_the_logits():
    tempered = PROBABILITIES ** (1 / 0.5)
    expected = tempered / tempered.sum()
    torch.testing.assert_close(drawn(temperature=0.5).double(), expected, atol=0.015, rtol=0)


def test_greedy_takes_the_most_probable_token_and_uses_no_randomness():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample_tokens(PROBABILITIES.log().unsqueeze(0), [generator], temperature=0.0) == [1]
    assert torch.equal(generator.get_state(), before)


def test_a_row_is_sampled_with_its_own_generator():
    logits, how = torch.zeros(3, 1000), {"temperature": 1.0}
    generators = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    together = sample_tokens(logits, generators(1, 2, 3), **how)
    assert together == [sample_tokens(logits[:1], generators(s), **how)[0] for s in (1, 2, 3)]
    assert len(set(together)) == 3


def test_the_first_of_several_stop_strings_counts():
    assert find_stop("one two three", ("three", "two")) == 4
    assert find_stop("one", ("two",)) is None


def test_an_unfinished_text_is_streamed_up_to_a_possible_stop_string():
    told = lambda text: text[: num_streamable(text, ("END", "\n\n"))]  # noqa: E731
    assert told("the") == "the"
    assert told("the E") == "the "
    assert told("the EN") == "the "
    assert told("the ENemy") == "the ENemy"
    assert told("the END of") == "the "
    assert told("the\n") == "the"
    assert told("half a letter \ufffd") == "half a letter "
