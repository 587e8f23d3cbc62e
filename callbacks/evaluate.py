"""Validation with samples: images and captions of fixed prompts are generated, scored and shown.

`fit` and `validate` use the same code. Everything that may vary between evaluations of a checkpoint
is an option of this callback and not of the model.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.metrics import ImageQuality, SampleMetric
from callbacks.plot import line_plots
from callbacks.prompts import Prompt, PromptSet
from callbacks.protocol import MetricRecord, prompts_hash, save_records
from callbacks.results import run_folder
from callbacks.sampling import (
    Kind,
    SampleBatch,
    refuse_shards,
    resolve_sampling,
    sample,
    shares,
)
from callbacks.text_perplexity import TextPerplexity
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import GuidanceScale, SamplingConfig
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments
from tf_lightning.training.module import Transfusion

MODULE_PROTOCOL = {  # definitions of the losses that the module logs at validation
    "loss_lm": "mean nll in nats over text targets",
    "loss_codes": "mean nll in nats over image codes and the <eoi> after them",
}


class Evaluate(L.Callback):
    """Samples at every validation and logs `val/<metric>[<label>]`.

    Images, captions and texts are shown in TensorBoard. `validate` and `test` also print a table,
    and write `metrics.json` and, for several guidance scales, the plot `guidance.png` into a
    separate folder. `fit` writes `metrics/step<N>-<tag>.json`. A failed evaluation is a warning in
    `fit` and an error otherwise.

    Args:
        prompts: the prompts and the real images.
        metrics: metrics of the samples.
        generate_images: generate an image for each prompt.
        caption_images: generate a caption for each prompt's image.
        sampling: how images, captions and texts are sampled.
        guidance_scales: score images of each of these scales instead of sampling.guidance_scale.
        seed: prompt i is sampled with seed + i.
        weights: "ema" for the EMA weights if the model has them, or "raw".
        batch_size: prompts sampled together.
        num_shown: prompts shown in TensorBoard, at most a batch.
        texts: beginnings of texts that the model continues in TensorBoard.
        tag: name of the prompts in TensorBoard and in files, for a run with several evaluations.
    """

    def __init__(
        self,
        prompts: PromptSet,
        metrics: list[SampleMetric] = (),
        generate_images: bool = True,
        caption_images: bool = True,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        guidance_scales: list[GuidanceScale] | None = None,
        seed: NonNegativeInt = 0,
        weights: Literal["ema", "raw"] = "ema",
        batch_size: PositiveInt = 32,
        num_shown: NonNegativeInt = 8,
        texts: Sequence[str] = (),
        tag: str = "val",
    ):
        check_arguments(Evaluate.__init__, locals())
        self.prompt_set, self.metrics = prompts, list(metrics)
        self.enabled = {"generated": generate_images, "captioned": caption_images}
        if guidance_scales is not None and not guidance_scales:
            raise UserError("guidance_scales=[] has no scale; give one number or more, or null")
        self.sampling, self.seed = sampling, seed
        self.scales = list(guidance_scales or [sampling.guidance_scale])
        self.weights, self.batch_size = weights, batch_size
        self.num_shown, self.texts, self.tag = num_shown, list(texts), tag
        self.records: list[MetricRecord] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the options and load the metrics' networks, so that mistakes stop before training.

        Raises:
            UserError: an option or a metric does not fit the model or the prompts.
        """
        refuse_shards(pl_module, self)
        self.sampling = resolve_sampling(self.sampling, pl_module)
        try:
            for metric in self.metrics:
                if not self.enabled[metric.kind]:
                    option = "generate_images" if metric.kind == "generated" else "caption_images"
                    raise UserError(
                        f"{type(metric).__name__} scores {metric.kind} images, but {option} is "
                        "false; set it to true or remove the metric"
                    )
                metric.open(self.prompt_set)
        except ValueError as error:
            raise UserError(str(error)) from error

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Sample, compute the metrics and log them."""
        self.records = []
        if trainer.sanity_checking:
            return
        try:
            self.records = self.evaluate(trainer, pl_module)
        except ValueError as error:  # the same error on every rank
            if trainer.state.fn != "fit":
                raise UserError(str(error)) from error
            rank_zero_warn(f"the evaluation at step {trainer.global_step} failed: {error}")
        for record in self.records:
            value = torch.tensor(record.value, dtype=torch.float64)
            pl_module.log(record.name, value, add_dataloader_idx=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Write all values with their protocols, also the losses and the text perplexity."""
        if trainer.sanity_checking:
            return
        folder = run_folder(trainer)  # on every rank
        if trainer.is_global_zero and len(self.scales) > 1 and self.records:
            with atomic_file(folder / "guidance.png") as file:
                self.plot().save(file, format="PNG")
        records = [*self.records, *text_records(trainer)]
        records += module_records(trainer, pl_module, records)
        save_records(trainer, pl_module, records, self.tag)

    on_test_end = on_validation_end

    def evaluate(self, trainer: L.Trainer, module: Transfusion) -> list[MetricRecord]:
        """Sample and return the records of all metrics, for every guidance scale.

        Raises:
            ValueError: there are no prompts, too few samples, or samples that are not finite; it is
                raised on all ranks.
        """
        prompts = self.prompt_set.prompts(trainer.datamodule)
        if self.enabled["captioned"] and not all(prompt.image for prompt in prompts):
            raise UserError("these prompts have no images to caption; set caption_images: false")
        pipe = TransfusionPipeline.from_module(module, ema=self.weights == "ema")
        for metric in self.metrics:
            metric.to(module.device)
            metric.reset()
        self.add_real(trainer)
        self.log_texts(trainer, pipe)
        facts = {
            "prompts": self.prompt_set.facts["dataset"],
            "num_prompts": len(prompts),
            "prompts_hash": prompts_hash(prompts),
            "weights": pipe.checkpoint["weights"],
            "precision": trainer.precision,
            "image_size": pipe.model.latent_shape and pipe.image_size,
            "seed": self.seed,
        }
        records = self.score(trainer, pipe, prompts, "captioned", self.sampling, facts)
        for scale in self.scales:
            suffix = f"@{scale:g}" if len(self.scales) > 1 else ""
            sampling = self.sampling.with_options(guidance_scale=scale)
            records += self.score(trainer, pipe, prompts, "generated", sampling, facts, suffix)
        return records

    def add_real(self, trainer: L.Trainer) -> None:
        """Add real images to metrics without real statistics."""
        metrics = [m for m in self.metrics if isinstance(m, ImageQuality) and m.needs_real]
        if not metrics:
            return
        images = self.prompt_set.real_images(trainer.datamodule)
        share = images[trainer.global_rank :: trainer.world_size]
        raise_on_all_ranks(trainer, lambda: [metric.add_real(share) for metric in metrics])
        for metric in metrics:
            metric.keep_real()

    def score(
        self,
        trainer: L.Trainer,
        pipe: TransfusionPipeline,
        prompts: Sequence[Prompt],
        kind: Kind,
        sampling: SamplingConfig,
        facts: dict,
        suffix: str = "",
    ) -> list[MetricRecord]:
        """Generate the images or the captions of all prompts, and compute the metrics of them.

        Args:
            trainer: trainer of the run.
            pipe: the model.
            prompts: prompts of all ranks.
            kind: "generated" images or "captioned" images.
            sampling: how to sample.
            facts: the rest of the metrics' protocol.
            suffix: ends the names of the metrics.
        """
        metrics = [metric for metric in self.metrics if metric.kind == kind]
        if not self.enabled[kind]:
            return []
        for metric in metrics:
            metric.reset()
        batches = sample(
            pipe,
            prompts,
            shares(len(prompts), self.batch_size, trainer.global_rank, trainer.world_size),
            sampling,
            seed=self.seed,
            kind=kind,
            precision=trainer.precision_plugin.forward_context,
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )

        def update_metrics() -> None:
            for batch in batches:
                for metric in metrics:
                    metric.update(batch)
                if batch.indices.start == 0:  # rank zero's first batch
                    self.log_samples(trainer, batch, suffix)

        raise_on_all_ranks(trainer, update_metrics)
        modality = "image" if kind == "generated" else "text"
        facts = facts | sampling.used(modality, makes_codes=bool(pipe.model.net.num_codes))
        values: dict[str, float] = {}
        protocols: dict[str, dict] = {}
        for metric in metrics:
            values |= metric.compute()
            protocols |= metric.protocol
        return [
            MetricRecord(f"val/{name}{suffix}", value, facts | protocols[name])
            for name, value in values.items()
        ]

    def log_samples(self, trainer: L.Trainer, batch: SampleBatch, suffix: str) -> None:
        """Show the first samples of a batch in TensorBoard."""
        if isinstance(trainer.logger, TensorBoardLogger) and self.num_shown:
            shown, tag = batch.first(self.num_shown), self.tag + suffix
            log_samples(trainer, self.prompt_set, shown, tag)

    def log_texts(self, trainer: L.Trainer, pipe: TransfusionPipeline) -> None:
        """Show continuations of `texts` in TensorBoard, on rank zero."""
        if isinstance(trainer.logger, TensorBoardLogger) and self.texts and trainer.is_global_zero:
            sampling = self.sampling.with_options(temperature=1.0)
            how = {"batch_size": len(self.texts), "progress": False, "sampling": sampling}
            ends = pipe(self.texts, output_modality="text", **how).texts
            whole = "\n\n".join(f"{a} {b}" for a, b in zip(self.texts, ends, strict=True))
            trainer.logger.experiment.add_text(f"text/{self.tag}", whole, trainer.global_step)

    def plot(self) -> Image.Image:
        """Plot each metric against the guidance scale."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for record in self.records:
            if "guidance_scale" not in record.protocol:
                continue
            title = record.name.rpartition("@")[0].removeprefix("val/")
            point = record.protocol["guidance_scale"], record.value
            lines.setdefault(title, []).append(point)
        return line_plots(lines, "guidance scale")


def raise_on_all_ranks(trainer: L.Trainer, work: Callable[[], object]) -> None:
    """Do this rank's share of the work, and raise a ValueError of any rank on all ranks.

    Otherwise the other ranks would wait forever for the rank that failed.
    """
    message = None
    try:
        work()
    except ValueError as error:
        message = str(error)
    if trainer.world_size > 1:
        messages = [None] * trainer.world_size
        torch.distributed.all_gather_object(messages, message)
        message = next((found for found in messages if found), None)
    if message:
        raise UserError(message)


def log_samples(trainer: L.Trainer, prompts: PromptSet, batch: SampleBatch, tag: str) -> None:
    """Show samples in TensorBoard, marked right or wrong where the prompt set can judge them.

    Generated images are shown above their prompts as `generated/<tag>`. Images above their
    generated captions are shown as `captioned/<tag>`, beside a table `captions/<tag>`.
    """
    writer, step = trainer.logger.experiment, trainer.global_step
    if batch.captions is None:
        title = f"generated/{tag}"
        tiles = [
            Tile(image, prompt.text, prompts.judge(prompt, image))
            for prompt, image in zip(batch.prompts, batch.images, strict=True)
        ]
    else:
        title = f"captioned/{tag}"
        tiles = [
            Tile(image, caption, prompts.judge_caption(prompt, caption))
            for prompt, image, caption in zip(
                batch.prompts, batch.images, batch.captions, strict=True
            )
        ]
        writer.add_text(f"captions/{tag}", caption_table(batch), step)
    sheet = contact_sheet([(f"{title}, step {step}", tiles)], columns=2)
    writer.add_image(title, pil_to_tensor(sheet), step)


def caption_table(batch: SampleBatch) -> str:
    """Return a Markdown table of the reference captions and the generated caption of each image."""
    rows = [
        f"| {'<br>'.join(prompt.references[:5])} | {caption} |"
        for prompt, caption in zip(batch.prompts, batch.captions, strict=True)
    ]
    return "\n".join(["| reference captions | generated caption |", "|---|---|", *rows])


def text_records(trainer: L.Trainer) -> list[MetricRecord]:
    """Return the records of the TextPerplexity callback at this validation."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, TextPerplexity)]
    return [record for callback in callbacks for record in callback.records]


def module_records(
    trainer: L.Trainer, module: Transfusion, others: Sequence[MetricRecord]
) -> list[MetricRecord]:
    """Return records of the losses that the module logged at this validation."""
    known = {record.name for record in others}
    weights = "raw" if module.ema is None else "ema"
    definitions = MODULE_PROTOCOL
    if module.process is not None:
        definitions = definitions | {"loss_diffusion": module.process.loss_definition}
    return [
        MetricRecord(
            name,
            float(value),
            {"definition": definitions[name.rpartition("/")[2]], "weights": weights},
        )
        for name, value in trainer.callback_metrics.items()
        if name.rpartition("/")[2] in definitions and name.startswith("val/")
        if name not in known
    ]
