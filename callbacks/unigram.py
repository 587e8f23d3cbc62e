"""Perplexity of a model that knows only the frequency of each token: a baseline for training."""

import lightning as L
import numpy as np
import torch

from callbacks.sampling import check_module
from tf_lightning.batch import unmasked_ids
from tf_lightning.data.corpus.reader import Corpus


class UnigramBaseline(L.Callback):
    """Logs `val/<source>/perplexity_unigram` beside `val/<source>/perplexity`, for text sources.

    The token frequencies are those of the training split, with one added to each count so that no
    token is impossible. They are evaluated on the tokens that `val/<source>/perplexity` counts: all
    tokens of a validation document except the first, and its end.
    """

    def score_names(self, data: L.LightningDataModule) -> list[str]:
        """Return the names of the values that this callback logs."""
        return [f"val/{source}/perplexity_unigram" for source in data.source_names]

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse a model without text."""
        check_module(model, self)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compute the perplexities once."""
        data = trainer.datamodule
        self.perplexity = {
            name: unigram_perplexity(
                data.corpora["train"][name],
                data.corpora["val"][name],
                vocab_size=data.tokenizer.vocab_size,
                eos_id=data.tokenizer.eos_id,
            )
            for name in data.source_names
            if data.corpora["train"][name].image_shape is None and len(data.corpora["val"][name])
        }

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the perplexity of each source."""
        for name, value in self.perplexity.items():
            pl_module.log(f"val/{name}/perplexity_unigram", value, add_dataloader_idx=False)


def unigram_perplexity(train: Corpus, val: Corpus, *, vocab_size: int, eos_id: int) -> float:
    """Compute exp(cross-entropy) of the tokens of `val` under the frequencies of `train`."""
    counts = token_counts(train, vocab_size, eos_id, first=True) + 1
    scored = token_counts(val, vocab_size, eos_id, first=False)
    log_probs = np.log(counts / counts.sum())
    return float(np.exp(-(scored @ log_probs) / scored.sum()))


def token_counts(corpus: Corpus, vocab_size: int, eos_id: int, *, first: bool) -> np.ndarray:
    """Count each token over the documents and their ends, (vocab_size,).

    Args:
        corpus: the documents.
        vocab_size: number of tokens.
        eos_id: token of a document's end.
        first: count also the first token of each document.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for index in range(len(corpus)):
        tokens = unmasked_ids(torch.cat(corpus.document(index)))
        counts += torch.bincount(tokens if first else tokens[1:], minlength=vocab_size)
    counts[eos_id] += len(corpus)
    return counts.numpy().astype(np.float64)
