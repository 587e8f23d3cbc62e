"""LightningCLI with this project's defaults, links between model and data, and one-line errors."""

import os
import pkgutil
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tf_lightning.checkpoint import (
    AUTOENCODER,
    TRANSFUSION,
    find_checkpoint,
    find_checkpoints,
    newest_sound,
    read_checkpoint,
)
from tf_lightning.cli.advice import find_problem, renamed
from tf_lightning.cli.checks import (
    check_autoencoder,
    check_cpu,
    check_data_paths,
    check_groups,
    check_limits_positive,
    check_seed,
    check_strategy_name,
    check_values,
    fast_precision,
)
from tf_lightning.cli.command_line import (
    config_files,
    expand_home,
    refuse_linked,
    refuse_model_options,
    refuse_options_of_list,
    typed_keys,
    warn_of_unused_values,
    without_value,
)
from tf_lightning.cli.config_files import ConfigContent, Place, read_config
from tf_lightning.cli.config_parser import ConfigError, ConfigFile, ConfigParser
from tf_lightning.cli.exported import ExportIO, is_exported, read_trained
from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.cli.parser import Parser, stop
from tf_lightning.cli.quiet import silence_warnings
from tf_lightning.cli.run_callbacks import (
    ALWAYS,
    SaveFitConfig,
    always_callbacks,
    named_callbacks,
    refuse_unused,
)
from tf_lightning.cli.run_folder import (
    LOGGER,
    EarlierRun,
    append_to_csv,
    default_folder,
    files_of_run,
    folder_of,
    is_requeued,
    is_sound,
    last_configured,
    next_commands,
    only_process,
    refuse_moved_run,
    refuse_needed,
    refuse_started_run,
    resume_command,
)
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.stream import check_same_seed
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.folders import check_writable
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.fsdp import check_numbers
from tf_lightning.training.interrupts import Interrupts
from tf_lightning.training.last_checkpoint import LastCheckpoint, link_to
from tf_lightning.training.missed_work import MissedWork, read_progress
from tf_lightning.training.module import Transfusion
from tf_lightning.training.precision import check_precision
from tf_lightning.training.sharded_saves import ShardedStrategy

# Defaults of every recipe. A recipe states what differs.

TRAINER = {
    "accelerator": "auto",
    "devices": 1,
    "precision": None,  # bf16-mixed where the hardware multiplies it faster, else 32-true
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the data modules divide rows among ranks themselves
    "check_val_every_n_epoch": None,  # val_check_interval counts steps: the stream has no epochs
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 25,
    "enable_model_summary": False,  # SaveFitConfig says how many parameters there are
}
EXAMPLE = "configs/quickstart.yaml"

HINT = "`tf-lightning fit --help` lists the keys."


class TransfusionCLI(LightningCLI):
    """Adds defaults and links, checks the checkpoint first, and reports mistakes in one line."""

    def __init__(
        self,
        *args,
        verb: str | None = None,
        data_only: bool = False,
        parse_only: bool = False,
        more_options: Iterable[str] = (),
        **kwargs,
    ) -> None:
        """Parse, build and run.

        Args:
            args: arguments of LightningCLI.
            verb: the command, if it is known; then no parser is built for the others, which saves
                most of the time that parsing takes.
            data_only: build only the data; its options that follow the model are taken from the
                configuration, which needs no model that fits.
            parse_only: build nothing; `config` has the values.
            more_options: names of the command's options that are not in the configuration.
            kwargs: arguments of LightningCLI.
        """
        self.verb, self.data_only, self.parse_only = verb, data_only, parse_only
        self.files: dict[str, ConfigContent] = {}
        self.places: dict[str, Place] = {}
        self.given, self.seed_follows = set(), False
        self.more_options = more_options
        try:
            super().__init__(*args, **kwargs)
        except ConfigError as error:
            sentence = self.explain(error)
            stop(sentence, code=2, hint=f"{HINT}{renamed(sentence)}")

    def explain(self, error: ConfigError) -> str:
        """Describe a configuration that does not parse in one sentence, with its file and line."""
        problem = find_problem(error.report, [*error.options, *self.more_options])
        if not self.places and " needs " in problem.sentence:
            return (
                f"{self.verb} needs the configuration of a run; give -c CONFIG, such as {EXAMPLE}"
            )
        if "expected one argument" in problem.sentence and (word := without_value(self.typed)):
            return f"{word} needs a value, as in {word}=VALUE"
        place = self.place_of(problem.key)
        return f"{place}: {problem.sentence}" if place else problem.sentence

    def place_of(self, key: str) -> Place | None:
        """Return where a key stands, or the nearest key above it; None for a typed one."""
        while key and key not in self.typed_keys:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return None

    def with_place(self, message: str) -> str:
        """Complete a message that begins with an argument, such as "lr=-1", by where it is given.

        The name becomes the whole key, after the file and line. A message stays as it is if several
        given keys end in this name, or none.
        """
        argument = re.match(r"[\w.]+(?==)", message)
        given = {*self.places, *self.typed_keys} if argument else ()
        keys = [key for key in given if key.endswith(f".{argument[0]}")]
        if len(keys) != 1:
            return message
        place, message = self.place_of(keys[0]), keys[0] + message[argument.end() :]
        return f"{place}: {message}" if place else message

    def init_parser(self, **kwargs) -> LightningArgumentParser:
        """Create a parser whose configuration files are read by `ConfigFile`."""
        parser = self.parser_class(**kwargs)
        parser.files = self.files
        parser.add_argument("-c", "--config", action=ConfigFile, help="configuration file, YAML")
        return parser

    def subcommands(self) -> dict[str, set[str]]:
        """Return the commands to build parsers for, with Trainer arguments that they leave out."""
        commands = LightningCLI.subcommands()
        return {self.verb: commands[self.verb]} if self.verb in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults, add the callbacks of every run, and link the data to the model."""
        if self.verb == "fit":
            parser.add_argument(
                "--overwrite",
                action="store_true",
                help="Remove the earlier run in this folder when training starts.",
            )
        # With a default class, `model:` and `data:` may hold the arguments of the class directly.
        parser.set_defaults({"model": {"class_path": class_path(Transfusion)}})
        parser.set_defaults({"data": {"class_path": class_path(Mixture)}})
        parser.set_defaults({"trainer.logger": LOGGER})
        for key, (path, defaults) in ALWAYS.items():
            parser.add_class_arguments(pkgutil.resolve_name(path), key, sub_configs=True)
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
        for key, named in NAMED.items():
            cls = pkgutil.resolve_name(named.class_path)
            parser.add_argument(f"--{key}", type=cls | None, default=None, help=named.purpose)
            if named.default:
                parser.set_defaults({key: {"class_path": named.class_path}})
        model, data = "model.init_args", "data.init_args"
        parser.link_arguments(f"{model}.patch_size", f"{data}.patch_size")
        parser.link_arguments(f"{model}.transformer.vocab_size", f"{data}.vocab_size")
        parser.link_arguments(f"{model}.linear", f"{data}.time_token", compute_fn=time_token)
        # Data without continuous latents has no such attribute, and the model's value stays.
        parser.link_arguments(
            "data.latent_channels", f"{model}.latent_channels", apply_on="instantiate"
        )

    def _prepare_subcommand_parser(self, *args, **kwargs) -> LightningArgumentParser:
        """Create the parser of a command, with our words for the options of `Trainer.fit`.

        Lightning's table drops labels in brackets, so `verbose` is off, and
        `callbacks.scores.PrintScores` prints a table of its own. `weights_only` has no effect,
        because no checkpoint may run code.
        """
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = "Checkpoint: a file, the folder of a run, or last."
            elif action.dest in ("verbose", "weights_only"):
                action.help = SUPPRESS
            if action.dest == "verbose":
                parser.set_defaults(verbose=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """Parse, and refuse a checkpoint that is missing or damaged."""
        args = expand_home(sys.argv[1:] if args is None else args)
        refuse_linked(args)
        self.typed = args
        self.typed_keys = typed_keys(args)
        try:
            self.read_files(args)
        except UserError as error:
            stop(str(error), code=2, hint=HINT)
        self.given = {*self.places, *self.typed_keys}
        refuse_options_of_list(self.typed_keys, self.files.values())
        if self.data_only and "model" not in self.places:
            args = ["--model.transformer={}", *args]
        super().parse_arguments(parser, args)
        expand_home(self.config)
        verb = self.config.get("subcommand")
        config = self.config[verb] if verb else self.config
        warn_of_unused_values(self.files.values(), config)
        check_seed(config.seed_everything)
        check_values(config)
        for part in ("model", "data"):
            check_groups(part, config[part])
        check_data_paths(config.data.get("init_args") or {})
        if verb is None:  # built for `prepare`, `inspect` or `plan`
            return
        check_limits_positive(verb, config.trainer)
        check_strategy_name(config.trainer.strategy)
        config.ckpt_path = self.find_checkpoint(verb, config)
        if config.ckpt_path not in (None, "last"):
            read_trained(config.ckpt_path, self.kind(verb))

    def read_files(self, args: list[str]) -> None:
        """Read the configuration files of the command line.

        Raises:
            UserError: a file is not a configuration.
        """
        for word in config_files(args):
            self.files[word] = content = read_config(Path(word))
            content.refuse_empty_groups(["trainer", "model", "data", *ALWAYS])
            if "config" in content.values:
                raise UserError(f"{content.places['config']}: config is not a key; give another -c")
            self.places |= content.places

    def find_checkpoint(self, verb: str, config: Namespace) -> str | None:
        """Return the checkpoint that `ckpt_path` means: a file, or the last one of a folder.

        `fit` resolves "last" itself, when the run's folder is known.
        """
        path = config.get("ckpt_path")
        if verb == "fit" and path in (None, "last"):
            return path
        if not path:
            needs = "--ckpt_path is empty" if verb == "fit" else f"{verb} needs a trained model"
            ways = "give FILE or last, or leave it out" if verb == "fit" else "add --ckpt_path FILE"
            raise UserError(f"{needs}; {ways}")
        if verb == "fit" and is_exported(path):
            raise UserError(
                f"{path} is an export, which has no optimizer to resume; start a new run from it "
                f"with --init_from.checkpoint {path}"
            )
        if path != "last":
            return path if is_exported(path) else str(find_checkpoint(path, self.kind(verb)))
        return str(last_configured(config, self.files.values(), self.kind(verb)))

    def _parse_ckpt_path(self) -> None:
        """Replace the model's arguments by the hyper-parameters of `--ckpt_path FILE`.

        LightningCLI does the same, but does not know how to upgrade older checkpoints. `fit` keeps
        its configuration; the module refuses what a resumed run cannot change.
        """
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        if path and verb != "fit":
            hparams = read_trained(path, self.kind(verb))["hyper_parameters"]
            refuse_model_options(self.typed, verb, self.config[verb].model.init_args, hparams)
            if path_of_class := self.config[verb].model.get("class_path"):
                hparams = {"class_path": path_of_class, "init_args": hparams}
            self.config = self.parser.parse_object({verb: {"model": hparams}}, self.config)

    def kind(self, verb: str) -> str:
        """Return the kind of checkpoint that the configured model reads."""
        trains_autoencoder = self.config[verb].model.class_path == class_path(AutoencoderModule)
        return AUTOENCODER if trains_autoencoder else TRANSFUSION

    def before_instantiate_classes(self) -> None:
        """Choose the precision where the config leaves it open; config.yaml records the choice."""
        config = self.config[self.config.subcommand] if self.config.get("subcommand") else None
        if config and config.trainer.precision is None:
            config.trainer.precision = fast_precision(config.trainer.accelerator)
        if config and str(config.trainer.precision).startswith("transformer-engine"):
            check_precision(config.trainer.precision)  # before Lightning asks to install it
        if config and (config.trainer.accelerator == "cpu" or not torch.cuda.is_available()):
            check_cpu(config.trainer)
        self.link_seed(self.config.get(self.subcommand or "", self.config))

    def link_seed(self, config: Namespace) -> None:
        """Give data and model the run's seed where theirs are left open; config.yaml records it."""
        for part in ("data", "model"):
            arguments = (config.get(part) or {}).get("init_args") or {}
            if "seed" in arguments and f"{part}.seed" not in self.given:
                arguments.seed = int(config.seed_everything)
                self.seed_follows |= part == "data"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Refuse to resume a run of other rows; see `StreamData.load_state_dict`."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        path = arguments.get("ckpt_path")
        if subcommand == "fit" and path and Path(path).exists():
            state = read_checkpoint(path, self.kind("fit"), mmap=True)
            position = state.get(type(self.datamodule).__qualname__, {})
            seed = getattr(self.datamodule, "seed", None)
            # Data of older versions recorded no seed; theirs was 0 whatever seed_everything was.
            check_same_seed(position.get("seed", 0 if self.seed_follows else seed), seed)
        return arguments

    def instantiate_classes(self) -> None:
        """Build data, model and trainer from the config."""
        if self.parse_only:
            return
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        try:
            if self.data_only:
                data = self.parser.instantiate_classes(Namespace(data=self.config.data)).data
                self.datamodule = data
                return
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            cause: BaseException = error  # jsonargparse wraps the message of a constructor
            while cause.__cause__ and not isinstance(cause, UserError):
                cause = cause.__cause__
            message = " ".join(str(cause).split())
            if "argument after ** must be a mapping" in message or "'NoneType' object" in message:
                message = "an option or a group of options is null; give it, or leave it out"
            raise UserError(self.with_place(message)) from error
        if isinstance(self.model, Transfusion):
            check_autoencoder(self.model, self.datamodule, config.model.init_args.latent_channels)

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        """Build the trainer with the callbacks of every run before those of `trainer.callbacks`."""
        built = self.config_init.get(self.subcommand) or self.config_init
        listed = built.trainer.callbacks or []
        listed = listed if isinstance(listed, list) else [listed]
        if built.trainer.fast_dev_run:  # ModelCheckpoint would still save at the end
            listed = [own for own in listed if not isinstance(own, ModelCheckpoint)]
            kwargs["enable_checkpointing"] = built.trainer.enable_checkpointing = False
        always = always_callbacks(built, listed)
        refuse_unused(self.typed_keys, built, listed)
        self.run_folder = folder_of(built.trainer.logger, default_folder(built.trainer))
        listed = [*named_callbacks(built, listed, isinstance(self.model, Transfusion)), *listed]
        savers = [own for own in [*always, *listed] if isinstance(own, ModelCheckpoint)]
        for saver in savers:
            saver.dirpath = saver.dirpath or str(self.run_folder / "checkpoints")
        self.saver = next((saver for saver in savers if saver.save_last), next(iter(savers), None))
        self.earlier = EarlierRun()
        self.interrupts = Interrupts()
        ends = [self.earlier, self.interrupts]
        self.last_state = LastCheckpoint(self.saver) if self.saver else None
        ends += [self.last_state, MissedWork()] if self.saver else []
        plugins = built.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, ExportIO()]
        # Lightning keeps the state of jobs that SLURM preempts in the root directory.
        kwargs["default_root_dir"] = str(self.run_folder)
        if isinstance(built.trainer.strategy, ModelParallelStrategy):
            kwargs["strategy"] = ShardedStrategy.like(built.trainer.strategy)
        callbacks = [*always, *listed, *ends]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def after_instantiate_classes(self) -> None:
        """Run the checks that need no prepared data, including the callbacks' checks."""
        if not self.subcommand:
            return
        writers = [c for c in self.trainer.callbacks if isinstance(c, BasePredictionWriter)]
        if self.subcommand == "predict" and not writers:
            raise UserError("predict would write nothing; add --prediction_writer {}")
        if not self.trainer.fast_dev_run:
            check_writable(self.run_folder)
        arguments = self.config_init[self.subcommand]
        if arguments.get("verbose"):
            rank_zero_warn("verbose is not used: Lightning's table drops labels such as [shapes]")
            arguments["verbose"] = False
        for callback in self.trainer.callbacks:
            if hasattr(callback, "before_run"):
                callback.before_run(self.trainer, self.model, self.datamodule)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; `fit` keeps other processes out of the folder before it looks into it."""
        writes = self.trainer.is_global_zero and not self.trainer.fast_dev_run
        alone = nullcontext()
        if subcommand == "fit" and writes:
            alone = only_process(self.run_folder, self.folder_option())
        with alone:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Choose the checkpoint to resume, and refuse an impossible run."""
        if hasattr(self.model, "before_training"):
            self.model.before_training(self.trainer, self.datamodule)
        self.finished_step = None
        resumed = self.choose_checkpoint()
        self.config_init.fit.ckpt_path = resumed
        is_sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if is_sharded and resumed and Path(resumed).is_file():
            check_numbers(read_checkpoint(resumed, self.kind("fit"), mmap=True))
        for callback in self.trainer.callbacks:
            if not resumed and hasattr(callback, "before_training"):  # InitFrom
                callback.before_training(self.model, self.datamodule)
        if resumed:
            self.keep_rows()
        # The checks of callbacks draw random numbers; the initial weights do not depend on them.
        reset_seed()

    def keep_rows(self) -> None:
        """Keep the rows of metrics.csv, which Lightning's logger would remove."""
        for logger in self.trainer.loggers if self.trainer.is_global_zero else ():
            if isinstance(logger, CSVLogger):
                append_to_csv(logger)

    before_validate = before_test = before_predict = keep_rows

    def choose_checkpoint(self) -> str | None:
        """Return the checkpoint that `fit` resumes; None for a new run.

        Raises:
            UserError: a new run would be mixed with the one in its folder.
        """
        config, trainer = self.config.fit, self.trainer
        overwrite = config.pop("overwrite", False)  # config.yaml is used again, without it
        if trainer.fast_dev_run:
            return None if config.ckpt_path == "last" else config.ckpt_path
        if overwrite:
            self.replace_earlier_run()
        elif config.ckpt_path == "last" or (not config.ckpt_path and is_requeued()):
            return self.last_checkpoint()
        elif not config.ckpt_path:
            refuse_started_run(*self.folders(), self.folder_option())
        return config.ckpt_path

    def folders(self) -> tuple[Path, Path]:
        """Return the folder of the run and the folder of its checkpoints."""
        default = self.run_folder / "checkpoints"
        return self.run_folder, Path(self.saver.dirpath) if self.saver else default

    def folder_option(self) -> str:
        """Return the option that gives a run another folder."""
        if not self.trainer.loggers:
            return "--trainer.default_root_dir"
        if not isinstance(self.config.fit.trainer.logger, list):
            return "--trainer.logger.name"
        place = self.place_of("trainer.logger")  # an option cannot reach into a list
        return f"`name` for the first of trainer.logger{f' ({place})' if place else ''}"

    def replace_earlier_run(self) -> None:
        """Let `EarlierRun` remove the files in the run's folder.

        Raises:
            UserError: the new run would start from it.
        """
        if self.config.fit.ckpt_path:
            raise UserError(
                "--overwrite removes the checkpoints that --ckpt_path would resume; leave one of "
                "them out"
            )
        needed = [getattr(callback, "checkpoint", None) for callback in self.trainer.callbacks]
        names = "tokenizer_file", "autoencoder_name"
        needed += [getattr(self.datamodule, name, None) for name in names]
        needed = [name for name in needed if isinstance(name, str | Path)]
        refuse_needed(*self.folders(), needed, self.folder_option())
        self.earlier.files = files_of_run(*self.folders())

    def last_checkpoint(self) -> str | None:
        """Return the newest sound checkpoint of the run's folder, if there is one.

        Sets `finished_step` where the run has nothing left to do.

        Raises:
            UserError: the configuration is of a run that was moved.
        """
        folder, checkpoints = self.folders()
        files, last = find_checkpoints(folder, checkpoints), checkpoints / "last.ckpt"
        if not files:
            refuse_moved_run(folder, self.files.values())
            rank_zero_info(f"There is no {last} yet; training starts at step 0.")
            return None
        shards = isinstance(self.trainer.strategy, ShardedStrategy)  # loads what rank zero found
        all_shards = self.trainer.is_global_zero or not shards
        found = newest_sound(files, self.kind("fit"), all_shards)
        if self.trainer.is_global_zero and (last.is_symlink() or not last.exists()):
            link_to(found, last)  # the run was killed before it did so, or its last one is damaged
        finished = (read_progress(folder) or {}).get("finished_step")
        if finished and 0 < self.trainer.max_steps <= finished:
            self.finished_step = finished
        return str(found)

    def fit(self, **arguments) -> None:
        """Train; LightningCLI calls it in place of `Trainer.fit`.

        A run that does not reach its end says how to go on. A finished one is left as it is.
        """
        if not self.finished_step:
            self.run_trainer("fit", arguments)
            return
        rank_zero_info(
            f"The run in {os.path.relpath(self.run_folder)} ended at step "
            f"{self.finished_step:,}, and nothing is missing; raise trainer.max_steps to go on."
        )

    def validate(self, **arguments) -> None:
        """Validate; LightningCLI calls it in place of `Trainer.validate`."""
        self.run_trainer("validate", arguments)

    def test(self, **arguments) -> None:
        """Test; LightningCLI calls it in place of `Trainer.test`."""
        self.run_trainer("test", arguments)

    def predict(self, **arguments) -> None:
        """Predict; LightningCLI calls it in place of `Trainer.predict`."""
        self.run_trainer("predict", arguments)

    def run_trainer(self, verb: str, arguments: dict[str, Any]) -> None:
        """Run the trainer; say how to go on if training ends early."""
        try:
            with self.interrupts.ending.together(self.trainer):
                getattr(self.trainer, verb)(**arguments)
        except BaseException as error:
            began = not self.last_state or self.last_state.began
            refused = isinstance(error, UserError) and not began  # the same command fails again
            tells = verb == "fit" and self.trainer.is_global_zero and not refused
            hint = self.how_to_go_on() if tells else ""
            if isinstance(error, Interrupted):
                error.hint = hint
            elif hint:
                print(hint, file=sys.stderr)
            raise

    def how_to_go_on(self) -> str:
        """Return the newest sound checkpoint of a run that ended early, and how to resume it."""
        if not self.last_state or self.trainer.fast_dev_run:
            return ""
        found = find_checkpoints(self.run_folder, Path(self.saver.dirpath))
        sound = next(filter(is_sound, found), None)
        if sound is None:
            unsaved = self.last_state.step > self.last_state.saved_step
            reason = "no checkpoint could be written" if unsaved else "no step was finished"
            return f"Nothing was saved, because {reason}."
        newest = os.path.relpath(sound)
        return f"The newest checkpoint is {newest}. Go on with:\n  {resume_command(self.typed)}"

    def after_fit(self) -> None:
        """Print where the checkpoint is and what to type next."""
        trainer = self.trainer
        step = f"step {self.finished_step or trainer.global_step:,}"
        if trainer.fast_dev_run:
            rank_zero_info("The trial run (fast_dev_run) is over; it saved nothing.")
        elif not self.saver:
            rank_zero_info(f"Trained to {step}; nothing was saved, as checkpoints are turned off.")
        elif isinstance(self.model, Transfusion):
            last = os.path.relpath(Path(self.saver.dirpath, "last.ckpt"))
            draws = self.datamodule.autoencoder_name is not None
            commands = "\n  ".join(next_commands(last, draws, trainer.loggers))
            rank_zero_info(f"The last checkpoint is {last} ({step}). Next:\n  {commands}")


def class_path(cls: type) -> str:
    """Return the path under which a configuration names a class."""
    return f"{cls.__module__}.{cls.__name__}"


def time_token(linear: Namespace | None) -> bool:
    """Return whether the configured linear patch coder puts the noise level into a token."""
    if linear is None:
        return False
    arguments = linear.get("init_args", linear)  # jsonargparse wraps an optional dataclass
    return arguments["time"] == "token"


def build_data(args: list[str], parser: Parser) -> TransfusionCLI:
    """Build the data of a configuration, for `prepare` and `inspect`.

    Args:
        args: arguments that the command's own parser does not know.
        parser: that parser.
    """
    own = own_options(parser)
    return build(args, run=False, verb=parser.verb, data_only=True, more_options=own)


def build_config(args: list[str], parser: Parser) -> Namespace:
    """Parse a configuration and build nothing, for `plan`; the arguments are as in `build_data`."""
    own = own_options(parser)
    return build(args, run=False, verb=parser.verb, parse_only=True, more_options=own).config


def own_options(parser: Parser) -> list[str]:
    """Return the names of the options that a command's own parser has."""
    return [name.lstrip("-") for name in parser.option_names()]


def build(
    args: list[str], run: bool = True, verb: str | None = None, **options: Any
) -> TransfusionCLI:
    """Parse the arguments, build data, model and trainer, and with `run` run the verb.

    Args:
        args: the command line; with `run` it begins with the verb.
        run: run fit, validate, test or predict; otherwise only build.
        verb: the command, where `run` is false.
        options: further arguments of TransfusionCLI.
    """
    silence_warnings()
    return TransfusionCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=TRAINER,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=ConfigParser,
        parser_kwargs={"prog": "tf-lightning"},
        args=args,
        run=run,
        verb=args[0] if run and args else verb,
        **options,
    )


def run_lightning(args: list[str]) -> None:
    """Run fit, validate, test or predict."""
    build(args)
