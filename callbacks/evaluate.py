"""Validation with samples: images and captions of fixed prompts are generated, scored and shown.

`fit` and `validate` use the same code. Everything that may vary between evaluations of a checkpoint
is an option of this callback and not of the model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.media import log_image, log_table
from callbacks.metrics import ImageQuality, SampleMetric
from callbacks.plot import line_plots
from callbacks.prompts import Prompt, PromptSet
from callbacks.protocol import MetricRecord, prompts_hash, save_records
from callbacks.results import is_trial, run_folder, warn_in_fit, weights_step
from callbacks.sampling import (
    Kind,
    SampleBatch,
    check_draws,
    check_module,
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

    Images, captions and texts are given to every logger that takes them (TensorBoard, Weights &
    Biases, MLflow, Comet). Images, with their prompts or captions, are also written to `media/` in
    the run's folder, and so are tables of captions and texts if no logger takes them. `validate`
    and `test` write `metrics.json` and, for several guidance scales, the plot `guidance.png` into a
    separate folder. `fit` writes `metrics/step<N>-<tag>.json`. A failed evaluation is a warning in
    `fit` and an error otherwise; if a metric fails, the others still have values.

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
        num_shown: prompts that are shown, at most a batch; 0: none.
        texts: beginnings of texts whose continuations are shown.
        tag: name of the prompts in loggers and in files, for a run with several evaluations.
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
        if guidance_scales and not generate_images:
            raise UserError(
                f"guidance_scales={list(guidance_scales)} has no effect with generate_images=false;"
                " set it to null, or generate images"
            )
        self.sampling, self.seed = sampling, seed
        self.scales = list(guidance_scales or [sampling.guidance_scale])
        self.weights, self.batch_size = weights, batch_size
        self.num_shown, self.texts, self.tag = num_shown, list(texts), tag
        self.records: list[MetricRecord] = []
        self.failed: dict[SampleMetric, str] = {}  # reason of each metric without a value
        self.checked = False

    @property
    def state_key(self) -> str:
        """Identify the callback by its tag: a run has one evaluation of each tag."""
        return f"Evaluate[{self.tag}]"

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Check options and prompts, and load the metrics' networks, before data is prepared.

        Raises:
            UserError: an option or a metric does not fit the model, the data or the prompts.
        """
        check_module(model, self)
        tags = [c.tag for c in trainer.callbacks if isinstance(c, Evaluate)]
        if tags.count(self.tag) > 1:
            raise UserError(
                f"two Evaluate callbacks have tag={self.tag!r}; give them different tags"
            )
        self.sampling = resolve_sampling(self.sampling, model)
        if any(self.enabled.values()):
            remedy = "set evaluate to null, or generate_images and caption_images to false"
            check_draws(data, self, remedy)
        try:
            self.check_metrics(data)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.checked = True

    def check_metrics(self, data: L.LightningDataModule) -> None:
        """Read the prompts and check every metric against them.

        Raises:
            ValueError: a metric is of samples that are not made, or does not fit the prompts.
        """
        self.prompt_set.setup(data)
        prompts = self.prompt_set.prompts(data)
        if self.enabled["captioned"] and not all(prompt.image for prompt in prompts):
            raise UserError("these prompts have no images to caption; set caption_images to false")
        for metric in self.metrics:
            if not self.enabled[metric.kind]:
                option = "generate_images" if metric.kind == "generated" else "caption_images"
                raise UserError(
                    f"{type(metric).__name__} scores {metric.kind} images, but {option} is "
                    "false; set it to true or remove the metric"
                )
            metric.open(self.prompt_set)
            metric.check(prompts, partial(count_real, self.prompt_set, data), self.batch_size)
        names = [name for metric in self.metrics for name in metric.names]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"two metrics are named {', '.join(sorted(repeated))}; give them different labels"
            )

    def score_names(self, data: L.LightningDataModule) -> list[str]:
        """Return the names of the values that this callback logs."""
        names = [f"val/{name}" for m in self.metrics if m.kind == "captioned" for name in m.names]
        generated = [name for m in self.metrics if m.kind == "generated" for name in m.names]
        suffixes = [self.suffix(scale) for scale in self.scales]
        return names + [f"val/{name}{suffix}" for suffix in suffixes for name in generated]

    def suffix(self, scale: float) -> str:
        """Return the end of a metric's name: the guidance scale, if there are several."""
        return f"@{scale:g}" if len(self.scales) > 1 else ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        if not self.checked:
            self.before_run(trainer, pl_module, trainer.datamodule)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Sample, compute the metrics and log them."""
        self.records, self.failed = [], {}
        if is_trial(trainer):
            return
        with warn_in_fit(trainer, "the evaluation"):
            self.records = self.evaluate(trainer, pl_module)
        if trainer.state.fn == "fit":
            for reason in self.failed.values():
                rank_zero_warn(f"a score at step {trainer.global_step} is missing: {reason}")
        for record in self.records:
            value = torch.tensor(record.value, dtype=torch.float64)
            pl_module.log(record.name, value, add_dataloader_idx=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Write all values with their protocols, also the losses and the text perplexity."""
        if is_trial(trainer):
            return
        folder = run_folder(trainer)  # on every rank
        if trainer.is_global_zero and len(self.scales) > 1 and self.records:
            with atomic_file(folder / "guidance.png") as file:
                self.plot().save(file, format="PNG")
        records = [*self.records, *text_records(trainer)]
        records += module_records(trainer, pl_module, records)
        save_records(trainer, pl_module, records, self.tag)
        if self.failed and trainer.state.fn != "fit":  # the other scores are written first
            raise UserError("; ".join(dict.fromkeys(self.failed.values())))

    on_test_end = on_validation_end

    def evaluate(self, trainer: L.Trainer, module: Transfusion) -> list[MetricRecord]:
        """Sample and return the records of all metrics, for every guidance scale.

        Raises:
            ValueError: the samples are not finite; it is raised on all ranks.
        """
        self.folder = run_folder(trainer)  # on every rank
        self.step = weights_step(trainer, module)
        prompts = self.prompt_set.prompts(trainer.datamodule)
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
            sampling = self.sampling.with_options(guidance_scale=scale)
            suffix = self.suffix(scale)
            records += self.score(trainer, pipe, prompts, "generated", sampling, facts, suffix)
        return records

    def try_each(
        self, metrics: Sequence[SampleMetric], work: Callable[[SampleMetric], object]
    ) -> None:
        """Call a function for each metric that has not failed; keep the reason if it fails."""
        for metric in metrics:
            if metric not in self.failed:
                try:
                    work(metric)
                except ValueError as error:
                    self.failed[metric] = str(error)

    def share_failures(self, trainer: L.Trainer) -> None:
        """Leave out the metrics that failed on any rank, because ranks compute values together."""
        if trainer.world_size > 1:
            own = {self.metrics.index(metric): reason for metric, reason in self.failed.items()}
            found: list[dict[int, str]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(found, own)
            everyone = {i: reason for reasons in found for i, reason in reasons.items()}
            self.failed = {self.metrics[i]: everyone[i] for i in sorted(everyone)}

    def add_real(self, trainer: L.Trainer) -> None:
        """Add real images to metrics without real statistics."""
        metrics = [m for m in self.metrics if isinstance(m, ImageQuality) and m.needs_real]
        if not metrics:
            return
        images = self.prompt_set.real_images(trainer.datamodule)
        share = images[trainer.global_rank :: trainer.world_size]
        self.try_each(metrics, lambda metric: metric.add_real(share))
        self.share_failures(trainer)
        self.try_each(metrics, lambda metric: metric.keep_real())  # fails on all ranks or on none

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

        A metric that fails is left out; `failed` has its reason.

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
                self.try_each(metrics, lambda metric, batch=batch: metric.update(batch))
                if batch.indices.start == 0 and self.num_shown:  # rank zero's first batch
                    shown, tag = batch.first(self.num_shown), self.tag + suffix
                    log_samples(trainer, self.folder, self.step, self.prompt_set, shown, tag)

        raise_on_all_ranks(trainer, update_metrics)
        self.share_failures(trainer)
        modality = "image" if kind == "generated" else "text"
        facts = facts | sampling.used(modality, makes_codes=bool(pipe.model.net.num_codes))
        records = []
        for metric in metrics:
            if metric in self.failed:
                continue
            values, reasons = metric.compute()
            protocols = metric.protocol
            records += [
                MetricRecord(f"val/{name}{suffix}", value, facts | protocols[name])
                for name, value in values.items()
            ]
            if reasons:
                self.failed[metric] = "; ".join(reasons)
        return records

    def log_texts(self, trainer: L.Trainer, pipe: TransfusionPipeline) -> None:
        """Show continuations of `texts`, on rank zero."""
        if self.texts and trainer.is_global_zero:
            sampling = self.sampling.with_options(temperature=1.0)
            how = {"batch_size": len(self.texts), "progress": False, "sampling": sampling}
            ends = pipe(self.texts, output_modality="text", **how).texts
            rows = list(zip(self.texts, ends, strict=True))
            columns = ["beginning", "continuation"]
            log_table(trainer, self.folder, self.step, f"text/{self.tag}", columns, rows)

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


def count_real(prompts: PromptSet, data: L.LightningDataModule) -> int:
    """Count the real images of a prompt set."""
    return len(prompts.real_images(data))


def log_samples(
    trainer: L.Trainer, folder: Path, step: int, prompts: PromptSet, batch: SampleBatch, tag: str
) -> None:
    """Show samples in the run's loggers, marked right or wrong where the prompt set can judge them.

    Generated images are shown above their prompts as `generated/<tag>`. Images above their
    generated captions are shown as `captioned/<tag>`, beside a table `captions/<tag>`.
    """
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
        rows = [
            ("\n".join(prompt.references[:5]), caption)
            for prompt, caption in zip(batch.prompts, batch.captions, strict=True)
        ]
        columns = ["reference captions", "generated caption"]
        log_table(trainer, folder, step, f"captions/{tag}", columns, rows)
    sheet = contact_sheet([(f"{title}, step {step}", tiles)], columns=2)
    log_image(trainer, folder, step, title, sheet)


def text_records(trainer: L.Trainer) -> list[MetricRecord]:
    """Return the records of the TextPerplexity callback at this validation."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, TextPerplexity)]
    return [record for callback in callbacks for record in callback.records]


def module_records(
    trainer: L.Trainer, module: Transfusion, others: Sequence[MetricRecord]
) -> list[MetricRecord]:
    """Return records of the losses that the module logged at this validation."""
    known = {record.name for record in others}
    definitions = MODULE_PROTOCOL
    if module.process is not None:
        definitions = definitions | {"loss_diffusion": module.process.loss_definition}
    return [
        MetricRecord(
            name,
            float(value),
            {
                "definition": definitions[name.rpartition("/")[2]],
                "weights": module.inference_weights,
            },
        )
        for name, value in trainer.callback_metrics.items()
        if name.rpartition("/")[2] in definitions and name.startswith("val/")
        if name not in known
    ]
