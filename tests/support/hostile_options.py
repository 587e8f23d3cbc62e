"""Random values of configurations, and random prompts and sampling options."""

import random
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from diffusers import AutoencoderKL, VQModel  # noqa: F401 - before the time of a try is limited
from PIL import Image

from support.hostile_folders import exported
from support.tiny import PATCH_SIZE, VOCAB_SIZE, mixed_batch
from tf_lightning.autoencoder.network import AutoencoderConfig
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.layers import RopeScaling
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.unet import UNetConfig
from tf_lightning.ranges import hints
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

INTEGERS = [-(10**18), -1, 0, 1, 2, 3, 4, 6, 7, 8, 16]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-300, 0.3, 0.5, 1.0, 2.0, 1e30]
STRINGS = ["", "auto", "v_prediction", "flow", "linear", "DDPMScheduler", "null", "\0", "é" * 99]
TEXTS = ["", " ", "a red circle", "<boi>", "<eos><bos>", "\0", "\ud800", "e\u0301\u200d", "\n" * 9]
TEXTS += ["x" * 5000, "🏽" * 50, "ﷺ", "\u202eabc"]


def hostile_value(kind: Any, rng: random.Random) -> Any:
    """Draw a value of a type, often outside of its range."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return hostile_value(inner[0], rng)
    if origin is Literal:
        return rng.choice([*inner, "neither"])
    if origin is Union or type(kind).__name__ == "UnionType":
        return hostile_value(rng.choice(inner), rng)
    if origin is tuple:
        count = rng.randint(0, 4) if inner[-1] is ... else len(inner)
        return tuple(hostile_value(inner[0], rng) for _ in range(count))
    if kind in CONFIGS:
        return changed(kind, CONFIGS[kind], rng)
    values = {int: INTEGERS, float: FLOATS, bool: [False, True], str: STRINGS}
    return rng.choice(values[kind]) if kind in values else None


def changed(cls: type, small: dict[str, Any], rng: random.Random) -> Any:
    """Build a small object with hostile values of up to three arguments."""
    declared = {name: kind for name, kind in hints(cls.__init__).items() if name != "return"}
    names = rng.sample(sorted(declared), min(len(declared), rng.randint(0, 3)))
    return cls(**small | {name: hostile_value(declared[name], rng) for name in names})


TRANSFORMER = {"vocab_size": VOCAB_SIZE, "dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}
CONFIGS: dict[type, dict[str, Any]] = {
    TransformerConfig: TRANSFORMER,
    RopeScaling: {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 64,
    },
    UNetConfig: {"channels": (4, 8), "num_blocks": 1, "head_dim": 4},
    LinearConfig: {},
    AutoencoderConfig: {"channels": (4, 8), "layers_per_block": 1, "norm_groups": 2},
}


def build_model(folder: Path, rng: random.Random) -> None:
    """Build a model of random options; one that fits the batch of a test computes its losses."""
    if rng.random() < 0.2:
        small = {"network": AutoencoderConfig(**CONFIGS[AutoencoderConfig])}
        changed(AutoencoderModule, small, rng).configure_model()
        return
    small = {"transformer": TransformerConfig(**TRANSFORMER), "latent_channels": 3}
    module = changed(Transfusion, small | {"patch_size": PATCH_SIZE}, rng)
    hparams = module.hparams
    if module.linear and module.linear.time == "token":
        return  # its batches have another form
    hparams.compile = False  # takes a minute
    module.configure_model()
    fits = hparams.patch_size == PATCH_SIZE and hparams.latent_channels == 3
    if fits and not hparams.num_codes and module.config.vocab_size >= VOCAB_SIZE:
        with torch.no_grad():
            module.loss_sums(module.net, mixed_batch())


@cache
def pipeline() -> TransfusionPipeline:
    """A small model with random weights."""
    return TransfusionPipeline.from_pretrained(exported(), device="cpu")


def hostile_part(rng: random.Random) -> Any:
    """Draw a part of a prompt."""
    if rng.random() < 0.6:
        return rng.choice(TEXTS) + "".join(chr(rng.randrange(0x3000)) for _ in range(5))
    size, mode = (rng.choice([1, 2, 4, 300]), rng.choice([1, 4, 9])), rng.choice("1LPF") + ""
    return Image.new(rng.choice([mode, "RGB", "RGBA", "I;16"]), size)


def answer_prompt(folder: Path, rng: random.Random) -> None:
    """Generate from a random prompt with random options, in few steps."""
    prompt = [hostile_part(rng) for _ in range(rng.randint(0, 3))]
    few = {"num_inference_steps": 2, "max_new_tokens": 3}
    sampling = changed(SamplingConfig, few, rng)
    if sampling.num_inference_steps > 16 or sampling.max_new_tokens > 16:
        return
    modality = rng.choice(["image", "text", "any", None])
    pipeline()([prompt], output_modality=modality, progress=False, sampling=sampling)
