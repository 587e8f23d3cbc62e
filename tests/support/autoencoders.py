"""A small network of each supported class of diffusers, and every layout of its files."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIDE = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
KL = SIDE | {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4}
DC = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {
        "block_types": ["ResBlock", "EfficientViTBlock"],
        "block_out_channels": [8, 16],
        "layers_per_block": [1, 1],
        "qkv_multiscales": [[], [5]],
    }.items()
}
CONFIGS = {  # factors of powers of two scale without rounding
    "AutoencoderKL": KL | {"scaling_factor": 0.5, "shift_factor": 0.125},
    "AsymmetricAutoencoderKL": SIDE
    | {"down_block_out_channels": [8, 16], "up_block_out_channels": [16, 16]}
    | {"norm_num_groups": 4, "scaling_factor": 0.25},
    "AutoencoderKLFlux2": KL,
    "AutoencoderDC": DC | {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.5},
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8] * 3,
        "decoder_block_out_channels": [8] * 3,
        "num_encoder_blocks": [1, 1, 1],
        "num_decoder_blocks": [1, 1, 1],
        "scaling_factor": 2.0,
        "shift_factor": 0.25,
    },
    "VQModel": KL | {"num_vq_embeddings": 32, "vq_embed_dim": 4, "lookup_from_codebook": True},
}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
ORIGINAL = (  # diffusers' names and those of latent diffusion
    (r"coder\.conv_norm_out", "coder.norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
)


DC_ORIGINAL = (  # diffusers' names and those of DC-AE's authors
    (r"(en|de)coder\.(down|up)_blocks\.(\d)\.", r"\1coder.stages.\3.op_list."),
    (r"(op_list\.\d)\.(conv[12]?|norm)\.", r"\1.main.\2."),
    (r"(main\.conv[12]?)\.", r"\1.conv."),
    (r"main\.norm", "main.conv2.norm"),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_in", ".context_module.main.aggreg.0.0"),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_out", ".context_module.main.aggreg.0.1"),
    (r"\.attn\.norm_out", ".context_module.main.proj.norm"),
    (r"\.attn\.to_out", ".context_module.main.proj.conv"),
    (r"\.conv_out\.conv_(inverted|depth|point)", r".local_module.main.\1_conv.conv"),
    (r"\.conv_out\.norm", ".local_module.main.point_conv.norm"),
    (r"encoder\.conv_in", "encoder.project_in.conv"),
    (r"encoder\.conv_out", "encoder.project_out.main.0.conv"),
    (r"decoder\.conv_in", "decoder.project_in.main.conv"),
    (r"decoder\.norm_out", "decoder.project_out.0"),
    (r"decoder\.conv_out", "decoder.project_out.2.conv"),
)


def make(class_name: str) -> nn.Module:
    """A network with random weights; FLUX.2's has statistics that do not normalize exactly."""
    torch.manual_seed(0)
    network = getattr(diffusers, class_name)(**CONFIGS[class_name]).eval()
    if class_name == "AutoencoderKLFlux2":
        network.bn.running_mean.uniform_(-0.1, 0.1)
        network.bn.running_var.uniform_(0.05, 0.2)
    return network


def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fold(latents: Tensor) -> Tensor:
    """2 x 2 positions of a channel become four channels, as in diffusers' Flux2Pipeline."""
    rows = [latents[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(rows, 2).flatten(1, 2)


def unfold(latents: Tensor) -> Tensor:
    b, c, h, w = latents.shape
    grid = latents.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return grid.reshape(b, c // 4, 2 * h, 2 * w)


@torch.no_grad()
def expected(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Latents or codes of `images`, and their reconstruction, as diffusers' pipelines make them.

    The memory format decides which kernels run; the other one differs by 3e-6.
    """
    network = network.to(memory_format=torch.channels_last)
    pixels = images().to(memory_format=torch.channels_last)
    name, config = type(network).__name__, network.config
    if name == "VQModel":
        encoded = network.encode(pixels).latents
        ids = network.quantize(encoded)[2][2].view(len(encoded), 1, *encoded.shape[2:])
        decoded = network.decode(
            ids.flatten(), force_not_quantize=True, shape=(2, *ids.shape[2:], encoded.shape[1])
        )
        return ids, decoded.sample.clamp(-1, 1)
    encoded = network.encode(pixels)
    if name in ("AutoencoderDC", "AutoencoderTiny"):
        raw = encoded.latent if name == "AutoencoderDC" else encoded.latents
    else:
        raw = encoded.latent_dist.mode()
    if name == "AutoencoderKLFlux2":
        mean = network.bn.running_mean.view(1, -1, 1, 1)
        std = (network.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps).sqrt()
        latents = (fold(raw) - mean) / std
        back = unfold(latents * std + mean)
    else:
        shift = config.get("shift_factor") or 0.0
        latents = (raw - shift) * config.scaling_factor
        back = latents / config.scaling_factor + shift
    return latents, network.decode(back.to(memory_format=torch.channels_last)).sample.clamp(-1, 1)


def old_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that layers of attention had before diffusers 0.17."""
    pattern = r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)"
    return {re.sub(pattern, lambda found: OLD[found[1]], n): w for n, w in weights.items()}


def original_names(
    weights: dict[str, Tensor], inner_quant: bool, resolutions: int = 2
) -> dict[str, Tensor]:
    """The names of latent diffusion: up blocks are counted from the last.

    Args:
        weights: under diffusers' names.
        inner_quant: the quantization convolutions are parts of encoder and decoder (FLUX.2).
        resolutions: number of the network's resolutions.
    """
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in ORIGINAL if inner_quant else ORIGINAL[:-2]:
            name = re.sub(ours, theirs, name)
        name = re.sub(r"\bup\.(\d)", lambda found: f"up.{resolutions - 1 - int(found[1])}", name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[..., None, None]
        renamed[name] = value.contiguous()
    return renamed


def dc_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of DC-AE's authors, where queries, keys and values are one convolution."""
    renamed = {}
    for name, value in weights.items():
        if ".attn.to_q.weight" in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, value = (
                name.replace("attn.to_q", "context_module.main.qkv.conv"),
                torch.cat(parts),
            )
        elif ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        for ours, theirs in DC_ORIGINAL:
            name = re.sub(ours, theirs, name)
        is_linear = re.search(r"main\.(qkv|proj)\.conv\.weight", name)
        renamed[name] = (value[..., None, None] if is_linear else value).contiguous()
    return renamed


def write_hub(cache: Path, model: str, folder: Path, subfolder: str = "") -> None:
    """Write a folder into a cache as the hub's client would after downloading it."""
    base = cache / f"models--{model.replace('/', '--')}"
    snapshot = base / "snapshots" / ("0" * 40) / subfolder
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text("0" * 40)


def write_layout(network: nn.Module, layout: str, folder: Path) -> Path:
    """Write a network in a layout and return what a user names."""
    plain = folder / "plain"
    if layout in ("fp16", "sharded fp16"):
        options = {"max_shard_size": "8KB"} if "sharded" in layout else {}
        network.half().save_pretrained(folder / "half", variant="fp16", **options)
        network.float()
        return folder / "half"
    if layout == "sharded":
        network.save_pretrained(plain, max_shard_size="8KB")
        assert len(list(plain.glob("*.safetensors"))) > 1
        return plain
    network.save_pretrained(plain)
    weights = load_file(plain / WEIGHTS)
    if layout == "folder":
        return plain
    if layout == "pipeline":
        shutil.copytree(plain, folder / "pipeline" / "vae")
        (folder / "pipeline" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", 1]}))
        return folder / "pipeline"
    if layout in ("file", "any name"):
        (plain / WEIGHTS).rename(plain / "my-vae.safetensors")
        return plain / "my-vae.safetensors" if layout == "file" else plain
    if layout in ("old names", "old names in a file"):
        (plain / WEIGHTS).unlink()
        name = WEIGHTS if layout == "old names" else "vae-ft-mse.safetensors"
        save_file(old_names(weights), plain / name)
        return plain if layout == "old names" else plain / name
    if layout in ("original", "checkpoint"):
        name = type(network).__name__
        inner = name == "AutoencoderKLFlux2"
        is_dc = name == "AutoencoderDC"
        renamed = dc_names(weights) if is_dc else original_names(weights, inner)
        if layout == "checkpoint":
            renamed = {f"first_stage_model.{name}": weight for name, weight in renamed.items()}
            renamed["model.diffusion_model.out.weight"] = torch.zeros(2)
        (plain / WEIGHTS).unlink()
        save_file(renamed, plain / "ae.safetensors")
        return plain / "ae.safetensors"
    raise ValueError(layout)
