"""Sizes of generated images: which ones suit a model, and how a request reaches the network."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from support.generation import (
    GUIDANCES,
    assert_documents_close,
    generate_documents,
    generation_model,
    plan,
)
from support.reference_generation import reference_document, reference_image
from support.tiny import PATCH_SIZE, document, tiny_net
from tf_lightning import TransfusionPipeline
from tf_lightning.batch import document_length
from tf_lightning.cli.generate import build_parser
from tf_lightning.data.buckets import bucket_sizes
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.generation.sizes import ImageSizes

WIDE, TALL = (3, 2, 6), (3, 6, 4)
SIZES = ImageSizes(((256, 256), *bucket_sizes(256, 16, 2.0)), 16)


def image(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", ["none", "editing"])
def test_a_requested_shape_and_that_of_an_edit_equal_the_reference(guidance):
    """One batch of unequal images against full forward passes of each alone."""
    net, how = tiny_net(), plan("image", **GUIDANCES[guidance])
    prompts = [document("3", 1), [image(WIDE), *document("2", 2)], [image(TALL), image(WIDE, 1)]]
    outputs = generate_documents(net, prompts, how)
    assert [tuple(output[0].shape) for output in outputs] == [(3, 4, 4), WIDE, WIDE]
    for seed, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        expected = reference_image(net, prompt, torch.Generator().manual_seed(seed), how)
        torch.testing.assert_close(output[0], expected, atol=1e-4, rtol=1e-4)
    how = replace(how, latent_shape=TALL)
    for seed, (prompt, output) in enumerate(
        zip(prompts, generate_documents(net, prompts, how), strict=True), 1
    ):
        assert tuple(output[0].shape) == TALL
        expected = reference_image(net, prompt, torch.Generator().manual_seed(seed), how)
        torch.testing.assert_close(output[0], expected, atol=1e-4, rtol=1e-4)


def test_text_and_images_of_a_requested_shape_equal_the_reference():
    """With output "any" the clean image of the requested shape is read by the text after it."""
    net = tiny_net()
    net.transformer.output.weight[18] += 0.5 * net.transformer.output.weight.std()  # <boi>
    how = replace(plan("any", max_images=2, max_new_tokens=8), latent_shape=WIDE)
    prompts = [document("3", 1), document("2i1", 2)]
    outputs = generate_documents(net, prompts, how)
    for seed, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        assert_documents_close(output, reference_document(net, prompt, seed, how))


def test_room_is_kept_for_the_requested_shape():
    model, how = generation_model(tiny_net()), plan("image")
    prompt = document("3", 1)
    length = document_length(prompt, PATCH_SIZE)
    assert model.capacity(prompt, how) == length + 4 + 2
    assert model.capacity(prompt, replace(how, latent_shape=TALL)) == length + 6 + 2
    narrow = replace(model, max_length=length + 7)
    assert narrow.capacity(prompt, how) == length + 6
    with pytest.raises(UserError, match="its output at least 8"):
        narrow.capacity(prompt, replace(how, latent_shape=TALL))


def test_training_sizes_and_nearest_sizes_fit():
    assert all(map(SIZES.fits, SIZES.trained))
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randint(1, 900), rng.randint(1, 900)
        nearest = SIZES.nearest(size)
        assert SIZES.fits(nearest) and SIZES.nearest(nearest) == nearest
    assert SIZES.fits((320, 192)) and (320, 192) not in SIZES.trained


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((100, 7), "size 100x7 (width x height) is not a multiple of 16 in both sides; the nearest "
         "size that works is 352x192"),
        ((321, 190), "multiple of 16 in both sides; the nearest size that works is 320x192"),
        ((640, 160), "has the aspect ratio 4, but the model was trained on width:height from 0.545 "
         "to 1.83; the nearest size that works is 352x192"),
        ((512, 512), "is larger than the images that the model was trained on; the nearest size "
         "that works is 256x256"),
        ((352, 352), "is larger than"),
        ((64, 64), "is smaller than the images"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_suit_the_model_is_refused_with_the_nearest(size, told):
    with pytest.raises(UserError) as error:
        SIZES.check(size)
    assert told in str(error.value)


def test_images_of_codes_have_the_size_of_training():
    sizes = ImageSizes([(64, 64)], 4, exact=True)
    sizes.check((64, 64))
    with pytest.raises(UserError, match="codes; the nearest size that works is 64x64"):
        sizes.check((60, 60))


def test_size_is_width_then_height_on_the_command_line():
    options = build_parser().parse_args(["a.ckpt", "--text", "a", "--size", "320x192"])
    assert (options.width, options.height) == (320, 192) and not hasattr(options, "size")


@pytest.mark.parametrize("text", ["320", "320*192", "x192", "-1x5", "a", "0x0", "64x0"])
def test_a_size_that_cannot_be_read_is_refused(text, capsys):
    with pytest.raises((SystemExit, UserError)) as error:
        build_parser().parse_args(["a.ckpt", "--text", "a", "--size", text])
    told = capsys.readouterr().err + str(error.value)
    assert "is not a width and a height in pixels, such as 320x192" in told or "expected" in told


def test_without_a_size_the_options_of_an_output_are_those_of_older_versions():
    assert "height" not in SamplingConfig().used("image")
    used = SamplingConfig(width=64).used("image")
    assert used["width"] == 64 and used["height"] is None
    assert "width" not in SamplingConfig(width=64).used("text")


def test_the_pipeline_generates_and_reads_images_of_any_trained_shape(run):
    """A pipeline whose checkpoint was trained on several shapes, with the weights of a run."""
    pipe = TransfusionPipeline.from_pretrained(run, device="cpu")
    default = pipe.model.latent_shape
    size = pipe.image_size
    channels, side, _ = default
    shapes = ((channels, side // 2, 2 * side), (channels, 2 * side, side // 2))
    pipe.model = replace(pipe.model, other_shapes=shapes)
    options = {"num_inference_steps": 2, "progress": False}
    out = pipe("a red circle", height=size // 2, width=2 * size, **options)
    assert out.images[0].size == (2 * size, size // 2)
    assert pipe("a red circle", **options).images[0].size == (size, size)
    wide = Image.new("RGB", (2 * size, size // 2), "red")
    assert pipe([[wide, "make it blue"]], **options).images[0].size == wide.size
    assert len(pipe(wide, max_new_tokens=2, progress=False).texts) == 1
    with pytest.raises(UserError, match=f"{3 * size} x {size} pixels, but this model reads"):
        pipe(Image.new("RGB", (3 * size, size)), progress=False)
    with pytest.raises(UserError, match=f"size {2 * size}x{size // 4} .* the aspect ratio 8"):
        pipe("a", height=size // 4, width=2 * size, **options)
