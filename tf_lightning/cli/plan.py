"""`tf-lightning plan`: memory, FLOPs and days of a run, computed before it starts.

Shapes: T positions in a row, N patches (and time token) per image, C x h x w latents.
"""

import argparse
import math
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tf_lightning.autoencoder.frozen import SHIPPED, load_autoencoder
from tf_lightning.batch import Batch, Document, num_patches, pack
from tf_lightning.cli.lightning import build_config
from tf_lightning.cli.parser import Parser, positive_int
from tf_lightning.errors import UserError
from tf_lightning.model.patches import LinearConfig, has_time_token
from tf_lightning.model.transfusion import build_network
from tf_lightning.training.flops import Workload, squared_lengths, training_flops
from tf_lightning.training.module import Transfusion
from tf_lightning.training.step_memory import StepMemory, plan_memory
from tf_lightning.training.steps import check_shard_size

DESCRIPTION = "Compute what a run needs on a number of GPUs: memory, FLOPs, days."
NOTES = """\
  tf-lightning plan -c CONFIG --gpus 64 --gpu-memory 80
  tf-lightning plan -c CONFIG --gpus 8 --model configs/model/1.4b.yaml
  tf-lightning plan -c CONFIG --gpus 8 --model.activation_checkpointing full

No data is read and no GPU is needed. A step of the configuration's model is run on tensors without
memory, sharded over the GPUs as ModelParallelStrategy does (FSDP2), and the memory of one GPU is
tracked. If the peak does not fit, the options that lower it are tried one after another. A tenth
of a GPU's memory is left to CUDA, to NCCL and to gaps between tensors. torch.compile, which takes
less, is left out.

Half of the positions are counted as image patches, if the data has an autoencoder. An autoencoder
that is not in the local folder is taken to shrink images 8 times, as Stable Diffusion's does.
The days are those of training steps alone, at the share of the peak that --mfu gives."""

GIB = 2**30
MFU, TFLOPS, GPU_MEMORY = 0.45, 989.0, 80.0  # share of the peak, H100's peak in bf16, its GiB
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and gaps between tensors
DOWNSAMPLE = 8  # assumed for an autoencoder that is not in a local folder
CAPTION_TOKENS = 32


def run_plan(args: list[str]) -> None:
    """Run `tf-lightning plan`."""
    parser = plan_parser()
    given, rest = parser.parse_known_args(args)
    plan = read_plan(build_config(rest, parser), given.gpus)
    memory = plan.memory()
    print(report(plan, memory, given))
    sets_rows = any("batch_size" in word or "accumulate_grad_batches" in word for word in rest)
    if not sets_rows and (note := plan.other_rows()):
        print(f"{'Rows a step':14} {note}")
    print(verdict(plan, memory, given.gpu_memory))


def plan_parser() -> Parser:
    """Create the parser of the options that are not part of the configuration."""
    usage = (
        "tf-lightning plan -c CONFIG [--gpus N] [--gpu-memory GIB] [--mfu SHARE] "
        "[--gpu-tflops TFLOPS] [--KEY VALUE]"
    )
    parser = Parser("plan", DESCRIPTION, NOTES, usage=usage, allow_abbrev=False)
    add = parser.add_argument
    about = "number of GPUs (default: the configuration's trainer.devices x trainer.num_nodes)"
    add("--gpus", type=positive_int, metavar="N", help=about)
    about = f"memory of a GPU in GiB (default: {GPU_MEMORY:g})"
    add("--gpu-memory", type=positive_number, default=GPU_MEMORY, metavar="GIB", help=about)
    about = f"share of the peak that training reaches, in (0, 1] (default: {MFU:g})"
    add("--mfu", type=share, default=MFU, metavar="SHARE", help=about)
    about = (
        f"peak of a GPU in TFLOPS, dense bf16: A100 312, H100 989, B200 2250 (default: {TFLOPS:g})"
    )
    add("--gpu-tflops", type=positive_number, default=TFLOPS, metavar="TFLOPS", help=about)
    return parser


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def share(text: str) -> float:
    """Parse a number in (0, 1]."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in (0, 1]")
    return number


@dataclass(frozen=True)
class Plan:
    """The settings of a run that determine its memory, FLOPs and time."""

    hparams: Mapping[str, Any]
    row_length: int
    batch_size: int
    accumulate: int
    num_gpus: int
    precision: str
    max_steps: int
    latent_shape: tuple[int, int, int] | None
    is_sharded: bool
    """Whether trainer.strategy is ModelParallelStrategy, which the plan assumes."""
    configured_gpus: int | None
    """Number of GPUs of the configuration; None if it depends on the machine."""

    def batch(self) -> Batch:
        """Return a batch of one rank, half of whose positions are patches if there are images."""
        return make_batch(
            self.batch_size,
            self.row_length,
            self.latent_shape,
            self.hparams["patch_size"],
            has_time_token(linear_config(self.hparams)),
            self.hparams["num_codes"] or 0,
        )

    def memory(self) -> StepMemory:
        """Measure the memory of a step."""
        hparams = {**self.hparams, "compile": False, "fp8": None}
        return plan_memory(hparams, self.batch(), self.num_gpus, self.precision, self.accumulate)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.accumulate * self.num_gpus

    @property
    def tokens_per_step(self) -> int:
        """Positions of all rows of an optimizer step."""
        return self.row_length * self.rows_per_step

    def other_rows(self) -> str:
        """Return how many rows a step has on the GPUs of the configuration, if those are others."""
        if self.configured_gpus in (None, self.num_gpus):
            return ""
        rows = self.batch_size * self.accumulate * self.configured_gpus
        batches, rest = divmod(rows, self.batch_size * self.num_gpus)
        keep = "" if rest else f"; --trainer.accumulate_grad_batches {batches} keeps {rows:,}"
        return (
            f"{self.rows_per_step:,}, but {rows:,} on the {self.configured_gpus:,} GPUs of the "
            f"configuration{keep}"
        )

    def flops_per_step(self) -> float:
        """FLOPs of an optimizer step on all GPUs."""
        with torch.device("meta"):
            net = build_network(self.hparams)
        batch = self.batch()
        work = Workload(
            num_tokens=int(batch.row_tokens.sum()),
            squared_lengths=float(squared_lengths(batch)),
            num_targets=len(batch.target_index) + len(batch.code_index),
            num_images=batch.num_images,
        )
        size = self.latent_shape and self.latent_shape[1:]
        return training_flops(net, work, size) * self.accumulate * self.num_gpus

    def num_parameters(self) -> int:
        """Count the parameters of the network."""
        with torch.device("meta"):
            return sum(p.numel() for p in build_network(self.hparams).parameters())


# ---------------------------------------------------------------- reading a configuration


def read_plan(config: Any, num_gpus: int | None) -> Plan:
    """Read the settings of a plan from a parsed configuration.

    Args:
        config: the values of trainer, model and data.
        num_gpus: number of GPUs; None: the configuration's.

    Raises:
        UserError: the model is no Transfusion model, the data has no rows, or the number of GPUs
            depends on the machine or is not a multiple of `shard_size`.
    """
    check_model(config.model.class_path)
    check_rows(config.data)
    hparams = config.model.init_args.as_dict()
    for name in ("unet", "linear"):  # jsonargparse wraps an optional dataclass
        hparams[name] = (hparams[name] or {}).get("init_args", hparams[name])
    trainer, data = config.trainer, config.data.init_args
    configured = configured_gpus(trainer)
    if not (num_gpus or configured):
        raise UserError(f"trainer.devices={trainer.devices} depends on the machine; give --gpus N")
    check_shard_size(hparams.get("shard_size"), num_gpus or configured)
    return Plan(
        hparams=hparams,
        row_length=data.row_length,
        batch_size=data.batch_size,
        accumulate=trainer.accumulate_grad_batches,
        num_gpus=num_gpus or configured,
        precision=plan_precision(trainer.precision),
        max_steps=trainer.max_steps,
        latent_shape=latent_shape(data.as_dict(), hparams),
        is_sharded="ModelParallelStrategy" in str(trainer.strategy),
        configured_gpus=configured,
    )


def check_model(class_path: str) -> None:
    """Refuse another model than Transfusion.

    Raises:
        UserError: the class is another one.
    """
    if not issubclass(pkgutil.resolve_name(class_path), Transfusion):
        raise UserError(f"plan works with Transfusion, but the model is {class_path}; give another")


def check_rows(data: Any) -> None:
    """Refuse data of a class of the user that does not say how long and how many its rows are.

    Raises:
        UserError: the class has no argument `row_length` or no `batch_size`.
    """
    if not {"row_length", "batch_size"} <= data.init_args.as_dict().keys():
        raise UserError(
            f"plan reads data.row_length and data.batch_size, which {data.class_path} does not "
            "have; describe its rows with --data Mixture --data.sources {} --data.weights {} "
            "--data.row_length T --data.batch_size B"
        )


def configured_gpus(trainer: Any) -> int | None:
    """Return the number of GPUs that a configuration asks for; None: it depends on the machine."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:  # numbers of devices, as in 0,1
        devices = devices.strip(",").split(",")
    count = len(devices) if isinstance(devices, list) else devices
    known = str(count).isdecimal() and int(count) > 0
    return int(count) * trainer.num_nodes if known else None


def plan_precision(precision: Any) -> str:
    """Return the precision of a GPU for the trainer's; fp16 takes as much memory as bf16."""
    return "bf16-mixed" if precision in (None, 16, "16", "16-mixed") else str(precision)


def linear_config(hparams: Mapping[str, Any]) -> LinearConfig | None:
    """Return the options of the linear patch coder, if they are given."""
    return LinearConfig(**hparams["linear"]) if hparams["linear"] else None


def latent_shape(data: Mapping[str, Any], hparams: Mapping[str, Any]) -> tuple | None:
    """Return (C, h, w) of the largest images of the data; None if it has no autoencoder."""
    name = data.get("autoencoder")
    if name is None:
        return None
    at_hand = name == "pixels" or name in SHIPPED or Path(name).exists()
    downsample = load_autoencoder(name).downsample if at_hand else DOWNSAMPLE
    side = max(image_sizes(data), default=256) // downsample
    return (1 if hparams["num_codes"] else hparams["latent_channels"], side, side)


def image_sizes(data: Mapping[str, Any]) -> Iterator[int]:
    """Yield the sizes in pixels of the images of a data module and of its sources."""
    sources = (data.get("sources") or {}).values()
    options_of = [
        {**vars(pkgutil.resolve_name(source["class_path"])), **(source.get("init_args") or {})}
        for source in sources
    ]
    for options in (data, *options_of):
        if isinstance(options.get("image_size"), int):
            yield options["image_size"]


# ---------------------------------------------------------------- a batch


def make_batch(
    num_rows: int,
    row_length: int,
    latent_shape: tuple[int, int, int] | None,
    patch_size: int,
    time_token: bool = False,
    num_codes: int = 0,
) -> Batch:
    """Make full rows: captioned images for half of the positions, and one text for the rest.

    Args:
        num_rows: B.
        row_length: T.
        latent_shape: (C, h, w); None: no images.
        patch_size: side of a patch in latent pixels.
        time_token: whether each image has a time token.
        num_codes: number of image codes; 0 for latents.

    Raises:
        UserError: a row has no room for an image.
    """
    tokenizer = SimpleNamespace(bos_id=0, eos_id=1, boi_id=2, eoi_id=3, vocab_size=5)
    like, length = None, 0
    if latent_shape is not None:
        like = torch.zeros(latent_shape, dtype=torch.long if num_codes else torch.float)
        length = num_patches(like, patch_size, time_token)
    return pack(
        [full_row(row_length, like, length)] * num_rows,
        list(range(num_rows)),
        tokenizer=tokenizer,
        row_length=row_length,
        patch_size=patch_size,
        time_token=time_token,
    )


def full_row(row_length: int, image: Tensor | None, length: int) -> list[Document]:
    """Return the documents of a full row.

    Args:
        row_length: T.
        image: latents or codes of each image; None: no images.
        length: N, positions of its patches and time token.

    Raises:
        UserError: the row has no room for an image.
    """
    row: list[Document] = []
    left = row_length
    if image is not None:
        whole = length + CAPTION_TOKENS + 4  # with <bos>, <boi>, <eoi> and <eos>
        if whole > row_length:
            raise UserError(
                f"an image with its caption takes {whole} positions, but a row has "
                f"{row_length}; give a larger data.row_length or smaller images"
            )
        count = min(max(1, row_length // 2 // length), row_length // whole)
        row = [[torch.full((CAPTION_TOKENS,), 4), image] for _ in range(count)]
        left -= count * whole
    if left > 2:
        row.append([torch.full((left - 2,), 4)])
    return row


# ---------------------------------------------------------------- the report


def report(plan: Plan, memory: StepMemory, given: argparse.Namespace) -> str:
    """Return the table of a run's memory, FLOPs and time."""
    flops, tokens = plan.flops_per_step(), plan.tokens_per_step
    at_rest = (memory.weights, memory.optimizer, memory.ema)
    lines = {
        "Parameters": f"{plan.num_parameters() / 1e6:,.1f}M",
        "Tokens a step": f"{tokens:,}: {plan.rows_per_step:,} rows of {plan.row_length:,}, "
        f"{plan.num_gpus:,} GPUs x {plan.batch_size} rows x {plan.accumulate} batches",
        "FLOPs a step": f"{flops:.3g}, {flops / tokens / 1e9:,.2f} GFLOPs a token",
        "Peak memory": f"{memory.peak / GIB:.1f} GiB on each GPU, of {given.gpu_memory:g} GiB: "
        + "weights {:.1f}, optimizer {:.1f}, moving average {:.1f}, ".format(
            *(x / GIB for x in at_rest)
        )
        + f"activations, gradients and gathered weights {memory.activations / GIB:.1f}",
        "Time": duration(plan, flops, given),
        "Checkpoint": f"{memory.checkpoint / 1e9:,.1f} GB",
    }
    if plan.num_gpus > 1 and not plan.is_sharded:
        whole = memory.peak - sum(at_rest) + memory.checkpoint
        lines["Strategy"] = (
            "planned with trainer.strategy ModelParallelStrategy; without it, each GPU has all "
            f"weights, averages and optimizer state: at least {whole / GIB:.1f} GiB"
        )
    return "\n".join(f"{name:14} {value}" for name, value in lines.items())


def duration(plan: Plan, flops: float, given: argparse.Namespace) -> str:
    """Return the time of all steps, each of which takes a number of FLOPs, or of one step."""
    seconds = flops / (plan.num_gpus * given.gpu_tflops * 1e12 * given.mfu)
    rate = f"{given.mfu:.0%} of {given.gpu_tflops:g} TFLOPS on each of {plan.num_gpus:,} GPUs"
    if plan.max_steps < 0:
        return f"{seconds:,.2f} s a step, {rate}; give trainer.max_steps for the days"
    days = plan.max_steps * seconds / 86_400
    return f"{days:,.1f} days for {plan.max_steps:,} steps, {rate}"


def verdict(plan: Plan, memory: StepMemory, gpu_memory: float) -> str:
    """Return whether a run fits, or which options make it fit, in sentences."""
    limit = USABLE * gpu_memory * GIB
    if memory.peak <= limit:
        return f"It fits: {USABLE:.0%} of {gpu_memory:g} GiB are {limit / GIB:.1f} GiB."
    tried = []
    for options, changed in remedies(plan):
        peak = changed.memory().peak
        tried.append(f"  {peak / GIB:6.1f} GiB with {options}")
        if peak <= limit:
            break
    else:
        tried.append("Give more GPUs, or a smaller model or data.row_length.")
    head = (
        f"It does not fit into {USABLE:.0%} of {gpu_memory:g} GiB ({limit / GIB:.1f} GiB). It takes"
    )
    return "\n".join([head, *tried])


def remedies(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield options that lower the memory, each added to those before it, cheapest first."""
    options: dict[str, Any] = {}
    tokens = plan.tokens_per_step
    modes = ("none", "selective", "full")
    now = plan.hparams.get("activation_checkpointing")
    for mode in modes[modes.index(now) + 1 :] if now in modes else ():
        plan = replace(plan, hparams={**plan.hparams, "activation_checkpointing": mode})
        options["model.activation_checkpointing"] = mode
        yield written(options), plan
    if plan.batch_size > 1:
        rows = plan.batch_size * plan.accumulate
        plan = replace(plan, batch_size=1, accumulate=rows)
        options |= {"data.batch_size": 1, "trainer.accumulate_grad_batches": rows}
        yield written(options), plan
    if plan.hparams.get("shard_size"):
        plan = replace(plan, hparams={**plan.hparams, "shard_size": None})
        options["model.shard_size"] = "null"
        yield written(options), plan
    if plan.hparams["ema_decay"] and plan.hparams.get("ema_device", "cpu") != "cpu":
        plan = replace(plan, hparams={**plan.hparams, "ema_device": "cpu"})
        options["model.ema_device"] = "cpu"
        yield written(options), plan
    for _ in range(3):
        plan = replace(plan, num_gpus=2 * plan.num_gpus)
        options["gpus"] = plan.num_gpus
        if plan.accumulate % 2 == 0:  # a step keeps its number of rows
            plan = replace(plan, accumulate=plan.accumulate // 2)
            options["trainer.accumulate_grad_batches"] = plan.accumulate
        factor = plan.tokens_per_step // tokens
        note = f" ({factor} times as many rows a step)" if factor > 1 else ""
        yield written(options) + note, plan


def written(options: dict[str, Any]) -> str:
    """Write options as on the command line."""
    return " ".join(f"--{name} {value}" for name, value in options.items())
