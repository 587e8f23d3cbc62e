"""Small documents, batches and networks that many tests share."""

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
IMAGE_CODES = torch.tensor([[[3, 0], [10, 3]]])  # an image of 4 discrete codes, of 11
VOCAB_SIZE, PATCH_SIZE, LATENT_SHAPE = 20, 2, (3, 4, 4)  # 4 patches per image
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def tiny_net(**sizes) -> TransfusionModel:
    """A network of two layers with PyTorch's default initialization, so that no output is zero."""
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "num_kv_heads": 2} | sizes
    config = TransformerConfig(vocab_size=VOCAB_SIZE, dim=32, num_layers=2, ffn_dim=48, **sizes)
    return TransfusionModel(config, PATCH_SIZE, LATENT_SHAPE[0]).requires_grad_(False)


def tiny_module(sizes: dict | None = None, **changed) -> Transfusion:
    """A module for these batches, with a random instead of a zero output layer of the denoiser.

    `sizes` are changed sizes of the Transformer, the others arguments of the module.
    """
    torch.manual_seed(0)
    arguments = {"patch_size": PATCH_SIZE, "latent_channels": 3, "warmup_steps": 1} | changed
    config = TransformerConfig(vocab_size=VOCAB_SIZE, **(SIZES | (sizes or {})))
    module = Transfusion(config, **arguments)
    module.configure_model()
    coder = module.net.patch_coder
    last = coder.conv_out if module.unet else coder.patch_decoder
    torch.nn.init.normal_(last.weight, std=0.2)
    return module


def document(shape: str, seed: int = 0) -> Document:
    """A random document from a shorthand: a digit is a text of that many tokens, "i" an image."""
    numbers = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(LATENT_SHAPE, generator=generator)
        if part == "i"
        else torch.tensor([numbers.randrange(3, 18) for _ in range(int(part))], dtype=torch.long)
        for part in shape
    ]


def packed(rows: list[Row], row_length: int | None = None, **options) -> Batch:
    """Pack rows into a batch; the default `row_length` is that of the longest row."""
    if row_length is None:
        row_length = max(sum(document_length(d, PATCH_SIZE) for d in row) for row in rows)
    options = {"row_ids": list(range(len(rows)))} | options
    return pack(rows, tokenizer=TOKENIZER, row_length=row_length, patch_size=PATCH_SIZE, **options)


def mixed_batch() -> Batch:
    """A batch of text, images in several places, and an image without its caption."""
    rows = [
        [document("5i", 1), document("7", 2), document("i", 3)],
        [document("i4", 4), document("i2i", 5)],
    ]
    return packed(rows, seed=3)


def code_batch() -> Batch:
    """A batch of discrete images after, before and without a caption, and text."""
    image, other = IMAGE_CODES, IMAGE_CODES.flip(-1)
    text, word, letter = torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8])
    rows = [[[text, image], [word]], [[image], [other, letter]]]
    return pack(rows, [0, 1], tokenizer=TOKENIZER, row_length=20, patch_size=1)


def layout(row: Row) -> list[tuple[int, int | None]]:
    """The document and the image (or None) of every position of a row, computed part by part."""
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
    """Draw one to three rows of up to three documents of up to four parts; all may be empty."""
    shape = st.lists(st.sampled_from("0125ii"), max_size=4).map("".join)
    documents = st.builds(document, shape, st.integers(0, 9))
    return st.lists(st.lists(documents, max_size=3), min_size=1, max_size=3)


def all_outputs(net: TransfusionModel, batch: Batch, attend) -> tuple[Tensor, Tensor]:
    """The logits at every position (B, T, V) and the denoiser's output (M, C, h, w)."""
    everywhere = SimpleNamespace(**vars(batch))
    everywhere.target_index = torch.arange(batch.input_ids.numel())
    logits, output = net(everywhere, batch.latents, batch.t, attend)
    return logits.unflatten(0, batch.input_ids.shape), output
