"""LightningCLI for Transfusion and autoencoders: any data module, errors in one sentence."""

import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from tf_lightning.autoencoder.frozen import load_matching_autoencoder
from tf_lightning.checkpoint import AUTOENCODER, TRANSFUSION, read_checkpoint
from tf_lightning.cli.parser import stop
from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

LOOP = {"validate": "val", "test": "test", "predict": "predict"}
OTHERS = "generate, inspect, export, sizes"


class ConfigParser(LightningArgumentParser):
    """Parses a run's configuration; a mistake is reported in one line and exits with code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report a mistake and exit with code 2."""
        stop(message, code=2, hint="`tf-lightning VERB --help` lists the keys.")


class SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml when training starts; what is refused or evaluated leaves an older one."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: data and checkpoint may still not fit the model."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        super().setup(trainer, pl_module, "fit")


class TransfusionCLI(LightningCLI):
    """Checks the checkpoint before anything is built; says a config's mistake in one sentence."""

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """Parse; refuse a checkpoint that is missing or damaged."""
        super().parse_arguments(parser, args)
        verb = self.config.get("subcommand")
        if verb is None:  # `prepare`
            return
        path = self.config[verb].get("ckpt_path")
        if verb != "fit" and not path:
            raise UserError(f"{verb} needs a trained model; add --ckpt_path FILE")
        refuse_nothing(verb, self.config[verb].trainer)
        if path and (verb, path) != ("fit", "last"):
            read_checkpoint(path, self.kind(verb))

    def _parse_ckpt_path(self) -> None:
        """Replace the model's arguments by the hyper-parameters of `--ckpt_path FILE`.

        LightningCLI does the same, but does not know how to upgrade older checkpoints.
        """
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        if path and Path(path).is_file():
            hparams = read_checkpoint(path, self.kind(verb), mmap=True)["hyper_parameters"]
            if class_path := self.config[verb].model.get("class_path"):
                hparams = {"class_path": class_path, "init_args": hparams}
            self.config = self.parser.parse_object({verb: {"model": hparams}}, self.config)

    def kind(self, verb: str) -> str:
        """Of the checkpoints that belong to this configuration."""
        name = f"{AutoencoderModule.__module__}.{AutoencoderModule.__name__}"
        return AUTOENCODER if self.config[verb].model.get("class_path") == name else TRANSFUSION

    def before_instantiate_classes(self) -> None:
        """Choose the precision where the config leaves it open; config.yaml records the choice."""
        config = self.config[self.config.subcommand] if self.config.get("subcommand") else None
        if config and config.trainer.precision is None:
            config.trainer.precision = fast_precision(config.trainer.accelerator)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer from the config."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            cause: BaseException = error  # jsonargparse wraps what a constructor says
            while cause.__cause__:
                cause = cause.__cause__
            raise UserError(" ".join(str(cause).split())) from error
        if isinstance(self.model, Transfusion):
            check_pictures(self.model, self.datamodule)

    def before_fit(self) -> None:
        """Refuse a damaged file that `--ckpt_path last` would resume, and a run that cannot be."""
        if isinstance(self.model, AutoencoderModule):
            self.model.before_training(self.trainer, self.datamodule)
        resumed = self.config.fit.ckpt_path
        if resumed == "last" and self.trainer.checkpoint_callback:
            folder = self.trainer.checkpoint_callback.dirpath
            last = Path(folder or f"{self.trainer.log_dir}/checkpoints") / "last.ckpt"
            resumed = last.is_file()
            if resumed:
                read_checkpoint(last, self.kind("fit"))
        for callback in self.trainer.callbacks:
            if not resumed and hasattr(callback, "before_training"):  # InitFrom
                callback.before_training(self.model, self.datamodule)


def refuse_nothing(verb: str, trainer: Mapping) -> None:
    """Lightning does nothing at all, and says nothing, where a limit is 0."""
    limits = ["max_steps", "max_epochs"] if verb == "fit" else [f"limit_{LOOP[verb]}_batches"]
    for name in limits:
        if trainer[name] == 0:
            raise UserError(f"{verb} with {name}=0 has nothing to do; give 1 or more")


def check_pictures(model: Transfusion, data: L.LightningDataModule) -> None:
    """Refuse an autoencoder that is not the model's before a picture is encoded."""
    if name := getattr(data, "autoencoder_name", None):
        load_matching_autoencoder(name, model.hparams.latent_channels, model.hparams.num_codes)


def fast_precision(accelerator: str) -> str:
    """Which of "bf16-mixed" and "32-true" the hardware multiplies faster.

    A CPU without AVX-512 BF16 or AMX emulates bf16, five times slower than fp32.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than some torch 2.x
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16-mixed" if fast else "32-true"


def quiet() -> None:
    """Leave out what Lightning tells its own developers and what a user cannot act on."""
    noise = ("💡 Tip:", "TPU available")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(noise))
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # Lightning 2.6
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")  # evaluations
    warnings.filterwarnings("ignore", ".*before the ``update`` method")  # the data says it: empty
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # a verb of ours has fewer
    warnings.filterwarnings("ignore", ".*does not have many workers")  # rows are cheap to load


def names_model_class(args: list[str]) -> bool:
    """Whether a configuration or an argument says which class its model is of.

    Without one it is Transfusion's, whose arguments then stand under `model:` themselves.
    """
    for option, following in zip(args, [*args[1:], ""], strict=True):
        name, _, value = option.partition("=")
        if name.startswith(("--model.class_path", "--model.help")):
            return True
        if name in ("-c", "--config", "--model") and holds_model_class(Path(value or following)):
            return True
    return False


def holds_model_class(file: Path) -> bool:
    """Whether a file of a configuration, or of its `model:` alone, names the model's class."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the parser says what is wrong with it
    model = content.get("model", content) if isinstance(content, dict) else None
    return isinstance(model, dict) and "class_path" in model


def build(args: list[str], run: bool = True, prog: str = "prepare") -> TransfusionCLI:
    """Parse the arguments, build what they name and, with `run`, run its verb."""
    quiet()
    subclass = names_model_class(args)
    return TransfusionCLI(
        L.LightningModule if subclass else Transfusion,
        L.LightningDataModule,
        subclass_mode_model=subclass,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=ConfigParser,
        parser_kwargs={"prog": "tf-lightning" if run else f"tf-lightning {prog}"},
        args=None if args == sys.argv[1:] else args,  # it warns when both are given
        run=run,
    )


def run_lightning(args: list[str]) -> None:
    """Run fit, validate, test or predict."""
    verbs = [*TransfusionCLI.subcommands(), "prepare"]
    if args[0] not in verbs and not args[0].startswith("-"):
        raise UserError(f"unknown command {args[0]!r}; use one of {', '.join(verbs)}, {OTHERS}")
    build(args)
