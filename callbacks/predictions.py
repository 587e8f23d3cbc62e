"""What `tf-lightning predict` writes: captions for held-out pictures, or pictures for captions.

Any number of ranks may write, and a run that was stopped goes on where it was, with as many ranks.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.results import run_folder
from callbacks.sampling import resolve_sampling
from tf_lightning.batch import Document
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig


class PredictionWriter(BasePredictionWriter):
    """Answers each captioned picture and appends a line to `predict/<output_modality>-<rank>.jsonl`.

    With "text", a picture is answered with a caption, beside the document's own; with "image", a
    caption is answered with a picture, in `predict/images/`. Documents that any rank has answered
    before, with the same checkpoint and settings, are left out.

    Args:
        output_modality: "text" for captions, "image" for images.
        sampling: how they are sampled.
        seed: with the document, names a picture's first noise.
    """

    def __init__(
        self,
        output_modality: Literal["text", "image"] = "text",
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: int = 0,
    ):
        super().__init__(write_interval="batch")
        self.output_modality, self.sampling, self.seed = output_modality, sampling, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a sampler that does not fit."""
        if self.output_modality == "image":
            self.sampling = resolve_sampling(self.sampling, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See what is there; leave out of this rank's file what another run wrote."""
        self.pipe = TransfusionPipeline.from_module(pl_module)
        self.folder = run_folder(trainer)
        checkpoint = Path(trainer.ckpt_path)
        used = self.sampling.used(self.output_modality, bool(pl_module.hparams["num_codes"]))
        settings = (str(checkpoint), checkpoint.stat().st_mtime_ns, used, self.seed)
        self.run = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        self.path = self.folder / f"{self.output_modality}-{trainer.global_rank}.jsonl"
        mine = lines_of(self.path, self.run) if self.path.exists() else []
        with atomic_file(self.path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in mine))
        files = self.folder.glob(f"{self.output_modality}-*.jsonl")
        self.written = {line["key"] for file in files for line in lines_of(file, self.run)}
        self.found = len(self.written)

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
        """Answer the batch's captioned pictures, one line each."""
        pairs = [sorted(document, key=lambda part: part.ndim) for document in prediction]
        pairs = [pair for pair in pairs if [part.ndim for part in pair] == [1, 3]]
        missing = {key: pair for pair in pairs if (key := key_of(pair)) not in self.written}
        captions, images = zip(*missing.values(), strict=True) if missing else ((), ())
        if self.output_modality == "text":
            answers = self.generate(images, missing).texts
        else:
            generated = self.generate(captions, missing).images
            answers = [self._keep(key, i) for key, i in zip(missing, generated, strict=True)]
        with self.path.open("a") as file:
            for key, caption, answer in zip(missing, captions, answers, strict=True):
                own = self.pipe.model.tokenizer.decode(caption.tolist()).strip()
                line = {"key": key, "run": self.run, "caption": own, "answer": answer}
                file.write(json.dumps(line) + "\n")
        self.written |= missing.keys()

    def generate(self, prompts: Sequence[Tensor], keys: Iterable[str]) -> GenerationOutput:
        """Answer prompts of one part each, each with the seed of its document's key."""
        return self.pipe(
            [[prompt] for prompt in prompts],
            output_modality=self.output_modality,
            seed=[self.seed + int(key[:8], 16) for key in keys],
            batch_size=max(len(prompts), 1),
            progress=False,
            sampling=self.sampling,
        )

    def _keep(self, key: str, picture) -> str:
        """Write a picture; its name."""
        (self.folder / "images").mkdir(exist_ok=True)
        with atomic_file(self.folder / "images" / f"{key}.png") as file:
            picture.save(file, format="PNG")
        return f"images/{key}.png"

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where it is."""
        new = len(self.written) - self.found
        rank_zero_info(f"Wrote {new} lines to {self.path}; {self.found} were there already")


def key_of(document: Document) -> str:
    """Names a document by its content, on whatever rank it is met."""
    sha = hashlib.sha256()
    for part in document:
        sha.update(part.cpu().to(torch.float64).numpy().tobytes())
    return sha.hexdigest()[:16]


def lines_of(file: Path, run: str) -> list[dict[str, str]]:
    """The whole lines of a file that a run wrote; a killed run may leave half of one."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["run"] == run:
            lines.append(line)
    return lines
