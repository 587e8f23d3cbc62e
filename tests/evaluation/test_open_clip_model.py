"""open_clip models load without network from files, folders and the cache; errors are short."""

import json
import shutil
import time

import huggingface_hub.constants as hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from evaluation import open_clip_model
from evaluation.open_clip_model import load_open_clip
from support.extractors import TINY_CLIP, tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """The name of a model that was added to open_clip."""
    config = tmp_path_factory.mktemp("configs") / "ViT-tiny-test.json"
    config.write_text(json.dumps(TINY_CLIP["model_cfg"]))
    open_clip.add_model_config(config)
    return config.stem


def test_a_file_and_a_folder_give_the_same_model(folder, name):
    by_folder = load_open_clip(f"local-dir:{folder}")
    by_file = load_open_clip(name, str(folder / "open_clip_model.safetensors"))
    assert by_file.weights_hash == by_folder.weights_hash
    pairs = zip(by_file.network.parameters(), by_folder.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not by_file.network.training
    names = (f"open_clip:local-dir:{folder.name}", f"open_clip:{name}:open_clip_model.safetensors")
    assert (by_folder.name, by_file.name) == names


def test_missing_weights_without_network_are_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)  # the default of a user
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        load_open_clip("ViT-B-32", "openai")
    assert time.perf_counter() - start < 2
    message = str(error.value)
    assert message.startswith("open_clip cannot load 'ViT-B-32' with pretrained='openai' (")
    for part in (
        "timm/vit_base_patch32_clip_224.openai",
        str(tmp_path),
        "set pretrained to a local",
    ):
        assert part in message
    assert "\n" not in message
    assert hub.HF_HUB_OFFLINE is False


def test_weights_in_the_hub_cache_load_by_their_tag_without_network(
    folder, name, monkeypatch, tmp_path
):
    monkeypatch.setattr(open_clip_model, "reachable", lambda url: False)
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, name, {"mine": {"hf_hub": "me/tiny/weights.safetensors"}}
    )
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "open_clip_model.safetensors", snapshot / "weights.safetensors")
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert (
        load_open_clip(name, "mine").weights_hash
        == load_open_clip(f"local-dir:{folder}").weights_hash
    )


MISTAKES = {
    "an unknown model": ("ViT-nothing", "openai"),
    "an unknown tag": ("ViT-B-32", "no-such-tag"),
    "no tag": ("ViT-B-32", None),
    "no folder": ("local-dir:/no/such/folder", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_sentence(mistake):
    with pytest.raises(ValueError) as error:
        load_open_clip(*MISTAKES[mistake])
    message = str(error.value)
    assert message.startswith(f"open_clip cannot load '{MISTAKES[mistake][0]}'")
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("tensors", [{"visual.proj": torch.zeros(3, 3)}, None])
def test_weights_of_another_model_and_damaged_files_are_reported_in_one_sentence(
    name, tensors, tmp_path
):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"no weights") if tensors is None else save_file(tensors, file)
    with pytest.raises(ValueError, match=f"^open_clip cannot load '{name}' with pretr") as error:
        load_open_clip(name, str(file))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    with pytest.raises(ValueError, match="no weights in"):
        load_open_clip(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("model", ["local-dir:here", "hf-hub:me/tiny"])
def test_weights_that_open_clip_would_ignore_are_refused(model):
    with pytest.raises(ValueError, match=f"pretrained=openai has no effect with {model}"):
        load_open_clip(model, "openai")
