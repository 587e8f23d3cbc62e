"""A sharded network starts with the weights of one that is not sharded.

A process group that sends nothing stands for the other ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from callbacks.init_from import InitFrom
from support.tiny import SIZES, VOCAB_SIZE
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training.module import Transfusion

# PyTorch caches what depends on the rank of a mesh, so no other test has a mesh of this size.
RANKS, RANK = 12, 3
MODELS = {
    "plain": {"shard_size": 2, "fp8": "rowwise"},
    "image weights": {"modality_weights": "all", "qk_norm": "layer", "attention_bias": True},
    "unet": {"unet": UNetConfig((8, 16), num_blocks=1, head_dim=8), "text_lr_ratio": 0.0},
    "tied": {"tie_embeddings": True, "linear": LinearConfig(time="adaln", zero_init="input")},
}


@contextmanager
def fake_ranks() -> Iterator[None]:
    """A process group of RANKS in which this process is number RANK."""
    distributed.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def started(sharded: bool, precision: str = "32-true", **options) -> Transfusion:
    """A module that has built its network, within `fake_ranks` if sharded."""
    config = {n: options.pop(n) for n in [*options] if n in TransformerConfig.__dataclass_fields__}
    torch.manual_seed(3)
    config = TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES, **config)
    module = Transfusion(config, patch_size=2, latent_channels=3, **options)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(precision=precision, strategy=strategy)
    if sharded:
        names = ("data_parallel", "tensor_parallel")
        module._device_mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=names)
    module.configure_model()
    return module


def part_of(whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rows of a rank: the first ranks have as many as any, the last ones fewer or none."""
    chunks = whole.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else whole[:0]


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_has_its_part_of_the_unsharded_start(name):
    whole = started(sharded=False, **MODELS[name])
    ranks = MODELS[name].get("shard_size", RANKS)
    with fake_ranks():
        module = started(sharded=True, **MODELS[name])
        assert type(module.net) is not type(whole.net) and module.ema is not None
        ours, theirs = dict(module.named_parameters()), dict(whole.named_parameters())
        assert ours.keys() == theirs.keys()
        for key, parameter in ours.items():
            assert isinstance(parameter, DTensor)
            assert parameter.requires_grad == theirs[key].requires_grad
            expected = part_of(theirs[key], RANK % ranks, ranks)
            assert torch.equal(parameter.to_local(), expected), key
        if "tie_embeddings" in MODELS[name]:
            transformer = module.net.transformer
            assert transformer.output.weight is transformer.tok_embeddings.weight


def test_no_whole_network_is_ever_in_memory(monkeypatch):
    """Every tensor that is given memory is a shard, or one that is drawn whole and then cut."""
    sizes = []
    empty = torch.empty

    def recorded(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, "empty", recorded)
    with fake_ranks():
        module = started(sharded=True)
        largest = max(parameter.numel() for parameter in module.parameters())
        assert max(sizes) == largest


def test_pretrained_weights_are_cut_too():
    whole = started(sharded=False)
    for parameter in whole.net.parameters():
        torch.nn.init.normal_(parameter)
    with fake_ranks():
        module = started(sharded=True)
        InitFrom("unused.ckpt")._load(module, whole.net.state_dict())
        for net in (module.net, module.ema):
            for (key, ours), theirs in zip(
                net.named_parameters(), whole.net.parameters(), strict=True
            ):
                assert torch.equal(ours.to_local(), part_of(theirs, RANK, RANKS)), key


def policies(module: Transfusion) -> set[tuple]:
    """Return the dtypes and the resharding of each group of parameters."""
    found = set()
    for part in module.net.modules():
        if hasattr(part, "_get_fsdp_state"):
            state = part._get_fsdp_state()
            policy = state._mp_policy
            freed = [group.post_forward_mesh_info is not None for group in state._fsdp_param_groups]
            found.add((policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs, *freed))
    return found


def test_precision_and_resharding_reach_every_group():
    with fake_ranks():
        assert policies(started(True)) == {(None, None, False, True)}
        # The last group, of the whole network, is freed or kept as FSDP chooses.
        bf16 = (torch.bfloat16, torch.float32, False)
        options = {"precision": "bf16-mixed", "reshard_after_forward": False}
        assert policies(started(True, **options)) == {(*bf16, False), (*bf16, True)}


def test_blocks_are_sharded_one_by_one():
    with fake_ranks():
        net = started(True, modality_weights="all", unet=MODELS["unet"]["unet"]).net
        groups = [
            len(group.fsdp_params)
            for modules, _ in net.blocks()
            for group in modules[0]._get_fsdp_state()._fsdp_param_groups
        ]
        assert len(groups) == 2 + 2 + 2
        assert groups[:2] == [2 * 9, 2 * 9]  # text and image weights together
        (rest,) = net._get_fsdp_state()._fsdp_param_groups
        assert len(rest.fsdp_params) + sum(groups) == len(list(net.parameters()))
