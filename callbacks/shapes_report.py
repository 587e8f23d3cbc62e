"""The final report on the shapes world: images, captions and text judged by its oracle.

Prompts and images with two objects have held-out meanings, which no training image shows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.results import outside_fit
from callbacks.sampling import (
    check_draws,
    check_module,
    check_no_size,
    image_protocol,
    report_on_rank_zero,
    resolve_sampling,
)
from callbacks.text_perplexity import TextBytes, add_text
from callbacks.throughput import Throughput
from evaluation.perplexity import Perplexity
from tf_lightning.batch import pack
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments
from tf_lightning.shapes.grammar import caption, draw_text, parse, text_log_prob
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.world import IMAGE_SIZE, Meaning, draw_scene, generator, render
from tf_lightning.training.module import Transfusion

SEED_OFFSET = 1_000  # separates these images from those of validation
BATCH_SIZE = 64  # prompts sampled together
CAPTION_TOKENS = 32  # limit of a caption's length; the longest caption of the grammar is shorter


@dataclass(frozen=True)
class Question:
    """A held-out caption with its meaning and its real image."""

    prompt: str
    meaning: Meaning
    image: Image.Image


def questions(count: int, num_objects: int | None, seed: int) -> list[Question]:
    """Draw held-out scenes with a caption each.

    Args:
        count: number of scenes.
        num_objects: 1 or 2; None: drawn at random, with the probabilities of the training data.
        seed: seed of the scenes.
    """
    found = []
    for index in range(count):
        rng = generator(SEED_OFFSET + seed, index, "val")
        scene = draw_scene(rng, num_objects, split="val")
        image = Image.fromarray(render(scene))
        found.append(Question(caption(scene, rng), scene.meaning, image))
    return found


class ShapesReport(L.Callback):
    """Judges the model on the shapes world at the end of `fit`, and in `validate` and `test`.

    It writes into the run's folder: the generated images `samples/NNNN.png` with
    `samples/samples.jsonl` (file, prompt, reading of the oracle, right or wrong), `report.json`,
    and the contact sheet `sheet.png`. The times in the report are from the callback `Throughput`.

    Args:
        num_prompts: number of prompts with one object, of prompts with two objects, of images to
            caption, and of texts.
        sampling: how images are sampled; without a sampler DDPM, or Euler for a rectified flow.
        seed: seed of the prompts and of the samples.
    """

    def __init__(
        self,
        num_prompts: PositiveInt = 128,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        seed: NonNegativeInt = 0,
    ):
        check_arguments(ShapesReport.__init__, locals())
        self.num_prompts, self.sampling, self.seed = num_prompts, sampling, seed

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check the options before data is prepared.

        Raises:
            UserError: an option does not fit the model, or the model has no images.
        """
        check_module(model, self)
        check_draws(data, self, "set shapes_report to null")
        size = f"whose oracle reads images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels alone"
        check_no_size(self.sampling, self, size)
        self.sampling = resolve_sampling(self.sampling, model, "DDPMScheduler")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        self.before_run(trainer, pl_module, trainer.datamodule)

    def examine(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Generate and judge images and captions, and write the results, on rank zero."""
        report_on_rank_zero(trainer, pl_module, "ShapesReport", self.report)

    on_train_end = examine
    on_validation_end = outside_fit(examine)
    on_test_end = examine

    def report(
        self, trainer: L.Trainer, pl_module: Transfusion, pipe: TransfusionPipeline, folder: Path
    ) -> None:
        """Write the results of a pipeline with the module's weights into a folder."""
        rank_zero_info("Generating and judging images and captions ...")
        one, two = (questions(self.num_prompts, count, self.seed) for count in (1, 2))
        asked = one + two
        with trainer.precision_plugin.forward_context():
            generated = self.generate(pipe, asked)
        readings = [read(np.asarray(image)) for image in generated]
        right = [r.meaning == q.meaning for r, q in zip(readings, asked, strict=True)]
        shown = questions(self.num_prompts, None, self.seed + 1)
        with trainer.precision_plugin.forward_context():
            captions = pipe(
                [question.image for question in shown],
                output_modality="text",
                batch_size=max(len(shown), 1),
                progress=False,
                max_new_tokens=CAPTION_TOKENS,
            ).texts
        understood = [parse(text) == q.meaning for text, q in zip(captions, shown, strict=True)]
        perplexity, bound = text_perplexity(pipe, pl_module, self.num_prompts, self.seed)
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
            "global_step": trainer.global_step or pl_module.loaded_step,
            "weights": pl_module.inference_weights,
            "precision": trainer.precision,
            **image_protocol(self.sampling, pl_module),
        }
        verdicts = [
            {"file": f"{i:04d}.png", "prompt": q.prompt, "read": str(r), "right": ok}
            for i, (q, r, ok) in enumerate(zip(asked, readings, right, strict=True))
        ]
        page = sheet(asked, generated, right, shown, captions, understood)
        write_results(folder, report, verdicts, generated, page)
        rank_zero_info(summary(folder, report))

    def generate(self, pipe: TransfusionPipeline, asked: Sequence[Question]) -> list[Image.Image]:
        """Generate an image for each question."""
        images: list[Image.Image] = []
        for start in range(0, len(asked), BATCH_SIZE):
            images += pipe(
                [question.prompt for question in asked[start : start + BATCH_SIZE]],
                output_modality="image",
                seed=self.seed + start,
                batch_size=BATCH_SIZE,
                progress=False,
                sampling=self.sampling,
            ).images
        return images


def seconds_of(trainer: L.Trainer) -> dict[str, float]:
    """Return the seconds of the fit and of its validations; 0 without the callback Throughput."""
    clocks = [c for c in trainer.callbacks if isinstance(c, Throughput)]
    return {
        "train_seconds": round(sum(clock.fit_seconds for clock in clocks), 1),
        "validation_seconds": round(sum(clock.validation_seconds for clock in clocks), 1),
    }


@torch.no_grad()
def text_perplexity(
    pipe: TransfusionPipeline, module: Transfusion, count: int, seed: int
) -> tuple[float, float]:
    """Return the model's perplexity on held-out texts, and that of the grammar on the same tokens.

    Both leave out the first token of each document, which is always the word "imagine".
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
    metric = Perplexity(sync_on_compute=False).to(module.device)  # only rank zero computes this
    with pipe.model.autocast():
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
        Tile(question.image, text, ok)
        for question, text, ok in zip(shown, captions, understood, strict=True)
    ]
    one, two, words = (share(part) for part in (right[:half], right[half:], understood))
    return contact_sheet(
        [
            (f"One object: {one} images right", images[:half][:5]),
            (
                f"Two objects, in combinations unseen in training: {two} images right",
                images[half:][:10],
            ),
            (f"Captions of held-out images: {words} right", captioned[:5]),
        ]
    )


def share(verdicts: Sequence[bool]) -> str:
    """Format the share of true verdicts, such as "96.9% of 128"."""
    return f"{np.mean(verdicts):.1%} of {len(verdicts)}"


def write_results(
    folder: Path,
    report: dict,
    verdicts: Sequence[dict],
    images: Sequence[Image.Image],
    page: Image.Image,
) -> None:
    """Write the files of a report, each completely or not at all.

    Args:
        folder: the folder they go to.
        report: content of report.json.
        verdicts: lines of samples.jsonl; `file` names the image of each.
        images: the generated images, one for each verdict.
        page: the contact sheet.
    """
    samples = folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for verdict, image in zip(verdicts, images, strict=True):
        with atomic_file(samples / verdict["file"]) as file:
            image.save(file, format="PNG")
    with atomic_file(samples / "samples.jsonl") as file:
        file.write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    with atomic_file(folder / "report.json") as file:
        file.write_text(json.dumps(report, indent=2) + "\n")
    with atomic_file(folder / "sheet.png") as file:
        page.save(file, format="PNG")


def summary(folder: Path, report: dict) -> str:
    """Return the scores, and the files that were written."""
    one, two, captions = (report[k] for k in ("one_object", "two_objects", "caption_accuracy"))
    perplexity, bound = report["perplexity"], report["perplexity_bound"]
    return f"""
Images of one object right    {one:7.1%}   (prompts judged by the oracle)
Images of two objects right   {two:7.1%}   (meanings unseen in training)
Captions right                {captions:7.1%}   (held-out images)
Text perplexity               {perplexity:7.3f}   (lower bound {bound:.3f})
Wrote {folder}/sheet.png, samples/ and report.json."""
