"""CUDA gives the results of the CPU, and training steps do not synchronize with the device."""

import lightning as L
import pytest
import torch

from support import runs
from support.generation import generate_documents, generate_images, open_ended_net, plan
from support.tiny import SIZES, document, mixed_batch, packed, tiny_module, tiny_net
from tf_lightning.data import Mixture
from tf_lightning.model.attention import FlexAttention, build_attention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import update_ema
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.module import Transfusion

pytestmark = pytest.mark.gpu
TEXT = document("9", 4)
PROMPTS = [document("4", 1), document("2i3", 2), document("9", 3)]


def losses(module: Transfusion, batch) -> tuple[float, float]:
    """Sums of the text loss and the diffusion loss; computes their gradients in the module."""
    sums = module.loss_sums(module.net, batch)
    (sums.nll.sum() + sums.diffusion).backward()
    return sums.nll.sum().item(), sums.diffusion.item()


@pytest.mark.parametrize("modality_weights", ["shared", "all"])
def test_losses_and_gradients_equal_those_of_the_cpu(modality_weights):
    here, there = (tiny_module({"modality_weights": modality_weights}) for _ in range(2))
    there.to("cuda")
    assert isinstance(build_attention(mixed_batch().to("cuda")), FlexAttention)
    assert losses(there, mixed_batch().to("cuda")) == pytest.approx(
        losses(here, mixed_batch()), rel=1e-4
    )
    for ours, theirs in zip(here.net.parameters(), there.net.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad, atol=1e-3, rtol=1e-3)


def test_bf16_autocast_gives_roughly_the_same_losses():
    module, batch = tiny_module().to("cuda"), mixed_batch().to("cuda")
    exact = losses(module, batch)
    with torch.autocast("cuda", torch.bfloat16):
        assert losses(module, batch) == pytest.approx(exact, rel=2e-2)


def test_a_compiled_network_has_the_same_losses_for_batches_of_any_shape():
    plain, compiled = tiny_module().to("cuda"), tiny_module(compile=True).to("cuda")
    batches = [mixed_batch(), packed([[document("7i2", 1)], [document("i", 2)]], seed=1)]
    batches.append(packed([[document("9", 1), document("3", 2)]]))
    for batch in (each.to("cuda") for each in batches):
        assert losses(compiled, batch) == pytest.approx(losses(plain, batch), rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(mode, compiled):
    batch, gradients = mixed_batch().to("cuda"), []
    for activations in ("none", mode):
        module = tiny_module(activation_checkpointing=activations, compile=compiled).to("cuda")
        losses(module, batch)
        gradients.append([weight.grad for weight in module.net.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_average_is_on_the_host_between_validations():
    module = tiny_module(ema_device="cpu").to("cuda")
    assert next(module.inference_net.parameters()).is_cuda
    module.on_train_batch_start(None, 0)
    update_ema(module.ema, module.net, decay=0.5)
    for average, weight in zip(module.ema.parameters(), module.net.parameters(), strict=True):
        assert not average.is_cuda and weight.is_cuda
        torch.testing.assert_close(average, weight.detach().cpu())


def test_generated_images_and_texts_equal_those_of_the_cpu():
    how = plan("image", guidance_scale=2.0)
    drawn = [
        generate_images(tiny_net().to(device), PROMPTS, how, 1, 2, 3) for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], atol=1e-3, rtol=1e-3)
    here, there = (
        generate_documents(open_ended_net().to(device), PROMPTS, plan("text"))
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(here, there, strict=True):
        assert [part.tolist() for part in theirs] == [part.tolist() for part in ours]


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("modality_weights", ["shared", "all"])
def test_losses_and_gradients_in_fp8_are_roughly_those_of_bf16(recipe, compiled, modality_weights):
    """Also in a batch without images, and with numbers of positions that are no multiples of 16."""
    pytest.importorskip("torchao")
    if capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9")
    found = []
    for options in ({}, {"fp8": recipe, "compile": compiled}):
        module = tiny_module({"modality_weights": modality_weights}, **options).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            values = [losses(module, b.to("cuda")) for b in (mixed_batch(), packed([[TEXT]]))]
        found.append((values, [weight.grad for weight in module.net.parameters()]))
    (bf16, bf16_grads), (fp8, fp8_grads) = found
    assert fp8[0] == pytest.approx(bf16[0], rel=5e-2) and fp8[1] == pytest.approx(bf16[1], rel=5e-2)
    for ours, theirs in zip(fp8_grads, bf16_grads, strict=True):
        assert (ours - theirs).norm() <= 0.2 * theirs.norm() + 1e-3


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_gives_the_results_of_the_default_kernels(kv_heads, head_dim):
    pytest.importorskip("flash_attn.cute")
    if not (9, 0) <= capability() < (12, 0):
        pytest.skip("needs a GPU of compute capability 9 to 11")
    rows = [[document("50i50i"), document("9i90i")], [document("i99")]]
    batch = packed([row * 12 for row in rows]).to("cuda")
    real, found = batch.document_ids >= 0, []
    for flash in (False, True):
        torch.manual_seed(0)
        shapes = [(*batch.input_ids.shape, heads, head_dim) for heads in (2, kv_heads, kv_heads)]
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        qkv = [x.requires_grad_() for x in qkv]
        out = FlexAttention(batch, flash=flash)(*qkv)[real]
        out.square().sum().backward()
        found.append([out, *(x.grad for x in qkv)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


class ForbidSynchronization(L.Callback):
    """Raise an error if the host waits for the device during a training step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx > 1:  # the first steps compile
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


def test_training_steps_do_not_synchronize_with_the_device(tmp_path):
    config = TransformerConfig(vocab_size=runs.VOCAB_SIZE, **SIZES)
    module = Transfusion(config, patch_size=16, latent_channels=3, warmup_steps=1)
    data = Mixture(
        {"captions": ShapesCaptions(30, 6), "text": ShapesTexts(30, 6)},
        **{"autoencoder": "pixels", "vocab_size": runs.VOCAB_SIZE, "patch_size": 16},
        **{"row_length": 256, "batch_size": 2, "cache_dir": str(tmp_path)},
    )
    trainer = L.Trainer(
        **{"accelerator": "cuda", "devices": 1, "max_steps": 6, "precision": "bf16-mixed"},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0},
        **{"use_distributed_sampler": False, "gradient_clip_val": 0.5},
        callbacks=[ForbidSynchronization()],
    )
    trainer.fit(module, data)
    assert trainer.global_step == 6
