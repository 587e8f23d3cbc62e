"""How much one training step costs beside a plain causal Llama of the same size.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py
    python benchmarks/step_time.py --cuda [--compile]

Forward and backward, fp32, one thread, no optimizer, on the same packed rows. On CUDA: the paper's
0.76B, rows of 4,096, bf16 autocast, both models compiled or neither, device time.
`TransfusionModel` computes its attention by document, its vocabulary head at text targets, and both
losses. The plain Llama is what one would write for text alone: causal SDPA over the whole row, and
the vocabulary head and cross-entropy at every position, patches and padding taken for tokens. Each
ratio is the median over repeats of the two CPU times, taken one after the other in one process, so
that other work on the machine weighs on both. The bar is 1.15.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.batch import Batch, Document, document_length, pack
from tf_lightning.diffusion.process import add_noise, cosine_alphas_cumprod, diffusion_loss_sum
from tf_lightning.model.attention import build_attention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.training.losses import lm_loss, total_loss

BAR = 1.15
CONFIG = TransformerConfig(vocab_size=4096, dim=256, num_layers=6, num_heads=4, ffn_dim=704)
LARGE = TransformerConfig(32_002, dim=1536, num_layers=24, num_heads=24, ffn_dim=4096)  # 0.76B
ROW_LENGTH, LARGE_ROW_LENGTH, NUM_ROWS, PATCH_SIZE, LATENT_CHANNELS = 1024, 4096, 4, 2, 8
TOKENIZER = SimpleNamespace(bos_id=1, eos_id=2, boi_id=4094, eoi_id=4095)


# ---------------------------------------------------------------- the plain Llama


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, K) by cos, sin (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PlainBlock(nn.Module):
    """A Llama block under causal attention."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(dim, ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = self.attention_norm(x)
        q, k, v = (
            w(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, K)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))


class PlainLlama(nn.Module):
    """Next-token logits at every position."""

    def __init__(self, config: TransformerConfig, length: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            PlainBlock(config.dim, config.num_heads, config.ffn_dim)
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim, 1e-5)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        head_dim = config.dim // config.num_heads
        frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(length).unsqueeze(-1) * torch.cat([frequencies, frequencies])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids (B, T), places to predict from (K,) into B * T -> (K, V)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(self.norm(x).flatten(0, 1)[places])


# ---------------------------------------------------------------- documents


def text(generator: random.Random, shortest: int, longest: int) -> Tensor:
    """Random token ids, as many as asked for; what they are costs nothing."""
    length = generator.randint(shortest, longest)
    return torch.tensor([generator.randrange(3, 4094) for _ in range(length)])


def image(num_patches: int) -> Tensor:
    """A square of latents with that many patches."""
    side = PATCH_SIZE * round(num_patches**0.5)
    return torch.randn(LATENT_CHANNELS, side, side)


def captioned(num_patches: int) -> Callable[[random.Random], Document]:
    """Documents of a caption of 20-30 tokens and its image."""
    return lambda generator: [text(generator, 20, 30), image(num_patches)]


def ragged(generator: random.Random) -> Document:
    """Long and short captions, one to three images a document, and text alone."""
    if generator.random() < 1 / 3:
        return [text(generator, 20, 300)]
    pairs = ((text(generator, 5, 300), image(64)) for _ in range(generator.randint(1, 3)))
    return [part for pair in pairs for part in pair]


CASES = {
    "64-patch images, captions of 20-30 tokens": captioned(64),
    "256-patch images, captions of 20-30 tokens": captioned(256),
    "ragged mix: captions of 5-300, text of 20-300, 1-3 images": ragged,
}


def packed(draw: Callable[[random.Random], Document], row_length: int = ROW_LENGTH) -> Batch:
    """Rows filled from the left; a document that does not fit starts the next row."""
    generator = random.Random(0)
    rows: list[list[Document]] = [[]]
    while True:
        document = draw(generator)
        used = sum(document_length(other, PATCH_SIZE) for other in rows[-1])
        if used + document_length(document, PATCH_SIZE) > row_length:
            if len(rows) == NUM_ROWS:
                break
            rows.append([])
        rows[-1].append(document)
    row_ids = list(range(NUM_ROWS))
    return pack(rows, row_ids, tokenizer=TOKENIZER, row_length=row_length, patch_size=PATCH_SIZE)


# ---------------------------------------------------------------- the steps


def our_step(net: TransfusionModel, batch: Batch, alphas_cumprod: Tensor) -> None:
    """What `Transfusion.training_step` computes, with its backward pass."""
    timesteps = (batch.t * len(alphas_cumprod)).long()
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noised = add_noise(batch.latents, batch.noise, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    attend = build_attention(batch)
    logits, output = net(batch, noised, timesteps / len(alphas_cumprod), attend)
    loss_lm = lm_loss(logits, batch.labels.flatten()[batch.target_index]).mean()
    loss_diffusion = diffusion_loss_sum(output, batch.noise) / batch.noise.numel()
    total_loss(loss_lm, loss_diffusion, 5.0).backward()


def plain_step(llama: PlainLlama, ids: Tensor, places: Tensor) -> None:
    """Next-token prediction from `places` (K,), with its backward pass."""
    next_ids = ids.flatten().roll(-1)  # the last position of a row predicts the next row's first
    F.cross_entropy(llama(ids, places), next_ids[places]).backward()


def seconds(step: Callable, model: nn.Module, *args) -> float:
    """CPU time of one step from empty gradients, or the device's if the model is on one."""
    model.zero_grad()
    if not next(model.parameters()).is_cuda:
        start = time.process_time()
        step(model, *args)
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.autocast("cuda", torch.bfloat16):
        step(model, *args)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compare(
    batch: Batch, repeats: int, config: TransformerConfig = CONFIG, compiled: bool = False
) -> tuple[float, float, float]:
    """Medians: seconds of the plain step, ratio of ours to it, ratio to the strict one."""
    torch.manual_seed(0)
    device = batch.input_ids.device
    with device:
        net = TransfusionModel(config, PATCH_SIZE, LATENT_CHANNELS)
        net.reset_parameters()
        llama = PlainLlama(config, batch.input_ids.shape[1])
    for model in (net, llama):
        model.compile(disable=not compiled)
    alphas_cumprod = cosine_alphas_cumprod().to(device)
    everywhere = torch.arange(batch.input_ids.numel(), device=device)
    real = batch.row_tokens.sum().item() / len(everywhere)
    times = []
    for _ in range(repeats + 2):
        plain = seconds(plain_step, llama, batch.input_ids, everywhere)
        ours = seconds(our_step, net, batch, alphas_cumprod)
        strict = seconds(plain_step, llama, batch.input_ids, batch.target_index) * real
        times.append((plain, ours / plain, ours / strict))
    return tuple(map(statistics.median, zip(*times[2:], strict=True)))  # the first warm all up


def main() -> None:
    """Print one line a case; exit with 1 if one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds of steps a case")
    parser.add_argument("--cuda", action="store_true", help="a large model, on the GPU")
    parser.add_argument("--compile", action="store_true", help="both models, with torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    above = 0
    for name, draw in CASES.items():
        if options.cuda:
            batch, config = packed(draw, LARGE_ROW_LENGTH).to("cuda"), LARGE
        else:
            batch, config = packed(draw), CONFIG
        plain, ratio, strict = compare(batch, options.repeats, config, options.compile)
        above += ratio > BAR
        print(
            f"{name}: {ratio:.2f} x plain ({plain:.3f} s), {strict:.2f} x plain without padding "
            f"and with our targets; bar {BAR}",
            flush=True,
        )
    raise SystemExit(above > 0)


if __name__ == "__main__":
    main()
