"""`tf-lightning prepare`: corpora made ahead of training.

They are made in `cache_dir` by processes of this machine, or, with `--data.encoded DIR`, in DIR by
the ranks of a Trainer.
"""

import shlex
from pathlib import Path

import lightning as L
import torch

from tf_lightning.cli.lightning import TransfusionCLI, build_data
from tf_lightning.cli.parser import Parser, positive_int
from tf_lightning.data.corpus.distributed import ShardData, ShardEncoder
from tf_lightning.data.corpus.folders import LocalFolder
from tf_lightning.data.corpus.manifest import write_manifest
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.remote.urls import hide_logins
from tf_lightning.training.interrupts import Interrupts

DESCRIPTION = """\
Tokenize texts and encode images once, before training. An interrupted command continues where it
stopped when it is run again; finished shards are kept."""
NOTES = """\
Without --data.encoded, the corpora are written to the data's cache_dir, where `fit` finds them:
  tf-lightning prepare -c CONFIG
  tf-lightning fit -c CONFIG

With --data.encoded DIR, the ranks of the trainer encode the images on all devices and nodes. Each
rank writes its own shards (64 MB of source files):
  tf-lightning prepare -c CONFIG --data.encoded DIR --trainer.devices 8 --trainer.num_nodes 4
  tf-lightning fit -c CONFIG --data.encoded DIR

DIR is on a disk that all ranks share. It stores the mean and the standard deviation of the
posterior of each training image in fp16; also of its flipped copy with --data.hflip true, and of
its other crops with --data.crops 3. Training on DIR does not read the image files. It takes the
mode of the posterior, or samples it with --data.sample_posterior true. It refuses a DIR of another
autoencoder, image size, patch size, hflip or crops. Callbacks that show held-out images still read
the files. --data.num_workers sets the processes of each rank that read images.

When the command is done, DIR may be copied to an object store, as with `aws s3 sync`. Training then
reads the copy, and the nodes need not share a disk:
  tf-lightning fit -c CONFIG --data.encoded s3://BUCKET/FOLDER

CONFIG is the YAML file of a run. The command line changes any value in it, as for `fit`.
"""


def run_prepare(args: list[str]) -> None:
    """Run `tf-lightning prepare`."""
    parser = prepare_parser()
    given, rest = parser.parse_known_args(args)
    if given.exclude is not None:
        rest += ["--data.exclude", given.exclude]
    part = parse_part(given.shard)
    cli = build_data(rest, parser)
    if getattr(cli.datamodule, "encoded", None):
        if part != (0, 1) or given.processes:
            raise UserError(
                "--shard and --processes do not apply to --data.encoded; set the number of ranks "
                "with --trainer.devices and --trainer.num_nodes"
            )
        prepare_encoded(cli)
    else:
        prepare_cache(cli.datamodule, given.processes, part, rest)


def prepare_parser() -> Parser:
    """Create the parser of the options that are not part of the configuration."""
    parser = Parser(
        "prepare",
        DESCRIPTION,
        NOTES,
        usage="tf-lightning prepare -c CONFIG [--processes N] [--shard I/N] [--exclude FILE] "
        "[--data.encoded DIR] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=positive_int,
        help="number of shards to prepare at a time; a source has one for each 64 MB of its files, "
        "so a small one is prepared by one process (default: the number of CPU cores, but at "
        "most half of the shards, or 1 if a GPU encodes images)",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="prepare only every N-th shard, beginning with shard I (0 <= I < N), as one of N jobs",
    )
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        help="leave out the documents that FILE names, a filter list as `tf-lightning inspect` "
        "writes it; short for --data.exclude FILE, which `fit` needs too",
    )
    return parser


def parse_part(text: str) -> tuple[int, int]:
    """Parse "I/N".

    Raises:
        UserError: the text is not of this form, or I is not in {0..N-1}.
    """
    try:
        job, jobs = map(int, text.split("/"))
    except ValueError:
        job, jobs = -1, 0
    if not 0 <= job < jobs:
        raise UserError(f"--shard {text} is not I/N with 0 <= I < N; give 0/8 to 7/8 for 8 jobs")
    return job, jobs


def prepare_cache(
    data: L.LightningDataModule, processes: int | None, part: tuple[int, int], words: list[str]
) -> None:
    """Prepare the corpora in the data's `cache_dir`, or one part of their shards.

    Args:
        data: the data module.
        processes: number of processes; None chooses it.
        part: as in `corpus.prepare.prepare`.
        words: the configuration, as on the command line.
    """
    if hasattr(data, "prepare_options"):
        on_gpu = torch.cuda.is_available() and getattr(data, "autoencoder_name", None)
        data.prepare_options = {"processes": processes or (1 if on_gpu else None), "part": part}
    elif part != (0, 1):
        raise UserError(
            f"--shard does not apply to {type(data).__name__}, which is not prepared in shards; "
            "leave it out"
        )
    prepare_data(data)
    if part != (0, 1) and not data.corpora:
        print(
            "This part is done; when all parts are done, run `tf-lightning prepare` without "
            "--shard to join them."
        )
    else:
        print_where(data.cache_dir, words)


def prepare_data(data: L.LightningDataModule) -> None:
    """Prepare the data; if a signal ends this, the command says that it can be continued."""
    try:
        data.prepare_data()
    except Interrupted as error:
        error.hint = "Finished shards are kept; the same command continues."
        raise


def print_where(folder: Path | LocalFolder, words: list[str]) -> None:
    """Print where the corpora are, and the command that trains on them.

    Args:
        folder: where they are.
        words: the configuration, as on the command line.
    """
    command = shlex.join(["tf-lightning", "fit", *map(hide_logins, words)])
    print(f"The corpora are in {folder}. Train on them with\n  {command}")


def prepare_encoded(cli: TransfusionCLI) -> None:
    """Prepare the corpora in the data's `encoded` folder with the ranks of a Trainer."""
    data, config = cli.datamodule, cli.config.trainer
    if not isinstance(data.encoded, LocalFolder):
        raise UserError(
            f"prepare writes to a disk; give --data.encoded DIR, and copy DIR to {data.encoded}"
        )
    # Only the configured number of ranks is used: callbacks and strategy are for training.
    ranks = {name: config[name] for name in ("accelerator", "devices", "num_nodes")}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    interrupts = Interrupts()
    trainer = L.Trainer(**ranks, **off, enable_model_summary=False, callbacks=[interrupts])
    shards = ShardData(data.plan_encoded, data.encoded.path, data.num_workers)
    with ShardEncoder() as encoder, interrupts.ending.together(trainer):
        trainer.predict(encoder, datamodule=shards, return_predictions=False)
    if not trainer.is_global_zero:
        return
    shards.merge_shards()
    data.prepare_data()  # opens the corpora as training will, and plans their rows
    write_manifest(data.encoded.path)
    print_where(data.encoded, cli.typed)
