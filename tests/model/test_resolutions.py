"""Images of several resolutions in one batch give the same results as in separate batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from support import runs
from support.tiny import TOKENIZER, VOCAB_SIZE, document
from tf_lightning.batch import Batch, crop_by_bucket, pack, unpack
from tf_lightning.cli.main import main
from tf_lightning.diffusion.process import DDPM
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training.losses import loss_sums

LARGE, SMALL, WIDE = (8, 8), (4, 4), (4, 8)
CODERS = {
    "linear": {},
    "adaln": {"linear": LinearConfig(time="adaln")},
    "token": {"linear": LinearConfig(time="token", pos_embed="sincos")},
    "unet": {"unet": UNetConfig((8, 16), head_dim=8)},
    "sigma": {"learned_sigma": True},
}


def net(coder: str) -> TransfusionModel:
    torch.manual_seed(0)
    config = TransformerConfig(VOCAB_SIZE, 32, 2, 4, ffn_dim=48)
    return TransfusionModel(config, 2, 3, **CODERS[coder])


def with_sizes(shape: str, sizes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """`tiny.document` with images of these sizes."""
    random, sizes = torch.Generator().manual_seed(seed), iter(sizes)
    return [
        torch.randn(3, *next(sizes), generator=random) if part.ndim == 3 else part
        for part in document(shape, seed)
    ]


ROWS = [
    [with_sizes("3i", [LARGE], 1), with_sizes("i2", [LARGE], 2)],
    [with_sizes("2i", [SMALL], 3), with_sizes("ii1", [SMALL, SMALL], 4)],
    [with_sizes("i2i1i", [LARGE, SMALL, WIDE], 5), with_sizes("4", [], 6)],
    [with_sizes("1i", [SMALL], 7), with_sizes("i", [LARGE], 8)],
]


def batch_of(numbers: list[int], coder: str = "linear", copies: bool = False) -> Batch:
    """Some of ROWS; the noise of a row depends on its number only."""
    return pack(
        [ROWS[n] for n in numbers], numbers, tokenizer=TOKENIZER, row_length=110, patch_size=2,
        clean_copies=copies, time_token=coder == "token",
    )  # fmt: skip


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("coder", CODERS)
def test_a_mixed_batch_has_the_losses_of_its_rows(coder, copies):
    """The loss of every text target, the diffusion loss, and their gradients."""
    made, gamma = net(coder), None if coder == "sigma" else 5.0
    process = DDPM(learned_sigma=coder == "sigma", min_snr_gamma=gamma)
    found, gradients = [], []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        made.zero_grad()
        batches = [batch_of(part, coder, copies) for part in parts]
        costs = [loss_sums(made, batch, process, False, False) for batch in batches]
        nll, diffusion = torch.cat([c.nll for c in costs]), sum(c.diffusion for c in costs)
        (nll.sum() + diffusion).backward()
        gradients.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
        found.append((nll, diffusion, sum(batch.num_noised_elements for batch in batches)))
    (nll, diffusion, count), (nll_alone, diffusion_alone, count_alone) = found
    torch.testing.assert_close(nll, nll_alone)
    torch.testing.assert_close(diffusion, diffusion_alone)
    assert diffusion > 1 and count == count_alone == 3 * (64 * 4 + 16 * 5 + 32)
    for mixed, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-3, atol=1e-4)


def by_hand(made: TransfusionModel, batch: Batch, x_t: Tensor) -> list[Tensor]:
    """The output for each image, which is encoded alone and put at its positions."""
    x = made.transformer.tok_embeddings(batch.input_ids)
    images = [image for part in crop_by_bucket(x_t, batch.buckets) for image in part]
    coded = [
        made.patch_coder.encode(i[None], t[None]) for i, t in zip(images, batch.t, strict=True)
    ]
    for number, (patches, _) in enumerate(coded):
        x = x.masked_scatter((batch.image_ids == number).unsqueeze(-1), patches)
    hidden = made.transformer(x, batch.positions, DenseAttention(batch))
    return [
        made.patch_coder.decode(
            hidden[batch.image_ids == number][None], images[number].shape[-2:], skips
        )[0]
        for number, (_, skips) in enumerate(coded)
    ]


@pytest.mark.parametrize("coder", ["linear", "adaln", "token", "unet"])
def test_each_image_is_at_its_positions_whatever_its_size(coder):
    made, batch = net(coder).requires_grad_(False), batch_of([0, 1, 2, 3], coder)
    _, output = made(batch, batch.latents, batch.t, DenseAttention(batch))
    found = [image for part in crop_by_bucket(output, batch.buckets) for image in part]
    assert [tuple(image.shape[1:]) for image in found] == 5 * [SMALL] + [WIDE] + 4 * [LARGE]
    for image, expected in zip(found, by_hand(made, batch, batch.latents), strict=True):
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)


def test_the_padding_of_small_images_is_never_read():
    made, batch = net("linear").requires_grad_(False), batch_of([0, 1, 2, 3], copies=True)
    process = DDPM()
    clean = loss_sums(made, batch, process, False, False)
    for name in ("latents", "noise"):
        padded = getattr(batch, name)
        whole = torch.full_like(padded, 1e6)
        for there, part in zip(
            crop_by_bucket(whole, batch.buckets), crop_by_bucket(padded, batch.buckets), strict=True
        ):
            there.copy_(part)
        setattr(batch, name, whole)
    dirty = loss_sums(made, batch, process, False, False)
    assert torch.equal(clean.diffusion, dirty.diffusion) and torch.equal(clean.nll, dirty.nll)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_unpack_returns_the_documents_with_and_without_copies(data):
    sizes = st.sampled_from([LARGE, SMALL, WIDE])
    shapes = st.text("12i", min_size=1, max_size=4).filter(lambda s: not any(
        a != "i" != b for a, b in zip(s, s[1:], strict=False)))  # fmt: skip
    rows = [
        [
            with_sizes(shape, data.draw(st.lists(sizes, min_size=4, max_size=4)), seed)
            for seed, shape in enumerate(data.draw(st.lists(shapes, min_size=1, max_size=3)))
        ]
        for _ in range(2)
    ]
    batch = pack(
        rows, [0, 1], tokenizer=TOKENIZER, row_length=500, patch_size=2,
        clean_copies=data.draw(st.booleans()),
    )  # fmt: skip
    expected = [document for row in rows for document in row]
    for found, document_ in zip(unpack(batch, TOKENIZER), expected, strict=True):
        assert len(found) == len(document_)
        assert all(torch.equal(a, b) for a, b in zip(found, document_, strict=True))
    for number, copied in enumerate(batch.copied.tolist()):  # a copy has the positions of its image
        image, copy = (
            batch.positions[batch.image_ids == n] for n in (copied, batch.num_images + number)
        )
        assert torch.equal(image, copy)


def test_images_of_one_resolution_keep_their_order_without_padding():
    batch = batch_of([1, 1])
    assert batch.buckets == [(6, 0, 4, 4)] and batch.latents.shape == (6, 3, 4, 4)
    ids = batch.image_ids[batch.image_ids >= 0]
    assert torch.equal(ids, torch.arange(6).repeat_interleave(4))


def two_sizes(config: dict) -> None:
    """Train on images of 64 and of 32 pixels."""
    config["trainer"]["callbacks"] = [
        callback
        for callback in config["trainer"]["callbacks"]
        if callback["class_path"].split(".")[-1] in NAMED
    ]
    small = {
        "class_path": "support.sources.GreyImages",
        "init_args": {"side": 32, "num_documents": 30},
    }
    sources = {"captions": runs.shapes("Captions", 30), "grey": small}
    config["data"]["init_args"] |= {"sources": sources, "weights": {"captions": 1, "grey": 1}}


NAMED = ("ModelCheckpoint", "Throughput", "TextPerplexity", "PredictionWriter")


def test_a_run_on_two_resolutions_trains_predicts_and_generates_the_larger(tmp_path, capsys):
    config = str(runs.write_config(tmp_path, two_sizes))
    main(["fit", "-c", config])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    codec = torch.load(checkpoint, weights_only=True)["image_codec"]
    assert (codec["latent_shape"], codec["other_shapes"]) == ([3, 64, 64], [[3, 32, 32]])
    main(["predict", "-c", config, "--ckpt_path", checkpoint])
    (written,) = tmp_path.rglob("text-0.jsonl")
    assert len(written.read_text().splitlines()) == runs.NUM_VAL + 20
    main(
        [
            "generate",
            checkpoint,
            "grey 3",
            "--num-inference-steps",
            "2",
            "-n1",
            "-o",
            str(tmp_path / "out"),
        ]
    )
    assert Image.open(tmp_path / "out" / "0000.png").size == (64, 64)
    capsys.readouterr()
    main(["inspect", "-c", config])
    report = capsys.readouterr().out
    assert "images of 16 patches" in report and "images of 4 patches" in report
