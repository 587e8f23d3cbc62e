"""Export a checkpoint: the network as safetensors, and its text side as a language model's folder.

FOLDER/net.safetensors  every weight of the network under our names
FOLDER/net.json         hyper-parameters, autoencoder, step, whether the weights are EMA weights,
                        and the CRC-32 of the other two files
FOLDER/tokenizer.bin    the tokenizer's bytes, as in a checkpoint
FOLDER/text/            config.json, model.safetensors and tokenizer for `transformers`
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tf_lightning.checkpoint import read_checkpoint, select_weights, upgrade
from tf_lightning.checkpoint_file import file_checksum
from tf_lightning.errors import UserError, first_sentence
from tf_lightning.files import atomic_folder
from tf_lightning.hub import find_folder, read_json
from tf_lightning.interop.families import config_to_hf, family_options, model_type_of
from tf_lightning.interop.llama import VOCAB_WEIGHTS, state_dict_to_hf
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.tokenizer import huggingface
from tf_lightning.tokenizer.tokenizer import Tokenizer

METADATA = ("hyper_parameters", "image_codec", "row_length", "global_step")
CHECKED = ("net.safetensors", "tokenizer.bin")
DEFAULT_MAX_LENGTH = 2048  # tokens, for a checkpoint that does not store its row length
HEAD = "transformer.output.weight"


def export(checkpoint: dict, folder: Path, weights: str | None, parts: set[str]) -> str:
    """Write parts of a checkpoint to a folder, atomically.

    Args:
        checkpoint: the result of `read_checkpoint`.
        folder: folder to create; an earlier export is replaced.
        weights: "ema" or "raw"; None for the EMA weights if there are any.
        parts: "net", "text" or both.

    Returns:
        "ema" or "raw": the weights that were written.

    Raises:
        UserError: the checkpoint has no EMA weights, no family of language models expresses the
            text side, or the folder holds other files.
    """
    if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; give a new folder")
    net, weights = select_weights(checkpoint["state_dict"], weights)
    if "text" in parts:
        check_exportable(transformer_config(checkpoint))
    with atomic_folder(folder) as partial:
        if "net" in parts:
            write_net(checkpoint, net, weights, partial)
        if "text" in parts:
            (partial / "text").mkdir()
            write_text(checkpoint, net, partial / "text")
    return weights


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an export and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names) and names <= {"net.json", "net.safetensors", "tokenizer.bin", "text"}


def transformer_config(checkpoint: dict) -> TransformerConfig:
    """Return the sizes of a checkpoint's Transformer."""
    return TransformerConfig(**checkpoint["hyper_parameters"]["transformer"])


def check_exportable(config: TransformerConfig) -> None:
    """Raise UserError if no family expresses the text side; image weights do not matter."""
    if model_type_of(config) is None:
        own = [f"{name}={value!r}" for name, value in family_options(config).items()]
        raise UserError(
            f"no supported family of language models has {' with '.join(own)}; give --only net to "
            "export the network's own weights"
        )


def write_net(checkpoint: dict, net: dict[str, Tensor], weights: str, folder: Path) -> None:
    """Write the whole network; a tied vocabulary head is stored once."""
    if transformer_config(checkpoint).tie_embeddings:
        net = {name: weight for name, weight in net.items() if name != HEAD}
    save_file({n: w.contiguous() for n, w in net.items()}, folder / "net.safetensors")
    (folder / "tokenizer.bin").write_bytes(bytes(checkpoint["tokenizer"].numpy()))
    metadata = {name: checkpoint.get(name) for name in METADATA} | {"weights": weights}
    metadata["crc32"] = {name: f"{file_checksum(folder / name):08x}" for name in CHECKED}
    (folder / "net.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_text(checkpoint: dict, net: dict[str, Tensor], folder: Path) -> None:
    """Write the Transformer without image weights and without the rows of the image tokens."""
    config = transformer_config(checkpoint)
    tokenizer = Tokenizer.from_proto(bytes(checkpoint["tokenizer"].numpy()))
    prefix = "transformer."
    text = {n.removeprefix(prefix): w for n, w in net.items() if n.startswith(prefix)}
    text = {n: w for n, w in text.items() if not n.startswith("image_layers.")}
    text |= {name: text[name][: tokenizer.boi_id].clone() for name in VOCAB_WEIGHTS}
    if config.tie_embeddings:
        del text["output.weight"]
    renamed = state_dict_to_hf(text, model_type_of(config))
    tensors = {name: weight.float().contiguous() for name, weight in renamed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    max_length = checkpoint.get("row_length") or DEFAULT_MAX_LENGTH
    hf_config = config_to_hf(config, tokenizer.boi_id, max_length)
    hf_config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    huggingface.write_pretrained(tokenizer, folder)


def read_weights(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file, or an exported folder in the form of a checkpoint without EMA.

    Args:
        path: the file or folder, or the name of such a folder on the Hugging Face hub.
        mmap: leave tensors in the file until they are used.

    Raises:
        UserError: the path is neither, or is damaged, or the hub does not provide it.
    """
    files = ["net.json", "net.safetensors", "tokenizer.bin"]
    folder = find_folder(path, files, lambda folder: all((folder / f).is_file() for f in files))
    if not (folder / "net.json").is_file():
        return read_checkpoint(folder, mmap=mmap)
    checkpoint = read_json(folder / "net.json")
    checksums = checkpoint.pop("crc32", {})  # older versions recorded none
    try:
        net = load_file(folder / "net.safetensors")
        for name in CHECKED:
            if checksums and checksums[name] != f"{file_checksum(folder / name):08x}":
                raise ValueError(f"{name} does not have the checksum that net.json records")
        proto = bytearray((folder / "tokenizer.bin").read_bytes())
        upgrade(checkpoint)["hyper_parameters"]["ema_decay"] = 0.0
        if transformer_config(checkpoint).tie_embeddings:
            net[HEAD] = net["transformer.tok_embeddings.weight"]
        checkpoint["tokenizer"] = torch.frombuffer(proto, dtype=torch.uint8)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be read ({first_sentence(error)}); export it again"
        ) from error
    return checkpoint | {"state_dict": {f"net.{name}": weight for name, weight in net.items()}}
