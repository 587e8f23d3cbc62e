"""Activation checkpointing changes no gradient and needs less memory."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.tiny import SIZES, VOCAB_SIZE, document, mixed_batch, packed
from tf_lightning.errors import UserError
from tf_lightning.model import attention
from tf_lightning.model.attention import DenseAttention, FlexAttention, VarlenAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training import losses
from tf_lightning.training.module import Transfusion

UNET = {"unet": UNetConfig((8, 16), num_blocks=1, head_dim=8)}
SIZES_OF = {"mot": {"modality_weights": "all"}, "ffn": {"modality_weights": "ffn"}}
SIZES_OF |= {"dropout": {"dropout": 0.5}, "linear": {}, "unet": {"modality_weights": "all"}}
FORMS = {"varlen": VarlenAttention, "dense": DenseAttention, "flex": FlexAttention}


def module_of(mode: str, model: str, **sizes) -> Transfusion:
    """A module in which no weight is zero."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=VOCAB_SIZE, **(SIZES | SIZES_OF[model] | sizes))
    options = {"patch_size": 2, "latent_channels": 3, "ema_decay": 0.0}
    options |= UNET if model == "unet" else {}
    module = Transfusion(config, **options, activation_checkpointing=mode)
    module.configure_model()
    for parameter in module.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def gradients(module: Transfusion, bf16: bool) -> dict[str, torch.Tensor]:
    """The gradients of two batches of a step, which share an autocast context."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for _ in range(2):
            sums = module.loss_sums(module.net, mixed_batch())
            (sums.nll.sum() + sums.diffusion).backward()
    return {name: weight.grad for name, weight in module.net.named_parameters()}


@pytest.mark.parametrize(
    ("model", "form"),
    [
        *((model, "varlen") for model in SIZES_OF),
        ("mot", "dense"),
        ("ffn", "flex"),
        ("unet", "flex"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_gradients_are_the_same_bit_by_bit(monkeypatch, model, form):
    monkeypatch.setattr(losses, "build_attention", FORMS[form])
    # FlexAttention refuses a backward pass on the CPU, where its formulas still work uncompiled.
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    for bf16 in (False, True) if form == "varlen" else (False,):
        expected = gradients(module_of("none", model), bf16)
        assert all(gradient.any() for gradient in expected.values())
        for mode in ("selective", "full"):
            found = gradients(module_of(mode, model), bf16)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), mode


def storages(values) -> list[torch.UntypedStorage]:
    """The memory of all tensors in nested values."""
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in this context and still exist."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:  # else it is a view
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def count(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept_bytes(mode: str, model: str, num_layers: int) -> int:
    """The bytes that a forward pass leaves for the backward pass."""
    module = module_of(mode, model, num_layers=num_layers)
    batch = packed([[document("50i50i")], [document("i90")]], seed=3)
    with LiveBytes() as live:
        sums = module.loss_sums(module.net, batch)
        return live.count() if sums.nll.requires_grad else 0


@pytest.mark.parametrize("model", ["linear", "mot"])
def test_a_block_keeps_fewer_activations(model):
    """Full checkpointing keeps 32 of the 450 numbers that a block keeps for each position."""
    none, selective, full = (
        kept_bytes(mode, model, 5) - kept_bytes(mode, model, 1)
        for mode in ("none", "selective", "full")
    )
    assert full < 0.15 * none and selective < 0.8 * none


def test_a_unet_keeps_fewer_activations():
    none, selective, full = (kept_bytes(mode, "unet", 1) for mode in ("none", "selective", "full"))
    assert full < 0.7 * none and full < selective < none


def test_weights_keep_their_names_and_other_modes_are_refused():
    plain, changed = (module_of(mode, "unet").state_dict() for mode in ("none", "full"))
    assert plain.keys() == changed.keys()
    with pytest.raises(UserError, match="activation_checkpointing='some' must be 'none' or"):
        module_of("some", "linear")
