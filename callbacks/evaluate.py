"""Validation that samples: pictures and captions of fixed prompts, made once, measured, shown.

The same in `fit` and in `validate`; what may change between evaluations of one checkpoint is here,
not in the model.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.metrics import ImageQuality, SampleMetric
from callbacks.plot import line_plots
from callbacks.prompts import Prompt, PromptSet
from callbacks.protocol import MetricRecord, prompts_hash, save_numbers
from callbacks.results import run_folder
from callbacks.sampling import (
    Kind,
    SampleBatch,
    refuse_shards,
    resolve_sampling,
    sample,
    shares,
)
from callbacks.show import show
from callbacks.text_perplexity import TextPerplexity
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.training.module import Transfusion

MODULE_PROTOCOL = {  # of what the module itself logs at validation
    "loss_lm": "mean nll in nats over text targets",
    "loss_codes": "mean nll in nats over pictures' codes and the <eoi> behind",
    "loss_diffusion": "mean squared error over latent elements",
}


class Evaluate(L.Callback):
    """Samples at every validation and logs `val/<metric>[<label>]`.

    Pictures, captions and text go to TensorBoard. `validate` and `test` also print a table and
    write `metrics.json` into a folder of their own, with the plot `guidance.png` for several
    guidance scales; `fit` writes `metrics/step<N>-<tag>.json`. In `fit` a measurement that fails is
    a warning, else an error.

    Args:
        prompts: what is asked, and the real pictures.
        metrics: metrics of the samples.
        generate_images: generate an image for each prompt.
        caption_images: generate a caption for each prompt's image.
        sampling: how images, captions and texts are sampled.
        guidance_scales: measure the images with each of these in place of sampling.guidance_scale.
        seed: first noise of the first prompt; the next prompts' follow.
        weights: "ema", the average if the model keeps one, or "raw".
        batch_size: prompts sampled together.
        num_shown: prompts shown in TensorBoard, at most a batch.
        texts: beginnings of texts that the model continues, shown in TensorBoard.
        tag: names the prompts in TensorBoard and in the files, where a run has several of these.
    """

    def __init__(
        self,
        prompts: PromptSet,
        metrics: list[SampleMetric] = (),
        generate_images: bool = True,
        caption_images: bool = True,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - it is frozen
        guidance_scales: Sequence[float] | None = None,
        seed: int = 0,
        weights: Literal["ema", "raw"] = "ema",
        batch_size: int = 32,
        num_shown: int = 8,
        texts: Sequence[str] = (),
        tag: str = "val",
    ):
        self.prompt_set, self.metrics = prompts, list(metrics)
        self.makes = {"generated": generate_images, "captioned": caption_images}
        if guidance_scales is not None and not guidance_scales:
            raise UserError("guidance_scales=[] measures nothing; give one number or more, or null")
        self.sampling, self.seed = sampling, seed
        self.scales = list(guidance_scales or [sampling.guidance_scale])
        for scale in self.scales:
            sampling.with_options(guidance_scale=scale)  # refuses a scale that is not finite
        self.weights, self.batch_size = weights, batch_size
        self.num_shown, self.texts, self.tag = num_shown, list(texts), tag
        self.numbers: list[MetricRecord] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the metrics' networks now: what does not fit is told before hours of training."""
        refuse_shards(pl_module, self)
        self.sampling = resolve_sampling(self.sampling, pl_module)
        try:
            for metric in self.metrics:
                if not self.makes[metric.kind]:
                    option = "generate_images" if metric.kind == "generated" else "caption_images"
                    raise UserError(
                        f"{type(metric).__name__} measures {metric.kind} images, but {option} is "
                        "false; set it to true or remove the metric"
                    )
                metric.open(self.prompt_set)
        except ValueError as error:
            raise UserError(str(error)) from error

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Sample, measure, log."""
        self.numbers = []
        if trainer.sanity_checking:
            return
        try:
            self.numbers = self.evaluate(trainer, pl_module)
        except ValueError as error:  # the same on every rank
            if trainer.state.fn != "fit":
                raise UserError(str(error)) from error
            rank_zero_warn(f"step {trainer.global_step} is not measured: {error}")
        for number in self.numbers:
            value = torch.tensor(number.value, dtype=torch.float64)
            pl_module.log(number.name, value, add_dataloader_idx=False)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Write the numbers, the module's own among them, with what they depend on."""
        if trainer.sanity_checking:
            return
        folder = run_folder(trainer)  # on every rank
        if trainer.is_global_zero and len(self.scales) > 1 and self.numbers:
            with atomic_file(folder / "guidance.png") as file:
                self.plot().save(file, format="PNG")
        numbers = [*self.numbers, *text_numbers(trainer)]
        numbers += module_numbers(trainer, pl_module, numbers)
        save_numbers(trainer, pl_module, numbers, self.tag)

    on_test_end = on_validation_end

    def evaluate(self, trainer: L.Trainer, module: Transfusion) -> list[MetricRecord]:
        """Every number of every guidance scale.

        Raises:
            ValueError: nothing to ask, too few samples, or samples that are not finite; on all
                ranks alike.
        """
        prompts = self.prompt_set.prompts(trainer.datamodule)
        if self.makes["captioned"] and not all(prompt.picture for prompt in prompts):
            raise UserError("these prompts have no pictures to caption; give caption_images: false")
        pipe = TransfusionPipeline.from_module(module, ema=self.weights == "ema")
        for metric in self.metrics:
            metric.to(module.device)
            metric.reset()
        self.see_real(trainer)
        self.show_texts(trainer, pipe)
        facts = {
            "prompts": self.prompt_set.facts["dataset"],
            "num_prompts": len(prompts),
            "prompts_hash": prompts_hash(prompts),
            "weights": pipe.checkpoint["weights"],
            "precision": trainer.precision,
            "image_size": pipe.model.latent_shape and pipe.image_size,
            "seed": self.seed,
        }
        numbers = self.score(trainer, pipe, prompts, "captioned", self.sampling, facts)
        for scale in self.scales:
            suffix = f"@{scale:g}" if len(self.scales) > 1 else ""
            sampling = self.sampling.with_options(guidance_scale=scale)
            numbers += self.score(trainer, pipe, prompts, "generated", sampling, facts, suffix)
        return numbers

    def see_real(self, trainer: L.Trainer) -> None:
        """Let the measures that compare with real pictures see them, the first time."""
        lacking = [m for m in self.metrics if isinstance(m, ImageQuality) and m.needs_real]
        if not lacking:
            return
        pictures = self.prompt_set.real_pictures(trainer.datamodule)
        share = pictures[trainer.global_rank :: trainer.world_size]
        together(trainer, lambda: [metric.see_real(share) for metric in lacking])
        for metric in lacking:
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
            trainer: the run's trainer.
            pipe: the model.
            prompts: prompts of all ranks.
            kind: "generated" images or "captioned" images.
            sampling: how to sample.
            facts: the rest of the metrics' protocol.
            suffix: ends the names of the metrics.
        """
        metrics = [metric for metric in self.metrics if metric.kind == kind]
        if not self.makes[kind]:
            return []
        for metric in metrics:
            metric.reset()
        samples = sample(
            pipe,
            prompts,
            shares(len(prompts), self.batch_size, trainer.global_rank, trainer.world_size),
            sampling,
            seed=self.seed,
            kind=kind,
            precision=trainer.precision_plugin.forward_context,
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )

        def take() -> None:
            for sampled in samples:
                for metric in metrics:
                    metric.update(sampled)
                if sampled.indices.start == 0:
                    self.show(trainer, sampled, suffix)

        together(trainer, take)
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

    def show(self, trainer: L.Trainer, sampled: SampleBatch, suffix: str) -> None:
        """The first batch, which rank zero has, in TensorBoard."""
        if isinstance(trainer.logger, TensorBoardLogger) and self.num_shown:
            show(trainer, self.prompt_set, sampled.first(self.num_shown), self.tag + suffix)

    def show_texts(self, trainer: L.Trainer, pipe: TransfusionPipeline) -> None:
        """Continuations of `texts`, by rank zero, in TensorBoard."""
        if isinstance(trainer.logger, TensorBoardLogger) and self.texts and trainer.is_global_zero:
            sampling = self.sampling.with_options(temperature=1.0)
            how = {"batch_size": len(self.texts), "progress": False, "sampling": sampling}
            ends = pipe(self.texts, output_modality="text", **how).texts
            whole = "\n\n".join(f"{a} {b}" for a, b in zip(self.texts, ends, strict=True))
            trainer.logger.experiment.add_text(f"text/{self.tag}", whole, trainer.global_step)

    def plot(self):
        """Each metric against the guidance scale."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for number in self.numbers:
            if "guidance_scale" not in number.protocol:
                continue
            title = number.name.rpartition("@")[0].removeprefix("val/")
            point = number.protocol["guidance_scale"], number.value
            lines.setdefault(title, []).append(point)
        return line_plots(lines, "guidance scale")


def together(trainer: L.Trainer, work: Callable[[], object]) -> None:
    """Does this rank's share of work; a ValueError of one rank is raised on all of them.

    Without that the others would wait for it for ever.
    """
    told = None
    try:
        work()
    except ValueError as error:
        told = str(error)
    if trainer.world_size > 1:
        everyone = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, told)
        told = next((message for message in everyone if message), None)
    if told:
        raise UserError(told)


def text_numbers(trainer: L.Trainer) -> list[MetricRecord]:
    """What another callback measured of the text at this validation."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, TextPerplexity)]
    return [number for callback in callbacks for number in callback.numbers]


def module_numbers(
    trainer: L.Trainer, module: Transfusion, ours: Sequence[MetricRecord]
) -> list[MetricRecord]:
    """What the module logged of its losses at this validation."""
    known = {number.name for number in ours}
    weights = "raw" if module.ema is None else "ema"
    return [
        MetricRecord(
            name,
            float(value),
            {"definition": MODULE_PROTOCOL[name.rpartition("/")[2]], "weights": weights},
        )
        for name, value in trainer.callback_metrics.items()
        if name.rpartition("/")[2] in MODULE_PROTOCOL and name.startswith("val/")
        if name not in known
    ]
