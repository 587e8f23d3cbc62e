"""Every class of diffusers that is supported, in every layout of files: equal to diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import autoencoders
from support.autoencoders import WEIGHTS, expected, images, make, write_hub, write_layout
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.autoencoder.weights import CLASSES
from tf_lightning.errors import UserError

WITH_ATTENTION = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "VQModel")
LDM = ("AutoencoderKL", "AutoencoderKLFlux2", "VQModel")
ALL_LAYOUTS = ("folder", "file", "any name", "sharded", "fp16", "sharded fp16", "pipeline")
LAYOUTS = [(c, layout) for c in CLASSES for layout in ALL_LAYOUTS]
LAYOUTS += [(c, layout) for c in WITH_ATTENTION for layout in ("old names", "old names in a file")]
LAYOUTS += [(c, layout) for c in LDM for layout in ("original", "checkpoint")]
LAYOUTS += [("AutoencoderDC", "original")]


def largest_error(network: torch.nn.Module, name: str | Path) -> float:
    """Largest difference from diffusers over latents and reconstructions."""
    latents, reconstructed = expected(network)
    loaded = load_autoencoder(str(name))
    found = loaded.encode(images())
    assert found.dtype == latents.dtype and found.shape == latents.shape
    assert loaded.latent_channels == latents.shape[1]
    assert loaded.downsample == 16 // latents.shape[2]
    errors = (found - latents).abs().max(), (loaded.decode(latents) - reconstructed).abs().max()
    return max(float(error) for error in errors)


@pytest.mark.parametrize(("class_name", "layout"), LAYOUTS)
def test_latents_and_images_are_those_of_diffusers(class_name, layout, tmp_path):
    network = make(class_name)
    path = write_layout(network, layout, tmp_path)  # rounds the weights where it stores halves
    assert largest_error(network, path) < 1e-6


def test_every_class_has_a_test():
    assert set(autoencoders.CONFIGS) == set(CLASSES)


@pytest.mark.parametrize("subfolder", ["", "vae", "parts/first"])
@pytest.mark.parametrize("layout", ["folder", "sharded", "fp16"])
def test_a_name_on_the_hub_may_have_a_subfolder(subfolder, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    network = make("AutoencoderKL")
    folder = write_layout(network, layout, tmp_path)
    write_hub(tmp_path / "hub", "owner/model", folder, subfolder)
    assert largest_error(network, f"owner/model/{subfolder}".rstrip("/")) < 1e-6


def test_a_pipeline_on_the_hub_gives_its_vae(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    network = make("AutoencoderKL")
    write_hub(tmp_path / "hub", "owner/pipe", write_layout(network, "pipeline", tmp_path))
    assert largest_error(network, "owner/pipe") < 1e-6


def test_a_hub_copy_without_the_weights_is_downloaded_again(tmp_path, monkeypatch):
    """Another program may have downloaded config.json alone."""
    network = make("AutoencoderKL")
    folder = write_layout(network, "folder", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_hub(tmp_path / "hub", "owner/model", folder)
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / ("0" * 40)
    weights = snapshot / WEIGHTS
    weights.unlink()
    import huggingface_hub

    local = huggingface_hub.snapshot_download

    def download(name, allow_patterns, local_files_only=False, **options):
        if not local_files_only and WEIGHTS in allow_patterns:
            shutil.copy(folder / WEIGHTS, weights)
        return local(name, allow_patterns=allow_patterns, local_files_only=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert largest_error(network, "owner/model") < 1e-6


def test_channel_statistics_of_a_config_hold_for_every_class(tmp_path):
    """`latents_mean` and `latents_std` are no argument of AutoencoderDC, but of its config.json."""
    network = make("AutoencoderDC")
    plain = write_layout(network, "folder", tmp_path)
    config = json.loads((plain / "config.json").read_text())
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0]
    config |= {"latents_mean": mean, "latents_std": std}
    (plain / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        raw = network.encode(images()).latent
    wanted = (raw - torch.tensor(mean).view(1, 4, 1, 1)) / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(load_autoencoder(str(plain)).encode(images()), wanted)


def test_flux2_latents_have_unit_variance_by_its_statistics(tmp_path):
    network = make("AutoencoderKLFlux2")
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = autoencoders.fold(network.encode(x).latent_dist.mode())
    network.bn.running_mean.copy_(raw.mean((0, 2, 3)))
    network.bn.running_var.copy_(raw.var((0, 2, 3)))
    loaded = load_autoencoder(str(write_layout(network, "folder", tmp_path)))
    assert loaded.encode(x).std().item() == pytest.approx(1, abs=0.03)
    _, std = loaded.moments(x).unbind(1)
    with torch.no_grad():
        theirs = autoencoders.fold(network.encode(x).latent_dist.std)
    theirs = theirs / (network.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
    torch.testing.assert_close(std, theirs)


def test_half_precision_of_a_run_does_not_reach_the_autoencoder(tmp_path):
    """As under Lightning's 16-true; the network of SDXL overflows in float16."""
    network = make("AutoencoderKL")
    path = write_layout(network, "folder", tmp_path)
    torch.set_default_dtype(torch.float16)
    try:
        loaded = load_autoencoder(str(path))
        latents = loaded.encode(images().half().float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert latents.dtype == torch.float32
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.mean.dtype == loaded.std.dtype == torch.float32
    assert largest_error(network, path) < 1e-6


@pytest.mark.parametrize("class_name", CLASSES)
def test_only_a_posterior_has_a_standard_deviation(class_name, tmp_path):
    loaded = load_autoencoder(str(write_layout(make(class_name), "folder", tmp_path)))
    assert loaded.deterministic == (class_name in ("AutoencoderDC", "AutoencoderTiny", "VQModel"))
    if class_name != "VQModel":
        std = loaded.moments(images())[:, 1]
        assert bool(std.any()) != loaded.deterministic


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_layout(make("AutoencoderKL"), "folder", tmp_path)


def refused(name: str | Path) -> str:
    """The sentence with which an autoencoder is refused."""
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(name))
    message = str(caught.value)
    assert "\n" not in message and ". " not in message
    return message


def edit(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    {
        "another class": ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
        "no class": ({"_class_name": "os.system"}, "AutoencoderKL, AsymmetricAutoencoderKL"),
        "class of another type": ({"_class_name": ["AutoencoderKL"]}, "not supported"),
        "null": ({"scaling_factor": None}, "scaling_factor=None, which must be a number"),
        "text": ({"scaling_factor": "1"}, "scaling_factor=1, which must be a number"),
        "zero": ({"scaling_factor": 0}, "scaling_factor must be positive"),
        "negative": ({"scaling_factor": -1}, "scaling_factor must be positive"),
        "NaN": ({"scaling_factor": float("nan")}, "scaling_factor must be positive"),
        "infinite": ({"shift_factor": float("inf")}, "shift_factor finite"),
        "no mean": ({"latents_std": [1.0] * 4}, "latents_mean=None"),
        "three": ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "a list of 4 numbers"),
        "std 0": ({"latents_mean": [0.0] * 4, "latents_std": [1, 1, 0, 1]}, "latents_std must be"),
        "std NaN": (
            {"latents_mean": [0.0] * 4, "latents_std": [1, 1, float("nan"), 1]},
            "latents_std must be",
        ),
        "grey": ({"in_channels": 1}, "images have 3 channels"),
        "masks": ({"out_channels": 4}, "images have 3 channels"),
        "groups": ({"norm_num_groups": 0}, "cannot be loaded"),
        "widths": ({"block_out_channels": "ab"}, "cannot be loaded"),
        "layers": ({"layers_per_block": 10**9}, "more than 8 resolutions or 32 layers"),
        "resolutions": ({"block_out_channels": [8] * 10**5}, "more than 8 resolutions"),
        "width": ({"block_out_channels": [8, 2**40]}, "autoencoder"),
        "resolution without a block": (
            {"down_block_types": ["DownEncoderBlock2D"], "block_out_channels": [8]},
            "autoencoder",
        ),
    }.values(),
)
def test_a_config_that_cannot_be_used_is_refused(folder, changes, words):
    assert words in refused(edit(folder, **changes))


@pytest.mark.parametrize("layout", ["folder", "original"])
def test_surplus_weights_are_refused(layout, tmp_path):
    """Weights of FLUX.2 do not load into an AutoencoderKL, whatever their names."""
    path = write_layout(make("AutoencoderKLFlux2"), layout, tmp_path)
    edit(tmp_path / "plain", _class_name="AutoencoderKL")
    assert "3 are no part of the class, such as bn." in refused(path)


def test_a_tensor_that_is_not_finite_is_refused(folder):
    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_in.bias"][0] = float("nan")
    save_file(weights, folder / WEIGHTS)
    assert "decoder.conv_in.bias is not finite" in refused(folder)


def test_a_pickle_is_not_read(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    assert "holds no .safetensors file" in refused(folder)
    shutil.move(folder / "diffusion_pytorch_model.bin", folder / "vae.safetensors")
    assert "convert it to safetensors" in refused(folder / "vae.safetensors")


def test_several_files_without_diffusers_name_are_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "a.safetensors")
    shutil.move(folder / WEIGHTS, folder / "b.safetensors")
    assert "several weight files (a.safetensors, b.safetensors)" in refused(folder)
    load_autoencoder(str(folder / "a.safetensors"))


def test_an_index_that_leaves_its_folder_is_refused(folder):
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "not a file beside it" in refused(folder)


def test_a_missing_shard_is_refused(tmp_path):
    path = write_layout(make("AutoencoderKL"), "sharded", tmp_path)
    sorted(path.glob("*.safetensors"))[0].unlink()
    assert "cannot be loaded" in refused(path)


def test_a_pipeline_without_an_autoencoder_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "such as the vae folder" in refused(tmp_path)


@pytest.mark.parametrize("change", [{"act_fn": "relu"}, {"norm_num_groups": 2}])
def test_the_fingerprint_covers_settings_that_no_weight_shows(change, tmp_path):
    folder = write_layout(make("AutoencoderKL"), "folder", tmp_path)
    before = load_autoencoder(str(folder)).fingerprint
    assert load_autoencoder(str(edit(folder, **change))).fingerprint != before
