"""CodebookUsage: when a code is dead, and where it is restarted."""

import torch

from tf_lightning.autoencoder.network import CodebookUsage


def test_a_code_is_dead_after_dead_after_steps_without_use():
    usage = CodebookUsage(3, dead_after=2)
    assert usage.dead.all()  # no code was used yet
    usage.update(torch.tensor([4, 0, 1]))
    assert usage.dead.tolist() == [False, True, False]
    usage.update(torch.tensor([1, 2, 0]))
    usage.update(torch.tensor([0, 0, 0]))
    assert usage.dead.tolist() == [False, False, True]
    assert "idle" in usage.state_dict()


def test_only_dead_codes_are_moved_and_vectors_are_chosen_evenly():
    usage = CodebookUsage(10, dead_after=1)
    usage.update(torch.tensor([1, 1] + [0] * 8))
    codebook = torch.zeros(10, 2)
    vectors = torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    usage.restart(codebook, vectors, torch.Generator().manual_seed(0))
    assert codebook[:2].count_nonzero() == 0
    counts = [(codebook[2:, 0] == value).sum().item() for value in (1, 2, 3)]
    assert sorted(counts) == [2, 3, 3]
    again = torch.zeros(10, 2)
    usage.restart(again, vectors, torch.Generator().manual_seed(0))
    assert torch.equal(again, codebook)


def test_no_code_is_moved_to_outputs_that_are_not_finite():
    codebook = torch.zeros(4, 2)
    vectors = torch.tensor([[1.0, torch.inf], [2, 0]])
    CodebookUsage(4, 1).restart(codebook, vectors, torch.Generator().manual_seed(0))
    assert not codebook.any()
