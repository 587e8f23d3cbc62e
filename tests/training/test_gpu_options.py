"""Options that a run cannot have end in one sentence with the remedy."""

import pytest
import torch

from support.tiny import SIZES, VOCAB_SIZE
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training import gpu_options
from tf_lightning.training.gpu_options import check_flash, check_fp8, is_installed

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GOOD = {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends to have a GPU of this capability, with every package."""

    def pretend(capability: tuple[int, int], installed: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
        monkeypatch.setattr(gpu_options, "is_installed", lambda package: installed)

    return pretend


def sizes(**changed) -> TransformerConfig:
    return TransformerConfig(vocab_size=VOCAB_SIZE, **(SIZES | GOOD | changed))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_fp8_is_accepted_where_it_runs(gpu, capability):
    gpu(capability)
    check_fp8("rowwise", sizes(), "bf16-mixed", CUDA)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"installed": False}, r"needs torchao; install it: pip install 'tf-lightning\[fp8\]'"),
        ({"device": CPU}, "8.9 or higher, .* this run is on a CPU; set fp8 to null"),
        ({"capability": (8, 0)}, "this run is on NVIDIA X of capability 8.0; set fp8"),
        ({"precision": "32-true"}, "needs precision=bf16-mixed, .* not 32-true"),
        ({"dim": 40, "num_heads": 2, "head_dim": 16}, "transformer.dim is 40; change it"),
        ({"ffn_dim": 100}, "transformer.ffn_dim is 100"),
        ({"head_dim": 12}, r"transformer.num_heads \* head_dim is 24"),
        ({"head_dim": 8}, r"transformer.num_kv_heads \* head_dim is 8"),
    ],
)
def test_fp8_is_refused_where_it_does_not_run(gpu, given, told):
    gpu(given.pop("capability", (9, 0)), given.pop("installed", True))
    run = given.pop("precision", "bf16-mixed"), given.pop("device", CUDA)
    with pytest.raises(UserError, match=f"fp8=rowwise .*{told}"):
        check_fp8("rowwise", sizes(**given), *run)


@pytest.mark.parametrize("capability", [(9, 0), (10, 3), (11, 0)])
def test_flash_attention_is_accepted_where_it_runs(gpu, capability):
    gpu(capability)
    check_flash(sizes(), "bf16-mixed", CUDA)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"installed": False}, "needs the package flash-attn-4; install it: pip install --pre"),
        ({"device": CPU}, "this run is on a CPU; set it to false"),
        ({"capability": (8, 9)}, "this run is on NVIDIA X of capability 8.9"),
        ({"capability": (12, 0)}, "this run is on NVIDIA X of capability 12.0"),
        ({"precision": "32-true"}, "needs precision=bf16-mixed or 16-mixed, and not 32-true"),
        ({"head_dim": 20}, "a multiple of 8 up to 128, and it is 20"),
        ({"head_dim": 256}, "a multiple of 8 up to 128, and it is 256"),
    ],
)
def test_flash_attention_is_refused_where_it_does_not_run(gpu, given, told):
    gpu(given.pop("capability", (9, 0)), given.pop("installed", True))
    run = given.pop("precision", "bf16-mixed"), given.pop("device", CUDA)
    with pytest.raises(UserError, match=f"flash_attention .*{told}"):
        check_flash(sizes(**given), *run)


def test_packages_are_looked_up_without_importing_them():
    assert is_installed("torch.nn") and not is_installed("no_such_package.part")
