"""Scores of a validation on the terminal: a table after `validate` and `test`, a line in `fit`."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from callbacks.monitor import check_monitors, check_train_monitors
from callbacks.protocol import MetricRecord
from tf_lightning.progress import write_line


class Score(NamedTuple):
    """The unit and the better direction of a score.

    Attributes:
        better: 1 if higher values are better, -1 if lower ones are, 0 if neither.
        unit: unit of the value.
        brief: it is part of the line that `fit` prints.
    """

    better: int
    unit: str = ""
    brief: bool = True


SCORES = {
    "fid": Score(-1),
    "rfid": Score(-1),
    "kid": Score(-1),
    "inception_score": Score(1),
    "clip_score": Score(1),
    "cider": Score(1),
    "bleu4": Score(1),
    "composition": Score(1, "share"),
    "psnr": Score(1, "dB"),
    "ssim": Score(1),
    "loss_l1": Score(-1, "of 2", brief=False),
    "code_use": Score(1, "share"),
    "code_perplexity": Score(1, "codes", brief=False),
    "dead_codes": Score(-1, "codes", brief=False),
    "loss_diffusion": Score(-1, "per element"),
    "loss_codes": Score(-1, "nats"),
    "loss_lm": Score(-1, "nats", brief=False),  # the logarithm of the perplexity
    "perplexity": Score(-1),
    "bits_per_byte": Score(-1, "bits", brief=False),
    "perplexity_unigram": Score(0, brief=False),
}
UNKNOWN = Score(0)
WIDEST = 1000  # limit of a table's width, in characters
COUNTS = ("num_generated", "num_pairs", "num_captions", "num_images", "num_tokens")
COLUMNS = {  # heading in the printed table: key in a protocol
    "prompts": "num_prompts",
    "weights": "weights",
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "sampler": "sampler",
}


class PrintScores(L.Callback):
    """Prints all scores of a validation once, each under its whole name.

    `validate` and `test` print a table with the unit, the better direction and the number of
    samples of each score. `fit` prints a line after each validation.
    """

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse a monitored score that this run does not have."""
        check_monitors(trainer, model, data)

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        """Refuse a monitored value of training that is missing after the first log."""
        if trainer.global_step == trainer.log_every_n_steps + 1:
            check_train_monitors(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores of an evaluation at the step of its weights.

        Lightning would log them at step 0, where TensorBoard hides the curves of the training.
        """
        if trainer.state.fn != "fit" and (step := getattr(pl_module, "loaded_step", 0)):
            pl_module.log("step", float(step - 1))  # the index of the last step, as in `fit`

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the scores on rank zero."""
        if trainer.sanity_checking:
            return
        records = all_records(trainer)
        if not records or not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit":
            write_line(f"Step {trainer.global_step:,}: {score_line(records)}")
        else:
            print_table(records)

    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end


def all_records(trainer: L.Trainer) -> list[MetricRecord]:
    """Return the records of all callbacks at this validation, and the losses of the module.

    A name with a label belongs to a callback. If its record is missing, the value that the trainer
    still has is an earlier validation's.
    """
    found = {r.name: r for callback in trainer.callbacks for r in getattr(callback, "records", ())}
    for name, value in trainer.callback_metrics.items():
        if name.startswith("val/") and name not in found and "[" not in name:
            found[name] = MetricRecord(name, float(value), {})
    return list(found.values())


def meaning(name: str) -> Score:
    """Return the meaning of the value of this name."""
    parts = name.split("@")[0].split("/")
    return next((SCORES[part] for p in parts if (part := p.split("[")[0]) in SCORES), UNKNOWN)


def num_samples(record: MetricRecord) -> int | None:
    """Return the number of images, captions or tokens that a value was computed from."""
    count: Any = next((record.protocol[key] for key in COUNTS if key in record.protocol), None)
    if isinstance(count, dict):  # a composition's images by task
        count = count.get(record.name.split("@")[0].rpartition("/")[2], sum(count.values()))
    return count


def arrow(score: Score) -> str:
    """Return an arrow in the better direction, or a word where the terminal has no arrows."""
    arrows, words = {1: "↑", -1: "↓", 0: ""}, {1: "higher", -1: "lower", 0: ""}
    try:
        "↑↓".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return words[score.better]
    return arrows[score.better]


def score_line(records: Sequence[MetricRecord]) -> str:
    """Join the main scores; a composition is its overall value."""
    brief = [r for r in records if meaning(r.name).brief]
    brief = [r for r in brief if "composition[" not in r.name or "/overall" in r.name]
    shown = [f"{r.name.removeprefix('val/')} {r.value:.4g} {arrow(meaning(r.name))}" for r in brief]
    return ", ".join(text.strip() for text in shown) or "no scores"


def print_table(records: Sequence[MetricRecord]) -> None:
    """Print a table of all values.

    A setting that varies between records has a column (in a sweep, the guidance scale). Settings
    that are equal for all records are printed once in the caption. No name is cut to the width of
    the terminal, because its label names the protocol.
    """
    settings = {
        heading: [str(record.protocol.get(key, "")) for record in records]
        for heading, key in COLUMNS.items()
    }
    values = {heading: {*column} - {""} for heading, column in settings.items()}
    varying = [heading for heading, found in values.items() if len(found) > 1]
    common = [f"{heading} {found.pop()}" for heading, found in values.items() if len(found) == 1]
    headings = ["metric", "value", "unit", "better", "samples", *varying]
    right = {"value", "samples"}
    columns = [Column(h, no_wrap=True, justify="right" if h in right else "left") for h in headings]
    table = Table(*columns, caption=escape(", ".join(common)))
    for row, record in enumerate(records):
        score, count = meaning(record.name), num_samples(record)
        facts = [score.unit, arrow(score), "" if count is None else f"{count:,}"]
        cells = [record.name, f"{record.value:.6g}", *facts]
        cells += [settings[heading][row] for heading in varying]
        table.add_row(*map(escape, cells))  # rich would take [shapes] for markup
    console = Console()
    whole = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    Console(width=max(console.width, whole)).print(table)
