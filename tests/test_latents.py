"""Latents kept with their spread and mirrored: sampled in training, the mode in validation."""

import numpy as np
import pytest
import torch

from tf_lightning.autoencoder import load_autoencoder
from tf_lightning.data import Mixture
from tf_lightning.data.shapes_sources import ShapesCaptions

SEED = 3


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")

    def build_here(**options) -> Mixture:
        sources = {"captions": ShapesCaptions(12, 4)}
        data = Mixture(
            sources, autoencoder="shapes", row_length=256, batch_size=4, vocab_size=300, seed=SEED,
            cache_dir=str(folder), image_first_prob=0, caption_drop_prob=0, **options,
        )  # fmt: skip
        data.setup()
        return data

    return build_here


def pictures(split: str) -> torch.Tensor:
    """(n, 3, 64, 64) in [-1, 1]."""
    found = [np.asarray(picture) for _, picture in ShapesCaptions(12, 4).documents(split)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_moments_are_those_of_diffusers(build):
    autoencoder, images = load_autoencoder("shapes"), pictures("train")[:3]
    posterior = autoencoder.model.encode(images).latent_dist
    mean, std = autoencoder.moments(images).unbind(1)
    torch.testing.assert_close(mean, autoencoder.encode(images))
    torch.testing.assert_close(mean * autoencoder.std + autoencoder.mean, posterior.mean)
    torch.testing.assert_close(std * autoencoder.std, posterior.std)


def test_training_samples_the_posterior_and_validation_takes_its_mode(build):
    data = build(sample_posterior=True)
    corpus = data.corpora["train"]["captions"]
    mean, std = load_autoencoder("shapes").moments(pictures("train")).unbind(1)
    draws = [corpus.document(5, np.random.default_rng(n))[1] for n in range(400)]
    scores = (torch.stack(draws) - mean[5]) / std[5].clamp(min=1e-6)
    clear = std[5] > 1e-2  # where fp16 of the mean does not weigh
    if clear.any():
        assert scores[:, clear].mean().abs() < 0.05
        assert scores[:, clear].std() == pytest.approx(1, abs=0.05)
    spread = torch.stack(draws).std(0)
    torch.testing.assert_close(spread, std[5], rtol=0.25, atol=2e-3)
    torch.testing.assert_close(corpus.document(5)[1], mean[5], rtol=2e-3, atol=2e-3)
    modes = torch.cat([batch.latents for batch in data.val_dataloader()[0]])
    expected = load_autoencoder("shapes").encode(pictures("val"))
    torch.testing.assert_close(modes.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0],
                               rtol=1e-2, atol=0.3)  # fmt: skip


def test_half_of_the_documents_are_mirrored(build):
    corpus = build(mirror=True).corpora["train"]["captions"]
    images, encode = pictures("train"), load_autoencoder("shapes").encode
    plain, mirrored = encode(images)[2], encode(images.flip(-1))[2]
    assert (plain - mirrored).abs().max() > 0.5
    found = []
    for n in range(200):
        latents = corpus.document(2, np.random.default_rng(n))[1]
        found.append(torch.allclose(latents, mirrored, rtol=2e-3, atol=2e-3))
        assert found[-1] or torch.allclose(latents, plain, rtol=2e-3, atol=2e-3)
    assert 70 < sum(found) < 130


def test_samples_belong_to_the_row_and_differ_between_epochs(build):
    rows, again = (build(sample_posterior=True, mirror=True).train_dataloader().dataset
                   for _ in range(2))  # fmt: skip
    latents = lambda r, n: torch.stack([d[1] for d in r[n][1]])  # noqa: E731
    assert torch.equal(latents(rows, 7), latents(again, 7))
    (corpus,) = rows.corpora
    seen = [d[1] for n in range(3 * corpus.rows_per_epoch) for d in corpus.row(n)]
    assert len({x.numpy().tobytes() for x in seen}) == 3 * 12


def test_what_is_kept_names_the_corpus_and_the_default_is_as_it_was(build):
    paths = [
        build(**options).corpora["train"]["captions"].path
        for options in ({}, {"mirror": True}, {"sample_posterior": True})
    ]
    assert len(set(paths)) == 3
