"""Mixture: shares of tokens, exact resume, and configurations that build it."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from support.sources import GreyImages, RepeatedWord
from tf_lightning.data import TextFiles
from tf_lightning.errors import UserError


class Reader(L.LightningModule):
    """Records the rows that it receives; learns nothing."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated, self.fails_at = [], [], fails_at

    def training_step(self, batch, batch_index):
        if self.fails_at == self.global_step:
            raise KeyError("the machine is gone")
        # Noise is a function of (seed, row), so it identifies the rows.
        self.seen.append((batch.input_ids, batch.noise.sum().item(), batch.t.sum().item()))
        return 0 * self.weight.sum()

    def validation_step(self, batch, batch_index, dataloader_idx=0):
        self.validated.append((dataloader_idx, batch.source_ids, batch.row_tokens))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(folder, **arguments) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(**(settings | arguments))


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, second, strict=True)
    )


def test_batches_are_packed_rows_with_their_sources(mixture):
    data = mixture(weights={"words": 1, "pictures": 1})
    data.prepare_data()
    data.setup()
    assert data.source_names == ["words", "pictures"]
    assert data.image_shape == (3, 8, 8)
    for batch, _ in zip(data.train_dataloader(), range(20), strict=False):
        assert batch.input_ids.shape == (3, 64)
        has_image = (batch.image_ids >= 0).any(1)
        assert torch.equal(has_image, batch.source_ids == 1)


def test_token_shares_are_the_weights(mixture):
    sources = {
        "short": RepeatedWord("red", 2),
        "long": RepeatedWord("blue", 20),
        "pictures": GreyImages(),
    }
    data = mixture(sources, {"short": 2, "long": 5, "pictures": 3}, batch_size=50)
    data.setup()
    tokens = np.zeros(3)
    for batch, _ in zip(data.train_dataloader(), range(40), strict=False):
        np.add.at(tokens, batch.source_ids.numpy(), batch.row_tokens.numpy())
    assert tokens / tokens.sum() == pytest.approx([0.2, 0.5, 0.3], abs=0.01)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_weights_of_documents_are_shares_of_documents_of_any_length(mixture, drop):
    sources = {"pictures": GreyImages(), "chat": RepeatedWord("blue", 40)}
    weights = {"pictures": 9, "chat": 1}
    data = mixture(
        sources, weights, weights_count="documents", batch_size=50, caption_drop_prob=drop
    )
    data.setup()
    documents = np.zeros(2)
    for batch, _ in zip(data.train_dataloader(), range(60), strict=False):
        count = batch.document_ids.amax(1).add(1).numpy()
        np.add.at(documents, batch.source_ids.numpy(), count)
    assert documents / documents.sum() == pytest.approx([0.9, 0.1], abs=0.01)


def test_an_unknown_weights_count_is_refused(mixture):
    with pytest.raises(UserError, match="weights_count='words' must be 'tokens' or 'documents'"):
        mixture(weights_count="words")


def test_a_time_token_takes_a_position_and_has_its_own_corpus(mixture):
    plain, token = mixture(), mixture(time_token=True)
    plain.setup(), token.setup()
    names = [data.corpora["train"]["pictures"].name for data in (plain, token)]
    assert names[0] != names[1]
    batch = next(iter(token.val_dataloader()[1]))
    lengths = batch.image_ids.flatten()[batch.image_ids.flatten() >= 0].bincount()
    assert set(lengths.tolist()) == {5}  # 4 patches and the time token
    assert len(batch.patch_index) == 5 * batch.num_images


def test_without_weights_every_document_is_seen_equally_often(mixture):
    data = mixture({"few": RepeatedWord("red", 20, 50), "many": RepeatedWord("blue", 2, 2000)})
    data.setup()
    rows = data.train_dataloader().dataset
    per_epoch = [corpus.rows_per_epoch for corpus in rows.corpora]
    shares = rows.counts / rows.counts.sum()
    assert shares == pytest.approx(np.array(per_epoch) / sum(per_epoch), abs=1e-3)


def test_a_source_of_weight_0_is_only_validated_on(mixture):
    data = mixture(weights={"words": 1, "pictures": 0})
    data.setup()
    for batch, _ in zip(data.train_dataloader(), range(20), strict=False):
        assert batch.source_ids.max() == 0
    assert [len(loader) > 0 for loader in data.val_dataloader()] == [True, True]


def test_validation_has_each_document_once_in_the_order_of_the_sources(mixture):
    data = mixture(
        sources={"pictures": GreyImages(num_val=30), "words": RepeatedWord("red", 5, num_val=40)}
    )
    data.setup()
    texts, images = data.val_dataloader()[1], data.val_dataloader()[0]
    assert sum(batch.num_images for batch in images) == 30
    found = [int(batch.document_ids.amax(1).add(1).sum()) for batch in texts]
    assert sum(found) == 40
    assert all((batch.source_ids == 1).all() for batch in texts)


def test_lightning_validates_if_one_source_has_no_held_out_documents(mixture, tmp_path):
    sources = {"none": RepeatedWord("red", 5, num_val=0), "some": RepeatedWord("blue", 5)}
    module = Reader()
    trainer(tmp_path, limit_val_batches=1.0).validate(module, mixture(sources), verbose=False)
    assert {index for index, _, _ in module.validated} == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_reproduces_the_uninterrupted_run(mixture, tmp_path, num_workers, accumulate):
    arguments = {"accumulate_grad_batches": accumulate}
    whole, first, second = Reader(), Reader(), Reader()
    trainer(tmp_path, max_steps=6, **arguments).fit(whole, mixture(num_workers=num_workers))
    interrupted = trainer(tmp_path, max_steps=3, **arguments)
    interrupted.fit(first, mixture(num_workers=num_workers))
    interrupted.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(tmp_path, max_steps=6, **arguments)
    resumed.fit(second, mixture(num_workers=num_workers), ckpt_path=tmp_path / "last.ckpt")
    assert len(whole.seen) == 6 * accumulate
    assert same(first.seen + second.seen, whole.seen)
    assert not same(whole.seen[:3], whole.seen[3:6])


def test_resume_after_a_crash_continues_from_the_last_checkpoint(mixture, tmp_path):
    whole, crashing, second = Reader(), Reader(fails_at=4), Reader()
    trainer(tmp_path, max_steps=6).fit(whole, mixture())
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    with pytest.raises(KeyError):
        trainer(tmp_path, max_steps=6, callbacks=[saver], enable_checkpointing=True).fit(
            crashing, mixture()
        )
    resumed = trainer(tmp_path, max_steps=6)
    resumed.fit(second, mixture(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 6
    assert same(crashing.seen[:3] + second.seen, whole.seen)


def test_epochs_cut_short_do_not_repeat_rows(mixture, tmp_path):
    whole, cut = Reader(), Reader()
    trainer(tmp_path, max_steps=6).fit(whole, mixture())
    trainer(tmp_path, max_steps=6, limit_train_batches=2).fit(cut, mixture())
    assert same(cut.seen, whole.seen)


def test_a_checkpoint_resumes_with_another_batch_size(mixture, tmp_path):
    data, other = mixture(), mixture(batch_size=5)
    first = trainer(tmp_path, max_steps=4)
    first.fit(Reader(), data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert data.state_dict() == {"next_row": 4 * 3, "global_step": 4, "seed": 0}
    trainer(tmp_path, max_steps=6).fit(Reader(), other, ckpt_path=tmp_path / "last.ckpt")
    assert other.state_dict() == {"next_row": 4 * 3 + 2 * 5, "global_step": 6, "seed": 0}


def test_the_loader_is_as_long_as_the_run(mixture, tmp_path):
    data = mixture()
    trainer(tmp_path, max_steps=6, accumulate_grad_batches=2).fit(Reader(), data)
    assert len(data.train_dataloader()) == 12


def test_preparing_happens_once(mixture, monkeypatch):
    mixture().prepare_data()
    monkeypatch.setattr(RepeatedWord, "documents", None)
    monkeypatch.setattr(GreyImages, "documents", None)
    data = mixture()
    data.setup()
    assert len(data.corpora["train"]["words"]) == 300


def test_a_given_tokenizer_is_used(mixture, tmp_path):
    data = mixture()
    data.setup()
    (tmp_path / "mine.model").write_bytes(data.tokenizer.proto)
    other = mixture({"other": RepeatedWord("green", 3)}, tokenizer=str(tmp_path / "mine.model"))
    other.setup()
    assert other.tokenizer.proto == data.tokenizer.proto


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"words": 1}, "weights are given for .* give one for each"),
        ({"words": 1, "pictures": -1}, "weights=.* must be at least 0, each"),
        ({"words": 0, "pictures": 0}, "give one of them a positive number"),
    ],
)
def test_invalid_weights_are_a_user_error(mixture, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        mixture(weights=weights)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"weights_count": "documents"}, "weights_count=documents is the unit of weights, but"),
        ({"autoencoder": None, "hflip": True}, "hflip changes images, but without an autoencoder"),
        ({"autoencoder": None, "crops": 2}, "crops changes images, but without an autoencoder"),
        ({"autoencoder": None, "sample_posterior": True}, "sample_posterior changes images, but"),
    ],
)
def test_options_without_effect_are_refused(mixture, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        mixture(weights=None, **changed)


def test_noise_levels_follow_the_options_in_training_and_are_uniform_in_validation(mixture):
    kinds = {
        "uniform": {},
        "other": {"timestep_distribution": "logit_normal", "timestep_shift": 3.0},
    }
    times = {"uniform": [], "other": []}
    for name, changed in kinds.items():
        data = mixture(**changed, max_caption_t=1.0)
        data.setup()
        loaders = [data.train_dataloader(), data.val_dataloader()[1]]
        times[name] = [next(b.t for b in loader if b.num_images) for loader in loaders]
    expected = (torch.special.ndtri(times["uniform"][0]) + np.log(3)).sigmoid()
    torch.testing.assert_close(times["other"][0], expected)
    assert torch.equal(times["other"][1], times["uniform"][1])


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"timestep_shift": 0.0}, "timestep_shift=0.0 must be above 0"),
        ({"timestep_distribution": "normal"}, "'normal' must be 'uniform' or 'logit_normal'"),
    ],
)
def test_invalid_noise_level_options_are_a_user_error(mixture, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        mixture(**changed)


@pytest.mark.parametrize("name", ["image_first_prob", "caption_drop_prob", "max_caption_t"])
def test_probabilities_outside_0_and_1_are_a_user_error(mixture, name):
    with pytest.raises(UserError, match=f"{name}=1.5 must be .*1$"):
        mixture(**{name: 1.5})


def test_sources_may_have_images_of_different_sizes(mixture):
    """The rows of each source equal those of a mixture of this source alone."""
    sources = {"small": GreyImages(8), "large": GreyImages(16, 200)}
    data = mixture(sources, {"small": 1, "large": 1}, batch_size=8)
    data.setup()
    assert data.image_shapes == [(3, 8, 8), (3, 16, 16)] and data.image_shape == (3, 16, 16)
    for number, name in enumerate(sources):
        alone = mixture({name: sources[name]}, tokenizer=tokenizer_of(data))
        alone.setup()
        stream = data._rows(data.corpora["train"][name])
        expected = alone._rows(alone.corpora["train"][name])
        assert stream.rows_per_epoch == expected.rows_per_epoch
        assert stream.num_tokens == expected.num_tokens
        assert data.num_patches(stream.corpus) == [4, 16][number]
    batch = next(iter(data.train_dataloader()))
    assert [bucket[2:] for bucket in batch.buckets] == [(8, 8), (16, 16)]
    per_image = batch.image_ids[batch.image_ids >= 0].bincount().tolist()
    assert per_image == [4] * batch.buckets[0].num_images + [16] * batch.buckets[1].num_images


def tokenizer_of(data) -> str:
    """Return the file of a mixture's tokenizer."""
    path = data.cache_dir / "given.model"
    path.write_bytes(data.tokenizer.proto)
    return str(path)


def test_a_config_builds_a_mixture(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 400)
    config = {
        "class_path": "tf_lightning.data.Mixture",
        "init_args": {
            "sources": {
                "text": {
                    "class_path": "tf_lightning.data.TextFiles",
                    "init_args": {"paths": f"{tmp_path}/*.txt", "val_fraction": 0.0},
                },
                "shapes": {
                    "class_path": "tf_lightning.shapes.sources.ShapesCaptions",
                    "init_args": {"num_documents": 20, "num_val": 5},
                },
            },
            "weights": {"text": 0.25, "shapes": 0.75},
            "autoencoder": "pixels",
            "patch_size": 16,
            "vocab_size": 300,
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    data = from_config(config)
    data.prepare_data()
    assert isinstance(data.sources["text"], TextFiles)
    assert len(data.corpora["train"]["shapes"]) == 20


@pytest.mark.parametrize("kind", ["TextData", "ImageCaptionData", "InterleavedData"])
def test_a_config_builds_each_data_module(kind):
    arguments = {"paths": ["a", "b"], "row_length": 128, "cache_dir": "elsewhere"}
    data = from_config({"class_path": f"tf_lightning.data.{kind}", "init_args": arguments})
    assert (data.row_length, data.batch_size, str(data.cache_dir)) == (128, 8, "elsewhere")
    (source,) = data.sources.values()
    assert source.paths == ["a", "b"]


def from_config(config: dict) -> L.LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    return parser.instantiate(parser.parse_args([f"--data={json.dumps(config)}"])).data
