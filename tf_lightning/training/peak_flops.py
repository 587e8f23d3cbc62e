"""Peak FLOPs per second of GPUs, of which model FLOPs utilization (MFU) is a share."""

import re

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities import rank_zero_warn

# TFLOPS of dense matrices in bf16 or fp16 and in fp8, with sums in fp32, from the data sheets and
# architecture whitepapers of NVIDIA. Data sheets that count sparse matrices give twice as much.
PEAKS = {
    "B200": (2250, 4500),  # in an HGX board
    "GB200": (2500, 5000),
    "H200": (989.5, 1979),
    "H200 NVL": (835.5, 1671),
    "GH200": (989.5, 1979),
    "H100": (989.4, 1978.9),
    "H100 NVL": (835.5, 1671),
    "H100 PCIE": (756, 1513),
    "A100": (312, None),
    "A100 PCIE": (312, None),
    "L40S": (362, 733),
    "L40": (181, 362),
    "L4": (121, 242),
    "RTX 5090": (209.5, 419),
    "RTX 5080": (112.6, 225.1),
    "RTX 4090": (165.2, 330.3),
    "RTX 4080 SUPER": (104.4, 208.9),
    "RTX 4080": (97.5, 194.9),
    "RTX 3090 TI": (80, None),
    "RTX 3090": (71, None),
}
# Parts of a device's name that do not change its speed: the maker, the memory and the socket.
WITHOUT_EFFECT = re.compile(r"NVIDIA|GEFORCE|\d+GB?|HBM3E?|SXM\d?")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a device's peak FLOPs per second for dense matrices.

    Other types than bf16, fp16 and fp8, and other GPUs than those of PEAKS, are looked up in
    Lightning's table.

    Args:
        device: the device.
        dtype: type of the matrices; torch.float8_e4m3fn for fp8.

    Returns:
        None for CPUs, and with a warning for GPUs of unknown speed.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    in_16_bits, in_fp8 = PEAKS.get(short_name(name), (None, None))
    if dtype is torch.float8_e4m3fn:
        tflops = in_fp8
    elif dtype in (torch.bfloat16, torch.float16) and in_16_bits:
        tflops = in_16_bits
    else:
        found = get_available_flops(device, dtype)
        tflops = found and found / 1e12
    if tflops is None:
        rank_zero_warn(
            f"the peak of {name} in {dtype} is not known, so train/mfu is not logged; give it as "
            "peak_flops of the callback Throughput"
        )
    return tflops and tflops * 1e12


def short_name(name: str) -> str:
    """Return the part of a GPU's name that determines its speed, such as H100 PCIE."""
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(word for word in words if word and not WITHOUT_EFFECT.fullmatch(word))
