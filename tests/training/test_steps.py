"""An optimizer step of several batches: means over all of them, places of saving, settings."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor

from support.tiny import IMAGE_CODES, SIZES, TOKENIZER, document, packed, tiny_module
from tf_lightning.autoencoder.losses import ReconstructionLoss
from tf_lightning.batch import Batch, pack
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

# Means


def one_process(module: L.LightningModule, monkeypatch) -> dict[str, Tensor]:
    """Let a module's training_step run outside a trainer; return what it will log."""
    logged: dict[str, Tensor] = {}
    strategy = SimpleNamespace(backward=lambda loss, optimizer: loss.backward())
    trainer = SimpleNamespace(world_size=1, strategy=strategy, global_step=7, max_steps=20)
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "global_step", trainer.global_step)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    return logged


def step(module: L.LightningModule, batches: list, logged: dict) -> tuple[dict, dict]:
    """Gradients and logged values of a step."""
    loss = module.training_step(batches if len(batches) > 1 else batches[0], 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    return gradients, dict(logged)


def assert_same_steps(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    """Assert that the gradients and logged values of two steps are equal to 1e-6."""
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert (value - theirs[name]).norm() <= 1e-6 * value.norm(), name
    assert all(gradient.any() for gradient in one[0].values())


@pytest.fixture
def double():
    """Compute in double precision, so that rounding does not hide a wrong formula."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ROWS = [[document("3i7", 1)], [document("9", 2)], [document("i", 3)], [document("2", 4)]]


def in_double(batch: Batch) -> Batch:
    return batch._map(lambda x: x.double() if x.is_floating_point() else x)


def split(sizes: tuple[int, ...]) -> list[range]:
    """Consecutive ranges of these sizes."""
    return [range(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
@pytest.mark.parametrize("changed", [{"z_loss_weight": 0.1}, {"learned_sigma": True}])
def test_batches_of_a_step_give_the_gradients_and_losses_of_one_batch(
    double, monkeypatch, sizes, changed
):
    """Rows with many, few and no text targets, with and without an image."""
    module = tiny_module(diffusion_weight=3.0, **changed).double()
    logged = one_process(module, monkeypatch)
    whole, *parts = (
        in_double(packed([ROWS[n] for n in numbers], 24, row_ids=list(numbers)))
        for numbers in (range(4), *split(sizes))
    )
    assert {part.num_images > 0 for part in parts} == {True, False} or len(parts) == 2
    assert_same_steps(step(module, [whole], logged), step(module, parts, logged))


def test_batches_of_codes_give_the_gradients_and_losses_of_one_batch(double, monkeypatch):
    config = TransformerConfig(vocab_size=TOKENIZER.vocab_size, **SIZES)
    module = Transfusion(config, patch_size=1, num_codes=11, z_loss_weight=0.1)
    module.configure_model()
    module.double()
    logged = one_process(module, monkeypatch)
    whole = [[[IMAGE_CODES], [torch.tensor([5, 6]), IMAGE_CODES]], [[torch.tensor([7, 8, 9])]]]
    batches = [
        pack(rows, list(range(len(rows))), tokenizer=TOKENIZER, row_length=20, patch_size=1)
        for rows in (whole, whole[:1], whole[1:])
    ]
    assert len(batches[2].code_index) == 0 < len(batches[1].code_index)
    assert_same_steps(step(module, batches[:1], logged), step(module, batches[1:], logged))


def images(rows: range) -> ImageBatch:
    """Images of different contrast."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    drawn = drawn * torch.tensor([0.1, 0.9, 0.3, 0.5]).view(4, 1, 1, 1)
    return ImageBatch(drawn[list(rows)], torch.tensor(rows))


@pytest.mark.parametrize(
    "changed", [{"latent_noise": 0.3, "kl_weight": 0.1}, {"network": {"num_codes": 8}}]
)
@pytest.mark.parametrize("gan_start_step", [0, 10])  # before and after step 7
def test_batches_of_images_give_the_gradients_and_losses_of_one_batch(
    double, monkeypatch, changed, gan_start_step
):
    """With the scale of the adversarial loss, the unit of the noise and restarted codes."""
    sizes = {"channels": (4, 8), "layers_per_block": 1, "latent_channels": 2, "norm_groups": 2}
    sizes |= {"mid_attention": False, "code_dim": 2} | changed.get("network", {})
    results = []
    for parts in ((4,), (2, 2), (1, 1, 1, 1)):
        torch.manual_seed(0)
        module = AutoencoderModule(
            **{"network": sizes, "lpips_weight": 0.0, "gan_start_step": gan_start_step}
            | {name: value for name, value in changed.items() if name != "network"}
        )
        module.configure_model()
        module.reconstruction_loss = ReconstructionLoss()
        logged = one_process(module.double(), monkeypatch)
        found = step(module, [images(rows) for rows in split(parts)], logged)
        if gan_start_step:  # the discriminator's gradient is dropped before it starts
            for name in [name for name in found[0] if name.startswith("discriminator")]:
                assert not found[0].pop(name).any()
        results.append((found, module.state_dict()))
    for found, state in results[1:]:
        assert_same_steps(results[0][0], found)
        for name, value in state.items():  # restarted codes, counts of idle steps
            torch.testing.assert_close(value, results[0][1][name], msg=name)
