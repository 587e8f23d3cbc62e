"""Checks of the options that need newer GPUs: fp8 and FlashAttention 4."""

import importlib.util

import torch

from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; `package` may be a dotted name."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the parent of a dotted name is missing
        return False


def check_fp8(recipe: str, config: TransformerConfig, precision: str, device: torch.device) -> None:
    """Check that a network can be trained in fp8.

    Args:
        recipe: torchao's name of a way to scale.
        config: sizes of the Transformer.
        precision: the trainer's.
        device: device of the training.

    Raises:
        UserError: torchao, the GPU, bf16 or a size that fp8 needs is missing.
    """
    if not is_installed("torchao"):
        raise UserError(f"fp8={recipe} needs torchao; install it: pip install 'tf-lightning[fp8]'")
    if capability(device) < (8, 9):
        raise UserError(
            f"fp8={recipe} needs a GPU of compute capability 8.9 or higher, such as RTX 4090 or "
            f"H100, and this run is on {name(device)}; set fp8 to null"
        )
    if precision != "bf16-mixed":
        raise UserError(
            f"fp8={recipe} needs precision=bf16-mixed, in which the rest of the network computes, "
            f"and not {precision}; change the precision, or set fp8 to null"
        )
    widths = {
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_heads * head_dim": config.num_heads * config.head_size,
        "num_kv_heads * head_dim": config.kv_heads * config.head_size,
    }
    for what, width in widths.items():
        if width % 16:
            raise UserError(
                f"fp8={recipe} multiplies matrices whose sizes are multiples of 16, and "
                f"transformer.{what} is {width}; change it, or set fp8 to null"
            )


def check_flash(config: TransformerConfig, precision: str, device: torch.device) -> None:
    """Check that a network can be trained with the kernels of FlashAttention 4.

    Args:
        config: sizes of the Transformer.
        precision: the trainer's.
        device: device of the training.

    Raises:
        UserError: flash-attn-4, the GPU, a precision or a head dim that they need is missing.
    """
    if not is_installed("flash_attn.cute"):
        raise UserError(
            "flash_attention needs the package flash-attn-4; install it: "
            "pip install --pre flash-attn-4 (with CUDA 13: 'flash-attn-4[cu13]')"
        )
    if not (9, 0) <= capability(device) < (12, 0):  # later ones, such as RTX 5090, cannot train
        raise UserError(
            "flash_attention needs a GPU of compute capability 9 to 11, such as H100 or B200, and "
            f"this run is on {name(device)}; set it to false"
        )
    if precision not in ("bf16-mixed", "16-mixed"):
        raise UserError(
            f"flash_attention needs precision=bf16-mixed or 16-mixed, and not {precision}; change "
            "the precision, or set flash_attention to false"
        )
    size = config.head_size
    if size % 8 or size > 128:
        raise UserError(
            "flash_attention needs heads whose dim is a multiple of 8 up to 128, and it is "
            f"{size}; change transformer.head_dim or num_heads, or set flash_attention to false"
        )


def capability(device: torch.device) -> tuple[int, int]:
    """Return the CUDA compute capability of a device; (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def name(device: torch.device) -> str:
    """Return the name of a device for messages."""
    if device.type != "cuda":
        return f"a {device.type.upper()}"
    major, minor = capability(device)
    return f"{torch.cuda.get_device_name(device)} of capability {major}.{minor}"
