"""Public autoencoders: their real configs and file layouts, with narrow random networks.

The original names are written by hand, independently of diffusers' converter.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.autoencoders import original_names
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The shared keys of their config.json; the real widths are 128, 256, 512, 512 in 32 groups.
SHARED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CONFIGS = {
    "sd-vae-ft-mse": {"_diffusers_version": "0.4.2", "sample_size": 256},
    "sdxl": {
        "_diffusers_version": "0.20.0.dev0",
        "force_upcast": True,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "flux": {
        "_diffusers_version": "0.30.0.dev0",
        "force_upcast": True,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}
SCALING = {"sd-vae-ft-mse": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "flux": (0.3611, 0.1159)}


def original(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """CompVis' names."""
    names = original_names(weights, inner_quant=False, resolutions=4)
    return {prefix + name: value for name, value in names.items()}


def deprecated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention names in the file of sd-vae-ft-mse."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda found: names[found[0]], name): value
        for name, value in weights.items()
    }


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole Stable Diffusion checkpoint in half precision, with other networks' weights."""
    others = {f"model.diffusion_model.{n}.weight": torch.zeros(2) for n in range(500)}
    halves = {name: value.half() for name, value in original(weights).items()}
    return others | {f"first_stage_model.{name}": value for name, value in halves.items()}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path: Path) -> tuple[Path, AutoencoderKL]:
    """A folder in the hub's layout, and its network."""
    config = SHARED | CONFIGS[request.param]
    torch.manual_seed(0)
    model = AutoencoderKL.from_config(config).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    return tmp_path, model


def random_images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_are_scaled_and_shifted_as_published(saved, request):
    """(z - shift) * scale of the posterior's mode, and its inverse, as in diffusers' pipelines."""
    folder, model = saved
    scale, shift = SCALING[request.node.callspec.params["saved"]]
    loaded = load_autoencoder(str(folder))
    assert (loaded.latent_channels, loaded.downsample) == (model.config.latent_channels, 8)
    with torch.no_grad():
        latents = (model.encode(random_images()).latent_dist.mode() - shift) * scale
        images = model.decode(latents / scale + shift).sample.clamp(-1, 1)
    torch.testing.assert_close(loaded.encode(random_images()), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loaded.decode(latents), images, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["ours", "ae", "whole", "old"])
def test_a_single_file_loads_the_weights_of_the_folder(saved, layout):
    folder, _ = saved
    weights = load_file(folder / WEIGHTS)
    make = {"ours": dict, "ae": original, "whole": whole, "old": lambda w: original(w, "vae.")}
    save_file(make[layout](weights), folder / "ae.safetensors")
    loaded = load_autoencoder(str(folder / "ae.safetensors")).model.state_dict()
    tolerance = 1e-3 if layout == "whole" else 0.0  # half precision
    for name, value in weights.items():
        torch.testing.assert_close(loaded[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("file", ["", WEIGHTS])
def test_deprecated_attention_names_load(saved, file):
    folder, _ = saved
    weights = load_file(folder / WEIGHTS)
    save_file(deprecated(weights), folder / WEIGHTS, metadata={"format": "pt"})
    loaded = load_autoencoder(str(folder / file)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("fault", ["lacks one", "another shape", "of another program"])
def test_weights_that_do_not_match_the_config_are_refused(saved, fault):
    """Also in a checkpoint with many other tensors; no weight stays random."""
    folder, _ = saved
    weights = whole(load_file(folder / WEIGHTS))
    name = "first_stage_model.decoder.up.3.block.0.norm1.weight"
    if fault == "lacks one":
        del weights[name]
    elif fault == "another shape":
        weights[name] = torch.ones(3)
    else:
        weights = {"a": torch.zeros(1)}
    save_file(weights, folder / "whole.safetensors")
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(folder / "whole.safetensors"))
    assert "weights do not match its config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
