"""Training in fp8 follows training in bf16, and touches nothing but the products of the blocks.

A CPU has no fast products in fp8: it rounds to fp8 and multiplies in fp32.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from support.tiny import document, mixed_batch, packed, tiny_module
from tf_lightning.batch import Batch
from tf_lightning.model.attention import DenseAttention
from tf_lightning.training import losses, module
from tf_lightning.training.activation_checkpointing import checkpoint_activations
from tf_lightning.training.compiled_blocks import compile_blocks
from tf_lightning.training.fp8 import convert_linears
from tf_lightning.training.module import Transfusion

float8 = pytest.importorskip("torchao.float8")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@pytest.fixture
def emulated(monkeypatch):
    """Modules multiply in fp8 as a CPU can."""

    def convert(modules, recipe):
        convert_linears(modules, recipe, emulate=True)

    monkeypatch.setattr(module, "convert_linears", convert)


def backward(made: Transfusion, batch: Batch) -> Tensor:
    sums = made.loss_sums(made.net, batch)
    loss = (
        sums.nll.mean() + sums.diffusion / batch.num_noised_elements
        if batch.num_images
        else (sums.nll.mean())
    )
    loss.backward()
    return loss.detach()


def rounded(x: Tensor) -> Tensor:
    """x in fp8 with one scale, by the definition."""
    scale = 448 / x.abs().max()  # the largest number of float8_e4m3fn
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def test_a_layer_multiplies_what_fp8_keeps_of_its_input_and_weight():
    layer, x = nn.Linear(32, 16), torch.randn(5, 32)
    expected = F.linear(rounded(x), rounded(layer.weight), layer.bias)
    plain = layer(x)
    layers = nn.Sequential(layer)
    convert_linears([layers], "tensorwise", emulate=True)
    torch.testing.assert_close(layers(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)
    with torch.no_grad():  # as in validation and generation
        assert torch.equal(layers(x), plain)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradients_of_a_layer_are_those_of_torchao(recipe):
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        layers, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(5, 32, requires_grad=True)
        if ours:
            convert_linears([layers], recipe, emulate=True)
        else:
            float8.convert_to_float8_training(layers, config=config)
        layers(x).square().sum().backward()
        found.append([x.grad, layers[0].weight.grad, layers[0].bias.grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("modality_weights", ["shared", "all"])
def test_only_the_linear_layers_of_the_trained_blocks_are_converted(emulated, modality_weights):
    sizes = {"modality_weights": modality_weights}
    plain, ours = tiny_module(sizes), tiny_module(sizes, fp8="rowwise")
    converted = {n for n, part in ours.named_modules() if type(part).__name__ == "Float8Linear"}
    assert converted == {
        name
        for name, part in ours.named_modules()
        if isinstance(part, nn.Linear)
        and name.startswith(("net.transformer.layers.", "net.transformer.image_layers."))
    }
    weights, theirs = ours.state_dict(), plain.state_dict()
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():  # the same draws, and plain tensors of the same type
        assert type(weight) is Tensor and weight.dtype == torch.float32
        assert torch.equal(weight, theirs[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_follow_those_of_bf16(emulated, recipe):
    """20 steps on one batch: within 5%, and not equal."""
    found = []
    for fp8 in (None, recipe):
        made, batch = tiny_module(fp8=fp8), mixed_batch()
        optimizer = torch.optim.AdamW(made.net.parameters(), lr=3e-3)
        values = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                values.append(backward(made, batch))
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack(values))
    bf16, in_fp8 = found
    assert bf16[-1] < 0.8 * bf16[0]
    torch.testing.assert_close(in_fp8, bf16, rtol=0.05, atol=0)
    assert not torch.equal(in_fp8, bf16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_without_images_trains_separate_weights_for_patches(emulated, recipe):
    made = tiny_module({"modality_weights": "all"}, fp8=recipe)
    backward(made, packed([[document("9")]]))
    transformer = made.net.transformer
    gradients = [part.weight.grad for part in transformer.modules() if isinstance(part, nn.Linear)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert not transformer.image_layers[0].feed_forward.w1.weight.grad.any()


def test_checkpointed_and_compiled_blocks_have_the_same_gradients(emulated, monkeypatch):
    monkeypatch.setattr(losses, "build_attention", DenseAttention)
    torch.compiler.reset()
    found = []
    for prepared in (False, True):
        made = tiny_module(fp8="tensorwise")
        if prepared:
            checkpoint_activations(made.net, "selective")
            compile_blocks(made.net.transformer, backend=aot_eager)
        backward(made, mixed_batch())
        found.append({name: weight.grad for name, weight in made.net.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("fp8", "installed"), [(None, True), ("rowwise", True), ("rowwise", False)]
)
def test_blocks_are_converted_only_on_demand_and_with_torchao(monkeypatch, fp8, installed):
    """Without torchao, a checkpoint of a run in fp8 can still be loaded."""
    calls = []
    monkeypatch.setattr(module, "convert_linears", lambda *call: calls.append(call))
    monkeypatch.setattr(module, "is_installed", lambda package: installed)
    blocks = [blocks for blocks, _ in tiny_module(fp8=fp8).net.transformer.blocks()]
    assert calls == [(block, "rowwise") for block in blocks] * (installed and fp8 is not None)
