"""`tf-lightning prepare`: corpora made ahead of training, in parallel, as one job or several."""

import argparse
import os

import torch

from tf_lightning.errors import UserError
from tf_lightning.lightning_cli import build


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
