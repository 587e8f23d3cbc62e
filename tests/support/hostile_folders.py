"""Random damage of folders that another person may have written: autoencoders and exports."""

import copy
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from support.autoencoders import make, write_layout
from support.hostile_files import damaged
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.autoencoder.weights import CLASSES
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.interop.export import export
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.tokenizer.tokenizer import train_tokenizer
from tf_lightning.training.module import Transfusion

LAYOUTS = ("folder", "sharded", "fp16", "file", "pipeline", "any name")
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 7, 33, 10**9, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *("", "silu", "../../x", "a" * 10**4, [], [0], [1] * 9, [[5]], [8, 16], {}, {"a": 1}),
    *("AutoencoderKL", "UNet2DModel", "os.system", ["DownEncoderBlock2D"] * 2, [2**40, 8]),
]


def damage_json(file: Path, rng: random.Random) -> None:
    """Replace, add or remove values anywhere in a JSON file, or damage its bytes."""
    if rng.random() < 0.2:
        file.write_bytes(damaged(file.read_bytes(), rng))
        return
    content = json.loads(file.read_text())
    for _ in range(rng.randint(1, 3)):
        place = content
        while (inner := [v for v in place.values() if isinstance(v, dict)]) and rng.random() < 0.6:
            place = rng.choice(inner)
        key = rng.choice([*place, "unknown"])
        if rng.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))  # a value may be changed later
    file.write_text(json.dumps(content))


def damage_folder(folder: Path, rng: random.Random) -> None:
    """Damage, remove, exchange or rename one file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file, kind = rng.choice(files), rng.random()
    if file.suffix == ".json" and kind < 0.8:
        damage_json(file, rng)
    elif kind < 0.6:
        file.write_bytes(damaged(file.read_bytes(), rng))
    elif kind < 0.7:
        file.unlink()
    elif kind < 0.8:
        file.write_bytes(rng.choice(files).read_bytes())
    elif kind < 0.9:
        file.rename(file.with_name(rng.choice(["a.safetensors", "config.json", "b.bin"])))
    else:
        file.write_bytes(b"")


@cache
def saved(class_name: str, layout: str) -> tuple[Path, Path]:
    """Write an autoencoder once; return its folder and what a user names."""
    folder = Path(tempfile.mkdtemp())
    return folder, write_layout(make(class_name), layout, folder)


def read_autoencoder(folder: Path, rng: random.Random) -> None:
    """Load a damaged autoencoder, and encode and decode with what loads."""
    whole, path = saved(rng.choice(CLASSES), rng.choice(LAYOUTS))
    shutil.copytree(whole, folder / "copy")
    damage_folder(folder / "copy", rng)
    autoencoder = load_autoencoder(str(folder / "copy" / path.relative_to(whole)))
    side = 2 * autoencoder.downsample
    latents = autoencoder.encode(torch.zeros(1, 3, side, side))
    images = autoencoder.decode(latents)
    if images.shape != (1, 3, side, side) or not images.isfinite().all():
        raise AssertionError(f"{path} was damaged, loaded, and gives {images.shape}")


def small_checkpoint() -> dict[str, Any]:
    """Return a checkpoint of a small model with random weights."""
    return copy.deepcopy(_small_checkpoint())


@cache
def _small_checkpoint() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["a red circle above a blue square"] * 50
        tokenizer = train_tokenizer(iter(texts), Path(folder, "tokenizer.model"), 275)
    torch.manual_seed(0)
    sizes = {"vocab_size": 275, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}
    module = Transfusion(TransformerConfig(**sizes), 2, latent_channels=3, ema_decay=0.0)
    module.configure_model()
    return {
        "hyper_parameters": dict(module.hparams),
        "image_codec": {"autoencoder": "pixels", "latent_shape": [3, 4, 4]},
        "row_length": 64,
        "global_step": 1,
        "state_dict": {f"net.{n}": w for n, w in module.net.state_dict().items()},
        "tokenizer": torch.frombuffer(bytearray(tokenizer.proto), dtype=torch.uint8),
    }


@cache
def exported() -> Path:
    """Export a small model with an autoencoder once."""
    folder = Path(tempfile.mkdtemp(), "exported")
    export(small_checkpoint(), folder, None, {"net", "text"})
    return folder


def read_export(folder: Path, rng: random.Random) -> None:
    """Load a damaged exported folder."""
    copy = shutil.copytree(exported(), folder / "copy", ignore=shutil.ignore_patterns("text"))
    if rng.random() < 0.5:  # as older versions wrote it, without checksums
        metadata = json.loads((copy / "net.json").read_text())
        del metadata["crc32"]
        (copy / "net.json").write_text(json.dumps(metadata))
    damage_folder(copy, rng)
    TransfusionPipeline.from_pretrained(copy, device="cpu").plan("image", SamplingConfig())
