"""Output of `tf-lightning predict`: captions of validation images, or images of their captions.

Any number of ranks may write. A run that was stopped continues, also with another number of ranks.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from callbacks.results import numbered, run_folder
from callbacks.sampling import check_draws, check_module, resolve_sampling
from tf_lightning.batch import Document
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.ranges import NonNegativeInt, check_arguments


class PredictionWriter(BasePredictionWriter):
    """Writes a line to `predict/<output_modality>-<rank>.jsonl` for each captioned image.

    With "text", it generates a caption for the image; the line has it beside the document's own
    caption. With "image", it generates an image for the caption and writes it to `predict/images/`.
    Documents that any rank has answered before with the same checkpoint and options are skipped;
    another checkpoint or other options get a folder of their own: `predict-2`, and so on.

    Args:
        output_modality: "text" for captions, "image" for images.
        sampling: how they are sampled.
        seed: seed of the samples, together with the content of each document.
    """

    def __init__(
        self,
        output_modality: Literal["text", "image"] = "text",
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: NonNegativeInt = 0,
    ):
        check_arguments(PredictionWriter.__init__, locals())
        super().__init__(write_interval="batch")
        self.output_modality, self.sampling, self.seed = output_modality, sampling, seed

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check the options before data is prepared.

        Raises:
            UserError: an option does not fit the model, or the model has no images.
        """
        check_module(model, self)
        if self.output_modality == "image":
            check_draws(data, self, "set prediction_writer.output_modality to text")
            self.sampling = resolve_sampling(self.sampling, model)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        self.before_run(trainer, pl_module, trainer.datamodule)
        if stage == "predict":
            check_draws(trainer.datamodule, self, "give predict other data")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder of this checkpoint and these options, and the lines that it holds."""
        self.pipe = TransfusionPipeline.from_module(pl_module)
        folder = run_folder(trainer)  # on every rank
        checkpoint = Path(trainer.ckpt_path)
        used = self.sampling.used(self.output_modality, bool(pl_module.hparams["num_codes"]))
        settings = (str(checkpoint), checkpoint.stat().st_mtime_ns, used, self.seed)
        self.run = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        mine = (
            path for path in numbered(folder) if runs_in(path, self.output_modality) <= {self.run}
        )
        self.folder = trainer.strategy.broadcast(next(mine))
        self.folder.mkdir(exist_ok=True)
        self.path = self.folder / f"{self.output_modality}-{trainer.global_rank}.jsonl"
        kept = read_lines(self.path) if self.path.exists() else []  # without an incomplete line
        with atomic_file(self.path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        files = self.folder.glob(f"{self.output_modality}-*.jsonl")
        self.done = {line["key"] for file in files for line in read_lines(file)}
        self.num_found = len(self.done)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[Document],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Answer the captioned images of a batch and append one line for each."""
        pairs = [sorted(document, key=lambda part: part.ndim) for document in prediction]
        pairs = [pair for pair in pairs if [part.ndim for part in pair] == [1, 3]]
        missing = {key: pair for pair in pairs if (key := document_key(pair)) not in self.done}
        captions, images = zip(*missing.values(), strict=True) if missing else ((), ())
        if self.output_modality == "text":
            answers = self.generate(images, missing).texts
        else:
            generated = self.generate(captions, missing).images
            answers = [self._save_image(key, i) for key, i in zip(missing, generated, strict=True)]
        with self.path.open("a") as file:
            for key, caption, answer in zip(missing, captions, answers, strict=True):
                own = self.pipe.model.tokenizer.decode(caption.tolist()).strip()
                line = {"key": key, "run": self.run, "caption": own, "answer": answer}
                file.write(json.dumps(line) + "\n")
        self.done |= missing.keys()

    def generate(self, prompts: Sequence[Tensor], keys: Iterable[str]) -> GenerationOutput:
        """Answer prompts of one part each, with a seed from each document's key."""
        return self.pipe(
            [[prompt] for prompt in prompts],
            output_modality=self.output_modality,
            seed=[self.seed + int(key[:8], 16) for key in keys],
            batch_size=max(len(prompts), 1),
            progress=False,
            sampling=self.sampling,
        )

    def _save_image(self, key: str, image: Image.Image) -> str:
        """Write an image; return its path relative to the folder."""
        (self.folder / "images").mkdir(exist_ok=True)
        with atomic_file(self.folder / "images" / f"{key}.png") as file:
            image.save(file, format="PNG")
        return f"images/{key}.png"

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the file and the number of lines."""
        new = len(self.done) - self.num_found
        lines = f"{new:,} line" + "s" * (new != 1)
        found = f"; {self.num_found:,} were already there" if self.num_found else ""
        rank_zero_info(f"Wrote {lines} to {self.path}{found}")


def document_key(document: Document) -> str:
    """Return 16 hexadecimal digits that identify a document by its content."""
    sha = hashlib.sha256()
    for part in document:
        sha.update(part.cpu().to(torch.float64).numpy().tobytes())
    return sha.hexdigest()[:16]


def runs_in(folder: Path, output_modality: str) -> set[str]:
    """Return the runs whose lines are in a folder: checkpoint and options, as a hash."""
    files = folder.glob(f"{output_modality}-*.jsonl")
    return {line["run"] for file in files for line in read_lines(file)}


def read_lines(file: Path) -> list[dict[str, str]]:
    """Read the lines of a file; skip an incomplete line that a killed run left."""
    lines = []
    for text in file.read_text().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines
