"""Small documents and networks that several tests share."""

import random
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tf_lightning.batch import Batch, Document, Row, document_length, pack
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.training.module import Transfusion

TOKENIZER = SimpleNamespace(bos_id=1, eos_id=2, boi_id=18, eoi_id=19, vocab_size=20)
PICTURE_OF_CODES = torch.tensor([[[3, 0], [10, 3]]])  # four of eleven codes
VOCAB_SIZE, PATCH_SIZE, LATENT_SHAPE = 20, 2, (3, 4, 4)  # 4 patches an image
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def tiny_net(**sizes) -> TransfusionModel:
    """Two layers with PyTorch's own random weights, so that no output is zero."""
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "num_kv_heads": 2} | sizes
    config = TransformerConfig(vocab_size=VOCAB_SIZE, dim=32, num_layers=2, ffn_dim=48, **sizes)
    return TransfusionModel(config, PATCH_SIZE, LATENT_SHAPE[0]).requires_grad_(False)


def tiny_module(**changed) -> Transfusion:
    """A module for `tiny`'s batches, whose denoiser's output is not zero."""
    torch.manual_seed(0)
    arguments = {"patch_size": PATCH_SIZE, "latent_channels": 3, "warmup_steps": 1} | changed
    module = Transfusion(TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES), **arguments)
    module.configure_model()
    coder = module.net.patch_coder
    last = coder.conv_out if module.unet else coder.patch_decoder
    torch.nn.init.normal_(last.weight, std=0.2)
    return module


def document(shape: str, seed: int = 0) -> Document:
    """A document in shorthand: a digit is a text of that many tokens, "i" is an image."""
    numbers = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(LATENT_SHAPE, generator=generator)
        if part == "i"
        else torch.tensor([numbers.randrange(3, 18) for _ in range(int(part))], dtype=torch.long)
        for part in shape
    ]


def packed(rows: list[Row], row_length: int | None = None, **options) -> Batch:
    """The rows as a batch; without `row_length`, as long as the longest."""
    if row_length is None:
        row_length = max(sum(document_length(d, PATCH_SIZE) for d in row) for row in rows)
    options = {"row_ids": list(range(len(rows)))} | options
    return pack(rows, tokenizer=TOKENIZER, row_length=row_length, patch_size=PATCH_SIZE, **options)


def mixed_batch() -> Batch:
    """Text, pictures in several places, and a document whose caption was dropped."""
    rows = [
        [document("5i", 1), document("7", 2), document("i", 3)],
        [document("i4", 4), document("i2i", 5)],
    ]
    return packed(rows, seed=3)


def code_batch() -> Batch:
    """A caption with its picture, a text; a picture without caption, a picture before its text."""
    text, picture = lambda *ids: torch.tensor(ids), PICTURE_OF_CODES  # noqa: E731
    rows = [[[text(5, 6), picture], [text(7)]], [[picture], [picture.flip(-1), text(8)]]]
    return pack(rows, [0, 1], tokenizer=TOKENIZER, row_length=20, patch_size=1)


def layout(row: Row) -> list[tuple[int, int | None]]:
    """The document and the image of every position of a row, told part by part."""
    places, images = [], 0
    for number, parts in enumerate(row):
        places.append((number, None))  # <bos>
        for part in parts:
            if part.ndim == 1:
                places += [(number, None)] * len(part)
            else:
                places += [(number, None), *[(number, images)] * 4, (number, None)]
                images += 1
        places.append((number, None))  # <eos>
    return places


def random_rows() -> st.SearchStrategy[list[Row]]:
    """One to three rows of up to three documents of up to four parts; rows may be empty."""
    shape = st.lists(st.sampled_from("0125ii"), max_size=4).map("".join)
    documents = st.builds(document, shape, st.integers(0, 9))
    return st.lists(st.lists(documents, max_size=3), min_size=1, max_size=3)


def all_outputs(net: TransfusionModel, batch: Batch, attend) -> tuple[Tensor, Tensor]:
    """Logits at every position (B, T, V), and the denoiser's output (M, C, h, w)."""
    everywhere = SimpleNamespace(**vars(batch))
    everywhere.target_index = torch.arange(batch.input_ids.numel())
    logits, output = net(everywhere, batch.latents, batch.t, attend)
    return logits.unflatten(0, batch.input_ids.shape), output
