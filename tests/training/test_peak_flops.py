"""Peaks are those of the data sheets; a GPU of unknown speed has none, and this is said."""

import warnings

import pytest
import torch

from tf_lightning.training.peak_flops import PEAKS, peak_flops

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
CUDA = torch.device("cuda", 0)


@pytest.fixture
def named(monkeypatch):
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
        ("NVIDIA H100 80GB HBM3", FP8, 1978.9),
        ("NVIDIA H100 PCIe", BF16, 756),
        ("NVIDIA H200", BF16, 989.5),
        ("NVIDIA GH200 480GB", FP8, 1979),
        ("NVIDIA A100-SXM4-80GB", BF16, 312),
        ("NVIDIA A100 80GB PCIe", BF16, 312),
        ("NVIDIA B200", FP8, 4500),
        ("NVIDIA GeForce RTX 4090", BF16, 165.2),
        ("NVIDIA H100 80GB HBM3", torch.float64, 33.5),  # from Lightning's table
        ("Tesla V100-SXM2-16GB", torch.float16, 125),  # the same
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(named, name, dtype, tflops):
    named(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peak_flops(CUDA, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", FP8),
        ("NVIDIA A100-SXM4-80GB", FP8),
        ("AMD Instinct MI300X", BF16),
    ],
)
@pytest.mark.filterwarnings("ignore:FLOPs not found")  # Lightning's, without the remedy
def test_an_unknown_peak_is_told_with_its_remedy(named, name, dtype):
    named(name)
    with pytest.warns(UserWarning, match=f"peak of {name} in {dtype} is not known, .* peak_flops"):
        assert peak_flops(CUDA, dtype) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), BF16) is None


def test_fp8_is_twice_as_fast_as_bf16():
    for in_bf16, in_fp8 in PEAKS.values():
        assert in_fp8 is None or in_fp8 / in_bf16 == pytest.approx(2, rel=0.02)
