"""LightningCLI for Transfusion: one model class, any data module, errors in one sentence."""

import sys

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from tf_lightning.errors import UserError
from tf_lightning.model import read_checkpoint
from tf_lightning.module import Transfusion


class Parser(LightningArgumentParser):
    """Says what is wrong on one line instead of printing the whole usage first."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Exit with code 2."""
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        print(f"tf-lightning: error: {' '.join(lines)}", file=sys.stderr)
        print("`tf-lightning VERB --help` lists the keys.", file=sys.stderr)
        raise SystemExit(2)


class SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml when a run trains, never when it is evaluated."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save in `fit` only, so that `validate` leaves the training run's file alone."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class TransfusionCLI(LightningCLI):
    """Checks the checkpoint before anything is built."""

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; refuse a checkpoint that is missing or damaged."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("last", "best", "hpc"):
            read_checkpoint(path)


def run_lightning(args: list[str]) -> None:
    """Run fit, validate, test or predict."""
    verbs = TransfusionCLI.subcommands()
    if args[0] not in verbs and not args[0].startswith("-"):
        raise UserError(f"unknown command {args[0]!r}; use one of {', '.join(verbs)}, generate")
    sys.argv = [sys.argv[0]]  # LightningCLI warns when both are given
    TransfusionCLI(
        Transfusion,
        L.LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        args=args,
    )
