"""Preparing measures and records latents, and refuses an autoencoder without unit variance."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tf_lightning.autoencoder.frozen import SHAPES_FOLDER, LatentAutoencoder, load_autoencoder
from tf_lightning.data import Mixture
from tf_lightning.data.corpus.writer import ENCODER_BATCH
from tf_lightning.data.readers.captions import CaptionRows
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesCaptions


def scaled(folder: Path, factor: float) -> str:
    """The autoencoder of the shapes world with latents `factor` times as large."""
    path = shutil.copytree(SHAPES_FOLDER, folder / "autoencoder")
    config = json.loads((path / "config.json").read_text())
    config["latents_std"] = [std / factor for std in config["latents_std"]]
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def prepare(folder: Path, autoencoder: str, source=None, **options) -> Mixture:
    data = Mixture(
        {"captions": source or ShapesCaptions(50, 2)},
        **{"autoencoder": autoencoder, "row_length": 256, "vocab_size": 300},
        **{"cache_dir": str(folder / "data"), **options},
    )
    data.prepare_data()
    return data


def captioned(folder: Path) -> CaptionRows:
    """The image files of a folder with captions of the shapes world."""
    captions = [caption for caption, _ in ShapesCaptions(60, 2).documents("train")]
    files = sorted(folder.iterdir())
    rows = [{"file_name": f.name, "text": c} for f, c in zip(files, captions, strict=False)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return CaptionRows(str(folder / "metadata.jsonl"), image_size=64, val_fraction=0)


def stored(folder: Path) -> list[Path]:
    return [path for path in (folder / "data").glob("*") if path.is_dir()]


def test_mean_and_deviation_of_each_channel_are_recorded(tmp_path):
    corpus = prepare(tmp_path, "shapes", hflip=True).corpora["train"]["captions"]
    latents = torch.stack([corpus.document(i)[1] for i in range(len(corpus))])
    found = json.loads((corpus.path / "corpus.json").read_text())["latent_moments"]
    assert found["count"] == latents[:, 0].numel()
    torch.testing.assert_close(
        torch.tensor(found["mean"]), latents.mean((0, 2, 3)), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor(found["std"]), latents.std((0, 2, 3), correction=0), atol=1e-3, rtol=0
    )


def test_a_corpus_under_the_former_fingerprint_is_found_again(tmp_path, monkeypatch):
    """Fingerprints of version 0.1 ignored settings such as norm_num_groups."""
    with monkeypatch.context() as patch:
        patch.setattr(LatentAutoencoder, "fingerprint", LatentAutoencoder.old_fingerprint)
        before = prepare(tmp_path, "shapes").corpora["train"]["captions"]
    assert load_autoencoder("shapes").fingerprint != before.origin[3] == "42d4fac4acce56f6"
    assert prepare(tmp_path, "shapes").corpora["train"]["captions"].path == before.path
    assert len(stored(tmp_path)) == 2


@pytest.mark.parametrize("factor", [0.1, 10])
def test_an_autoencoder_of_another_scale_is_refused_and_nothing_is_stored(factor, tmp_path):
    with pytest.raises(UserError, match="multiply scaling_factor") as caught:
        prepare(tmp_path, scaled(tmp_path, factor))
    measured = float(str(caught.value).split("standard deviation ")[1].split(",")[0])
    assert measured == pytest.approx(0.95 * factor, rel=0.03)
    assert not stored(tmp_path)


def test_the_first_batch_of_images_is_enough_to_refuse(tmp_path):
    passes = []

    class Counted(ShapesCaptions):
        def documents(self, split):
            passes.append(0)
            for document in super().documents(split):
                passes[-1] += 1
                yield document

    with pytest.raises(UserError, match="of 64 images have standard deviation"):
        prepare(tmp_path, scaled(tmp_path, 0.1), Counted(200, 2))
    assert passes == [200, ENCODER_BATCH]  # the tokenizer's texts, then the preparation


def test_few_images_are_prepared_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="fewer than 48"):
        prepare(tmp_path, scaled(tmp_path, 0.1), ShapesCaptions(20, 2))
    assert len(stored(tmp_path)) == 2


def test_images_of_one_color_are_not_refused(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        image = Image.fromarray(np.full((64, 64, 3), 128 + number % 3, np.uint8))
        image.save(folder / f"{number}.png")
    prepare(tmp_path, "shapes", captioned(folder))


@pytest.mark.parametrize("moments", [False, True])
def test_infinite_latents_are_refused_by_image(moments, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):  # enough text for the tokenizer
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    with pytest.raises(UserError, match=r"the latents of image 0 \(.*images/0\.png\) reach .*e\+0"):
        prepare(tmp_path, scaled(tmp_path, 1e6), captioned(folder), sample_posterior=moments)
    assert not stored(tmp_path)


def test_an_autoencoder_without_posterior_cannot_be_sampled(tmp_path):
    with pytest.raises(UserError, match='autoencoder "pixels" has no posterior'):
        prepare(tmp_path, "pixels", sample_posterior=True, patch_size=16)
