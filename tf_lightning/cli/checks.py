"""Checks of a run's settings before anything is built, and the precision where it is left open."""

import inspect
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry

from tf_lightning.autoencoder.frozen import load_matching_autoencoder
from tf_lightning.cli.advice import nearest_name
from tf_lightning.errors import UserError
from tf_lightning.folders import check_writable
from tf_lightning.training.module import Transfusion

LARGEST = 2**63 - 1  # number that torch's integers hold
# Options of the data that name a file or folder; an empty one would mean the current folder.
PATHS = ("autoencoder", "cache_dir", "encoded", "tokenizer")
LOOP = {"validate": "val", "test": "test", "predict": "predict"}
MOST_CPU_PROCESSES = 8  # of one run, on a machine with fewer cores


def check_seed(seed: bool | int | None) -> None:
    """Raise UserError for a seed that numpy does not take."""
    if seed is None or not isinstance(seed, bool) and not 0 <= seed < 2**32:
        shown = "null" if seed is None else seed
        raise UserError(f"seed_everything={shown} must be from 0 to {2**32 - 1}")


def check_values(values: Any, key: str = "") -> None:
    """Raise UserError for a value that no option takes, at any depth of a configuration.

    Args:
        values: a configuration or a value in it.
        key: its dotted key.
    """
    if isinstance(values, Namespace):
        values = vars(values)
    if isinstance(values, dict):
        for name, value in values.items():
            check_values(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            check_values(value, key)
    elif isinstance(values, int) and abs(values) > LARGEST and key != "seed_everything":
        raise UserError(f"{key}={values} must be at most {LARGEST}")
    elif isinstance(values, str) and "\0" in values:
        raise UserError(f"{key} holds the character \\0, which no name has; leave it out")


def check_groups(part: str, config: Namespace) -> None:
    """Raise UserError for a group of options of the model or the data that is not a mapping.

    Args:
        part: "model" or "data".
        config: its `class_path` and `init_args`.
    """
    options = config.get("init_args") or {}
    try:
        kinds = get_type_hints(pkgutil.resolve_name(config.class_path).__init__)
    except NameError:  # a class whose annotations only a type checker can resolve
        return
    for name, kind in kinds.items():
        if name in options and is_dataclass(kind) and not isinstance(options[name], Namespace):
            shown = "null" if options[name] is None else options[name]
            raise UserError(
                f"{part}.{name} is {shown}; give its options, as in --{part}.{name}.KEY VALUE"
            )


def check_data_paths(options: Mapping) -> None:
    """Raise UserError for an empty path of the data, and for a cache_dir that is not a folder."""
    for name in PATHS:
        if options.get(name) == "":
            raise UserError(f"data.{name} is empty; give a name, or leave it out")
    if options.get("cache_dir"):
        check_writable(Path(options["cache_dir"]))


def check_limits_positive(verb: str, trainer: Mapping) -> None:
    """Raise UserError if a limit is 0, with which Lightning silently does nothing."""
    limits = ["max_steps", "max_epochs", "limit_train_batches"]
    for name in limits if verb == "fit" else [f"limit_{LOOP[verb]}_batches"]:
        if trainer[name] == 0:
            raise UserError(f"{verb} with {name}=0 has nothing to do; give 1 or more")


def check_strategy_name(strategy: Any) -> None:
    """Raise UserError for the name of a strategy that Lightning does not have."""
    known = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(strategy, str) and strategy not in known:
        near = nearest_name(strategy, known)
        advice = f"did you mean {near}?" if near else "give auto, ddp, fsdp or a class"
        raise UserError(f"there is no trainer.strategy={strategy}; {advice}")


def check_cpu(trainer: Mapping) -> None:
    """Raise UserError for settings of the trainer that a CPU cannot run."""
    if trainer.precision in (16, "16", "16-mixed"):
        raise UserError(
            f"precision={trainer.precision} needs a GPU; use bf16-mixed or 32-true on a CPU"
        )
    most = max(MOST_CPU_PROCESSES, os.cpu_count() or 1)
    if trainer.devices == "auto":
        return
    if not str(trainer.devices).isdecimal() or int(trainer.devices) < 1:
        raise UserError(
            f"trainer.devices={trainer.devices} must be a number of processes on a CPU, at least 1"
        )
    if int(trainer.devices) > most:
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
