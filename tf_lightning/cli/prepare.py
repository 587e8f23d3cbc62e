"""`tf-lightning prepare`: corpora made ahead of training, in parallel, as one job or several.

`tf-lightning encode`: a latent cache, made by a Trainer over any number of ranks and nodes.
"""

import argparse
import os

import lightning as L
import torch

from tf_lightning.cli.lightning import build
from tf_lightning.data.encode import EncodeData, Encoder
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError


def run_prepare(args: list[str]) -> None:
    """Prepare a configuration's corpora, or one job's part of their shards."""
    given, rest = prepare_options().parse_known_args(args)
    if {"-h", "--help"} & set(rest):
        prepare_options().print_help()
    part = one_of_jobs(given.shard)
    data = build(rest, run=False).datamodule
    if not hasattr(data, "how_to_prepare"):
        if part != (0, 1):
            raise UserError("--shard is for corpora that a Transfusion reads; leave it out here")
    else:
        on_gpu = torch.cuda.is_available() and getattr(data, "autoencoder_name", None)
        processes = given.processes or (1 if on_gpu else os.cpu_count() or 1)
        data.how_to_prepare = {"processes": processes, "part": part}
    data.prepare_data()
    if part != (0, 1) and not data.corpora:
        print("This part is done; when all are, `tf-lightning prepare` without --shard joins them.")
    else:
        print(f"The corpora are in {data.cache_dir}; train on them with `tf-lightning fit`.")


def prepare_options() -> argparse.ArgumentParser:
    """What `prepare` takes beside a configuration."""
    parser = argparse.ArgumentParser("tf-lightning prepare", add_help=False, allow_abbrev=False)
    parser.usage = "tf-lightning prepare -c CONFIG [--processes N] [--shard I/N]"
    parser.description = (
        "Tokenises texts and encodes pictures, once. What was interrupted goes on where it was."
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="how many shards (64 MB of files) to prepare at a time; default: one a core, or 1 "
        "where a GPU encodes pictures",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="as job I of N, 0 <= I < N, prepare every N-th shard only",
    )
    return parser


def one_of_jobs(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; UserError if it is none."""
    try:
        job, jobs = map(int, text.split("/"))
    except ValueError:
        job, jobs = -1, 0
    if not 0 <= job < jobs:
        raise UserError(f"--shard {text} is not I/N with 0 <= I < N; give 0/8 to 7/8 for 8 jobs")
    return job, jobs


HELP = """\
usage: tf-lightning encode -c CONFIG [--data.encoded DIR]

Tokenises texts and encodes pictures over the trainer's ranks and nodes, once, into DIR (default:
encoded/ in the data's cache_dir): of each training picture, and of its mirror image with
--data.mirror true and of its ends with --data.crops 3, mean and standard deviation of its
posterior in fp16. Then
  tf-lightning fit -c CONFIG --data.encoded DIR
trains on it without the pictures' files, on the mode or with --data.sample_posterior true on
samples; it refuses an autoencoder, picture size, mirror, crops or patches that are not those of
DIR.

  --trainer.devices 8 --trainer.num_nodes 4   ranks; each encodes shards (64 MB of files) of its own
  --data.num_workers 8                        processes of each rank that read pictures

DIR is on a disk that all ranks share. What was killed goes on where it stopped; finished shards are
kept. Callbacks that show held-out pictures still read these from their files. Any other value of
the configuration can be changed behind the command:
"""


def run_encode(args: list[str]) -> None:
    """Encode a configuration's corpora."""
    if {"-h", "--help"} & set(args):
        print(HELP)
    cli = build(args, run=False, prog="encode")
    data, given = cli.datamodule, cli.config.trainer
    check(data)
    data.encoded, folder = None, data.encoded or data.cache_dir / "encoded"
    # Of the run's own trainer only the ranks: its callbacks and strategy are for training.
    ranks = {name: given[name] for name in ("accelerator", "devices", "num_nodes")}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(**ranks, **off, enable_model_summary=False)
    work = EncodeData(data, folder)
    with Encoder() as encoder:
        trainer.predict(encoder, datamodule=work, return_predictions=False)
    if not trainer.is_global_zero:
        return
    work.finish()
    data.encoded = folder
    data.prepare_data()  # opens it as training will, and plans its rows
    print(f"The corpora are in {folder}; train on them with `tf-lightning fit -c CONFIG", end=" ")
    print(f"--data.encoded {folder}`.")


def check(data: L.LightningDataModule) -> None:
    """Refuse what has no pictures to encode."""
    if not isinstance(data, Mixture):
        raise UserError(
            f"{type(data).__name__} is not for a Transfusion; encode the configuration of one"
        )
    if data.autoencoder_name in (None, "pixels"):
        raise UserError(
            f"autoencoder={data.autoencoder_name!r} has nothing to encode; give another "
            "--data.autoencoder, or use `tf-lightning prepare`"
        )
