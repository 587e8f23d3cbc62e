"""The embedded world's own examination: generated pictures, captions and text judged by its oracle.

Two-object prompts and pictures are of meanings that no training picture shows.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.results import outside_fit, run_folder
from callbacks.sampling import image_protocol, refuse_shards, resolve_sampling
from callbacks.text_perplexity import TextBytes, add_text
from callbacks.throughput import Throughput
from evaluation.perplexity import Perplexity
from tf_lightning.batch import pack
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.shapes.grammar import caption, draw_text, parse, text_log_prob
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.world import Meaning, draw_scene, generator, render
from tf_lightning.training.module import Transfusion

SEED_OFFSET = 1_000  # the examination's pictures are none of the validation's


@dataclass(frozen=True)
class Question:
    """A held-out caption with its true picture."""

    prompt: str
    meaning: Meaning
    picture: Image.Image


def questions(count: int, num_objects: int | None, seed: int) -> list[Question]:
    """Held-out scenes with a caption each; `num_objects` None mixes 1 and 2 as training does."""
    asked = []
    for index in range(count):
        rng = generator(SEED_OFFSET + seed, index, "val")
        scene = draw_scene(rng, num_objects, split="val")
        picture = Image.fromarray(render(scene))
        asked.append(Question(caption(scene, rng), scene.meaning, picture))
    return asked


class ShapesReport(L.Callback):
    """Examines the model when training ends, and whenever a checkpoint is validated or tested.

    Writes into the run's folder `samples/NNNN.png` with `samples/samples.jsonl` (file, prompt, what
    the oracle read, right or wrong), `report.json` and the contact sheet `sheet.png`. The report's
    seconds are those that the callback `Throughput` counted.

    Args:
        num_prompts: prompts with one object, prompts with two, pictures to caption, and texts.
        sampling: how images are sampled; without a sampler DDPM, the best for the small model, or
            Euler for a rectified flow.
        seed: of the prompts and of the first noise.
    """

    def __init__(
        self,
        num_prompts: int = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: int = 0,
    ):
        self.num_prompts, self.sampling, self.seed = num_prompts, sampling, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a sampler that does not fit."""
        refuse_shards(pl_module, self)
        self.sampling = resolve_sampling(self.sampling, pl_module, "DDPMScheduler")

    def examine(self, trainer: L.Trainer, module: Transfusion) -> None:
        """All questions, on rank zero; writes the files and logs the scores."""
        folder = run_folder(trainer)  # on every rank
        if not trainer.is_global_zero:
            return
        rank_zero_info("Judging pictures and captions ...")
        module.eval()
        pipe = TransfusionPipeline.from_module(module)
        one, two = (questions(self.num_prompts, count, self.seed) for count in (1, 2))
        asked = one + two
        with trainer.precision_plugin.forward_context():
            drawn = self.draw(pipe, asked)
        readings = [read(np.asarray(picture)) for picture in drawn]
        right = [r.meaning == q.meaning for r, q in zip(readings, asked, strict=True)]
        shown = questions(self.num_prompts, None, self.seed + 1)
        with trainer.precision_plugin.forward_context():
            images = [q.picture for q in shown]
            how = {"batch_size": max(len(images), 1), "progress": False, "max_new_tokens": 32}
            written = pipe(images, output_modality="text", **how).texts
        understood = [parse(text) == q.meaning for text, q in zip(written, shown, strict=True)]
        perplexity, bound = text_perplexity(pipe, module, self.num_prompts, self.seed)
        report = {
            **seconds_of(trainer),
            "num_parameters": sum(p.numel() for p in pipe.model.net.parameters()),
            "one_object": float(np.mean(right[: len(one)])),
            "two_objects": float(np.mean(right[len(one) :])),
            "caption_accuracy": float(np.mean(understood)),
            "perplexity": perplexity,
            "perplexity_bound": bound,
            "counts": dict.fromkeys(("one_object", "two_objects", "captions", "texts"), len(one)),
            "seed": self.seed,
            "global_step": trainer.global_step or module.loaded_step,
            "weights": "raw" if module.ema is None else "ema",
            "precision": trainer.precision,
            **image_protocol(self.sampling, module),
        }
        verdicts = [
            {"file": f"{i:04d}.png", "prompt": q.prompt, "read": str(r), "right": ok}
            for i, (q, r, ok) in enumerate(zip(asked, readings, right, strict=True))
        ]
        samples = folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        for verdict, picture in zip(verdicts, drawn, strict=True):
            with atomic_file(samples / verdict["file"]) as file:
                picture.save(file, format="PNG")
        lines = (json.dumps(verdict) + "\n" for verdict in verdicts)
        with atomic_file(samples / "samples.jsonl") as file:
            file.write_text("".join(lines))
        with atomic_file(folder / "report.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")
        with atomic_file(folder / "sheet.png") as file:
            page = sheet(asked, drawn, right, shown, written, understood)
            page.save(file, format="PNG")
        last = folder / "checkpoints" / "last.ckpt"
        rank_zero_info(summary(folder, last if last.exists() else trainer.ckpt_path, report))

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine

    def draw(self, pipe: TransfusionPipeline, asked: Sequence[Question]) -> list[Image.Image]:
        """One picture a question, 64 at a time."""
        drawn: list[Image.Image] = []
        for start in range(0, len(asked), 64):
            part = asked[start : start + 64]
            seeds = [self.seed + start + i for i in range(len(part))]
            drawn += pipe(
                [q.prompt for q in part],
                output_modality="image",
                seed=seeds,
                batch_size=64,
                progress=False,
                sampling=self.sampling,
            ).images
        return drawn


def seconds_of(trainer: L.Trainer) -> dict[str, float]:
    """Wall-clock time of the fit, and what its validations took of it; 0 if it was not measured."""
    clocks = [c for c in trainer.callbacks if isinstance(c, Throughput)]
    return {
        "train_seconds": round(sum(clock.fit_seconds for clock in clocks), 1),
        "validation_seconds": round(sum(clock.validation_seconds for clock in clocks), 1),
    }


@torch.no_grad()
def text_perplexity(
    pipe: TransfusionPipeline, module: Transfusion, count: int, seed: int
) -> tuple[float, float]:
    """Perplexity of held-out text, and that of the grammar itself on the same tokens.

    Each document's first token is left out on both sides: it is always the word "imagine".
    """
    texts = [draw_text(generator(SEED_OFFSET + seed, index, "val")) for index in range(count)]
    documents = [pipe.encode(text) for text in texts]
    batch = pack(
        [[document] for document in documents],
        list(range(count)),
        tokenizer=pipe.model.tokenizer,
        row_length=max(len(document[0]) for document in documents) + 2,
        patch_size=module.hparams.patch_size,
    ).to(module.device)
    metric = Perplexity(sync_on_compute=False).to(module.device)  # rank zero is alone here
    nll = module.loss_sums(pipe.model.net, batch).nll
    add_text(metric, nll, batch, TextBytes(pipe.model.tokenizer, module.device))
    perplexity = metric.compute()["perplexity"].item()
    entropy = -sum(text_log_prob(text) for text in texts)
    return perplexity, math.exp(entropy / metric.counts["num_tokens"])


def sheet(
    asked: Sequence[Question],
    generated: Sequence[Image.Image],
    right: Sequence[bool],
    shown: Sequence[Question],
    captions: Sequence[str],
    understood: Sequence[bool],
) -> Image.Image:
    """Draw the first images of one and of two objects, and the first captions, with their scores.

    Args:
        asked: prompts with one object, then as many prompts with two.
        generated: an image for each prompt.
        right: whether each image matches its prompt.
        shown: held-out images.
        captions: a caption for each held-out image.
        understood: whether each caption matches its image.
    """
    half = len(asked) // 2
    images = [
        Tile(image, question.prompt, ok)
        for question, image, ok in zip(asked, generated, right, strict=True)
    ]
    captioned = [
        Tile(question.picture, text, ok)
        for question, text, ok in zip(shown, captions, understood, strict=True)
    ]
    one, two, words = (f"{share(part)} right" for part in (right[:half], right[half:], understood))
    return contact_sheet(
        [
            (f"Images of prompts with one object: {one}", images[:half][:5]),
            (f"Images of prompts with two objects, unseen in training: {two}", images[half:][:10]),
            (f"Captions of held-out images: {words}", captioned[:5]),
        ]
    )


def share(verdicts: Sequence[bool]) -> str:
    """Format the share of true verdicts, such as "96.9% of 128"."""
    return f"{np.mean(verdicts):.1%} of {len(verdicts)}"


def summary(folder: Path, checkpoint: str | Path | None, report: dict) -> str:
    """What was found, what was written, and what to type next."""
    here = os.path.relpath(Path(sys.executable).parent)
    command = "" if here.startswith("..") else f"{here}/"  # .venv/bin/ after `make quickstart`
    return f"""
one object right       {report["one_object"]:7.1%}   (prompts judged by the world's oracle)
two objects right      {report["two_objects"]:7.1%}   (meanings that no training picture shows)
captions right         {report["caption_accuracy"]:7.1%}   (held-out pictures)
text's perplexity      {report["perplexity"]:7.3f}   (at best {report["perplexity_bound"]:.3f})
Wrote {folder}/sheet.png, samples/ and report.json. Next:
  {command}tf-lightning generate {checkpoint} "a red circle above a blue square" -o out
  {command}tf-lightning generate {checkpoint} --image {folder}/samples/0000.png
  {command}tensorboard --logdir {folder.parent}"""
