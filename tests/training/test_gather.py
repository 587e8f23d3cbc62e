"""The dtype of a whole copy of a sharded network; tests/callbacks/test_sharded.py samples one."""

import pytest
import torch

from tf_lightning.errors import UserError
from tf_lightning.training import gather
from tf_lightning.training.gather import COPY_SHARE, copy_dtype

WEIGHTS = [torch.zeros(3, 8), torch.zeros(40)]  # 64 elements: 256 bytes in fp32, 128 in bf16
DEVICE = torch.device("cpu")


@pytest.mark.parametrize(
    ("usable", "precision", "dtype"),
    [
        (256, "32-true", torch.float32),
        (256, "bf16-mixed", torch.float32),
        (255, "bf16-mixed", torch.bfloat16),
        (128, "bf16-mixed", torch.bfloat16),
    ],
)
def test_a_copy_keeps_its_dtype_where_it_fits_and_else_takes_the_trainers(
    usable, precision, dtype, monkeypatch
):
    monkeypatch.setattr(gather, "free_memory", lambda device: usable / COPY_SHARE)
    assert copy_dtype(WEIGHTS, DEVICE, precision) == dtype


@pytest.mark.parametrize(("usable", "precision"), [(255, "32-true"), (127, "bf16-mixed")])
def test_a_copy_that_does_not_fit_is_refused_in_one_sentence(usable, precision, monkeypatch):
    monkeypatch.setattr(gather, "free_memory", lambda device: usable / COPY_SHARE)
    with pytest.raises(UserError, match="a copy may take 80%; train on more ranks, or set the"):
        copy_dtype(WEIGHTS, DEVICE, precision)
