"""Reading diffusers' autoencoders from folders, single files and the Hugging Face hub.

The content of a file decides how it is read, not its name. Weights are read from safetensors files
only, and `_class_name` selects one of CLASSES, so that no code of a folder is ever run. A network
is built without memory, on torch's meta device, and takes its tensors from the file. Each tensor
must be in the file, and the file must have no others.
"""

import inspect
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tf_lightning.errors import UserError, first_sentence
from tf_lightning.hub import find_folder, read_json, read_shard_index, split_hub_name

CLASSES = (
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderDC",
    "AutoencoderTiny",
    "VQModel",
)
STEM = "diffusion_pytorch_model"
WEIGHTS_FILE = f"{STEM}.safetensors"
# Patterns of the weights on the hub; those in half precision are used only if there are no others.
HUB_WEIGHTS = (
    (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}-*.safetensors"),
    (f"{STEM}.fp16.safetensors", f"{STEM}*.fp16.*json", f"{STEM}.fp16-*.safetensors"),
)
PIPELINE_PARTS = ("vae", "vqvae", "movq")  # an autoencoder's folder in the folder of a pipeline

# Limits of a configuration, far above those of any published autoencoder.
MAX_RESOLUTIONS, MAX_LAYERS = 8, 32

PREFIXES = ("first_stage_model.", "vae.")  # of the autoencoder in a whole checkpoint
TRAINING_ONLY = ("loss.", "model_ema.")  # networks that only the training of an LDM uses
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ---------------------------------------------------------------- where the files are


def find_autoencoder_path(name: str) -> Path:
    """Return the folder or file of an autoencoder; one on the hub is downloaded.

    Args:
        name: a folder, a file, or a hub name "owner/model" or "owner/model/subfolder".

    Raises:
        UserError: there is no such path, or the hub does not provide it.
    """
    if Path(name).exists():
        return Path(name)
    if hub_name := split_hub_name(name):
        return download(*hub_name)
    raise UserError(
        f'there is no autoencoder "{name}"; give "shapes", "shapes_vq", "pixels", a folder, a '
        ".safetensors file with its config.json beside it, or a hub name such as "
        "stabilityai/sd-vae-ft-mse or owner/model/vae"
    )


def download(model: str, subfolder: str) -> Path:
    """Download an autoencoder's config.json, then its weights, and return their folder.

    Raises:
        UserError: the hub does not provide them.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    configs = [f"{prefix}config.json", f"{prefix}model_index.json"]
    configs += [f"{prefix}{part}/config.json" for part in PIPELINE_PARTS]
    snapshot = find_folder(model, configs, lambda folder: has_config(folder / subfolder))
    folder = config_folder(snapshot / subfolder)
    inside = folder.relative_to(snapshot)
    for patterns in HUB_WEIGHTS:
        if not has_weights(folder):
            wanted = [(inside / pattern).as_posix() for pattern in patterns]
            find_folder(model, wanted, lambda _: has_weights(folder))
    return folder


def has_config(folder: Path) -> bool:
    """Return whether the folder of an autoencoder or of a pipeline is there."""
    parts = ("", *PIPELINE_PARTS)
    return any((folder / part / "config.json").is_file() for part in parts)


def has_weights(folder: Path) -> bool:
    """Return whether all weights of an autoencoder are in its folder."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except UserError:
        return False


def config_folder(path: Path) -> Path:
    """Return the folder that holds config.json: for a pipeline's folder, its autoencoder's.

    Args:
        path: the folder or file that the user gave.

    Raises:
        UserError: there is no config.json.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return folder
    for part in PIPELINE_PARTS:
        if (folder / part / "config.json").is_file():
            return folder / part
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is a pipeline without an autoencoder in {' or '.join(PIPELINE_PARTS)}; "
            "give the folder of an autoencoder, such as the vae folder of a pipeline"
        )
    raise UserError(
        f"autoencoder {path} has no config.json in {folder}; copy the config.json of the "
        "autoencoder into that folder"
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: one, or the shards of an index.

    Raises:
        UserError: the folder has none, or several of which none has diffusers' name.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    indices = sorted(folder.glob("*.safetensors*.json"), key=lambda file: len(file.name))
    if indices:  # the shortest name is that of the full precision
        return sorted(read_shard_index(indices[0]))
    found = sorted(folder.glob("*.safetensors"))
    half = folder / f"{STEM}.fp16.safetensors"
    if half in found or len(found) == 1:
        return [half if half in found else found[0]]
    if found:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} holds several weight files ({names}); give the path of one")
    raise UserError(
        f"{folder} holds no .safetensors file; download {WEIGHTS_FILE}, or convert the weights "
        "(.bin and .ckpt files can run code and are not read)"
    )


# ---------------------------------------------------------------- building


def load_network(name: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load an autoencoder of one of CLASSES in float32.

    Args:
        name: a path or a hub name, see `find_autoencoder_path`.

    Returns:
        The network, and the content of its config.json.

    Raises:
        UserError: it does not exist, is of another class, or its weights do not match its config.
    """
    try:
        path = find_autoencoder_path(str(name))
        folder = config_folder(path)
        config = read_json(folder / "config.json")
        is_weights = path.is_file() and path.suffix != ".json"  # config.json names its folder
        weights = read_tensors([path] if is_weights else weight_files(folder))
        return build_network(config, weights), config
    except UserError:
        raise
    except Exception as error:  # diffusers raises many types for a config with wrong values
        raise UserError(
            f'autoencoder "{name}" cannot be loaded ({first_sentence(error)}); check its '
            "config.json and its weights, or download it again"
        ) from error


def build_network(config: Mapping[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Build the network that config.json describes, with these weights.

    Raises:
        UserError: the class or a value is not supported, or the weights do not match.
    """
    import diffusers  # imported here because it takes seconds, and most commands load none

    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name not in CLASSES:
        raise UserError(
            f"the autoencoder is of class {class_name}, which is not supported; give one of class "
            f"{', '.join(CLASSES[:-1])} or {CLASSES[-1]}"
        )
    cls = getattr(diffusers, class_name)
    known = inspect.signature(cls.__init__).parameters
    arguments = {name: value for name, value in config.items() if name in known}
    check_config(arguments)
    # On the meta device neither memory nor the random generator is used.
    with torch.device("meta"):
        network = cls(**arguments)
    expected = network.state_dict()
    weights = rename(weights, expected, network.config)
    check_weights(expected, weights, class_name)
    network.load_state_dict(weights, assign=True)
    return network


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse images that are not RGB, and sizes that no autoencoder has.

    Raises:
        UserError: a value is not supported.
    """
    for name in ("in_channels", "out_channels"):
        if config.get(name, 3) != 3:
            raise UserError(
                f"the autoencoder's config.json has {name}={reprlib.repr(config[name])}, but "
                "images have 3 channels; give an autoencoder of RGB images"
            )
    if config.get("upsampling_scaling_factor", 2) != 2:
        raise UserError(
            "the autoencoder's config.json has upsampling_scaling_factor="
            f"{reprlib.repr(config['upsampling_scaling_factor'])}; only 2 is supported"
        )
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        counts_layers = re.search("layers|num_.*_blocks", name)
        too_deep = counts_layers and any(isinstance(v, int) and v > MAX_LAYERS for v in values)
        lists = [values, *(v for v in values if isinstance(v, list))]
        too_long = not name.startswith("latents_") and max(map(len, lists)) > MAX_RESOLUTIONS
        if too_deep or too_long:
            raise UserError(
                f"the autoencoder's config.json has {name}={str(value)[:80]}, more than "
                f"{MAX_RESOLUTIONS} resolutions or {MAX_LAYERS} layers; download it again"
            )


# ---------------------------------------------------------------- weights and their names


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Read tensors as float32; of a whole checkpoint only those of its autoencoder.

    Raises:
        UserError: a file is not a whole safetensors file, or a value is not finite.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in names)), "")
                for name in (n for n in names if n.startswith(prefix)):
                    tensor = tensors.get_tensor(name)
                    # Copied, because the tensor may be a view of the file.
                    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    weights[name.removeprefix(prefix)] = tensor.to(dtype, copy=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"autoencoder weights {file} cannot be loaded ({first_sentence(error)}); download "
                "the file again, or convert it to safetensors if it is of another kind"
            ) from error
    for name, tensor in weights.items():
        # Both keep NaN; five times as fast as isfinite of each value.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"the autoencoder's tensor {name} is not finite; download the weights again"
            )
    return weights


def rename(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename weights to diffusers' present names; names of no known layout stay as they are.

    Args:
        weights: tensors under diffusers' names, its old names of attention layers, or the original
            names of latent diffusion (LDM), FLUX.2 or DC-AE.
        expected: the network's state dict.
        config: the network's configuration.
    """
    weights = {rename_attention(name): weight for name, weight in weights.items()}
    if any(re.match(r"(en|de)coder\.(down|up|mid)\.", name) for name in weights):
        return rename_ldm(weights, expected, config)
    if any(re.match(r"(en|de)coder\.stages\.", name) for name in weights):
        from diffusers.loaders import single_file_utils

        return single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers(weights)
    return weights


def rename_attention(name: str) -> str:
    """Replace the name that a layer of attention had before diffusers 0.17."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}{OLD_ATTENTION[found[2]]}.",
        name,
    )


def rename_ldm(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Rename the weights of an autoencoder of latent diffusion, which FLUX.2 extends."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights = {n: w for n, w in weights.items() if not n.startswith(TRAINING_ONLY)}
    moved = {
        re.sub(r"^(en|de)coder\.(?=(post_)?quant_conv\.)", "", n): w for n, w in weights.items()
    }
    renamed = {name: moved[name] for name in expected if name in moved}  # bn., quantize.
    renamed |= convert_ldm_vae_checkpoint(moved, config)
    # The converter drops unknown weights. Reshaped weights are views of the weights in the file.
    used = {id(weight if weight._base is None else weight._base) for weight in renamed.values()}
    return renamed | {name: weight for name, weight in moved.items() if id(weight) not in used}


def check_weights(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], class_name: str
) -> None:
    """Compare the names and shapes of weights with those of the network.

    Raises:
        UserError: some are missing, too many, or of another shape.
    """
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    other = [n for n in expected if n in weights and expected[n].shape != weights[n].shape]
    faults = []
    for names, fault in (
        (missing, "missing"),
        (surplus, "no part of the class"),
        (other, "of another shape"),
    ):
        if names:
            faults.append(f"{len(names)} are {fault}, such as {names[0]}")
    if faults:
        raise UserError(
            f"the autoencoder's weights do not match its config.json, which is of class "
            f"{class_name}: {'; '.join(faults)}; download both from the same place"
        )
