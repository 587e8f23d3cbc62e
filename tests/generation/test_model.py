"""A trained network read back from its checkpoint: the same pictures, the same words."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from support import runs
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.data import Mixture
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline, load, to_image, to_pixels
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.module import Transfusion

PROMPTS = [["a red circle"], ["a blue square above a green circle"], ["one red square"]]
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def train(folder, sources: dict, autoencoder: str | None) -> Transfusion:
    """A module after three steps, and its checkpoint folder/model.ckpt."""
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
    """A model in training, with the shipped autoencoder; its checkpoint is folder/model.ckpt."""
    sources = {"captions": ShapesCaptions(30, 4), "text": ShapesTexts(30, 4)}
    return TransfusionPipeline.of(train(folder, sources, "shapes"))


@pytest.fixture(scope="module")
def loaded(live, folder) -> TransfusionPipeline:
    return load(folder / "model.ckpt")


@pytest.fixture(scope="module")
def text_only(tmp_path_factory) -> TransfusionPipeline:
    folder = tmp_path_factory.mktemp("text")
    train(folder, {"text": ShapesTexts(30, 4)}, None)
    return load(folder / "model.ckpt")


def draw(model: TransfusionPipeline, prompts: list, seeds: list[int], **options) -> np.ndarray:
    """Pictures (n, 64, 64, 3) as integers."""
    options = {"num_inference_steps": 3, "guidance_scale": 2.0} | options
    return np.stack([np.asarray(p, int) for p in model.draw(prompts, seeds=seeds, **options)])


def test_a_loaded_checkpoint_draws_and_writes_as_the_module_in_training_does(live, loaded):
    assert (draw(live, PROMPTS, [0, 1, 2]) == draw(loaded, PROMPTS, [0, 1, 2])).all()
    pictures = [[Image.new("RGB", (64, 64), colour)] for colour in ("red", "white")]
    assert live.write(pictures) == loaded.write(pictures)


def test_the_averaged_weights_are_the_ones_that_draw(live, folder):
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    name = "transformer.layers.0.attention.wq.weight"
    weight = live.net.get_parameter(name)
    assert torch.equal(weight, state[f"ema.{name}"])
    assert not torch.equal(weight, state[f"net.{name}"])


def test_a_checkpoint_has_no_weights_of_the_autoencoder(live, folder):
    shapes = {tuple(p.shape) for p in live.autoencoder.model.parameters() if p.ndim == 4}
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    assert shapes and not shapes & {tuple(value.shape) for value in state.values()}
    assert {key.split(".")[0] for key in state} == {"net", "ema"}


def test_a_picture_depends_on_its_seed_and_prompt_not_on_its_batch_mates(loaded):
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


def pictures(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in images])


def test_generate_draws_several_pictures_of_each_prompt(loaded):
    how = {"guidance_scale": 2.0, "num_inference_steps": 3, "progress": False}
    prompts = ["a red circle", ["one red square", Image.new("RGB", (64, 64), "red")]]
    out = loaded.generate(prompts, num_images=2, seed=5, **how)
    assert out.seeds == [5, 6, 7, 8] and len(out.images) == len(out.documents) == 4
    repeated = [["a red circle"]] * 2 + [prompts[1]] * 2
    assert np.abs(pictures(out.images) - draw(loaded, repeated, out.seeds)).max() <= 1


def test_generate_writes_and_answers_in_any_way(loaded):
    how = {"max_new_tokens": 5, "num_inference_steps": 2, "progress": False}
    out = loaded.generate(["a red", "one"], answer="text", **how)
    assert out.texts == loaded.write([["a red"], ["one"]], max_new_tokens=5)
    assert out.images == []
    mixed = loaded.generate(["a red circle"], answer="any", temperature=1.0, seed=3, **how)
    kinds = [type(part) for part in mixed.documents[0]]
    assert kinds and all(kind in (str, Image.Image) for kind in kinds)


def test_a_stream_tells_the_text_that_write_returns(loaded):
    for prompt in (["imagine"], [Image.new("RGB", (64, 64), "red")]):
        how = {"temperature": 2.0, "seed": 4, "max_new_tokens": 12}
        pieces = list(loaded.stream(prompt, **how))
        (text,) = loaded.write([prompt], **how)
        assert "".join(pieces).strip() == text and len(pieces) > 1


def test_a_stop_text_is_left_out_of_writing_and_of_the_stream(loaded):
    how = {"temperature": 2.0, "seed": 4, "max_new_tokens": 12}
    (text,) = loaded.write([["imagine"]], **how)
    stop = text[len(text) // 2 :][:2]
    expected = text[: text.find(stop)].strip()
    assert loaded.write([["imagine"]], stop=(stop,), **how) == [expected]
    assert "".join(loaded.stream("imagine", stop=(stop,), **how)).strip() == expected


@pytest.mark.parametrize("prompts", [[""], [[]], [["", ""]]])
def test_an_empty_prompt_is_refused(loaded, prompts):
    for ask in (loaded.generate, loaded.write):
        with pytest.raises(UserError, match="a prompt is empty; give text or a picture"):
            ask(prompts)
    with pytest.raises(UserError, match="a prompt is empty"):
        loaded.draw([["a red circle"], *prompts], seeds=[0, 1])


def test_no_answers_at_all_are_refused_and_no_prompts_give_none(loaded):
    with pytest.raises(UserError, match="num_images=0 must be at least 1"):
        loaded.generate(["a red circle"], num_images=0)
    assert loaded.generate([], progress=False).documents == []
    assert loaded.write([]) == [] and loaded.draw([], seeds=[]) == []


def test_latents_of_another_size_are_refused(loaded):
    told = r"latents of a prompt are \(8, 4, 4\), this model reads \(8, 8, 8\)"
    with pytest.raises(UserError, match=told):
        loaded.write([[torch.zeros(8, 4, 4)]])


def test_a_prompt_longer_than_a_row_of_training_is_refused(loaded, live):
    assert loaded.max_length == live.max_length == 256
    with pytest.raises(UserError, match="this model was trained on 256; shorten the prompt"):
        loaded.write([["a red circle " * 99]])


def test_a_prompt_of_ids_and_latents_equals_one_of_text_and_pictures(loaded):
    prompt = [Image.new("RGB", (64, 64), "blue"), "make it red"]
    assert (draw(loaded, [prompt], [1]) == draw(loaded, [loaded.encode(prompt)], [1])).all()


def test_greedy_text_needs_no_seed_and_drawn_text_follows_it(loaded):
    prompt = [["imagine"]]
    assert loaded.write(prompt, seed=1) == loaded.write(prompt, seed=2)
    drawn = [loaded.write(prompt, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (65, 64)])
def test_a_picture_of_another_size_is_refused_with_both_sizes(loaded, size):
    width, height = size
    with pytest.raises(UserError, match=f"{width} x {height} pixels, this model reads 64 x 64"):
        loaded.write([[Image.new("RGB", size)]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_a_picture_of_any_mode_is_read(loaded, mode):
    assert loaded.encode([Image.new(mode, (64, 64))])[0].shape == (8, 8, 8)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(loaded, steps):
    with pytest.raises(UserError, match=f"num_inference_steps={steps}"):
        draw(loaded, PROMPTS[:1], [0], num_inference_steps=steps)


def test_a_model_of_text_alone_refuses_pictures_and_writes(text_only):
    with pytest.raises(UserError, match="trained on text alone"):
        text_only.draw([["a red circle"]], seeds=[0])
    with pytest.raises(UserError, match="trained on text alone"):
        text_only.write([[Image.new("RGB", (64, 64))]])
    assert isinstance(text_only.write([["imagine"]])[0], str)


def test_pixels_and_pictures_are_the_same_thing():
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
    with pytest.raises(UserError, match=r"do not fit this model \(size mismatch for net\.") as told:
        load(tmp_path / "wide.ckpt")
    assert "\n" not in str(told.value)
