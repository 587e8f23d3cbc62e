"""FLOPs computed from sizes, against PyTorch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.tiny import TOKENIZER, VOCAB_SIZE, code_batch, document, packed
from tf_lightning.batch import Batch, document_length, pack
from tf_lightning.model.attention import VarlenAttention
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training.flops import (
    Workload,
    flops_6nd,
    forward_flops,
    squared_lengths,
    training_flops,
)

NETS = {
    "linear": {},
    "grouped queries": {"num_kv_heads": 2},
    "head dim": {"num_kv_heads": 2, "head_dim": 14, "qk_norm": "full", "nope_interval": 2},
    "separate feed-forward": {"modality_weights": "ffn"},
    "all separate": {"modality_weights": "all"},
    "AdaLN": {"linear": LinearConfig(time="adaln", pos_embed="sincos"), "learned_sigma": True},
}
UNETS = {1: (8,), 2: (8, 16), 4: (8, 12, 16)}


def net(
    unet: UNetConfig | None = None, patch_size: int = 2, learned_sigma=False, linear=None, **sizes
) -> TransfusionModel:
    config = TransformerConfig(VOCAB_SIZE, 32, 2, 4, **{"ffn_dim": 48, **sizes})
    return TransfusionModel(
        config, patch_size, 3, unet=unet, learned_sigma=learned_sigma, linear=linear
    )


def rows() -> list:
    return [[document("2i3i1", 1), document("2", 2)], [document("i2", 3), document("7", 4)]]


def work_of(batch: Batch, patch_size: int = 2) -> Workload:
    """The workload of `rows`, computed from the documents."""
    lengths = [document_length(d, patch_size) for row in rows() for d in row]
    squares = sum(length**2 for length in lengths)
    return Workload(sum(lengths), squares, len(batch.target_index), batch.num_images)


def counted(net: TransfusionModel, batch: Batch, backward: bool = False) -> int:
    """FLOPs that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        logits, output = net(batch, batch.latents, batch.t, VarlenAttention(batch))
        if backward:
            (logits.sum() + output.sum()).backward()
    return counter.get_total_flops()


def repacked(patch_size: int) -> Batch:
    return pack(rows(), [0, 1], tokenizer=TOKENIZER, row_length=60, patch_size=patch_size)


@pytest.mark.parametrize("sizes", NETS.values(), ids=NETS)
def test_forward_flops_equal_those_counted(sizes):
    made, batch = net(**sizes), packed(rows())
    assert forward_flops(made, work_of(batch), (4, 4)) == counted(made, batch)


@pytest.mark.parametrize("patch_size, channels", UNETS.items())
def test_forward_flops_of_a_unet_equal_those_counted(patch_size, channels):
    unet = UNetConfig(channels, num_blocks=2, head_dim=8)
    made, batch = net(unet, patch_size, learned_sigma=True), repacked(patch_size)
    assert forward_flops(made, work_of(batch, patch_size), (4, 4)) == counted(made, batch)


def test_a_training_step_costs_three_forward_passes():
    """Up to the gradients of the patches and of the timestep sinusoids, which are not computed."""
    made, batch = net(), packed(rows())
    ours = training_flops(made, work_of(batch), (4, 4))
    assert ours == pytest.approx(counted(made, batch, backward=True), rel=0.03)


def test_text_has_no_flops_of_patches():
    made, batch = net(), packed([[document("7")]])
    work = Workload(9, 81, len(batch.target_index), 0)
    assert forward_flops(made, work, None) == pytest.approx(counted(made, batch))


def test_squared_lengths_are_summed_over_documents():
    batch = packed(rows())
    assert squared_lengths(batch).item() == work_of(batch).squared_lengths
    assert squared_lengths(packed([[]], row_length=4)).item() == 0


def test_6nd_counts_the_weights_a_token_meets():
    plain, own = net(), net(modality_weights="all")
    parameters = sum(p.numel() for p in plain.transformer.parameters())
    assert flops_6nd(plain, 10) == flops_6nd(own, 10) == 60 * parameters


def test_flops_of_a_network_with_codes_equal_those_counted():
    made, batch = (
        TransfusionModel(TransformerConfig(20, 32, 2, 4, ffn_dim=48), 1, 1, num_codes=11),
        code_batch(),
    )
    targets = len(batch.target_index) + len(batch.code_index)
    work = Workload(10 + 3 + 8 + 9, 10**2 + 3**2 + 8**2 + 9**2, targets, num_images=3)
    assert forward_flops(made, work, (2, 2)) == counted(made, batch)


def test_6n_differs_from_the_count_by_attention_embedding_and_norms():
    """For the paper's 7B model: 6 N omits attention, and includes the embedding and the norms."""
    with torch.device("meta"):
        config = TransformerConfig(32_002, 4096, 32, 32, ffn_dim=11_008)
        made = TransfusionModel(config, 2, 8)
    length = 4096
    flops = training_flops(made, Workload(length, length**2, length, 0), None) / length
    attention = 3 * 4 * 4096 * 32 * length
    embedding = 6 * 32_002 * 4096
    norms = 6 * 65 * 4096
    assert flops - attention + embedding + norms == pytest.approx(flops_6nd(made, 1), rel=1e-9)
