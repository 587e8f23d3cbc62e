"""Retrieval accuracy: the nearest image, and the accuracy of models that remember or do not."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image

from callbacks.retrieval import RetrievalAccuracy, nearest_images
from tf_lightning.data.documents import Skipped
from tf_lightning.data.images import to_image
from tf_lightning.diffusion.process import DDPM
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig


def test_the_nearest_image_has_the_smallest_squared_distance():
    generator = torch.Generator().manual_seed(0)
    generated = torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1
    images = torch.rand(70, 3, 8, 8, generator=generator) * 2 - 1
    expected = [
        min(range(70), key=lambda index: ((image - images[index]) ** 2).mean().item())
        for image in generated
    ]
    assert nearest_images(generated, images).tolist() == expected


def test_an_image_with_little_noise_is_nearest_to_itself():
    images = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator())
    assert nearest_images(noisy, images).tolist() == list(range(300))


def grey(number: int) -> Image.Image:
    return to_image(torch.full((3, 8, 8), number / 5 - 1))


class Greys:
    """Ten captioned images of one grey each, two of them for validation, and other documents."""

    def documents(self, split):
        if split == "val":
            return iter([["8", grey(8)], [grey(9), "9"]])
        pairs = [
            ["0", grey(0)],
            ["1", grey(1)],
            [grey(2), "2"],
            *([str(n), grey(n)] for n in (3, 4, 5, 6, 7)),
        ]
        return iter([*pairs[:3], ["text"], Skipped("damaged image"), *pairs[3:]])


SHIFTED = {"sampler": "DPMSolverMultistepScheduler", "timestep_shift": 2.5}


class Memory:
    """Answers each caption with its own image, or always with the first image."""

    def __init__(self, remembers: bool):
        self.remembers = remembers

    def __call__(self, prompts, *, sampling, **how) -> GenerationOutput:
        assert sampling == SamplingConfig(**SHIFTED)
        return GenerationOutput([[grey(int(p) if self.remembers else 0)] for p in prompts], [])


@pytest.mark.parametrize(("remembers", "accuracy"), [(True, 1.0), (False, 0.2)])
def test_accuracy_is_the_share_of_images_nearest_to_their_own(
    remembers, accuracy, tmp_path, monkeypatch
):
    monkeypatch.setattr(TransfusionPipeline, "from_module", lambda module: Memory(remembers))
    trainer = SimpleNamespace(
        **{
            "is_global_zero": True,
            "logger": None,
            "default_root_dir": str(tmp_path),
            "global_step": 7,
        },
        datamodule=SimpleNamespace(sources={"captions": Greys()}, autoencoder_name="pixels"),
        state=SimpleNamespace(fn="fit"),
        precision="32-true",
        sanity_checking=False,
        fast_dev_run=False,
        precision_plugin=Precision(),
    )
    module = torch.nn.Linear(1, 1)
    module.process = DDPM()
    module.device_mesh = None  # not sharded
    callback = RetrievalAccuracy(
        "captions", num_prompts=5, sampling=SamplingConfig(**SHIFTED), seed=4
    )
    monkeypatch.setattr("callbacks.retrieval.check_module", lambda *_: None)
    callback.setup(trainer, module, "fit")
    callback.examine(trainer, module)
    report = json.loads((tmp_path / "retrieval.json").read_text())
    assert report == {
        **{"retrieval_accuracy": accuracy, "num_prompts": 5, "num_images": 10},
        **{"seed": 4, "global_step": 7},
        **{"guidance_scale": 3.0, "num_inference_steps": 50, "nfe": 50, **SHIFTED},
        **{"image_guidance_scale": None, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0},
    }
    assert Image.open(tmp_path / "retrieval.png").width > 500
