"""Time one denoising step and one generated token, and the gain from batching prompts.

    OMP_NUM_THREADS=1 python benchmarks/generation.py
    OMP_NUM_THREADS=2 python benchmarks/generation.py --threads 2

Our generation is timed in turns with two others, in one process:
    plain  a Llama with a preallocated cache (plain_llama.py), without patches and sampler
    peer   lucidrains' transfusion-pytorch at the same sizes: `sample_one(cache_kv=True)` without
           guidance, and `generate_text_only` with its cache

The peer is not a dependency of this project; without it, its columns are left out. To compare with
it, make another environment that also contains ours, and run this file with its python:
    python -m venv /tmp/peer
    cd /tmp/peer/lib/python3*/site-packages
    ls -d CHECKOUT CHECKOUT/.venv/lib/python3*/site-packages > ours.pth
    /tmp/peer/bin/pip install transfusion-pytorch==0.19.4

The time of our denoising step is the slope between two numbers of network evaluations, so prompt
and start-up do not count. The peer's is the median time between two calls of its Transformer. With
one thread CPU time is measured, which other work on the machine affects least; with more threads,
wall time. Values are medians over repeats. Exit code 1 means that a limit is missed.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from plain_llama import PlainLlama, denoise, write_text
from step_time import CONFIG
from tf_lightning.batch import Document
from tf_lightning.diffusion.process import DDPM
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import GenerationModel, GenerationPlan
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel

try:
    from transfusion_pytorch import Transfusion as Peer
except ImportError:
    Peer = None

TOKENIZER = SimpleNamespace(bos_id=1, eos_id=2, boi_id=4094, eoi_id=4095)
LATENT_SHAPE, PATCH_SIZE, NUM_PATCHES = (8, 32, 32), 2, 256
FEW, MANY = 3, 9  # network evaluations
PREFIXES = {0: 2.5, 256: 5.0, 1024: 12.0}  # prefix length: minimum speed-up over the peer
QUICKSTART = TransformerConfig(
    vocab_size=512, dim=256, num_layers=6, num_heads=8, ffn_dim=704, qk_norm=True
)


# ---------------------------------------------------------------- ours


def build_net(config: TransformerConfig = CONFIG, latent_channels: int = 8) -> TransfusionModel:
    """Return a network with random weights that never generates <eos> or <boi>."""
    torch.manual_seed(0)
    net = TransfusionModel(config, PATCH_SIZE, latent_channels).requires_grad_(False)
    net.reset_parameters()
    net.transformer.output.weight[[TOKENIZER.eos_id, config.vocab_size - 2]] = 0
    return net


def generation_model(
    net: TransfusionModel, latent_shape: tuple[int, int, int] = LATENT_SHAPE
) -> GenerationModel:
    """Return a model whose vocabulary ends with <boi> and <eoi>."""
    size = net.transformer.config.vocab_size
    tokenizer = SimpleNamespace(bos_id=1, eos_id=2, boi_id=size - 2, eoi_id=size - 1)
    return GenerationModel(net, tokenizer, PATCH_SIZE, latent_shape)


def text(length: int, vocab_size: int = 4096) -> Tensor:
    """Return random ids of text tokens."""
    return torch.randint(3, vocab_size - 2, (length,))


def answer(
    model: GenerationModel, prompts: list[Document], plan: GenerationPlan, batch_size: int = 64
) -> None:
    """Generate and discard the outputs."""
    for _ in generate(model, prompts, list(range(len(prompts))), plan, batch_size=batch_size):
        pass


def image_plan(steps: int, guidance_scale: float = 1.0) -> GenerationPlan:
    """Return a plan for one DDIM image."""
    sampling = SamplingConfig(guidance_scale=guidance_scale, num_inference_steps=steps)
    return GenerationPlan("image", sampling, build_scheduler(DDPM()), steps)


def text_plan(count: int) -> GenerationPlan:
    """Return a plan for `count` greedy text tokens."""
    return GenerationPlan("text", SamplingConfig(max_new_tokens=count))


# ---------------------------------------------------------------- the peer


def build_peer() -> nn.Module:
    """The peer with our width, depth, heads, vocabulary and channels per patch."""
    torch.manual_seed(0)
    return Peer(
        num_text_tokens=CONFIG.vocab_size,
        dim_latent=8 * PATCH_SIZE**2,
        modality_default_shape=(NUM_PATCHES,),
        transformer={
            "dim": CONFIG.dim,
            "depth": CONFIG.num_layers,
            "heads": CONFIG.num_heads,
            "dim_head": CONFIG.dim // CONFIG.num_heads,
        },
    ).eval()


class Enough(Exception):
    """Stop the peer after the evaluations that are timed."""


@torch.no_grad()
def peer_step(peer: nn.Module, prompt: Tensor, threads: int) -> float:
    """Median seconds between two evaluations of the peer's Transformer for an image.

    A slope over whole calls would include the text that it generates after the image.
    """
    starts: list[float] = []

    def note(*_) -> None:
        starts.append(clock(threads)())
        if len(starts) > MANY - FEW:
            raise Enough

    hook = peer.transformer.register_forward_pre_hook(note)
    try:
        peer.sample_one(
            prompt if len(prompt) else None,
            cache_kv=True,
            force_modality_at_start=(0, (NUM_PATCHES,)),
            modality_steps=MANY,
            cfg_scale=1.0,
        )
    except Enough:
        pass
    finally:
        hook.remove()
    return statistics.median(b - a for a, b in itertools.pairwise(starts))


@torch.no_grad()
def peer_text(peer: nn.Module, prompt: Tensor, count: int) -> None:
    """Generate `count` tokens greedily with the peer."""
    peer.generate_text_only(prompt.unsqueeze(0), len(prompt) + count, temperature=0.0)


# ---------------------------------------------------------------- timing


def clock(threads: int) -> Callable[[], float]:
    """CPU clock for one thread, wall clock for several."""
    return time.process_time if threads == 1 else time.perf_counter


def seconds(run: Callable[[], None], threads: int) -> float:
    """Seconds of one call of `run`, see `clock`."""
    now = clock(threads)
    start = now()
    run()
    return now() - start


def medians(runs: dict[str, Callable[[], None]], threads: int, repeats: int) -> dict[str, float]:
    """Median seconds of each run, taken in turns after one warm-up turn."""
    times = [
        {name: seconds(run, threads) for name, run in runs.items()} for _ in range(repeats + 1)
    ]
    return {name: statistics.median(each[name] for each in times[1:]) for name in runs}


def per_evaluation(found: dict[str, float], who: str) -> float:
    """Seconds per network evaluation: slope between FEW and MANY evaluations."""
    return (found[f"{who} many"] - found[f"{who} few"]) / (MANY - FEW)


def time_steps(
    net: TransfusionModel, llama: PlainLlama, peer: nn.Module | None, options
) -> list[bool]:
    """Time a denoising step of a 256-patch image after each prefix; whether each limit is met."""
    met = []
    for prefix, limit in PREFIXES.items():
        prompt = text(prefix)
        runs = {}
        for name, count in (("few", FEW), ("many", MANY)):
            ours = partial(answer, generation_model(net), [[prompt]])
            runs[f"ours {name}"] = partial(ours, image_plan(count))
            runs[f"plain {name}"] = partial(denoise, llama, prefix, NUM_PATCHES, count)
        found = medians(runs, options.threads, options.repeats)
        ours, plain = per_evaluation(found, "ours"), per_evaluation(found, "plain")
        line = f"step, prefix {prefix}: {1e3 * ours:.0f} ms, {ours / plain:.2f} x plain (limit 1.2)"
        met.append(ours <= 1.2 * plain)
        if peer is not None:
            theirs = peer_step(peer, prompt, options.threads)
            line += f", {theirs / ours:.1f} x faster than the peer (limit {limit})"
            met.append(theirs >= limit * ours)
        print(line, flush=True)
    return met


def time_text(
    net: TransfusionModel, llama: PlainLlama, peer: nn.Module | None, options
) -> list[bool]:
    """Time 128 tokens after a prompt of 16; whether each limit is met."""
    prompt, count = text(16), 128
    runs = {
        "ours": lambda: answer(generation_model(net), [[prompt]], text_plan(count)),
        "plain": lambda: write_text(llama, prompt, count),
    }
    if peer is not None:
        runs["peer"] = lambda: peer_text(peer, prompt, count)
    found = medians(runs, options.threads, options.repeats)
    line = f"text, 16 + 128: {count / found['ours']:.0f} tokens/s, "
    line += f"{found['ours'] / found['plain']:.2f} x the time of plain"
    met = []
    if peer is not None:
        ratio = found["peer"] / found["ours"]
        line += f", {ratio:.2f} x faster than the peer (limit 2)"
        met.append(ratio >= 2)
    print(line, flush=True)
    return met


def time_batches(options) -> list[bool]:
    """Time 16 prompts in one batch and one by one; whether each limit is met."""
    net, shape = build_net(QUICKSTART), (8, 8, 8)
    model = generation_model(net, shape)
    captions = [[torch.randn(shape), text(1 + n, 512)] for n in range(16)]
    prompts = [[text(5 + n % 4, 512)] for n in range(16)]
    met = []
    for name, asked, how, limit in (
        ("16 captions of 20 tokens after unequal prompts", captions, text_plan(20), 4.0),
        ("16 guided quickstart images of 10 steps", prompts, image_plan(10, 3.0), 2.0),
    ):
        runs = {
            size: lambda n=n, asked=asked, how=how: answer(model, asked, how, batch_size=n)
            for size, n in (("together", 16), ("alone", 1))
        }
        found = medians(runs, options.threads, options.repeats)
        ratio = found["alone"] / found["together"]
        met.append(ratio >= limit)
        print(
            f"{name}: {ratio:.1f} x faster in one batch than one at a time (limit {limit})",
            flush=True,
        )
    return met


def main() -> None:
    """Print one line for each case; exit with code 1 if one misses its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns per case (default: 5)")
    parser.add_argument("--only", choices=("steps", "text", "batches"), help="time only one part")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, llama = build_net(), PlainLlama(CONFIG, 2048).requires_grad_(False)
    peer = build_peer() if Peer else None
    if peer is None:
        print("transfusion-pytorch is not installed; see --help to compare with it")
    met = []
    if options.only in (None, "steps"):
        met += time_steps(net, llama, peer, options)
    if options.only in (None, "text"):
        met += time_text(net, llama, peer, options)
    if options.only in (None, "batches"):
        met += time_batches(options)
    raise SystemExit(math.prod(met) == 0)


if __name__ == "__main__":
    main()
