"""Weights out of a checkpoint: the network as safetensors, its text side as a Llama's folder.

FOLDER/net.safetensors  every weight of the network, under its own names
FOLDER/net.json         the model's arguments, its autoencoder, step, and which weights these are
FOLDER/tokenizer.bin    the tokenizer, as a checkpoint keeps it
FOLDER/text/            config.json, model.safetensors and tokenizer, for `transformers`
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.interop.hub import read_json
from tf_lightning.interop.llama import ENTRIES, hf_state_dict, inexpressible, to_hf
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.tokenizer import huggingface
from tf_lightning.tokenizer.tokenizer import Tokenizer

FACTS = ("hyper_parameters", "image_codec", "row_length", "global_step")
MAX_LENGTH = 2048  # of a checkpoint that does not say how long its rows were
HEAD = "transformer.output.weight"


def export(checkpoint: dict, folder: Path, weights: str | None, parts: set[str]) -> str:
    """Write a checkpoint's parts into a new folder, whole or not at all.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        folder: is made; an earlier export there is replaced.
        weights: "ema" or "raw"; None: the average, if there is one.
        parts: "net", "text" or both.

    Returns:
        Which weights were written.

    Raises:
        UserError: there is no average, the text side is no Llama, or something else is there.
    """
    if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; give a new folder")
    state_dict = checkpoint["state_dict"]
    averaged = any(name.startswith("ema.") for name in state_dict)
    weights = weights or ("ema" if averaged else "raw")
    if weights == "ema" and not averaged:
        raise UserError("the checkpoint keeps no averaged weights; give --weights raw")
    start = "ema." if weights == "ema" else "net."
    net = {n.removeprefix(start): w for n, w in state_dict.items() if n.startswith(start)}
    if "text" in parts:
        check_text(transformer_config(checkpoint))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        if "net" in parts:
            write_net(checkpoint, net, weights, new)
        if "text" in parts:
            (new / "text").mkdir()
            write_text(checkpoint, net, new / "text")
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(new, folder)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)
    return weights


def is_export(folder: Path) -> bool:
    """Whether `export` wrote this folder."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names) and names <= {"net.json", "net.safetensors", "tokenizer.bin", "text"}


def transformer_config(checkpoint: dict) -> TransformerConfig:
    """The sizes of a checkpoint's Transformer."""
    sizes = checkpoint["hyper_parameters"]["transformer"]
    return TransformerConfig(**sizes) if isinstance(sizes, dict) else sizes


def check_text(config: TransformerConfig) -> None:
    """Refuse a Transformer whose text side is not a Llama's; image weights do not touch text."""
    if others := inexpressible(config):
        told = ", ".join(f"{name}={value!r}" for name, value in others.items())
        raise UserError(
            f"a Llama's folder cannot express {told}; train without, or give --only net for the "
            "network's own weights"
        )


def write_net(checkpoint: dict, net: dict[str, Tensor], weights: str, folder: Path) -> None:
    """The network as it is; a tied vocabulary head is written once."""
    if transformer_config(checkpoint).tie_embeddings:
        net = {name: weight for name, weight in net.items() if name != HEAD}
    save_file({n: w.contiguous() for n, w in net.items()}, folder / "net.safetensors")
    facts = {name: checkpoint.get(name) for name in FACTS} | {"weights": weights}
    (folder / "net.json").write_text(json.dumps(facts, indent=2, default=asdict) + "\n")
    (folder / "tokenizer.bin").write_bytes(bytes(checkpoint["tokenizer"].numpy()))


def write_text(checkpoint: dict, net: dict[str, Tensor], folder: Path) -> None:
    """The Transformer without what belongs to images: the rows behind the tokenizer's own too."""
    config = transformer_config(checkpoint)
    tokenizer = Tokenizer.from_proto(bytes(checkpoint["tokenizer"].numpy()))
    start = "transformer."
    text = {n.removeprefix(start): w for n, w in net.items() if n.startswith(start)}
    text = {n: w for n, w in text.items() if not n.startswith("image_layers.")}
    text |= {name: text[name][: tokenizer.boi_id].clone() for name in ENTRIES}
    if config.tie_embeddings:
        del text["output.weight"]
    tensors = {name: weight.float().contiguous() for name, weight in hf_state_dict(text).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = to_hf(config, tokenizer.boi_id, checkpoint.get("row_length") or MAX_LENGTH)
    facts |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    huggingface.write(tokenizer, folder)


def read_weights(path: str | Path) -> dict[str, Any]:
    """A checkpoint, or the network in an exported folder as one without an average.

    Raises:
        UserError: it is neither, or damaged.
    """
    folder = Path(path)
    if not (folder / "net.json").is_file():
        return read_checkpoint(path)
    facts = read_json(folder / "net.json")
    try:
        net = load_file(folder / "net.safetensors")
        proto = bytearray((folder / "tokenizer.bin").read_bytes())
        facts["hyper_parameters"]["ema_decay"] = 0.0
        if transformer_config(facts).tie_embeddings:
            net[HEAD] = net["transformer.tok_embeddings.weight"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be read ({error}); export it again") from error
    facts["tokenizer"] = torch.frombuffer(proto, dtype=torch.uint8)
    return facts | {"state_dict": {f"net.{name}": weight for name, weight in net.items()}}
