"""What the command line decides by itself."""

import pytest
import torch

from tf_lightning.cli.lightning import fast_precision


@pytest.mark.parametrize(
    ("capability", "precision"),
    [("avx512_bf16", "bf16-mixed"), ("amx_bf16", "bf16-mixed"), ("avx512_f", "32-true")],
)
def test_a_cpu_multiplies_bf16_only_where_it_has_the_instructions(
    capability, precision, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert fast_precision("cpu") == precision


def test_a_torch_that_does_not_tell_gets_full_precision(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "32-true"
