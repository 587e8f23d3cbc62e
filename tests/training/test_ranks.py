"""Ranks whose weights differ end the run."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException

from support import ranks, runs
from support.tiny import tiny_module
from tf_lightning.errors import UserError
from tf_lightning.training.ranks import check_same_weights, checksum
from tf_lightning.training.step_memory import fake_ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_a_checksum_is_the_sum_of_the_bits(dtype):
    values = torch.tensor([0.0, 1.0, 0.0]).to(dtype)
    size = values.element_size()
    by_hand = sum(
        int.from_bytes(bytes(value.view(torch.uint8).tolist()), "little", signed=True)
        for value in values.view(3, 1)
    )
    assert by_hand > 0 and checksum(values) == by_hand
    assert checksum(values.view(3, 1).T) == by_hand and size in (1, 2, 4, 8)


@pytest.mark.parametrize("name", [None, "net.transformer.norm.weight", "ema.patch_coder.patch_"])
def test_a_tensor_that_differs_is_named(monkeypatch, name):
    """Another rank's checksums are those of a copy with one changed bit in each such tensor."""
    module, other = tiny_module(), tiny_module()
    changed = [key for key in other.state_dict() if name and key.startswith(name)]
    for key in changed:
        other.state_dict()[key].view(torch.int32).flatten()[-1] ^= 1
    theirs = torch.stack([checksum(x) for x in other.state_dict().values()])
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(world_size=2, interrupted=False))
    monkeypatch.setattr(module, "all_gather", lambda ours: torch.stack([ours, theirs]))
    if name is None:
        return check_same_weights(module)
    with pytest.raises(UserError, match=f"{len(changed)} of .* the first is {changed[0]}"):
        check_same_weights(module)


@pytest.mark.parametrize("shard_size", [None, 2])
def test_replicas_of_shards_are_compared(shard_size):
    """Four ranks hold one copy in each of two groups (HSDP), or share a single copy (FSDP2)."""
    with fake_ranks(4, shard_size) as mesh:
        mesh = mesh["data_parallel"]
        placements = [Replicate(), Shard(0)][-mesh.ndim :]
        whole = torch.arange(12.0)
        weight = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        mine, other = (checksum(part) for part in whole.chunk(shard_size or 4)[:2])
        assert checksum(weight) == mine != other
        sums = torch.stack([mine, other, mine, other])[:, None]
        module = SimpleNamespace(trainer=SimpleNamespace(world_size=4), device="cpu")
        module.state_dict = lambda: {"weight": weight}
        module.all_gather = lambda ours: sums
        check_same_weights(module)
        sums = torch.stack([mine, other, mine, other + 1])[:, None]
        if shard_size is None:  # there is nothing to compare
            return check_same_weights(module)
        with pytest.raises(UserError, match="1 of 1 tensors are not the same .* is weight"):
            check_same_weights(module)
        assert module.ranks_differ


@pytest.mark.slow
def test_a_run_whose_ranks_differ_ends_before_its_next_checkpoint(tmp_path):
    config = runs.write_config(tmp_path, ranks.two_rank_config)
    with pytest.raises(ProcessExitedException) as ended:
        disturb = "--trainer.callbacks+=support.runs.Disturb"
        ranks.fit(config, 2, "ddp", disturb)
    assert ended.value.exit_code == 1
    assert (tmp_path / "run" / "config.yaml").is_file()  # written when training starts
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
