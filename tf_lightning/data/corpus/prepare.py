"""A source made into a corpus on disk: text tokenised, pictures encoded, bad samples counted.

Done once; a corpus is found again by what it was made of. It is made shard by shard: a shard is
complete or not there, so what was killed goes on where it stopped; the corpus too appears at once.

A corpus in the making: what it is made of, and its shards, each complete or not there at all.

Corpora that `tf-lightning encode` wrote: read as they are, or refused in one sentence.

What a folder holds is all a run needs: texts' tokens and their tokenizer, pictures' latents. The
sources' files are not looked at any more, so they need not be there.
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

from tf_lightning.data.corpus.reader import Corpus, Latents
from tf_lightning.data.corpus.writer import CorpusWriter, merge
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer

FORMAT = 2  # of the files; a new number has every corpus prepared again


@dataclass(frozen=True)
class Job:
    """A split of a source that is to be made into a corpus.

    Attributes:
        name: of the source, for messages.
        split: "train" or "val".
        path: where the corpus will be.
        origin: all that it is made of; `origin_facts` reads it.
        arguments: of CorpusWriter, behind the folder.
        shards: sources whose documents, one after another, are the corpus's.
    """

    name: str
    split: Split
    path: Path
    origin: list
    arguments: tuple
    shards: list[Source]

    @property
    def title(self) -> str:
        """What a progress bar says."""
        return f"preparing {self.name} {self.split}"

    @property
    def folder(self) -> Path:
        """Where shards wait until all are there."""
        return self.path.parent / f".{self.path.name}-shards"

    def shard(self, number: int) -> Path:
        """Where a finished shard is."""
        return self.folder / f"{number:06d}"

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        return [n for n in range(len(self.shards)) if not self.shard(n).is_dir()]


def plan_corpus(
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
) -> Job:
    """How the corpus `<directory>/<name>-<split>-<hash>` is made; makes nothing.

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
    shards = source.shards(split) if hasattr(source, "shards") else [source]
    arguments = tokenizer, autoencoder, row_length, patch_size, time_token, latents
    return Job(name, split, path, origin, arguments, shards)


def origin_facts(origin: list) -> dict:
    """What `plan_corpus` made a corpus of, by name."""
    names = ("format", "source", "tokenizer", "autoencoder", "row_length", "patch_size")
    return dict(zip(names, origin, strict=False)) | {"time_token": "time_token" in origin}


class ShardWriter:
    """One shard of a job being written; left with an error, it leaves nothing behind.

    Args:
        job: whose folder exists.
        number: of the shard.
    """

    def __init__(self, job: Job, number: int):
        self.job, self.number = job, number
        self.skipped: Counter[str] = Counter()
        self.unfinished = Path(tempfile.mkdtemp(dir=job.folder, prefix=f".{number}-"))
        self.writer = CorpusWriter(self.unfinished, *job.arguments)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def add(self, document: RawDocument | Skipped) -> None:
        """Write a document; count it, by reason, where it cannot be used."""
        try:
            if isinstance(document, Skipped):
                raise BadSample(document.reason)
            self.writer.add(document)
        except BadSample as error:
            self.skipped[str(error)] += 1

    def _close(self) -> None:
        """Write the rest; the shard appears at once."""
        self.writer.close(dict(self.skipped.most_common()), self.job.origin)
        finished = self.job.shard(self.number)
        if not finished.is_dir():  # another process may have been as quick
            os.rename(self.unfinished, finished)


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
    """One line, such as "emoji train: prepared 1,200 documents, skipped 1: 1 truncated image"."""
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


VOCABULARY = "tokenizer.model"


def encoded_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the folder's texts.

    Raises:
        UserError: nothing was encoded there.
    """
    if not (folder / VOCABULARY).is_file():
        raise UserError(
            f"nothing is encoded in {folder}; run `tf-lightning encode -c CONFIG` first, or leave "
            "encoded: out"
        )
    return Tokenizer(folder / VOCABULARY)


def corpora_of(folder: Path, name: str, split: Split) -> list[Path]:
    """The finished corpora of one name and split, whatever they were made of."""
    hexadecimal = "[0-9a-f]" * 12
    return sorted(folder.glob(f"{name}-{split}-{hexadecimal}"))


@dataclass(frozen=True)
class Needed:
    """What a run needs corpora to be encoded with.

    Attributes:
        tokenizer: its fingerprint.
        autoencoder: its fingerprint, None where there is none; it says weights and scaling.
        downsample: of the autoencoder.
        patch_size: side of a patch in latent pixels.
        time_token: whether each picture takes one position more.
        row_length: positions in a row, of which no document may take more.
        mirror: whether training has mirror images.
        crops: how many squares of each picture training has.
        sample_posterior: whether training samples the posterior; else it takes the mode.
    """

    tokenizer: str
    autoencoder: str | None
    downsample: int
    patch_size: int
    time_token: bool
    row_length: int
    mirror: bool
    crops: int
    sample_posterior: bool


def open_encoded(folder: Path, name: str, split: Split, source: Source, needed: Needed) -> Corpus:
    """The corpus of one source and split.

    Args:
        folder: what `encode` wrote.
        name: of the source.
        split: "train" or "val".
        source: asked for its `image_size`, where it has one, and for nothing else.
        needed: what the corpus must have been encoded with.

    Raises:
        UserError: there is none, or it was encoded otherwise.
    """
    found = corpora_of(folder, name, split)
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} corpora of {name} {split} and not one; run "
            "`tf-lightning encode -c CONFIG` to its end, into a folder of its own"
        )
    corpus = Corpus(found[0], needed.sample_posterior)
    for what, theirs, ours in _pairs(corpus, split, source, needed):
        if theirs != ours:
            raise UserError(
                f"{name} {split} in {folder} was encoded with {what} {theirs} and the data has "
                f"{ours}; give the data what it was encoded with, or encode into another folder"
            )
    return corpus


def _pairs(corpus: Corpus, split: Split, source: Source, needed: Needed) -> Iterator[tuple]:
    """What has to be equal: its name, the corpus's, and ours."""
    facts, latents = origin_facts(corpus.origin), corpus.latents
    yield "format", facts["format"], FORMAT
    yield "a tokenizer of fingerprint", facts["tokenizer"], needed.tokenizer
    yield "an autoencoder of fingerprint", facts["autoencoder"], needed.autoencoder
    yield "patch_size", facts["patch_size"], needed.patch_size
    yield "time_token", facts["time_token"], needed.time_token
    image_size = getattr(source, "image_size", None)
    if image_size and corpus.image_shape:
        yield "image_size", corpus.image_shape[-1] * needed.downsample, image_size
    if needed.row_length < facts["row_length"]:  # in longer rows they fit
        yield "row_length", facts["row_length"], needed.row_length
    if split == "train":
        yield "mirror", latents.mirrored, needed.mirror
        yield "crops", latents.crops, needed.crops
        if needed.sample_posterior:  # a mode is there always
            yield "sample_posterior", latents.moments, True
