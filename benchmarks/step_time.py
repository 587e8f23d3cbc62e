"""Compare the time of one training step with that of a plain causal Llama of the same size.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py
    python benchmarks/step_time.py --cuda

One step is a forward and a backward pass without the optimizer. Both models see the same packed
rows. On the CPU: fp32, one thread, CPU time. On CUDA: the paper's 0.76B model, rows of 4,096
positions, bf16 autocast, device time; once as it is, once with the blocks of both models compiled,
and once with their linear layers in fp8 as well. MFU is the share of the device's peak, in fp8 for
the last, by the FLOPs of our model without padding, and of the plain Llama with it; the memory is
the peak of a step. The rows are 315 steps of 0.09 PFLOPs each, 1.5 minutes at 40% of an H100's
peak, and the time to compile.

Our model attends within documents and computes the vocabulary head at text targets only, and both
losses. The plain Llama is what one would write for text alone: causal attention over the whole row,
with the vocabulary head and cross-entropy at every position, including patches and padding.

Each ratio is the median over repeats of two times measured one after the other in one process, so
other work on the machine affects both. The limit for the ratio is 1.15. The second ratio compares
with a plain Llama that has no padding and computes only our text targets.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plain_llama import PlainLlama
from tf_lightning.batch import Batch, Document, document_length, pack
from tf_lightning.diffusion.process import DDPM
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.training.compiled_blocks import compile_blocks
from tf_lightning.training.flops import Workload, squared_lengths, training_flops
from tf_lightning.training.fp8 import convert_linears
from tf_lightning.training.gpu_options import check_fp8
from tf_lightning.training.losses import loss_sums, total_loss
from tf_lightning.training.peak_flops import peak_flops

LIMIT = 1.15
KINDS = {"eager": torch.bfloat16, "compiled": torch.bfloat16, "fp8": torch.float8_e4m3fn}
RECIPE = "tensorwise"  # the fastest of fp8
CONFIG = TransformerConfig(vocab_size=4096, dim=256, num_layers=6, num_heads=4, ffn_dim=704)
LARGE = TransformerConfig(32_002, dim=1536, num_layers=24, num_heads=24, ffn_dim=4096)  # 0.76B
ROW_LENGTH, LARGE_ROW_LENGTH, NUM_ROWS, PATCH_SIZE, LATENT_CHANNELS = 1024, 4096, 4, 2, 8
TOKENIZER = SimpleNamespace(bos_id=1, eos_id=2, boi_id=4094, eoi_id=4095)


# ---------------------------------------------------------------- documents


def text(generator: random.Random, shortest: int, longest: int) -> Tensor:
    """Random token ids of a random length from `shortest` to `longest`."""
    length = generator.randint(shortest, longest)
    return torch.tensor([generator.randrange(3, 4094) for _ in range(length)])


def image(num_patches: int) -> Tensor:
    """Square random latents (C, h, w) of `num_patches` patches."""
    side = PATCH_SIZE * round(num_patches**0.5)
    return torch.randn(LATENT_CHANNELS, side, side)


def captioned(num_patches: int) -> Callable[[random.Random], Document]:
    """A function that draws documents: a caption of 20-30 tokens and an image."""
    return lambda generator: [text(generator, 20, 30), image(num_patches)]


def ragged(generator: random.Random) -> Document:
    """Text alone, or one to three images with short and long captions."""
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
    """Fill NUM_ROWS rows with drawn documents; a document that does not fit starts the next row."""
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


def our_step(net: TransfusionModel, batch: Batch, process: DDPM) -> None:
    """Compute the losses of `Transfusion.training_step` and their gradients."""
    sums = loss_sums(net, batch, process, causal_images=False, with_z=False)
    loss_diffusion = sums.diffusion / batch.num_noised_elements
    total_loss(sums.nll.mean(), loss_diffusion, 5.0).backward()


def plain_step(llama: PlainLlama, ids: Tensor, target_index: Tensor) -> None:
    """Compute the next-token loss at `target_index` (K,) and its gradients."""
    next_ids = ids.flatten().roll(-1)  # the last position of a row predicts the next row's first
    F.cross_entropy(llama(ids, target_index), next_ids[target_index]).backward()


def seconds(step: Callable, model: nn.Module, *args) -> float:
    """Seconds of one step: CPU time, or device time for a model on a CUDA device."""
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


@dataclass
class Timing:
    """Medians over the repeats."""

    plain: float  # seconds of a plain step
    ratio: float  # our time, divided by it
    strict: float  # our time, divided by that of a plain Llama without padding, with our targets
    flops: tuple[float, float]  # of our step and of the plain step
    gib: tuple[float, float]  # peak memory of both; 0 on a CPU

    def mfu(self, peak: float | None) -> str:
        """Shares of a device's peak in FLOPs per second: ours / plain."""
        if peak is None:
            return "unknown"
        seconds = self.ratio * self.plain, self.plain
        return " / ".join(f"{f / s / peak:.1%}" for f, s in zip(self.flops, seconds, strict=True))


def build(
    config: TransformerConfig, row_length: int, device: str, kind: str = "eager"
) -> tuple[TransfusionModel, PlainLlama]:
    """Build both models.

    Args:
        config: sizes of both.
        row_length: positions of a row.
        device: where they are.
        kind: "eager"; "compiled", with compiled blocks; "fp8", with these in fp8, which a CPU
            emulates.
    """
    torch.manual_seed(0)
    with torch.device(device):
        net = TransfusionModel(config, PATCH_SIZE, LATENT_CHANNELS)
        net.reset_parameters()
        llama = PlainLlama(config, row_length)
    if kind == "fp8":
        convert_linears([*net.transformer.layers, *llama.blocks], RECIPE, emulate=device == "cpu")
    if kind != "eager":
        compile_blocks(net.transformer)
        for block in llama.blocks:
            block.compile()
    return net, llama


def count_flops(net: TransfusionModel, batch: Batch) -> tuple[float, float]:
    """FLOPs of our step on a batch, and of the plain step."""
    tokens, positions = batch.row_tokens.sum().item(), batch.input_ids.numel()
    squares = squared_lengths(batch).item()
    bucket = batch.buckets[0]  # all images have one size
    work = Workload(tokens, squares, len(batch.target_index), bucket.num_images, bucket.num_copies)
    plain = Workload(positions, positions * batch.input_ids.shape[1], positions)
    size = tuple(batch.latents.shape[-2:])
    return training_flops(net, work, size), training_flops(net, plain, None)


def peak_gib(step: Callable, model: nn.Module, *args) -> float:
    """GiB on a CUDA device at the peak of a step; both models' weights are not counted."""
    if not next(model.parameters()).is_cuda:
        return 0.0
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds(step, model, *args)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def compare(batch: Batch, repeats: int, net: TransfusionModel, llama: PlainLlama) -> Timing:
    """Time our model and the plain Llama on a batch."""
    process = DDPM().to(batch.input_ids.device)
    everywhere = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    real = batch.row_tokens.sum().item() / len(everywhere)
    times = []
    for _ in range(repeats + 2):
        plain = seconds(plain_step, llama, batch.input_ids, everywhere)
        ours = seconds(our_step, net, batch, process)
        strict = seconds(plain_step, llama, batch.input_ids, batch.target_index) * real
        times.append((plain, ours / plain, ours / strict))
    medians = map(statistics.median, zip(*times[2:], strict=True))  # the first rounds warm up
    llama.zero_grad()
    ours = peak_gib(our_step, net, batch, process)
    net.zero_grad()
    plain = peak_gib(plain_step, llama, batch.input_ids, everywhere)
    return Timing(*medians, count_flops(net, batch), (ours, plain))


def cases_of(
    config: TransformerConfig, row_length: int, device: str, kind: str, repeats: int
) -> Iterator[tuple[str, Timing]]:
    """Yield each case's name and times; `kind` is one of `build`."""
    net, llama = build(config, row_length, device, kind)
    for name, draw in CASES.items():
        yield name, compare(packed(draw, row_length).to(device), repeats, net, llama)


def show_table(
    config: TransformerConfig,
    row_length: int,
    device: str,
    repeats: int,
    peaks: dict[str, float | None],
) -> None:
    """Print a table with one row for each kind of blocks and each case.

    Args:
        config: sizes of both models.
        row_length: positions of a row.
        device: where to run.
        repeats: timed rounds of a row.
        peaks: the device's peak FLOPs per second for each kind of blocks.
    """
    print("| images | blocks | ratio | strict | ours, s | MFU ours / plain | GiB ours / plain |")
    print("|---|---|---|---|---|---|---|")
    for kind, peak in peaks.items():
        for name, t in cases_of(config, row_length, device, kind, repeats):
            print(
                f"| {name} | {kind} | {t.ratio:.2f} | {t.strict:.2f} | {t.ratio * t.plain:.3f} | "
                f"{t.mfu(peak)} | {t.gib[0]:.1f} / {t.gib[1]:.1f} |",
                flush=True,
            )


def peaks_of(device: torch.device) -> dict[str, float | None]:
    """Return a GPU's peak for each kind of blocks, without fp8 where it cannot run."""
    peaks = {kind: peak_flops(device, dtype) for kind, dtype in KINDS.items() if kind != "fp8"}
    try:
        check_fp8(RECIPE, LARGE, "bf16-mixed", device)
    except UserError as error:
        print(f"Without rows of fp8: {error}\n")
        return peaks
    return peaks | {"fp8": peak_flops(device, KINDS["fp8"])}


def main() -> None:
    """Print one line for each case; on a CPU, exit with code 1 if a ratio is above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds per case (default: 9)")
    parser.add_argument("--cuda", action="store_true", help="time the 0.76B model on the GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cuda and not torch.cuda.is_available():
        parser.error("--cuda needs a GPU that torch can use; leave it out to time on the CPU")
    if options.cuda:
        peaks = peaks_of(torch.device("cuda", 0))
        return show_table(LARGE, LARGE_ROW_LENGTH, "cuda", options.repeats, peaks)
    above = 0
    for name, t in cases_of(CONFIG, ROW_LENGTH, "cpu", "eager", options.repeats):
        above += t.ratio > LIMIT
        print(
            f"{name}: {t.ratio:.2f} x plain ({t.plain:.3f} s), {t.strict:.2f} x plain without "
            f"padding and with our targets; limit {LIMIT}",
            flush=True,
        )
    raise SystemExit(above > 0)


if __name__ == "__main__":
    main()
