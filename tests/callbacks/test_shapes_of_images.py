"""Callbacks with images of several shapes: scores of squares, captions of whole images, sheets."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from callbacks.contact_sheet import IMAGE_SIZE, TILE_WIDTH, Tile, draw_tile
from callbacks.init_from import POSITIONS, adapted
from callbacks.metrics import ImageQuality
from callbacks.prompts import HeldOut, center_crop_resize
from callbacks.sampling import SampleBatch, sample
from support import runs
from support.sharded_folders import write_sharded
from tf_lightning import TransfusionPipeline
from tf_lightning.checkpoint import select_weights
from tf_lightning.cli.main import main
from tf_lightning.data.corpus.image_storage import ImageStorageSpec
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.generation.sizes import ImageSizes
from tf_lightning.model.patches import MAX_GRID, LinearPatchCoder, learned_pos_embed, stretched
from tf_lightning.sharded import read_sharded


def gradient(width: int, height: int) -> Image.Image:
    """An image whose red is the column."""
    columns = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.stack([np.tile(columns, (height, 1))] * 3, -1)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (33, 64)])
def test_a_square_crop_is_that_of_pillow_without_its_border(size):
    """ImageOps.fit uses pixels outside of the crop; inside the two agree."""
    image = gradient(*size)
    ours = center_crop_resize(image, 16)
    assert center_crop_resize(image, (16, 16)).tobytes() == ours.tobytes()
    fitted = ImageOps.fit(image, (16, 16), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(fitted).astype(int))
    assert ours.size == (16, 16) and difference[:, 2:-2].max() <= 4


def test_a_crop_to_a_wide_size_keeps_the_width():
    wide = np.asarray(center_crop_resize(gradient(200, 200), (40, 20)))
    assert wide.shape == (20, 40, 3) and wide[:, 0].max() < 5 and wide[:, -1].min() > 250


class Shown:
    """A pipeline that records the images that it captions."""

    image_sizes = ImageSizes(((64, 64), (96, 48), (48, 96)), 16)

    def __call__(self, prompts, **options):
        self.sizes = [image.size for image in prompts]
        return SimpleNamespace(texts=["a"] * len(prompts))


def test_images_are_captioned_in_the_nearest_shape_of_the_training_data():
    pipe, sizes = Shown(), [(300, 160), (70, 70), (10, 30)]
    prompts = [SimpleNamespace(image=lambda size=size: gradient(*size)) for size in sizes]
    (batch,) = sample(
        pipe, prompts, [range(3)], SamplingConfig(), seed=0, kind="captioned",
        precision=lambda: torch.no_grad(), progress=False,
    )  # fmt: skip
    assert isinstance(batch, SampleBatch) and pipe.sizes == [(96, 48), (64, 64), (48, 96)]


class Pairs:
    image_size = 32

    def documents(self, split):
        yield ["wide", gradient(64, 16)]
        yield ["square", gradient(32, 32)]


def test_held_out_images_of_several_shapes_are_scored_as_squares():
    data = SimpleNamespace(sources={"a": Pairs()}, image_storage=ImageStorageSpec())
    prompts = HeldOut("a")
    prompts.setup(data)
    assert prompts.image_size is None and prompts.facts["resize"] == "as trained on"
    data.image_storage = ImageStorageSpec(max_aspect_ratio=4.0)
    assert [prompt.image().size for prompt in prompts.prompts(data)] == [(64, 16), (32, 32)]
    assert prompts.image_size is None  # asking for prompts changes nothing
    prompts.setup(data)
    assert prompts.image_size == 32 and prompts.facts["resize"] == "centre crop, lanczos 32"


def test_real_images_of_several_sizes_are_refused_in_one_sentence():
    quality = ImageQuality()
    prompts = SimpleNamespace(image_size=None, facts={"dataset": "photos"})
    quality.open(prompts)
    sizes = [(40, 30), (64, 64)]
    with pytest.raises(UserError, match="40 x 30 and 64 x 64; use prompts that resize them"):
        quality.to("cpu").add_real([lambda size=size: gradient(*size) for size in sizes])


def test_a_sheet_shows_a_wide_image_whole():
    page = Image.new("RGB", (TILE_WIDTH, 240), "white")
    draw_tile(page, (0, 0), Tile(Image.new("RGB", (30, 10), "black"), ""), [], None)
    black = np.asarray(page)[..., 0] == 0
    rows, columns = black.any(1).nonzero()[0], black.any(0).nonzero()[0]
    assert (len(columns), len(rows)) == (IMAGE_SIZE, IMAGE_SIZE // 3)
    assert rows[0] == (IMAGE_SIZE - len(rows)) // 2


def test_stretched_embeddings_equal_linear_interpolation_of_torch():
    table = torch.randn(8, 5)
    wanted = torch.nn.functional.interpolate(table.T[None], size=16, mode="linear")[0].T
    torch.testing.assert_close(stretched(table, 2.0, 16), wanted)
    assert torch.equal(stretched(table, 1.0, 8), table)
    # Each pair of patches of the finer grid has the mean of the patch that it divides.
    line = torch.arange(8.0).unsqueeze(1)
    pairs = stretched(line, 2.0, 16).view(8, 2).mean(1)
    torch.testing.assert_close(pairs[1:-1], line[1:-1, 0])


def test_a_grid_within_the_table_reads_it_and_a_larger_one_is_interpolated():
    rows, columns = torch.nn.Embedding(MAX_GRID, 4), torch.nn.Embedding(MAX_GRID, 4)
    found = learned_pos_embed(rows, columns, 3, MAX_GRID)
    wanted = rows.weight[:3].unsqueeze(1) + columns.weight
    assert torch.equal(found, wanted.flatten(0, 1))
    long = learned_pos_embed(rows, columns, 2, 100).view(2, 100, 4)
    torch.testing.assert_close(
        long[0] - rows.weight[0], stretched(columns.weight, 100 / MAX_GRID, 100)
    )
    coder = LinearPatchCoder(1, 1, 8)
    coder.reset_parameters()
    assert coder.encode(torch.zeros(1, 1, 4, 100), torch.zeros(1))[0].shape == (1, 400, 8)


@pytest.mark.parametrize(
    ("shapes", "factor"), [((8, 16), 2.0), ((16, 8), 0.5), ((8, 8), 1.0), ((None, 8), 1.0)]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_init_from_adapts_the_positions_to_another_resolution(shapes, factor, sharded, tmp_path):
    old, new = ([4, side, side] if side else None for side in shapes)
    weights = {name: torch.randn(MAX_GRID, 3) for name in POSITIONS} | {"other": torch.ones(2)}
    module = SimpleNamespace(image_codec={"latent_shape": new})
    given = weights
    if sharded:
        folder = write_sharded({"state_dict": weights, "global_step": 1}, tmp_path / "a.ckpt")
        given = read_sharded(folder)["state_dict"]
    found = adapted(given, {"image_codec": {"latent_shape": old}}, module)
    assert {*found} == {*weights} and torch.equal(found["other"], weights["other"])
    for name in POSITIONS:
        if factor == 1:
            assert torch.equal(found[name], weights[name])
        else:
            torch.testing.assert_close(found[name], stretched(weights[name], factor, MAX_GRID))


def fit_pictures(folder: Path, pictures: Path, image_size: int, **model) -> dict:
    """Train two steps on a folder of pictures with buckets; return the last checkpoint."""

    def change(config: dict) -> None:
        runs.only_checkpoints(config)
        source = {"paths": f"{pictures}/*.png", "image_size": image_size, "val_fraction": 0.2}
        sources = {"pictures": {"class_path": "tf_lightning.data.CaptionFolders"}}
        sources["pictures"]["init_args"] = source
        config["data"]["init_args"] |= {"sources": sources, "max_aspect_ratio": 2.0}
        config["data"]["init_args"] |= {"patch_size": 4, "tokenizer": model.get("checkpoint")}
        config["model"] |= {"patch_size": 4, "lr": model.get("lr", 1e-2)}
        config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
        if "checkpoint" in model:
            config["init_from"] = {"checkpoint": model["checkpoint"]}

    main(["fit", "-c", str(runs.write_config(folder, change))])
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_at_a_low_resolution_starts_one_at_twice_the_resolution(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, size in enumerate([(60, 60), (80, 50), (40, 80)] * 5):
        gradient(*size).save(tmp_path / f"pictures/{number:02}.png")
        (tmp_path / f"pictures/{number:02}.txt").write_text(f"picture {number}")
    low = fit_pictures(tmp_path / "low", tmp_path / "pictures", 16)
    path = str(tmp_path / "low/run/checkpoints/last.ckpt")
    high = fit_pictures(tmp_path / "high", tmp_path / "pictures", 32, checkpoint=path, lr=1e-30)
    assert low["image_codec"]["latent_shape"] == [3, 16, 16]
    assert high["image_codec"]["latent_shape"] == [3, 32, 32]
    assert len(high["image_codec"]["other_shapes"]) > 1
    before, after = (select_weights(c["state_dict"])[0] for c in (low, high))
    for name, weight in before.items():
        expected = stretched(weight, 2.0, MAX_GRID) if name in POSITIONS else weight
        torch.testing.assert_close(after[name], expected, msg=name)
    pipe = TransfusionPipeline.from_pretrained(str(tmp_path / "high/run"), device="cpu")
    out = pipe("picture 1", width=40, height=24, num_inference_steps=1, progress=False)
    assert out.images[0].size == (40, 24)


def test_buckets_of_the_same_area_keep_their_positions():
    weights = {POSITIONS[0]: torch.randn(MAX_GRID, 3)}
    module = SimpleNamespace(image_codec={"latent_shape": [4, 5, 14]})
    assert adapted(weights, {"image_codec": {"latent_shape": [4, 8, 8]}}, module) is weights
