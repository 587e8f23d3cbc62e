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
    OF_CODES,
    Kind,
    SampleBatch,
    fit_drawing,
    model_of,
    refuse_shards,
    sample,
    shares,
)
from callbacks.show import show
from callbacks.text_perplexity import TextPerplexity
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
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
        guidance_scale: 1 = off; several are measured one after another.
        num_inference_steps: network evaluations a picture.
        sampler: name of a diffusers scheduler; None: DDIM, or Euler for flow.
        timestep_shift: of its steps, towards noise where over 1; not of DDIM and UniPC.
        code_temperature: where pictures are codes; 0 = the likeliest.
        code_top_k: draw from this many likeliest codes; None: from all.
        code_top_p: draw from the fewest codes that have this probability together.
        seed: first noise of the first prompt; the next prompts' follow.
        weights: "ema", the average if the model keeps one, or "raw".
        batch_size: prompts sampled together.
        max_new_tokens: limit of a caption or a text.
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
        guidance_scale: float | list[float] = 3.0,
        num_inference_steps: int = 50,
        sampler: str | None = None,
        timestep_shift: float = 1.0,
        code_temperature: float = 1.0,
        code_top_k: int | None = None,
        code_top_p: float = 1.0,
        seed: int = 0,
        weights: Literal["ema", "raw"] = "ema",
        batch_size: int = 32,
        max_new_tokens: int = 64,
        num_shown: int = 8,
        texts: Sequence[str] = (),
        tag: str = "val",
    ):
        self.prompt_set, self.metrics = prompts, list(metrics)
        self.makes = {"generated": generate_images, "captioned": caption_images}
        self.scales = guidance_scale if isinstance(guidance_scale, list) else [guidance_scale]
        if not self.scales:
            raise UserError("guidance_scale=[] measures nothing; give one number or more")
        self.how = {"num_inference_steps": num_inference_steps, "sampler": sampler}
        self.how |= {"timestep_shift": timestep_shift, "seed": seed}
        self.how |= dict(zip(OF_CODES, (code_temperature, code_top_k, code_top_p), strict=True))
        self.weights, self.batch_size, self.max_new_tokens = weights, batch_size, max_new_tokens
        self.num_shown, self.texts, self.tag = num_shown, list(texts), tag
        self.numbers: list[MetricRecord] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the metrics' networks now: what does not fit is told before hours of training."""
        refuse_shards(pl_module, self)
        self.how = fit_drawing(self.how, pl_module)
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
        model, weights = model_of(module, self.weights)
        for metric in self.metrics:
            metric.to(module.device)
            metric.reset()
        self.see_real(trainer)
        self.show_texts(trainer, model)
        facts = {
            "prompts": self.prompt_set.facts["dataset"],
            "num_prompts": len(prompts),
            "prompts_hash": prompts_hash(prompts),
            "weights": weights,
            "precision": trainer.precision,
            "image_size": model.latent_shape and model.image_size,
        }
        written = facts | {"decoding": "greedy", "max_new_tokens": self.max_new_tokens}
        numbers = self.score(trainer, model, prompts, "captioned", "", written)
        for scale in self.scales:
            suffix = f"@{scale:g}" if len(self.scales) > 1 else ""
            drawn = facts | self.how | {"guidance_scale": scale}
            numbers += self.score(trainer, model, prompts, "generated", suffix, drawn)
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
        model: TransfusionPipeline,
        prompts: Sequence[Prompt],
        kind: Kind,
        suffix: str,
        facts: dict,
    ) -> list[MetricRecord]:
        """Generate the images or the captions of all prompts, and compute the metrics of them.

        Args:
            trainer: the run's.
            model: what is asked.
            prompts: of all ranks.
            kind: of the samples.
            suffix: of the numbers' names.
            facts: how the samples are made.
        """
        metrics = [metric for metric in self.metrics if metric.kind == kind]
        if not self.makes[kind]:
            return []
        for metric in metrics:
            metric.reset()
        samples = sample(
            model,
            prompts,
            shares(len(prompts), self.batch_size, trainer.global_rank, trainer.world_size),
            facts,
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

    def show_texts(self, trainer: L.Trainer, model: TransfusionPipeline) -> None:
        """Continuations of `texts`, by rank zero, in TensorBoard."""
        if isinstance(trainer.logger, TensorBoardLogger) and self.texts and trainer.is_global_zero:
            begun = [[text] for text in self.texts]
            ends = model.write(begun, max_new_tokens=self.max_new_tokens, temperature=1.0)
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
