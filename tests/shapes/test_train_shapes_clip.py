"""The CLIP of the shapes world: its training, its files, and its reported accuracy."""

import json

import numpy as np
import open_clip
import pytest
import torch

from callbacks.metrics import SHAPES_CLIP
from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import parse
from tf_lightning.shapes.train_clip import ALL_MEANINGS, different_meanings, main, measure, pairs


def test_a_batch_has_different_meanings_and_matching_captions():
    rng = np.random.default_rng(0)
    asked = different_meanings(200, rng)
    assert len(set(asked)) == 200
    assert 5 < sum(len(meaning.objects) == 1 for meaning in asked)
    images, words = pairs(asked, rng)
    assert [parse(text) for text in words] == asked
    assert images.shape == (200, 3, 64, 64) and images.min() >= -1 and images.max() <= 1


def test_the_shipped_model_is_small_and_reaches_its_reported_accuracy():
    weights = SHAPES_CLIP / "open_clip_model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    report = json.loads((SHAPES_CLIP / "report.json").read_text())
    assert "tf_lightning.shapes.train_clip" in report["command"]
    assert report["held_out"]["candidates"] == len(ALL_MEANINGS) == 630
    model = open_clip.create_model(f"local-dir:{SHAPES_CLIP}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{SHAPES_CLIP}")
    found = measure(model, tokenize, num_rounds=1, seed=0)
    for name in ("picture_to_caption", "caption_to_picture"):
        assert found[name] == pytest.approx(report["held_out"][name], abs=0.01)
        assert found[name] > 0.98


def test_training_writes_a_folder_that_open_clip_reads(tmp_path, capsys):
    out = tmp_path / "made" / "clip"
    main(["--out", str(out), "--steps", "4", "--batch-size", "8", "--rounds", "1"])
    model = open_clip.create_model(f"local-dir:{out}")
    assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    assert json.loads((out / "report.json").read_text())["held_out"]["num_images"] == 630
    assert [path.name for path in out.parent.iterdir()] == ["clip"]
    with pytest.raises(UserError, match="already exists"):
        main(["--out", str(out)])


def test_a_batch_with_more_pairs_than_meanings_is_refused(tmp_path):
    with pytest.raises(UserError, match="from 2 to 630"):
        main(["--out", str(tmp_path / "x"), "--batch-size", "631"])
