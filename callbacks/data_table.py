"""A table of the data's sources at the start of a run: sizes, skipped samples, shares, epochs."""

import lightning as L
import numpy as np

from callbacks.media import log_table
from callbacks.results import is_trial, run_folder
from tf_lightning.data.corpus.prepare import format_reasons
from tf_lightning.data.mixture import Mixture

COLUMNS = (
    "source", "training documents", "held-out documents", "images", "text tokens",
    "mean tokens of a text", "skipped", "padding", "share of tokens", "epochs in this run",
)  # fmt: skip


class DataTable(L.Callback):
    """Logs a table of the data's sources when a run starts, under `data`; not when it resumes.

    It has a row for each source: documents, images, text tokens, mean length of a text, skipped
    samples with reasons, the share of padding in its rows, the share of the tokens that the source
    gets, and how often the run reads it in all. Counts are of training data unless the heading says
    otherwise. The number of epochs is unknown if only a time limits the run. Loggers that take no
    texts, such as CSV, leave it to the file `media/data-step<N>.md`.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the table on rank zero."""
        data = trainer.datamodule
        if trainer.global_step or is_trial(trainer) or not isinstance(data, Mixture):
            return
        folder = run_folder(trainer)  # on every rank
        if trainer.is_global_zero:
            rows = source_rows(data, trainer.max_steps)
            log_table(trainer, folder, trainer.global_step, "data", COLUMNS, rows)


def source_rows(data: Mixture, max_steps: int) -> list[list[str]]:
    """Return the rows of the table, one for each source.

    Args:
        data: the data, whose training loader was made.
        max_steps: optimizer steps of the whole run; negative: unknown.
    """
    streams = data.rows
    fill = np.array([corpus.fill for corpus in streams.corpora])
    tokens = streams.counts * fill
    epochs = ["unknown"] * len(tokens)
    if max_steps >= 0:
        epochs = [f"{count:,.2f}" for count in streams.epochs(max_steps * data.rows_per_step())]
    columns = data.source_names, 1 - fill, tokens / tokens.sum(), epochs
    return [
        [name, *source_cells(data, name), f"{padding:.1%}", f"{share:.1%}", count]
        for name, padding, share, count in zip(*columns, strict=True)
    ]


def source_cells(data: Mixture, name: str) -> list[str]:
    """Return the cells of a source that do not depend on the other sources."""
    train, val = (data.corpora[split][name] for split in ("train", "val"))
    mean = f"{train.num_tokens / train.num_texts:,.1f}" if train.num_texts else ""
    counts = [len(train), len(val), train.num_images, train.num_tokens]
    skipped = format_reasons(train.skipped) or "0"
    return [*(f"{count:,}" for count in counts), mean, skipped]
