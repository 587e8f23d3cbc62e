"""Training reads a matching encoded folder; other folders are refused in one sentence."""

import json
import pickle
import shutil
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch

from support.prepare_runs import encode
from support.sources import ShardedNoise
from tf_lightning.autoencoder.frozen import SHAPES_FOLDER, load_autoencoder
from tf_lightning.data import Mixture
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("encoded") / "run")


@pytest.fixture
def build(folder, tmp_path):
    """Build a Mixture that reads the folder."""

    def build_here(image_size: int = 64, **changed) -> Mixture:
        arguments = {
            "autoencoder": "shapes",
            "patch_size": 2,
            "row_length": 64,
            "vocab_size": 300,
            "encoded": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            "caption_drop_prob": 0.0,
            "image_first_prob": 0.0,
        }
        data = Mixture({"noise": ShardedNoise(image_size=image_size)}, **(arguments | changed))
        data.setup()
        return data

    return build_here


def test_batches_equal_those_of_a_corpus_in_cache_dir_to_the_last_bit(build, tmp_path):
    read, made = build(), build(encoded=None)
    assert read.tokenizer.proto == made.tokenizer.proto
    batches = zip(read.train_dataloader(), made.train_dataloader(), strict=False)
    for a, b in islice(batches, 6):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.input_ids, b.input_ids)
        assert a.num_images and torch.equal(a.noise, b.noise)
    (a,), (b,) = (list(data.val_dataloader()[0]) for data in (read, made))
    assert torch.equal(a.latents, b.latents) and a.num_images == 3


def test_training_samples_the_posterior_or_takes_the_mode_as_configured(build):
    plain, sampled = build(), build(sample_posterior=True)
    images = torch.from_numpy(np.array(ShardedNoise().image("train", 5))).permute(2, 0, 1)
    mean, std = load_autoencoder("shapes").moments(images[None].float() / 127.5 - 1)[0]
    document = lambda data, n: data.corpora["train"]["noise"].document(  # noqa: E731
        5, np.random.default_rng(n)
    )[1]
    torch.testing.assert_close(document(plain, 0), mean, rtol=1e-3, atol=1e-4)
    draws = torch.stack([document(sampled, n) for n in range(400)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=float(std.max()) * 0.3 + 1e-3)
    torch.testing.assert_close(draws.std(0), std, rtol=0.25, atol=2e-3)


def test_a_folder_with_the_former_fingerprint_of_its_autoencoder_is_read(build, tmp_path, folder):
    """Fingerprints of version 0.1 ignored settings such as norm_num_groups."""
    copy = shutil.copytree(folder, tmp_path / "old")
    for file in copy.glob("*/corpus.json"):
        facts = json.loads(file.read_text())
        facts["made_from"][3] = load_autoencoder("shapes").old_fingerprint
        file.write_text(json.dumps(facts))
    assert build(encoded=str(copy)).corpora["train"]


@pytest.mark.parametrize(
    ("ids", "refused"),
    [([], False), (["elsewhere/1.png"], False), (["noise:train:2"], True)],
)
def test_a_filter_list_without_documents_of_the_folder_is_accepted(build, tmp_path, ids, refused):
    (tmp_path / "exclude.txt").write_text("\n".join(ids))
    expected = pytest.raises(UserError, match="encoded without the documents of .* left out")
    with expected if refused else nullcontext():
        build(exclude=str(tmp_path / "exclude.txt"))


def test_pickling_keeps_sample_posterior(build):
    for choice in (False, True):
        corpus = build(sample_posterior=choice).corpora["train"]["noise"]
        assert pickle.loads(pickle.dumps(corpus)).sample_posterior is choice


def other_scaling(tmp_path) -> str:
    """Copy the autoencoder with another scaling factor."""
    copy = tmp_path / "other"
    shutil.copytree(SHAPES_FOLDER, copy)
    config = json.loads((copy / "config.json").read_text())
    config["latents_std"][3] *= 1.01
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"autoencoder": other_scaling}, "an autoencoder of fingerprint [0-9a-f]+, but the data"),
        (
            {"image_size": 128},
            "image_size 64, but the data has 128; give the data the same",
        ),
        ({"hflip": True}, "hflip False, but the data has True; .* or encode into another folder"),
        ({"patch_size": 4}, "patch_size 2, but the data has 4"),
        ({"row_length": 48}, "row_length 64, but the data has 48"),
        ({"time_token": True}, "time_token False, but the data has True"),
        ({"tokenizer": "other.model"}, "a tokenizer of fingerprint .*, but the data has"),
        (
            {"encoded": "nowhere"},
            "nowhere holds no encoded corpora; run .*--data.encoded nowhere`",
        ),
    ],
)
def test_a_folder_of_other_settings_is_refused(build, tmp_path, changed, sentence):
    if "tokenizer" in changed:
        path = tmp_path / "other.model"
        train_tokenizer(iter(["quite other words"]), path, 300)
        changed = {"tokenizer": str(path)}
    changed = {key: v(tmp_path) if callable(v) else v for key, v in changed.items()}
    with pytest.raises(UserError, match=sentence) as error:
        build(**changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()  # no other corpus is prepared instead


def test_a_longer_row_length_is_accepted(build):
    assert build(row_length=128).corpora["train"]["noise"].num_images == 14


def test_sample_posterior_needs_stored_moments(build, tmp_path):
    build(encoded=None)
    cache = tmp_path / "cache"
    next(cache.glob("tokenizer-*.model")).rename(cache / "tokenizer.model")
    with pytest.raises(UserError, match="sample_posterior False, but the data has True"):
        build(encoded=str(cache), sample_posterior=True)


def test_an_incomplete_folder_is_refused(build, folder, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    next(part.glob("noise-val-*")).rename(part / "x")
    with pytest.raises(UserError, match="holds 0 corpora of noise val instead of one; run"):
        build(encoded=str(part))
