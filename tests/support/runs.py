"""A run of the command line that takes seconds: 64 x 64 shapes in 16 patches, two narrow layers."""

import copy
import gc
import os
import signal
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import yaml

from tf_lightning.cli.main import main
from tf_lightning.cli.run_callbacks import ALWAYS
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.training import gather

PATCH_SIZE, VOCAB_SIZE, MAX_STEPS = 16, 300, 6
PEAK_LR, WARMUP_STEPS, MIN_LR_RATIO, EMA_DECAY = 1e-3, 2, 0.1, 0.3
NUM_CAPTIONS, NUM_VAL = 40, 6
EVALUATE = {
    "prompts": {
        "class_path": "callbacks.prompts.ShapesPrompts",
        "init_args": {"count": 5, "real_per_prompt": 4},
    },
    "metrics": [
        {"class_path": "callbacks.metrics.ImageQuality"},
        {"class_path": "callbacks.metrics.CLIPScore"},
        {"class_path": "callbacks.metrics.CaptionScores"},
        {"class_path": "callbacks.geneval.ShapesComposition"},
    ],
    "batch_size": 2,
    "num_shown": 2,
    "texts": ["imagine"],
}


class Killed(Exception):
    """Raised by `StopAt`."""


class StopAt(L.Callback):
    """Crash a run after `step` optimizer steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


class KillAt(L.Callback):
    """Kill a rank, or all if None, with SIGKILL after `step` optimizer steps."""

    def __init__(self, step: int, rank: int | None = None):
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)


class SpoilLoss(L.Callback):
    """Makes the language model's loss of the last rank NaN in the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            head = pl_module.net.transformer.output
            self.hook = head.register_forward_hook(lambda module, inputs, out: out * torch.nan)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            self.hook.remove()


class OutOfMemory(L.Callback):
    """Takes all memory in the second step, as far as torch's error can tell."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Disturb(L.Callback):
    """Changes one weight of rank 1 after the second step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net.transformer.norm.weight[0] += 1e-6


class SignalAt(L.Callback):
    """Send this process a signal at the nth call of a hook, on one rank or on all if None."""

    def __init__(self, hook: str, nth: int = 1, signum: int = 15, rank: int | None = None):
        self.nth, self.signum, self.rank, self.count = nth, signum, rank, 0
        setattr(self, hook, self.call)

    def call(self, trainer, pl_module, *args):
        self.count += 1
        if self.count == self.nth and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.signum)


class RaiseAt(SignalAt):
    """Raise an error at the nth call of a hook."""

    def call(self, trainer, pl_module, *args):
        self.count += 1
        if self.count == self.nth and self.rank in (None, trainer.global_rank):
            raise Killed


class SleepAt(SignalAt):
    """Work for a long time, without the other ranks, at the nth call of a hook."""

    def call(self, trainer, pl_module, *args):
        self.count += 1
        if self.count == self.nth and self.rank in (None, trainer.global_rank):
            time.sleep(100)


class Examine(L.Callback):
    """Writes `examined` at the end of `fit`: the step of the last checkpoint, which is there."""

    def on_train_end(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir)
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        (folder / "examined").write_text(str(last["global_step"]))


class NoCopies(L.Callback):
    """Refuses a step while a copy of the network, besides the moving average, takes memory."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        networks = [x for x in gc.get_objects() if isinstance(x, TransfusionModel)]
        assert len(networks) == 2


class NoMemory(L.Callback):
    """Makes a rank believe that no memory is free, and writes down its warnings of failures."""

    def setup(self, trainer, pl_module, stage):
        gather.free_memory = lambda device: 0.0
        show = warnings.showwarning
        file = Path(trainer.default_root_dir, f"warnings-{trainer.global_rank}.txt")

        def keep(message, *args, **kwargs) -> None:
            if "failed" in str(message):
                with file.open("a") as opened:
                    opened.write(f"{message}\n")
            show(message, *args, **kwargs)

        warnings.showwarning = keep


class SpoilGradients(L.Callback):
    """Puts a NaN into the gradient of every step from the nth on."""

    def __init__(self, nth: int):
        self.nth = nth

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= self.nth:
            pl_module.net.transformer.norm.weight.grad[0] = torch.nan


def shapes(kind: str, num_documents: int, **arguments) -> dict:
    """The config of a source of the shapes world: Captions, Texts or Edits."""
    arguments = {"num_documents": num_documents, "num_val": NUM_VAL} | arguments
    return {
        "class_path": f"tf_lightning.shapes.sources.Shapes{kind}",
        "init_args": arguments,
    }


def trainer_config(folder: Path, callbacks: dict[str, dict]) -> dict:
    """A Trainer of MAX_STEPS steps on the CPU that writes to `folder`/run.

    Args:
        folder: parent of the run's folder.
        callbacks: arguments by class path, besides the checkpoint's (one every 3 steps).
    """
    checkpoint = ALWAYS["checkpoint"][1] | {"every_n_train_steps": 3}
    callbacks = {"lightning.pytorch.callbacks.ModelCheckpoint": checkpoint, **callbacks}
    logger = {"save_dir": str(folder), "name": "run", "version": "", "default_hp_metric": False}
    return {
        "accelerator": "cpu",
        "precision": "32-true",  # the same numbers on every CPU
        "devices": 1,
        "max_steps": MAX_STEPS,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": logger,
        },
        "callbacks": [{"class_path": k, "init_args": v} for k, v in callbacks.items()],
    }


def config(folder: Path) -> dict:
    """The whole configuration of a run in `folder`/run."""
    few = {"sampling": {"guidance_scale": 2.0, "num_inference_steps": 2}}
    callbacks = {
        "lightning.pytorch.callbacks.LearningRateMonitor": {"logging_interval": "step"},
        "callbacks.throughput.Throughput": {},
        "callbacks.text_perplexity.TextPerplexity": {},
        "callbacks.evaluate.Evaluate": {
            **EVALUATE,
            "sampling": few["sampling"] | {"max_new_tokens": 8},
        },
        "callbacks.shapes_report.ShapesReport": {"num_prompts": 4, **few},
        "callbacks.retrieval.RetrievalAccuracy": {"source": "captions", "num_prompts": 4, **few},
        "callbacks.predictions.PredictionWriter": {},
    }
    return {
        "seed_everything": 0,
        "trainer": trainer_config(folder, callbacks),
        "model": {
            "transformer": {
                "vocab_size": VOCAB_SIZE,
                "dim": 32,
                "num_layers": 2,
                "num_heads": 2,
                "ffn_dim": 48,
            },
            "patch_size": PATCH_SIZE,
            "latent_channels": 3,
            "lr": PEAK_LR,
            "warmup_steps": WARMUP_STEPS,
            "min_lr_ratio": MIN_LR_RATIO,
            "ema_decay": EMA_DECAY,
        },
        "data": {
            "class_path": "tf_lightning.data.Mixture",
            "init_args": {
                "sources": {
                    "captions": shapes("Captions", NUM_CAPTIONS),
                    "text": shapes("Texts", 40),
                },
                "autoencoder": "pixels",
                "vocab_size": VOCAB_SIZE,
                "patch_size": PATCH_SIZE,
                "row_length": 256,
                "batch_size": 2,
                "cache_dir": str(folder / "data"),
            },
        },
    }


def save_config(folder: Path, values: dict, change=lambda config: None) -> Path:
    """Write a copy of a configuration to `folder`/config.yaml after `change` has edited it."""
    values = copy.deepcopy(values)
    change(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_config(folder: Path, change=lambda config: None) -> Path:
    """Write the configuration to a file after `change` has edited it."""
    return save_config(folder, config(folder), change)


def fit(folder: Path, *arguments: str) -> Path:
    """Train; return the folder of the run."""
    main(["fit", "-c", str(write_config(folder)), *arguments])
    return folder / "run"


def only_checkpoints(config: dict) -> None:
    """Remove every callback but the checkpoint."""
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]


def stop_at(
    hook: str, nth: int = 1, signum: int = 15, kind: str = "Signal", rank: int | None = None
) -> list[str]:
    """Arguments of the command line that add `SignalAt`, `RaiseAt` or `SleepAt`."""
    prefix = "--trainer.callbacks"
    arguments = [f"{prefix}+=support.runs.{kind}At", f"{prefix}.hook={hook}", f"{prefix}.nth={nth}"]
    arguments += [] if rank is None else [f"{prefix}.rank={rank}"]
    return [*arguments, f"{prefix}.signum={int(signum)}"]
