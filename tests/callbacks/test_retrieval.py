"""Retrieval accuracy: the nearest image, and the accuracy of models that remember or do not."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image

from callbacks.retrieval import RetrievalAccuracy, nearest_images
from tf_lightning.data.documents import Skipped
from tf_lightning.data.images import to_image, to_pixels
from tf_lightning.diffusion.process import DDPM
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.generation.sizes import ImageSizes


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

    image_sizes = ImageSizes([(8, 8)], 1)

    def __init__(self, remembers: bool):
        self.remembers = remembers

    def __call__(self, prompts, *, sampling, **how) -> GenerationOutput:
        assert sampling == SamplingConfig(**SHIFTED, width=8, height=8)
        return GenerationOutput([[grey(int(p) if self.remembers else 0)] for p in prompts], [])


def fails(module):
    raise UserError("the copy does not fit")


class Values:
    """A logger that keeps the values that it is given, with their steps."""

    def __init__(self):
        self.given = {}

    def log_metrics(self, metrics, step):
        self.given |= {name: (value, step) for name, value in metrics.items()}


def examine(
    source, pipeline, folder, monkeypatch, logger=None, sampling=SHIFTED, verb="fit", **options
) -> dict:
    """Run the callback on a source with a pipeline in place of a model; return its report."""
    from_module = fails if pipeline is fails else lambda module: pipeline
    monkeypatch.setattr(TransfusionPipeline, "from_module", from_module)
    monkeypatch.setattr("callbacks.retrieval.check_module", lambda *_: None)
    trainer = SimpleNamespace(
        is_global_zero=True,
        logger=None,
        loggers=[logger] if logger else [],
        default_root_dir=str(folder),
        results_folder=folder,  # of an evaluation
        global_step=7,
        datamodule=SimpleNamespace(sources={"mine": source}, autoencoder_name="pixels"),
        state=SimpleNamespace(fn=verb),
        precision="32-true",
        sanity_checking=False,
        fast_dev_run=False,
        precision_plugin=Precision(),
    )
    module = torch.nn.Linear(1, 1)
    module.process = DDPM()
    module.device_mesh = None  # not sharded
    callback = RetrievalAccuracy("mine", sampling=SamplingConfig(**sampling), **options)
    callback.setup(trainer, module, "fit")
    callback.examine(trainer, module)
    name = options.get("name", "retrieval")
    assert Image.open(folder / f"{name}.png").width > 500
    return json.loads((folder / f"{name}.json").read_text())


class Shapes:
    """Five images of one shape and three of another."""

    def documents(self, split):
        sizes = [*[(16, 4), (8, 8)] * 3, (16, 4), (16, 4)] if split == "train" else []
        return iter([str(n), grey(n).resize(size)] for n, size in enumerate(sizes))


class Shaped:
    """Answers each caption with its own image in the size that is asked for."""

    image_sizes = ImageSizes([(8, 8), (16, 4)], 1)

    def __call__(self, prompts, *, sampling, **how) -> GenerationOutput:
        size = sampling.width, sampling.height
        return GenerationOutput([[grey(int(p)).resize(size)] for p in prompts], [])


def test_images_of_several_shapes_are_generated_and_compared_in_their_own(tmp_path, monkeypatch):
    report = examine(Shapes(), Shaped(), tmp_path, monkeypatch, num_prompts=8)
    assert report["retrieval_accuracy"] == 1.0 and report["num_images"] == 8
    assert report["chance"] == pytest.approx((5 / 5 + 3 / 3) / 8)


def test_images_of_one_shape_that_is_not_the_models_are_generated_in_it(tmp_path, monkeypatch):
    class Wide:
        def documents(self, split):
            return iter([str(n), grey(n).resize((16, 4))] for n in range(5 * (split == "train")))

    report = examine(Wide(), Shaped(), tmp_path, monkeypatch)
    assert report["retrieval_accuracy"] == 1.0 and report["chance"] == pytest.approx(1 / 5)


def test_images_of_equal_pixels_and_other_shapes_are_different_images(tmp_path, monkeypatch):
    class Flat:
        def documents(self, split):
            sizes = [(16, 4), (8, 8)] if split == "train" else []
            return iter(["3", grey(3).resize(size)] for size in sizes)

    report = examine(Flat(), Shaped(), tmp_path, monkeypatch)
    assert (report["retrieval_accuracy"], report["num_images"], report["chance"]) == (1, 2, 1)


def test_an_edit_is_generated_in_the_size_of_the_edited_image(tmp_path, monkeypatch):
    class Cropped:
        def documents(self, split):
            return iter([[grey(n).resize((16, 4)), str(n), grey(n)] for n in range(4)])

    class Crops(Shaped):
        def __call__(self, prompts, **how) -> GenerationOutput:
            return super().__call__([text for _, text in prompts], **how)

    report = examine(Cropped(), Crops(), tmp_path, monkeypatch)
    assert report["retrieval_accuracy"] == report["nearest_variant"] == 1
    # The edited image is the only one of its shape, so the chance level of variants is 1.
    assert (report["chance"], report["nearest_variant_chance"]) == (1 / 4, 1)


def test_a_size_of_ones_own_is_refused(tmp_path, monkeypatch):
    message = "sampling.height=4 does not fit RetrievalAccuracy, .*; leave sampling.height out"
    with pytest.raises(UserError, match=message):
        examine(Greys(), Memory(True), tmp_path, monkeypatch, sampling={"height": 4})


@pytest.mark.parametrize(("remembers", "accuracy"), [(True, 1.0), (False, 0.2)])
def test_accuracy_is_the_share_of_images_nearest_to_their_own(
    remembers, accuracy, tmp_path, monkeypatch
):
    report = examine(Greys(), Memory(remembers), tmp_path, monkeypatch, num_prompts=5, seed=4)
    assert report == {
        **{"retrieval_accuracy": accuracy, "chance": 0.1, "num_prompts": 5, "num_images": 10},
        **{"source": "mine", "split": "train", "seed": 4, "global_step": 7, "containing": None},
        **{"guidance_scale": 3.0, "num_inference_steps": 50, "nfe": 50, **SHIFTED},
        **{"image_guidance_scale": None, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0},
    }


def test_held_out_prompts_are_searched_among_the_images_of_both_splits(tmp_path, monkeypatch):
    options = {"split": "val", "name": "held_out"}
    report = examine(Greys(), Memory(True), tmp_path, monkeypatch, **options)
    assert (report["retrieval_accuracy"], report["num_prompts"], report["num_images"]) == (1, 2, 10)
    assert report["split"] == "val" and not (tmp_path / "retrieval.json").exists()


class Brighter:
    """Edits of greys: each image, how many steps brighter, and the image after that."""

    def documents(self, split):
        pairs = [(0, 1), (1, 1), (1, 3)] if split == "train" else [(4, 1), (2, 3)]
        return iter([[grey(start), str(steps), grey(start + steps)] for start, steps in pairs])


class Editor:
    """Makes an image brighter, by the steps of its instruction or always by one."""

    image_sizes = ImageSizes([(8, 8)], 1)

    def __init__(self, reads: bool):
        self.reads = reads

    def __call__(self, prompts, **_) -> GenerationOutput:
        levels = [round((to_pixels(image).mean().item() + 1) * 5) for image, _ in prompts]
        steps = [int(text) if self.reads else 1 for _, text in prompts]
        return GenerationOutput([[grey(a + b)] for a, b in zip(levels, steps, strict=True)], [])


@pytest.mark.parametrize(("reads", "accuracy"), [(True, 1.0), (False, 0.5)])
def test_an_edit_is_right_if_the_nearest_image_is_the_edited_one(
    reads, accuracy, tmp_path, monkeypatch
):
    """Images before and after edits are searched, each once: greys 0, 1, 2, 4 and 5."""
    report = examine(Brighter(), Editor(reads), tmp_path, monkeypatch, split="val")
    assert (report["retrieval_accuracy"], report["num_images"]) == (accuracy, 5)


class Levels:
    """Edits of greys to a level, and captions; the two splits share images before edits."""

    def documents(self, split):
        edits = {"train": [(2, 3), (7, 8)], "val": [(2, 5), (2, 6), (7, 9)]}[split]
        yield from ([grey(before), f"level {after}", grey(after)] for before, after in edits)
        yield [str(4 if split == "val" else 1), grey(4 if split == "val" else 1)]


class Imprecise:
    """Generates a grey for each prompt, by its text."""

    image_sizes = ImageSizes([(8, 8)], 1)
    levels = {"level 5": 4.4, "level 6": 4.7, "level 9": 9, "4": 4}

    def __call__(self, prompts, **_) -> GenerationOutput:
        texts = [prompt if isinstance(prompt, str) else prompt[1] for prompt in prompts]
        return GenerationOutput([[grey(self.levels[text])] for text in texts], [])


def test_the_nearest_variant_is_searched_among_the_images_of_all_edits_of_the_input(
    tmp_path, monkeypatch
):
    """The variants of level 2 are 2, 3, 5 and 6, from both splits; those of level 7 are 7, 8 and 9.

    Level 4.4 is nearest to 4 of all images, but to 5 of its variants; 4.7 is nearest to 5.
    """
    logger = Values()
    options = {"split": "val", "name": "edits", "logger": logger}
    report = examine(Levels(), Imprecise(), tmp_path, monkeypatch, **options)
    assert report["retrieval_accuracy"] == pytest.approx(2 / 4)  # level 9 and the caption
    assert report["nearest_variant"] == pytest.approx(2 / 3)
    assert report["chance"] == pytest.approx(1 / 9) and report["num_images"] == 9
    assert report["nearest_variant_chance"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 3) / 3)
    assert (report["num_prompts"], report["num_prompts_with_images"]) == (4, 3)
    names = ("retrieval_accuracy", "nearest_variant")
    assert logger.given == {f"val/{name}[edits]": (report[name], 6) for name in names}


def test_prompts_without_images_have_no_variants(tmp_path, monkeypatch):
    logger = Values()
    report = examine(Greys(), Memory(True), tmp_path, monkeypatch, logger=logger)
    assert not any("variant" in name for name in [*report, *logger.given])


def test_prompts_are_chosen_by_their_text_and_searched_among_all(tmp_path, monkeypatch):
    options = {"split": "val", "containing": "level 5"}
    report = examine(Levels(), Imprecise(), tmp_path, monkeypatch, **options)
    assert (report["num_prompts"], report["nearest_variant"]) == (1, 1)
    assert (report["chance"], report["nearest_variant_chance"]) == (1 / 9, 1 / 4)
    assert report["containing"] == "level 5"
    with pytest.raises(UserError, match="image with 'level 8' in its text to retrieve in its val"):
        examine(Levels(), None, tmp_path, monkeypatch, split="val", containing="level 8")


def test_a_failure_is_a_warning_in_fit_and_an_error_otherwise(tmp_path, monkeypatch):
    sentence = "RetrievalAccuracy of mine at step 7 failed: the copy does not fit"
    with pytest.warns(UserWarning, match=sentence), pytest.raises(FileNotFoundError):
        examine(Greys(), fails, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="^the copy does not fit"):
        examine(Greys(), fails, tmp_path, monkeypatch, verb="validate")
    assert not [*tmp_path.iterdir()]


def test_a_split_without_prompts_is_refused(tmp_path, monkeypatch):
    class Texts:
        def documents(self, split):
            return iter([["a text"], [grey(0), grey(1)]])

    with pytest.raises(UserError, match="no captioned or edited image to retrieve in its val"):
        examine(Texts(), None, tmp_path, monkeypatch, split="val")
