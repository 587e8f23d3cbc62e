"""TransfusionPipeline: loading, saving, prompts, options, and reproducible outputs."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from support import runs
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.data import Mixture
from tf_lightning.data.images import to_image, to_pixels
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline, default_modality
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.module import Transfusion

PROMPTS = [["a red circle"], ["a blue square above a green circle"], ["one red square"]]
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def train(folder, sources: dict, autoencoder: str | None) -> Transfusion:
    """Train a module for three steps and write its checkpoint folder/model.ckpt."""
    L.seed_everything(0)
    channels = 8 if autoencoder == "shapes" else 3
    patch_size = 2 if autoencoder == "shapes" else 16
    module = Transfusion(
        TransformerConfig(vocab_size=runs.VOCAB_SIZE, **SIZES),
        **{"patch_size": patch_size, "latent_channels": channels, "warmup_steps": 1, "lr": 0.01},
        **{"prediction_type": "v_prediction", "ema_decay": 0.5},
    )
    data = Mixture(
        sources,
        **{"autoencoder": autoencoder, "vocab_size": runs.VOCAB_SIZE, "patch_size": patch_size},
        **{"row_length": 256, "batch_size": 2, "cache_dir": str(folder / "data")},
    )
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": 3, "default_root_dir": folder},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "limit_val_batches": 0, "use_distributed_sampler": False},
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def live(folder) -> TransfusionPipeline:
    """A pipeline of a module in training; its checkpoint is folder/model.ckpt."""
    sources = {"captions": ShapesCaptions(30, 4), "text": ShapesTexts(30, 4)}
    return TransfusionPipeline.from_module(train(folder, sources, "shapes"))


@pytest.fixture(scope="module")
def loaded(live, folder) -> TransfusionPipeline:
    return TransfusionPipeline.from_pretrained(folder / "model.ckpt")


@pytest.fixture(scope="module")
def text_only(tmp_path_factory) -> TransfusionPipeline:
    folder = tmp_path_factory.mktemp("text")
    train(folder, {"text": ShapesTexts(30, 4)}, None)
    return TransfusionPipeline.from_pretrained(folder / "model.ckpt")


def draw(pipe: TransfusionPipeline, prompts: list, seeds: list[int], **options) -> np.ndarray:
    """Generate one image for each prompt, (n, 64, 64, 3) integers."""
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "progress": False} | options
    return arrays(pipe(prompts, output_modality="image", seed=seeds, **options).images)


def write(pipe: TransfusionPipeline, prompts: list, **options) -> list[str]:
    return pipe(prompts, output_modality="text", progress=False, **options).texts


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in images])


def test_a_loaded_checkpoint_generates_what_the_module_in_training_does(live, loaded):
    assert (draw(live, PROMPTS, [0, 1, 2]) == draw(loaded, PROMPTS, [0, 1, 2])).all()
    pictures = [[Image.new("RGB", (64, 64), color)] for color in ("red", "white")]
    assert write(live, pictures) == write(loaded, pictures)


def test_images_are_generated_with_the_averaged_weights(live, folder):
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    name = "transformer.layers.0.attention.wq.weight"
    weight = live.model.net.get_parameter(name)
    assert torch.equal(weight, state[f"ema.{name}"])
    assert not torch.equal(weight, state[f"net.{name}"])


def test_a_checkpoint_has_no_weights_of_the_autoencoder(live, folder):
    shapes = {tuple(p.shape) for p in live.autoencoder.model.parameters() if p.ndim == 4}
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    assert shapes and not shapes & {tuple(value.shape) for value in state.values()}
    assert {key.split(".")[0] for key in state} == {"net", "ema"}


def test_an_image_depends_on_its_seed_and_prompt_and_not_on_the_batch(loaded):
    together = draw(loaded, PROMPTS, [5, 6, 7])
    for number, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 7], strict=True)):
        alone = draw(loaded, [prompt], [seed])[0]
        assert np.abs(alone - together[number]).max() <= 1  # rounding
    assert np.abs(draw(loaded, PROMPTS[:1], [9])[0] - together[0]).max() > 8


def test_parts_of_a_prompt_keep_their_order(loaded):
    picture = Image.new("RGB", (64, 64), "red")
    kinds = [[part.ndim for part in loaded.encode(p)] for p in (["a", picture], [picture, "a"])]
    assert kinds == [[1, 3], [3, 1]]
    first, second = draw(loaded, [["one red", picture], [picture, "one red"]], [3, 3])
    assert (first != second).any()


def test_several_images_are_generated_for_each_prompt(loaded):
    how = {"guidance_scale": 2.0, "num_inference_steps": 3, "progress": False}
    prompts = ["a red circle", ["one red square", Image.new("RGB", (64, 64), "red")]]
    out = loaded(prompts, num_outputs=2, seed=5, output_modality="image", **how)
    assert out.seeds == [5, 6, 7, 8] and len(out.images) == len(out.parts) == 4
    repeated = [["a red circle"]] * 2 + [prompts[1]] * 2
    assert np.abs(arrays(out.images) - draw(loaded, repeated, out.seeds)).max() <= 1


def test_text_and_mixed_outputs_are_generated(loaded):
    how = {"max_new_tokens": 5, "num_inference_steps": 2, "progress": False}
    out = loaded(["a red", "one"], output_modality="text", **how)
    assert out.texts == write(loaded, [["a red"], ["one"]], max_new_tokens=5)
    assert out.images == []
    mixed = loaded("a red circle", output_modality="any", temperature=1.0, seed=3, **how)
    kinds = [type(part) for part in mixed.parts[0]]
    assert kinds and all(kind in (str, Image.Image) for kind in kinds)


def test_a_stream_yields_the_same_text_as_a_call(loaded):
    for prompt in (["imagine"], [Image.new("RGB", (64, 64), "red")]):
        how = {"temperature": 2.0, "seed": 4, "max_new_tokens": 12}
        pieces = list(loaded.stream(prompt, **how))
        (text,) = write(loaded, [prompt], **how)
        assert "".join(pieces).strip() == text and len(pieces) > 1


def test_a_stop_string_is_left_out_of_outputs_and_streams(loaded):
    how = {"temperature": 2.0, "seed": 4, "max_new_tokens": 12}
    (text,) = write(loaded, [["imagine"]], **how)
    stop = text[len(text) // 2 :][:2]
    expected = text[: text.find(stop)].strip()
    assert write(loaded, [["imagine"]], stop=(stop,), **how) == [expected]
    assert "".join(loaded.stream("imagine", stop=(stop,), **how)).strip() == expected


def test_every_empty_prompt_means_no_condition(loaded):
    prompts = ["", [], ["", ""]]
    how = {"num_inference_steps": 2, "max_new_tokens": 4, "temperature": 0.0}
    for modality in ("image", "text"):
        outputs = loaded(prompts, output_modality=modality, seed=[3, 3, 3], **how)
        parts = [np.asarray(p, int) if modality == "image" else p for (p,) in outputs.parts]
        for part in parts[1:]:
            assert part == parts[0] if modality == "text" else abs(part - parts[0]).max() <= 1


def test_a_prompt_of_another_type_is_refused(loaded):
    with pytest.raises(
        UserError, match="a prompt is a string, an image or a list of both, not int"
    ):
        loaded([3])


def test_a_prompt_that_is_not_unicode_is_refused(loaded):
    with pytest.raises(UserError, match="character 5 of the prompt, .* is not a Unicode character"):
        loaded("caf\u00e9\udce9")


def test_zero_outputs_are_refused_and_no_prompts_give_no_outputs(loaded):
    with pytest.raises(UserError, match="num_outputs=0 must be at least 1"):
        loaded("a red circle", num_outputs=0)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        loaded("a red circle", batch_size=0)
    for modality in ("image", "text", "any", None):
        assert loaded([], output_modality=modality, progress=False).parts == []


def test_latents_of_another_size_are_refused(loaded):
    told = r"latents in a prompt have shape \(8, 4, 4\), but this model reads \(8, 8, 8\)"
    with pytest.raises(UserError, match=told):
        write(loaded, [[torch.zeros(8, 4, 4)]])


def test_a_prompt_longer_than_a_row_of_training_is_refused(loaded, live):
    assert loaded.model.max_length == live.model.max_length == 256
    with pytest.raises(
        UserError, match="this model was trained on rows of 256; shorten the prompt"
    ):
        write(loaded, [["a red circle " * 99]])


def test_a_prompt_of_ids_and_latents_equals_one_of_text_and_images(loaded):
    prompt = [Image.new("RGB", (64, 64), "blue"), "make it red"]
    assert (draw(loaded, [prompt], [1]) == draw(loaded, [loaded.encode(prompt)], [1])).all()


def test_sampled_text_depends_on_the_seed_and_greedy_text_does_not(loaded):
    prompt = [["imagine"]]
    assert write(loaded, prompt, seed=1) == write(loaded, prompt, seed=2)
    drawn = [write(loaded, prompt, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (65, 64)])
def test_an_image_of_another_size_is_refused_with_both_sizes(loaded, size):
    width, height = size
    with pytest.raises(UserError, match=f"{width} x {height} pixels, but this model reads 64 x 64"):
        write(loaded, [[Image.new("RGB", size)]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_an_image_of_any_mode_is_read(loaded, mode):
    assert loaded.encode([Image.new(mode, (64, 64))])[0].shape == (8, 8, 8)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(loaded, steps):
    with pytest.raises(UserError, match=f"num_inference_steps={steps} must be "):
        draw(loaded, PROMPTS[:1], [0], num_inference_steps=steps)


def test_a_model_of_text_alone_refuses_images_and_generates_text(text_only):
    with pytest.raises(UserError, match="trained on text alone"):
        text_only("a red circle")
    with pytest.raises(UserError, match="trained on text alone"):
        write(text_only, [[Image.new("RGB", (64, 64))]])
    assert isinstance(write(text_only, [["imagine"]])[0], str)


def test_images_survive_the_round_trip_to_pixels():
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pixels = to_pixels(Image.fromarray(values))
    assert pixels.shape == (3, 5, 7) and pixels.min() >= -1 and pixels.max() <= 1
    torch.testing.assert_close(pixels[:, 2, 3], torch.tensor(values[2, 3]) / 127.5 - 1)
    assert (np.asarray(to_image(pixels)) == values).all()
    assert np.asarray(to_image(torch.full((3, 1, 1), 1.5))).tolist() == [[[255] * 3]]


def test_weights_of_another_shape_are_refused_in_one_sentence(folder, live, tmp_path):
    checkpoint = read_checkpoint(folder / "model.ckpt")
    checkpoint["hyper_parameters"]["transformer"]["dim"] = 64
    torch.save(checkpoint, tmp_path / "wide.ckpt")
    misfit = r"do not fit this model \(size mismatch for transformer\."
    with pytest.raises(UserError, match=misfit) as told:
        TransfusionPipeline.from_pretrained(tmp_path / "wide.ckpt")
    assert "\n" not in str(told.value)


def test_one_prompt_needs_no_list_and_its_last_part_chooses_the_modality(loaded):
    """Text is answered with an image, and an image with text."""
    how = {"num_inference_steps": 2, "max_new_tokens": 3, "progress": False}
    drawn, written = loaded("a red circle", **how), loaded(Image.new("RGB", (64, 64)), **how)
    assert len(drawn.images) == 1 and drawn.texts == [""]
    assert written.images == [] and len(written.texts) == 1
    edited = loaded([[Image.new("RGB", (64, 64)), "make it red"]], **how)
    assert len(edited.images) == 1


def test_prompts_that_end_differently_need_a_modality():
    image = Image.new("RGB", (4, 4))
    assert default_modality(["a", [image, "b"]]) == "image"
    assert default_modality([image, ["a", image]]) == "text"
    with pytest.raises(UserError, match="some prompts end in text and others in an image"):
        default_modality(["a", image])


def test_options_replace_those_of_a_config_and_unknown_ones_are_refused(loaded):
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=1.0)
    how = {"progress": False, "seed": 3}
    by_config = loaded("a red circle", sampling=sampling, **how).images[0]
    by_name = loaded("a red circle", num_inference_steps=2, guidance_scale=1.0, **how).images[0]
    changed = loaded("a red circle", sampling=sampling, guidance_scale=5.0, **how).images[0]
    assert by_config.tobytes() == by_name.tobytes() != changed.tobytes()
    with pytest.raises(
        UserError, match="there is no sampling option 'steps'; use height, width, guidance_scale"
    ):
        loaded("a red circle", steps=2)
    with pytest.raises(UserError, match="output_modality='video' must be 'image', 'text' or 'any'"):
        loaded("a red circle", output_modality="video")
    with pytest.raises(UserError, match="1 seeds do not fit 2 outputs; give one each"):
        loaded(["a", "b"], seed=[0])


def test_a_saved_pipeline_generates_the_same(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "saved")
    saved = TransfusionPipeline.from_pretrained(tmp_path / "saved")
    assert saved.checkpoint["weights"] == loaded.checkpoint["weights"] == "ema"
    assert (draw(saved, PROMPTS, [0, 1, 2]) == draw(loaded, PROMPTS, [0, 1, 2])).all()
    saved.save_pretrained(tmp_path / "again")
    files = [tmp_path / name / "net.safetensors" for name in ("saved", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_nearly_the_same(loaded, folder, dtype):
    half = TransfusionPipeline.from_pretrained(folder / "model.ckpt", device="cpu", dtype=dtype)
    assert {p.dtype for p in half.model.net.parameters()} == {dtype}
    difference = np.abs(draw(half, PROMPTS, [0, 1, 2]) - draw(loaded, PROMPTS, [0, 1, 2]))
    assert difference.mean() < 8
    assert len(write(half, ["a red circle"], max_new_tokens=4)) == 1


def test_a_module_can_be_used_with_its_raw_weights(folder):
    module = train(folder / "raw", {"text": ShapesTexts(30, 4)}, None)
    averaged, raw = (TransfusionPipeline.from_module(module, ema) for ema in (True, False))
    assert averaged.model.net is module.ema and raw.model.net is module.net
    assert (averaged.checkpoint["weights"], raw.checkpoint["weights"]) == ("ema", "raw")


def test_loading_builds_no_lightning_module(loaded, folder, monkeypatch):
    monkeypatch.setattr(Transfusion, "__init__", lambda *args, **kwargs: pytest.fail("built one"))
    TransfusionPipeline.from_pretrained(folder / "model.ckpt")


def test_the_public_names_are_those_of_the_packages():
    import tf_lightning

    assert tf_lightning.TransfusionPipeline is TransfusionPipeline
    assert tf_lightning.Transfusion is Transfusion and tf_lightning.Mixture is Mixture
    assert all(hasattr(tf_lightning, name) for name in tf_lightning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        tf_lightning.Model  # noqa: B018


def test_an_exported_folder_is_found_on_the_hub(loaded, tmp_path, monkeypatch):
    """The hub's copy is a folder in its cache, laid out as `save_pretrained` writes it."""
    snapshot = tmp_path / "models--someone--shapes" / "snapshots" / "main"
    loaded.save_pretrained(snapshot)
    (tmp_path / "models--someone--shapes" / "refs").mkdir()
    (tmp_path / "models--someone--shapes" / "refs" / "main").write_text("main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pipe = TransfusionPipeline.from_pretrained("someone/shapes")
    assert (draw(pipe, PROMPTS[:1], [4]) == draw(loaded, PROMPTS[:1], [4])).all()
    with pytest.raises(UserError, match="no folder someone/absent, and the hub does not provide"):
        TransfusionPipeline.from_pretrained("someone/absent")
