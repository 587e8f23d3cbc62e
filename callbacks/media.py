"""Values, images, texts and tables of a run, for its loggers and as files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tf_lightning.files import atomic_file


def log_values(trainer: L.Trainer, step: int, values: Mapping[str, float]) -> None:
    """Give values to all loggers, also from hooks in which `self.log` is not allowed.

    Args:
        trainer: trainer of the run.
        step: optimizer steps of the weights; see `results.weights_step`.
        values: the values by name, such as "val/retrieval_accuracy[edits]".
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=last_index(step))


def log_image(trainer: L.Trainer, folder: Path, step: int, tag: str, image: Image.Image) -> None:
    """Give an image to all loggers, and write it to `folder`/media/<tag>-step<N>.png.

    Call it on rank zero.

    Args:
        trainer: trainer of the run.
        folder: folder for the file.
        step: optimizer steps of the weights; see `results.weights_step`.
        tag: name of the image, such as "generated/val".
        image: RGB image.
    """
    for logger in trainer.loggers:
        give_image(logger, tag, image, step)
    with atomic_file(media_file(folder, tag, step, ".png")) as file:
        image.save(file, format="PNG")


def log_table(
    trainer: L.Trainer,
    folder: Path,
    step: int,
    tag: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    """Give a table of texts to all loggers; write it as Markdown if none takes it.

    Args:
        trainer: trainer of the run.
        folder: folder for the file.
        step: optimizer steps of the weights; see `results.weights_step`.
        tag: name of the table, such as "captions/val".
        columns: the headings.
        rows: the cells.
    """
    if not any([give_table(logger, tag, columns, rows, step) for logger in trainer.loggers]):
        with atomic_file(media_file(folder, tag, step, ".md")) as file:
            file.write_text(markdown_table(columns, rows) + "\n", encoding="utf-8")


def give_image(logger: Logger, tag: str, image: Image.Image, step: int) -> None:
    """Log an image, if the logger takes images.

    The loggers are known by their methods, because their packages need not be installed.
    """
    experiment, last = logger.experiment, last_index(step)
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(tag, [image], step=last)
    elif hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(tag, pil_to_tensor(image), last)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, image, artifact_file=f"{file_name(tag, step)}.png")
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(image, name=tag, step=last)


def give_table(
    logger: Logger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> bool:
    """Log a table of texts; return whether the logger takes texts."""
    experiment, last = logger.experiment, last_index(step)
    if hasattr(logger, "log_table"):
        logger.log_table(tag, columns=list(columns), data=[list(row) for row in rows], step=last)
    elif hasattr(experiment, "add_text"):
        experiment.add_text(tag, markdown_table(columns, rows), last)
    elif hasattr(experiment, "log_text"):
        text = markdown_table(columns, rows)
        if hasattr(logger, "run_id"):
            experiment.log_text(logger.run_id, text, artifact_file=f"{file_name(tag, step)}.md")
        else:
            experiment.log_text(text, step=last, metadata={"name": tag})
    else:
        return False
    return True


def last_index(step: int) -> int:
    """Return the index of the last of some optimizer steps, from 0: the step of the scores.

    Lightning logs every value at this index, so images and scores of one validation are together.
    """
    return max(step - 1, 0)


def media_file(folder: Path, tag: str, step: int, suffix: str) -> Path:
    """Return the file of an image or a table; its folder is created."""
    path = folder / "media" / f"{file_name(tag, step)}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def file_name(tag: str, step: int) -> str:
    """Return a file name, such as generated-val-step0000900."""
    plain = re.sub(r"[^\w.@-]+", "-", tag)
    return f"{plain}-step{step:07d}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; characters with a meaning in Markdown or HTML are escaped."""
    lines = [
        columns,
        ["---"] * len(columns),
        *([escape(str(cell)) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape(text: str) -> str:
    """Escape a text for a cell of a Markdown table; line breaks become <br>."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    return "<br>".join(text.splitlines())
