"""A source made into a corpus on disk: text tokenised, pictures encoded, bad samples counted.

Done once; a corpus is found again by what it was made of. It is made shard by shard: a shard is
complete or not there, so what was killed goes on where it stopped; the corpus too appears at once.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from tf_lightning.data.corpus import Corpus, Split
from tf_lightning.data.corpus_writer import merge
from tf_lightning.data.shards import Job, ShardWriter
from tf_lightning.errors import UserError


def prepare(job: Job, *, processes: int = 1, part: tuple[int, int] = (0, 1)) -> Corpus | None:
    """The corpus of a job, made if it is not there.

    Args:
        job: as `plan_corpus` describes it.
        processes: that prepare shards at the same time; 1 is this one.
        part: (i, n) prepares only every n-th shard from shard i on, as one of n jobs.

    Returns:
        The corpus, or None where shards of another part are still to be prepared.

    Raises:
        UserError: nothing usable, pictures without autoencoder, or pictures that do not divide into
            patches. A "val" split with no samples at all is an empty corpus.
    """
    if job.path.is_dir():
        return Corpus(job.path)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        _prepare_shards(job, [n for n in job.missing() if n % part[1] == part[0]], processes)
        missing, count = len(job.missing()), len(job.shards)
        if missing:
            done = f"{count - missing:,} of {count:,} shards"
            told = f"{job.name} {job.split}: {done} are prepared; the others are other parts'"
            rank_zero_info(told)
            return None
        _finish(job)
    except FileNotFoundError:  # another process was quicker, and has tidied up
        if not job.path.is_dir():
            raise
    finally:
        with suppress(OSError):  # it is not empty: finished shards are kept
            job.folder.rmdir()
    return Corpus(job.path)


def _prepare_shards(job: Job, numbers: list[int], processes: int) -> None:
    """Prepare some shards, here or in several processes."""
    processes, several = min(processes, len(numbers)), len(numbers) > 1
    bar = tqdm(total=len(numbers), desc=job.title, unit=" shards", delay=2, disable=not several)
    if processes <= 1:
        for number in numbers:
            _prepare_shard(job, number, silent=several)
            bar.update()
    else:  # not forked: a copy of a process with threads may wait for ever
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start_process, (job,)) as pool:
            waiting = [pool.submit(_in_process, number) for number in numbers]
            try:
                for future in waiting:
                    future.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError(
                    f"{job.title}: one of {processes} processes was killed, perhaps for want of "
                    "memory; finished shards are kept, run it again with fewer --processes"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    bar.close()


_job: Job | None = None  # of a process that prepares shards


def _start_process(job: Job) -> None:
    global _job
    _job = job
    torch.set_num_threads(1)


def _in_process(number: int) -> None:
    _prepare_shard(_job, number, silent=True)


def _prepare_shard(job: Job, number: int, silent: bool) -> None:
    """Write one shard; it appears complete or not at all."""
    documents = job.shards[number].documents(job.split)
    with ShardWriter(job, number) as shard:
        for document in tqdm(documents, job.title, unit=" documents", delay=2, disable=silent):
            shard.add(document)


def _finish(job: Job) -> None:
    """Make one corpus of all shards, and say what is in it."""
    name, split = job.name, job.split
    shards = [job.shard(number) for number in range(len(job.shards))]
    whole = shards[0] if len(shards) == 1 else Path(tempfile.mkdtemp(dir=job.folder))
    try:
        if len(shards) > 1:
            merge(shards, whole, job.origin)
        facts = json.loads((whole / "corpus.json").read_text())
        check_result(name, split, facts["num_documents"], facts["skipped"])
        if not job.path.is_dir():
            os.rename(whole, job.path)
    except UserError:
        shutil.rmtree(job.folder)  # the same again would not help
        raise
    shutil.rmtree(job.folder, ignore_errors=True)
    rank_zero_info(report(name, split, facts))


def report(name: str, split: Split, facts: dict) -> str:
    """`summary` of a whole corpus, with its tokens and images."""
    holds = f" ({facts['num_tokens']:,} tokens, {facts['num_images']:,} images)"
    return summary(name, split, facts["num_documents"], facts["skipped"], holds)


def summary(
    name: str, split: Split, num_documents: int, skipped: dict[str, int], holds: str = ""
) -> str:
    """One line, such as "emoji train: prepared 1,200 documents, skipped 1: 1 truncated picture"."""
    line = f"{name} {split}: prepared {num_documents:,} documents{holds}"
    if skipped:
        line += f", skipped {sum(skipped.values()):,}: {_reasons(skipped)}"
    return line


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def check_result(name: str, split: Split, num_documents: int, skipped: dict[str, int]) -> None:
    """UserError where nothing of a source can be used."""
    if num_documents == 0 and skipped:
        raise UserError(
            f"{name}: all {sum(skipped.values()):,} documents of the {split} split are unusable "
            f"({_reasons(skipped)}); mend them or change the data's arguments"
        )
    if num_documents == 0 and split == "train":
        raise UserError(f"{name}: there are no documents to train on; check its paths")
