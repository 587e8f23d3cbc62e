"""Checks of a run's settings before anything is built, and the precision where it is left open."""

import inspect
import os
from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.strategies import StrategyRegistry

from tf_lightning.autoencoder.frozen import load_matching_autoencoder
from tf_lightning.cli.advice import close
from tf_lightning.errors import UserError
from tf_lightning.training.module import Transfusion

LOOP = {"validate": "val", "test": "test", "predict": "predict"}
MOST_CPU_PROCESSES = 8  # of one run, on a machine with fewer cores


def check_seed(seed: bool | int) -> None:
    """Raise UserError for a seed that numpy does not take."""
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything={seed} must be from 0 to {2**32 - 1}")


def check_limits_positive(verb: str, trainer: Mapping) -> None:
    """Raise UserError if a limit is 0, with which Lightning silently does nothing."""
    limits = ["max_steps", "max_epochs", "limit_train_batches"]
    for name in limits if verb == "fit" else [f"limit_{LOOP[verb]}_batches"]:
        if trainer[name] == 0:
            raise UserError(f"{verb} with {name}=0 has nothing to do; give 1 or more")
    time = trainer.get("max_time")
    if verb == "fit" and time and not str(time).strip("0:"):
        raise UserError(f"fit with max_time={time} has nothing to do; give DD:HH:MM:SS")
    known = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(trainer.strategy, str) and trainer.strategy not in known:
        near = close(trainer.strategy, known)
        advice = f"did you mean {near}?" if near else "give auto, ddp, fsdp or a class"
        raise UserError(f"there is no trainer.strategy={trainer.strategy}; {advice}")


def check_cpu(trainer: Mapping) -> None:
    """Raise UserError for settings of the trainer that a CPU cannot run."""
    if trainer.precision in (16, "16", "16-mixed"):
        raise UserError(
            f"precision={trainer.precision} needs a GPU; use bf16-mixed or 32-true on a CPU"
        )
    most = max(MOST_CPU_PROCESSES, os.cpu_count() or 1)
    if str(trainer.devices).isdecimal() and int(trainer.devices) > most:
        raise UserError(
            f"trainer.devices={trainer.devices} starts as many processes on this CPU; give at most "
            f"{most}"
        )


def check_autoencoder(model: Transfusion, data: L.LightningDataModule, configured: int) -> None:
    """Refuse an autoencoder that does not fit the model, before any image is encoded.

    Args:
        model: built with the latent channels of the data's autoencoder.
        data: names its autoencoder, if it has one.
        configured: `latent_channels` of the configuration or the checkpoint; the default of
            Transfusion counts as not configured.
    """
    if name := getattr(data, "autoencoder_name", None):
        default = inspect.signature(Transfusion).parameters["latent_channels"].default
        channels = model.hparams.latent_channels if configured == default else configured
        load_matching_autoencoder(name, channels, model.hparams.num_codes)


def fast_precision(accelerator: str) -> str:
    """Return the precision that the hardware multiplies faster, "bf16-mixed" or "32-true".

    A CPU without AVX-512 BF16 or AMX emulates bf16, which is slower than fp32.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch 2.x
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16-mixed" if fast else "32-true"
