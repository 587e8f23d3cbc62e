"""A source made into a corpus on disk: text tokenised, pictures encoded, bad samples counted.

Done once; a corpus is found again by what it was made of. It is made shard by shard: a shard is
complete or not there, so what was killed goes on where it stopped; the corpus too appears at once.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from tf_lightning.data.corpus import BadSample, Corpus, Latents, Skipped, Source, Split
from tf_lightning.data.corpus_writer import CorpusWriter, merge
from tf_lightning.errors import UserError
from tf_lightning.tokenizer import Tokenizer

FORMAT = 1  # of the files; a new number has every corpus prepared again


@dataclass(frozen=True)
class Job:
    """What every shard of a corpus is prepared with; see `prepare`."""

    title: str
    folder: Path
    origin: list
    arguments: tuple  # of CorpusWriter, behind the folder

    def path(self, number: int) -> Path:
        """Where a finished shard is."""
        return self.folder / f"{number:06d}"


def prepare(
    source: Source,
    split: Split,
    *,
    name: str,
    directory: str | Path,
    tokenizer: Tokenizer,
    autoencoder=None,
    row_length: int,
    patch_size: int,
    time_token: bool = False,
    latents: Latents = Latents(),  # noqa: B008 - it is frozen
    processes: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Corpus | None:
    """The corpus `<directory>/<name>-<split>-<hash>`, made if it is not there.

    A text longer than a row is cut into pieces that fill rows; a document with pictures that is
    longer than a row is skipped and counted. A source may have a method `shards(split)`, a list of
    sources whose documents, one after another, are its own.

    Args:
        source: raw documents.
        split: "train" or "val".
        name: of the source, for the directory and for messages.
        directory: the cache.
        tokenizer: for the texts.
        autoencoder: for the pictures; None where there are none.
        row_length: positions in a row.
        patch_size: side of a patch in latent pixels.
        time_token: each picture takes one position more.
        latents: what is kept of each picture.
        processes: that prepare shards at the same time; 1 is this one.
        part: (i, n) prepares only every n-th shard from shard i on, as one of n jobs.

    Returns:
        The corpus, or None where shards of another part are still to be prepared.

    Raises:
        UserError: nothing usable, pictures without autoencoder, or pictures that do not divide into
            patches. A "val" split with no samples at all is an empty corpus.
    """
    origin = [
        FORMAT,
        source.fingerprint(split),
        tokenizer.fingerprint,
        autoencoder and autoencoder.fingerprint,
        row_length,
        patch_size,
        *(["time_token"] if time_token else []),
    ]
    if latents != Latents():  # so that corpora of before there was a choice are found
        origin.append(asdict(latents))
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    path = Path(directory) / f"{name}-{split}-{digest}"
    if path.is_dir():
        return Corpus(path)

    shards = source.shards(split) if hasattr(source, "shards") else [source]
    folder = path.parent / f".{path.name}-shards"
    folder.mkdir(parents=True, exist_ok=True)
    title = f"preparing {name} {split}"
    shape = row_length, patch_size, time_token, latents
    job = Job(title, folder, origin, (tokenizer, autoencoder, *shape))
    try:
        wanted = [n for n in range(part[0], len(shards), part[1]) if not job.path(n).is_dir()]
        _prepare_shards(job, split, {number: shards[number] for number in wanted}, processes)
        missing = [n for n in range(len(shards)) if not job.path(n).is_dir()]
        if missing:
            done = f"{len(shards) - len(missing):,} of {len(shards):,} shards"
            rank_zero_info(f"{name} {split}: {done} are prepared; the others are other parts'")
            return None
        _finish(job, path, name, split, len(shards))
    except FileNotFoundError:  # another process was quicker, and has tidied up
        if not path.is_dir():
            raise
    finally:
        with suppress(OSError):  # it is not empty: finished shards are kept
            folder.rmdir()
    return Corpus(path)


def _prepare_shards(job: Job, split: Split, shards: dict[int, Source], processes: int) -> None:
    """Prepare numbered shards, here or in several processes."""
    processes = min(processes, len(shards))
    several = len(shards) > 1
    bar = tqdm(total=len(shards), desc=job.title, unit=" shards", delay=2, disable=not several)
    if processes <= 1:
        for number, shard in shards.items():
            _prepare_shard(job, split, number, shard, silent=several)
            bar.update()
    else:  # not forked: a copy of a process with threads may wait for ever
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start_process, (job,)) as pool:
            waiting = [pool.submit(_in_process, split, *item) for item in shards.items()]
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


def _in_process(split: Split, number: int, shard: Source) -> None:
    _prepare_shard(_job, split, number, shard, silent=True)


def _prepare_shard(job: Job, split: Split, number: int, shard: Source, silent: bool) -> None:
    """Write one shard; it appears complete or not at all."""
    unfinished = Path(tempfile.mkdtemp(dir=job.folder, prefix=f".{number}-"))
    try:
        writer = CorpusWriter(unfinished, *job.arguments)
        documents = tqdm(
            shard.documents(split), job.title, unit=" documents", delay=2, disable=silent
        )
        writer.close(_write_documents(documents, writer), job.origin)
        if not job.path(number).is_dir():  # another process may have been as quick
            os.rename(unfinished, job.path(number))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_documents(documents: Iterator, writer: CorpusWriter) -> dict[str, int]:
    """Write all documents; how many samples were skipped, by reason."""
    skipped: Counter[str] = Counter()
    for document in documents:
        try:
            if isinstance(document, Skipped):
                raise BadSample(document.reason)
            writer.add(document)
        except BadSample as error:
            skipped[str(error)] += 1
    return dict(skipped.most_common())


def _finish(job: Job, path: Path, name: str, split: Split, num_shards: int) -> None:
    """Make one corpus of all shards, and say what is in it."""
    shards = [job.path(number) for number in range(num_shards)]
    whole = shards[0] if num_shards == 1 else Path(tempfile.mkdtemp(dir=job.folder))
    try:
        if num_shards > 1:
            merge(shards, whole, job.origin)
        facts = json.loads((whole / "corpus.json").read_text())
        check_result(name, split, facts["num_documents"], facts["skipped"])
        if not path.is_dir():
            os.rename(whole, path)
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
