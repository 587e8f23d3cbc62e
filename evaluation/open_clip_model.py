"""open_clip models by tag, file or folder; a missing network is reported without a long wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import open_clip
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn

from evaluation.weights import file_hash, reachable


class OpenClip(NamedTuple):
    """A frozen model with its preprocessing of images and captions."""

    network: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str  # model and weights, without the folders of their files
    weights_hash: str


def load_open_clip(model: str, pretrained: str | None = None) -> OpenClip:
    """Load a model with pretrained weights.

    Args:
        model: a model name known to open_clip ("ViT-L-14"), "local-dir:FOLDER" or
            "hf-hub:ORG/NAME".
        pretrained: a tag ("openai") or a file of weights; None with "local-dir:" and "hf-hub:".
            A file of OpenAI's weights needs a model with QuickGELU, such as "ViT-L-14-quickgelu";
            the tag selects QuickGELU by itself.

    Raises:
        ValueError: the model or its weights are unknown, the weights are absent and cannot be
            downloaded, or `pretrained` is given for a model that has weights of its own.
    """
    if pretrained and model.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(
            f"pretrained={pretrained} has no effect with {model}, which has weights of its own; "
            "leave it out"
        )
    try:
        with hub_offline_if_unreachable():
            weights = weights_file(model, pretrained)
            network, preprocess = open_clip.create_model_from_pretrained(
                model, pretrained, force_quick_gelu=trained_with_quick_gelu(model, pretrained)
            )
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # a damaged file or a file of another model fails in many ways
        where = f"{model!r} with pretrained={pretrained!r}" if pretrained else repr(model)
        reason = shorten(str(error), 240) or type(error).__name__
        raise ValueError(
            f"open_clip cannot load {where} ({reason}); set pretrained to a local file, or set "
            "model to local-dir:FOLDER with open_clip_config.json and open_clip_model.safetensors"
        ) from error
    network = network.eval().requires_grad_(False)
    return OpenClip(
        network, preprocess, tokenizer, short_name(model, pretrained), file_hash(weights)
    )


def trained_with_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether the weights of a tag were trained with QuickGELU.

    open_clip only warns about the mismatch and then computes with another activation.
    """
    return bool((open_clip.get_pretrained_cfg(model, pretrained or "") or {}).get("quick_gelu"))


def short_name(model: str, pretrained: str | None) -> str:
    """Name a model independently of the folders of its files.

    The hash of the weights distinguishes files of the same name.
    """
    schema, name = open_clip.factory.parse_model_name(model)
    parts = [
        "open_clip",
        f"local-dir:{Path(name).resolve().name}" if schema == "local-dir" else model,
    ]
    if pretrained and not schema:
        parts.append(Path(pretrained).name)
    return ":".join(parts)


def weights_file(model: str, pretrained: str | None) -> Path:
    """Return the file of weights that open_clip reads; download it if the cache lacks it.

    Raises:
        ValueError: there are no such weights.
    """
    schema, name = open_clip.factory.parse_model_name(model)
    if schema == "local-dir":
        found = open_clip.factory._find_checkpoint_in_dir(Path(name))
    elif schema == "hf-hub":
        found = from_hub(name, None)
    elif Path(pretrained or "").is_file():
        found = pretrained
    else:
        config = open_clip.get_pretrained_cfg(model, pretrained or "")
        if not config:
            tags = open_clip.list_pretrained_tags_by_model(model)
            known = f"its tags include {', '.join(tags[:4])}" if tags else "the model has no tags"
            raise ValueError(f"neither a file nor a tag; {known}")
        found = from_hub(*config["hf_hub"].rsplit("/", 1))
    if not found:
        raise ValueError(f"no weights in {name}")
    return Path(found)


def from_hub(repository: str, file: str | None) -> str:
    """Return the path of a file of the hub in its cache; None: open_clip's default file names."""
    try:
        return open_clip.pretrained.download_pretrained_from_hf(repository, file or None)
    except FileNotFoundError as error:
        if not constants.HF_HUB_OFFLINE:
            raise
        raise ValueError(
            f"the weights of {repository} are not in {constants.HF_HUB_CACHE} "
            f"and {constants.ENDPOINT} does not answer"
        ) from error


@contextmanager
def hub_offline_if_unreachable() -> Iterator[None]:
    """Make huggingface_hub use only its cache while its host does not answer.

    Otherwise huggingface_hub retries for most of a minute, and its own switch is an environment
    variable that it reads at import.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
