"""A training step never asks the device for a number; on CUDA the host would wait for it."""

import lightning as L
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from support import fits
from tf_lightning.model.attention import DenseAttention, FlexAttention
from tf_lightning.training import losses
from tf_lightning.training.guard import StepGuard

ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}
ASKS |= {"_unique2", "unique_consecutive", "unique_dim", "bincount"}


class Questions(TorchDispatchMode):
    """Lists the operations whose result or whose shape the host has to read."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_index = name == "index" and any(x is not None and x.dtype.itemsize == 1 for x in args[1])
        if name in ASKS or is_index:  # an index of booleans has as many elements as are true
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Listen(L.Callback):
    """Listens from the start to the end of each training step."""

    def __init__(self):
        self.questions, self.num_steps = Questions(), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.questions.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.questions.__exit__(None, None, None)
        self.num_steps += 1


def attention_of_cuda(batch, causal):
    """Build what CUDA builds, then attend in a form whose backward pass a CPU has."""
    FlexAttention(batch, causal)
    return DenseAttention(batch, causal)


@pytest.mark.parametrize(("marks", "muon"), [(True, False), (True, True), (False, False)])
def test_a_step_asks_the_device_for_nothing(tmp_path, monkeypatch, marks, muon):
    """A guard that asks, as on a CPU, is noticed."""
    monkeypatch.setattr(losses, "build_attention", attention_of_cuda)
    monkeypatch.setattr("tf_lightning.model.attention.compiled", lambda function: function)
    monkeypatch.setattr(StepGuard, "can_mark", lambda *_: marks)
    listen, sizes = Listen(), {"modality_weights": "all", "dropout": 0.1}
    how = {"max_steps": 3, "gradient_clip_val": 1.0}
    how |= {"accumulate_grad_batches": 2, "callbacks": [listen], "log_every_n_steps": 50}
    module = fits.shapes_module(sizes, warmup_steps=1, ema_decay=0.9, muon=muon)
    fits.fit(module, fits.shapes_data(tmp_path, clean_copies=True), **how)
    assert listen.num_steps >= 3
    assert bool(listen.questions.found) == (not marks), listen.questions.found
