"""The folder of a run: where it is, whether it holds a run already, and what to resume from."""

import csv
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tf_lightning.checkpoint import find_checkpoints, newest_sound
from tf_lightning.checkpoint_file import DamagedFile, check
from tf_lightning.cli.config_files import ConfigContent
from tf_lightning.errors import UserError
from tf_lightning.remote.urls import hide_logins
from tf_lightning.sharded import open_sharded
from tf_lightning.training.missed_work import PROGRESS_FILE, read_progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Files and folders of a run, including those of this project's callbacks.
WRITTEN = (
    "config.yaml", "hparams.yaml", "metrics.csv", "events.out.tfevents.*", "checkpoints",
    "hpc_ckpt_*.ckpt", PROGRESS_FILE, "metrics", "media", "guidance.png",
    "report.json", "sheet.png", "samples",
    # RetrievalAccuracy, by its default name and those of the recipes.
    *(f"{name}.{kind}" for name in ("retrieval", "held_out", "edits") for kind in ("json", "png")),
)  # fmt: skip
REPLACED = ("hparams.yaml", "metrics.csv")  # by then, the logger of a new run has replaced these

LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    # An empty version makes runs/NAME the run's folder, so that --ckpt_path last finds it.
    "init_args": {"save_dir": "runs", "name": "run", "version": "", "default_hp_metric": False},
}
DEFAULT_FOLDER = Path(LOGGER["init_args"]["save_dir"], LOGGER["init_args"]["name"])


def default_folder(trainer: Namespace) -> Path:
    """Return the folder of a run without a logger, from the configuration of its trainer."""
    return Path(trainer.default_root_dir or DEFAULT_FOLDER)


def folder_of(logger: Logger | Iterable[Logger] | bool | None, default: Path) -> Path:
    """Return the folder of a run: its first logger's, or `default` without a logger.

    Args:
        logger: `trainer.logger` of the configuration.
        default: for a run without a logger, or with Lightning's own default.
    """
    loggers = [logger] if isinstance(logger, Logger) else logger
    if not loggers or loggers is True:
        return default
    first = next(iter(loggers))
    if isinstance(first, TensorBoardLogger | CSVLogger):
        return Path(first.log_dir)
    # To W&B, MLflow and Neptune, `name` is the project; the run's own name is private.
    own = getattr(first, "_name", None) or getattr(first, "_run_name", None)
    return Path(first.save_dir or default.parent, str(own or first.name or default.name))


def configured_folders(
    config: Mapping[str, Any],
    files: Iterable[ConfigContent],
    options: Mapping[str, Any],
    default: Path,
) -> list[Path]:
    """Return the folders of runs that a configuration names: by its logger, or by its files.

    An evaluation protocol has a logger of its own, so each file is read for itself too.

    Args:
        config: the configuration of a command.
        files: the files it comes from.
        options: default options of the logger.
        default: folder of a run without a logger, or with Lightning's own default.
    """
    loggers, folders = [config.trainer.logger or False], []
    for file in files:
        trainer = file.values.get("trainer")
        loggers.append(trainer.get("logger") if isinstance(trainer, dict) else None)
        if file.file.name == "config.yaml":  # of a run, wherever its folder was moved
            folders.append(file.file.parent)
    for logger in loggers:
        if isinstance(logger, bool):
            folders.insert(0, default)
        elif folder := folder_of_values(logger, options):
            folders.insert(0, folder)
    return list(dict.fromkeys(folders))


def folder_of_values(logger: Any, options: Mapping[str, Any]) -> Path | None:
    """Return the folder of a run whose `trainer.logger` has these values; None without options.

    Args:
        logger: the values of one logger or of several.
        options: default options of the logger.
    """
    first = logger[0] if isinstance(logger, list) and logger else logger
    if not isinstance(first, Mapping | Namespace):
        return None
    return folder_of_options({**options, **first, **(first.get("init_args") or {})})


def folder_of_options(options: Mapping[str, Any]) -> Path:
    """Return the folder of a logger with these options, one of which is its `class_path`."""
    version, logger = options.get("version"), str(options.get("class_path", "TensorBoardLogger"))
    if not logger.endswith(("TensorBoardLogger", "CSVLogger")):
        version = ""  # the identity of a run, and no part of its folder
    elif isinstance(version, int):
        version = f"version_{version}"
    return Path(options["save_dir"] or ".", options["name"] or "", version or "")


def last_configured(config: Namespace, files: Iterable[ConfigContent], kind: str) -> Path:
    """Return the newest sound checkpoint of the run that a configuration names.

    Args:
        config: the configuration of a command.
        files: the files it comes from.
        kind: TRANSFUSION or AUTOENCODER.

    Raises:
        UserError: there is none.
    """
    default = default_folder(config.trainer)
    folders = configured_folders(config, files, LOGGER["init_args"], default)
    for folder in folders:
        checkpoints = Path(config.checkpoint.dirpath or folder / "checkpoints")
        if found := find_checkpoints(folder, checkpoints):
            return newest_sound(found, kind)
    raise UserError(
        f"there is no checkpoint in {' or '.join(map(str, folders))}; train first with "
        "`tf-lightning fit`, or give --ckpt_path FILE"
    )


def refuse_needed(
    folder: Path, checkpoints: Path, needed: Iterable[str | Path | None], option: str
) -> None:
    """Raise UserError if `EarlierRun` would remove something that the new run starts from.

    Args:
        folder: the run's folder.
        checkpoints: folder of its checkpoints.
        needed: the files and folders that the new run reads.
        option: what gives a run another folder.
    """
    removed = [path.resolve() for path in files_of_run(folder, checkpoints)]
    for path in filter(None, needed):
        place = Path(path).resolve()
        if any(place.is_relative_to(old) or old.is_relative_to(place) for old in removed):
            raise UserError(
                f"--overwrite would remove {path}, which the new run needs; give the new run its "
                f"own {option}"
            )


def refuse_started_run(folder: Path, checkpoints: Path, option: str) -> None:
    """Raise UserError if the folder holds a run that a new one would be mixed with.

    A run that was killed before its first checkpoint and its first validation left nothing to keep.

    Args:
        folder: the run's folder.
        checkpoints: folder of its checkpoints.
        option: what gives a run another folder.
    """
    progress = read_progress(folder) or {}
    has_results = any(step is not None for step in progress.values())
    if has_results or (folder / "report.json").exists() or find_checkpoints(folder, checkpoints):
        raise UserError(
            f"{os.path.relpath(folder)} holds a run already; resume it with --ckpt_path last, give "
            f"the new run its own {option}, or replace the old one with --overwrite"
        )


def refuse_moved_run(folder: Path, files: Iterable[ConfigContent]) -> None:
    """Raise UserError if a file is the config.yaml of a run that is not where the file says.

    The run was moved or renamed, or its folder is relative to another current folder. A new run
    would start at step 0 where an earlier one is to be resumed.

    Args:
        folder: the folder that the configuration names, which holds no checkpoint.
        files: the files of the configuration.
    """
    for content in files:
        trainer, place = content.values.get("trainer"), content.file.resolve().parent
        logger = trainer.get("logger") if isinstance(trainer, dict) else None
        if content.file.name != "config.yaml" or place == folder.resolve():
            continue
        is_named = folder == folder_of_values(logger, LOGGER["init_args"])
        if is_named and find_checkpoints(place, place / "checkpoints"):
            raise UserError(
                f"{content.file} is of the run in {os.path.relpath(place)}, but names the folder "
                f"{folder}, which has no checkpoint; move the run there, or change the folder in "
                "that file"
            )


def files_of_run(folder: Path, checkpoints: Path) -> list[Path]:
    """List what a run has written into its folder, and nothing else."""
    return [*(path for pattern in WRITTEN for path in folder.glob(pattern)), checkpoints]


@contextmanager
def only_process(folder: Path, option: str) -> Iterator[None]:
    """Let no other process train in a folder during the block.

    Args:
        folder: the run's folder.
        option: what gives a run another folder.

    Raises:
        UserError: another process is training in it.
    """
    path = folder / ".lock"
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        file = locked_file(path)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"another process is training in {os.path.relpath(folder)}; wait for its end, or give "
            f"the new run its own {option}"
        ) from error
    try:
        yield
    finally:
        if file:
            path.unlink(missing_ok=True)
            file.close()
        with suppress(OSError):  # a run that is refused leaves no empty folders
            for place in missing:
                place.rmdir()


def locked_file(path: Path) -> IO | None:
    """Create a file that this process has locked; None where that is not possible.

    The lock ends with the process in any case. Its children do not inherit it, so that a worker
    that outlives a killed run does not keep its folder.

    Raises:
        BlockingIOError or PermissionError: another process has locked it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:  # no room, of which the run itself will tell
        return None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        file.close()
        raise
    except OSError:  # a file system without locks
        pass
    return file


class EarlierRun(L.Callback):
    """Removes the files of an earlier run when training starts.

    A new run that is refused before, by its data for example, leaves them as they are.
    """

    def __init__(self):
        self.files: list[Path] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the files on rank zero, except those that the new run's logger has replaced."""
        for path in self.files if trainer.is_global_zero else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in REPLACED:
                path.unlink(missing_ok=True)


def append_to_csv(logger: CSVLogger) -> None:
    """Make a logger append to the metrics.csv in its folder; by itself it removes the file."""
    file = Path(logger.log_dir, "metrics.csv")
    aside = file.with_suffix(".csv.earlier")
    if aside.is_file():  # of a process that was killed below
        aside.rename(file)
    if not file.is_file():
        return
    file.rename(aside)
    writer = logger.experiment  # looks for the file when it is created
    file = aside.rename(file)
    with file.open(newline="") as rows:
        writer.metrics_keys = next(csv.reader(rows), [])


def is_sound(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete; the checksums of shards are not read."""
    try:
        open_sharded(checkpoint) if checkpoint.is_dir() else check(checkpoint)
    except (UserError, DamagedFile, OSError):
        return False
    return True


def resume_command(args: list[str]) -> str:
    """Return the command that resumes an interrupted run; its URLs have no logins.

    Args:
        args: arguments of the command that started it, with its verb.
    """
    kept, rest = [], iter(args)
    for arg in rest:
        if arg == "--ckpt_path":
            next(rest, None)
        elif not arg.startswith("--ckpt_path=") and arg != "--overwrite":
            kept.append(arg)
    return shlex.join(["tf-lightning", *map(hide_logins, kept), "--ckpt_path", "last"])


def next_commands(checkpoint: str, has_images: bool, loggers: Iterable[Logger]) -> list[str]:
    """Return the commands to type after a run of Transfusion: generate, and show its curves.

    Args:
        checkpoint: path of its last checkpoint.
        has_images: whether it generates images.
        loggers: its loggers.
    """
    here = os.path.relpath(Path(sys.executable).parent)
    program = "" if here.startswith("..") else f"{here}/"  # .venv/bin/ of a checkout
    output = "-o out" if has_images else "--output-modality text"
    commands = [f'{program}tf-lightning generate {checkpoint} "a prompt" {output}']
    boards = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
    folders = [os.path.relpath(board.log_dir) for board in boards[:1]]
    return commands + [f"{program}tensorboard --logdir {folder}" for folder in folders]


def is_requeued() -> bool:
    """Return whether SLURM started this job again after it was preempted."""
    return SLURMEnvironment.detect() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
