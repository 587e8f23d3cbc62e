"""Compiled blocks give the gradients of plain ones, and share their compiled code."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch._dynamo.backends.debugging import aot_eager

from support.tiny import SIZES, VOCAB_SIZE, document, mixed_batch, packed
from tf_lightning.batch import Batch
from tf_lightning.model.attention import DenseAttention, FlexAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training import losses
from tf_lightning.training.compiled_blocks import compile_blocks, compiled_in_training
from tf_lightning.training.module import Transfusion

BATCHES = [mixed_batch(), packed([[document("9i2", 1)], [document("i2", 2)]], row_length=30)]


def module_of(activations: str, **sizes) -> Transfusion:
    """A module of three layers in which no output is zero."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=VOCAB_SIZE, **(SIZES | {"num_layers": 3} | sizes))
    options = {"patch_size": 2, "latent_channels": 3, "ema_decay": 0.0}
    module = Transfusion(config, **options, activation_checkpointing=activations)
    module.configure_model()
    torch.nn.init.normal_(module.net.patch_coder.patch_decoder.weight, std=0.2)
    return module


def results(module: Transfusion, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The losses of the batches, and the sums of their gradients."""
    found = {}
    for number, batch in enumerate(batches):
        torch.manual_seed(1)  # of dropout
        sums = module.loss_sums(module.net, batch)
        (sums.nll.sum() + sums.diffusion).backward()
        found[f"loss {number}"] = (sums.nll.sum() + sums.diffusion).detach()
    return found | {name: weight.grad for name, weight in module.net.named_parameters()}


@pytest.mark.parametrize(
    ("activations", "sizes", "form", "batches"),
    [
        ("none", {"dropout": 0.5}, FlexAttention, BATCHES),
        ("selective", {"modality_weights": "all", "num_layers": 2}, DenseAttention, BATCHES[:1]),
    ],
)
def test_all_layers_share_the_compiled_code_and_have_the_same_gradients(
    monkeypatch, activations, sizes, form, batches
):
    monkeypatch.setattr(losses, "build_attention", form)
    # FlexAttention refuses a backward pass on the CPU, where its formulas still work uncompiled.
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr("tf_lightning.model.attention.compiled", lambda function: function)
    torch.compiler.reset()
    expected, graphs = results(module_of(activations, **sizes), batches), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)  # what inductor receives

    module = module_of(activations, **sizes)
    names = module.state_dict().keys()
    compile_blocks(module.net.transformer, backend=backend)
    found = results(module, batches)
    # Another number of patches in a batch makes the code general once.
    assert 1 <= len(graphs) <= len(batches)
    assert module.state_dict().keys() == names
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_validation_and_generation_do_not_run_the_compiled_code(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **options: lambda x: ("compiled", run(x)))
    run = compiled_in_training(lambda x: x + 1)
    assert run(1) == ("compiled", 2)
    with torch.no_grad():
        assert run(1) == 2
    with torch.inference_mode():
        assert run(1) == 2
