"""Which codes are in use, and where dead ones go."""

import torch

from tf_lightning.autoencoder.network import CodebookUse


def test_a_code_dies_after_so_many_steps_without_use():
    use = CodebookUse(3, dead_after=2)
    assert use.dead.all()  # nothing was picked yet
    use.count(torch.tensor([4, 0, 1]))
    assert use.dead.tolist() == [False, True, False]
    use.count(torch.tensor([1, 2, 0]))
    use.count(torch.tensor([0, 0, 0]))
    assert use.dead.tolist() == [False, False, True]
    assert "idle" in use.state_dict()


def test_dead_codes_alone_are_put_on_vectors_evenly():
    use = CodebookUse(10, dead_after=1)
    use.count(torch.tensor([1, 1] + [0] * 8))
    codebook = torch.zeros(10, 2)
    vectors = torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    use.restart(codebook, vectors, torch.Generator().manual_seed(0))
    assert codebook[:2].count_nonzero() == 0
    counts = [(codebook[2:, 0] == value).sum().item() for value in (1, 2, 3)]
    assert sorted(counts) == [2, 3, 3]
    again = torch.zeros(10, 2)
    use.restart(again, vectors, torch.Generator().manual_seed(0))
    assert torch.equal(again, codebook)
