"""Networks for metrics: Inception with random weights, a tiny CLIP, and features a test chooses."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as layout
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluation.features import Extractor, Features

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
}


def random_inception(path: Path) -> Path:
    """Write random weights in the format of torch-fidelity's Inception (566 tensors)."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(layout.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = layout.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The published file is older than torch's zip format.
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP with one narrow layer per tower into a folder that `local-dir:` accepts."""
    torch.manual_seed(0)
    network = open_clip.CLIP(**TINY_CLIP["model_cfg"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


class FirstPixels(nn.Module):
    """An extractor whose features are the first values of an image, uint8 as float32."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Features:
        numbers = images.float().flatten(1)[:, : self.num_features]
        return Features(numbers, numbers / 64)


def first_pixels(num_features: int) -> Extractor:
    """The extractor `FirstPixels` as metrics take it."""
    sizes = {"num_features": num_features, "num_classes": num_features}
    return Extractor(FirstPixels(num_features), **sizes, name="first-pixels", weights_hash="none")
