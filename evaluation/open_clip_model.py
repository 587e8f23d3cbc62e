"""open_clip models by tag, file or folder; at once where there is no network."""

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
    """A frozen model with what is done to pictures and captions before it."""

    network: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str  # model and weights, without the folders that they lie in
    weights_hash: str


def load_open_clip(model: str, pretrained: str | None = None) -> OpenClip:
    """Loads a model with pretrained weights.

    Args:
        model: a name that open_clip knows ("ViT-L-14"), "local-dir:FOLDER" or "hf-hub:ORG/NAME".
        pretrained: a tag ("openai") or a file of weights; none with "local-dir:" and "hf-hub:".
            A file of OpenAI's weights needs a model with QuickGELU, such as "ViT-L-14-quickgelu";
            their tag brings it along.

    Raises:
        ValueError: no such model or weights, or weights absent and no network to fetch them.
    """
    try:
        with hub_offline_if_unreachable():
            weights = weights_file(model, pretrained)
            network, preprocess = open_clip.create_model_from_pretrained(
                model, pretrained, force_quick_gelu=trained_with_quick_gelu(model, pretrained)
            )
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # a broken or foreign file fails in many ways
        where = f"{model!r} with pretrained={pretrained!r}" if pretrained else repr(model)
        reason = shorten(str(error), 240) or type(error).__name__
        raise ValueError(
            f"open_clip cannot load {where} ({reason}); give pretrained a local file, or name "
            "model local-dir:FOLDER with open_clip_config.json and open_clip_model.safetensors"
        ) from error
    network = network.eval().requires_grad_(False)
    return OpenClip(
        network, preprocess, tokenizer, short_name(model, pretrained), file_hash(weights)
    )


def trained_with_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Whether a tag's weights were; open_clip itself only warns and computes something else."""
    return bool((open_clip.get_pretrained_cfg(model, pretrained or "") or {}).get("quick_gelu"))


def short_name(model: str, pretrained: str | None) -> str:
    """The same wherever the files lie; the hash of the weights tells files of one name apart."""
    schema, name = open_clip.factory.parse_model_name(model)
    parts = [
        "open_clip",
        f"local-dir:{Path(name).resolve().name}" if schema == "local-dir" else model,
    ]
    if pretrained and not schema:
        parts.append(Path(pretrained).name)
    return ":".join(parts)


def weights_file(model: str, pretrained: str | None) -> Path:
    """The file that open_clip reads, fetched when it is on the hub and not in the cache."""
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
            known = f"tags begin {', '.join(tags[:4])}" if tags else "no tag of this model is known"
            raise ValueError(f"neither a file nor a tag; {known}")
        found = from_hub(*config["hf_hub"].rsplit("/", 1))
    if not found:
        raise ValueError(f"no weights in {name}")
    return Path(found)


def from_hub(repository: str, file: str | None) -> str:
    """A file of the hub, by way of its cache; without a name, open_clip's usual ones."""
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
    """Has huggingface_hub use its cache alone, at once, while its host does not answer.

    Without it huggingface_hub retries for most of a minute; its own switch is an environment
    variable read at import.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
