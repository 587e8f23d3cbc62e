"""Preparation of a corpus: tokenize texts, encode images, count unusable samples.

A corpus is prepared once, under a hash of everything that determines its content, and found by that
hash afterwards. It is written shard by shard. The folder of a shard appears only when the shard is
complete, so an interrupted preparation continues with the first missing shard. The folder of the
corpus, too, appears only when the corpus is complete.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info

from tf_lightning.autoencoder.statistics import Moments, check_std
from tf_lightning.data.corpus.image_storage import ImageStorageSpec
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.corpus.writer import CorpusWriter, merge
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split, num_samples
from tf_lightning.errors import UserError
from tf_lightning.files import partial_folder, publish_folder, report_full_disk
from tf_lightning.processes import end_processes, start_worker
from tf_lightning.progress import counted, progress_bar
from tf_lightning.signals import blocked
from tf_lightning.tokenizer.tokenizer import Tokenizer

SHARDS_A_PROCESS = 2  # fewer take less time than the start of another process, which imports torch
MAX_REASONS = 100  # different reasons for skipped samples that are counted apart
FORMAT = 2  # version of the corpus files; a higher number makes every corpus be prepared again


@dataclass(frozen=True)
class PrepareJob:
    """One split of one source, to be written as a corpus.

    Attributes:
        name: name of the source, for messages.
        split: "train" or "val".
        path: folder of the finished corpus.
        origin: everything that determines the corpus's content; `origin_facts` names its items.
        writer_arguments: keyword arguments of `CorpusWriter`.
        shards: sources whose concatenated documents are the documents of the corpus.
    """

    name: str
    split: Split
    path: Path
    origin: list
    writer_arguments: dict
    shards: list[Source]

    @property
    def title(self) -> str:
        """Label of the progress bar."""
        return f"preparing {self.name} {self.split}"

    @property
    def shards_folder(self) -> Path:
        """Folder that keeps finished shards until all of them are there."""
        return self.path.parent / f".{self.path.name}-shards"

    def shard_path(self, number: int) -> Path:
        """Folder of a finished shard."""
        return self.shards_folder / f"{number:06d}"

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        return [n for n in range(len(self.shards)) if not self.shard_path(n).is_dir()]


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
    image_storage: ImageStorageSpec = ImageStorageSpec(),  # noqa: B008 - it is frozen
) -> PrepareJob:
    """Describe how the corpus `<directory>/<name>-<split>-<hash>` is made, without making it.

    A text that is longer than a row is cut into pieces that fill rows. A document with images that
    is longer than a row is skipped and counted. A source may have a method `shards(split)` that
    returns a list of sources whose concatenated documents are its own documents.

    Args:
        source: yields the raw documents. It may have a method `image_digest(split)` that returns
            a hash of the image files that its files name.
        split: "train" or "val".
        name: name of the source, for the folder and for messages.
        directory: the cache folder.
        tokenizer: tokenizes the texts.
        autoencoder: encodes the images; None if the source has no images.
        row_length: positions in a row.
        patch_size: side of a patch in latent pixels.
        time_token: whether each image takes one more position, for its timestep.
        image_storage: the form in which images are stored.
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
    # The default storage is not part of the digest.
    if image_storage != ImageStorageSpec():
        origin.append(image_storage.to_json())
    path = corpus_path(directory, name, split, origin)
    former = [*origin[:3], getattr(autoencoder, "old_fingerprint", None), *origin[4:]]
    if not path.is_dir() and corpus_path(directory, name, split, former).is_dir():
        path = corpus_path(directory, name, split, former)  # of version 0.1
    # A corpus that was prepared before the images were part of its origin is still used.
    if hasattr(source, "image_digest") and not path.is_dir():
        origin.append({"images": source.image_digest(split)})
        path = corpus_path(directory, name, split, origin)
    writer_arguments = {
        "tokenizer": tokenizer,
        "autoencoder": autoencoder,
        "row_length": row_length,
        "patch_size": patch_size,
        "time_token": time_token,
        "image_storage": image_storage,
    }
    return PrepareJob(
        name=name,
        split=split,
        path=path,
        origin=origin,
        writer_arguments=writer_arguments,
        shards=source.shards(split) if hasattr(source, "shards") else [source],
    )


def corpus_path(directory: str | Path, name: str, split: Split, origin: list) -> Path:
    """Return the folder of a corpus of this origin."""
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    return Path(directory) / f"{name}-{split}-{digest}"


def origin_facts(origin: list) -> dict:
    """Name the items of `PrepareJob.origin`."""
    names = ("format", "source", "tokenizer", "autoencoder", "row_length", "patch_size")
    return dict(zip(names, origin, strict=False)) | {"time_token": "time_token" in origin}


class ShardWriter:
    """Writes one shard of a job; a context manager that leaves nothing behind after an error.

    Args:
        job: the job; its `shards_folder` exists.
        number: number of the shard.
    """

    def __init__(self, job: PrepareJob, number: int):
        self.job, self.number = job, number
        self.skipped: Counter[str] = Counter()
        # Several processes, also on several nodes, may write the same shard: each has a folder of
        # its own, and the first that finishes wins.
        self.unfinished = partial_folder(job.shard_path(number))
        self.writer = CorpusWriter(self.unfinished, **job.writer_arguments)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def add(self, document: RawDocument | Skipped) -> None:
        """Write a document, or count the reason why it cannot be used."""
        try:
            if isinstance(document, Skipped):
                raise BadSample(document.reason)
            self.writer.add(document)
        except BadSample as error:
            known = str(error) in self.skipped or len(self.skipped) < MAX_REASONS
            self.skipped[str(error) if known else "other reasons"] += 1

    def _close(self) -> None:
        """Finish the files and move them to the shard's final path."""
        self.writer.close(dict(self.skipped.most_common()), self.job.origin)
        publish_folder(self.unfinished, self.job.shard_path(self.number))


def prepare(
    job: PrepareJob, *, processes: int | None = 1, part: tuple[int, int] = (0, 1)
) -> Corpus | None:
    """Open the corpus of a job, after preparing it if it does not exist.

    Args:
        job: the job, from `plan_corpus`.
        processes: number of processes that prepare shards in parallel; 1 uses this process, and
            None as many as there are CPU cores, if there are enough shards.
        part: (i, n) prepares only shards i, i + n, i + 2n, ..., so that n commands can share a job.

    Returns:
        The corpus, or None if shards of another part are still missing.

    Raises:
        UserError: the source has no usable document, it has images but there is no autoencoder, or
            its images do not divide into patches. A "val" split without samples makes an empty
            corpus.
    """
    if job.path.is_dir():
        shutil.rmtree(job.shards_folder, ignore_errors=True)  # of a process that was killed
        corpus = Corpus(job.path)
        if corpus.skipped:
            known = summary(job.name, job.split, len(corpus), corpus.skipped, verb="found")
            rank_zero_info(f"{known}; to read them again, delete {job.path}")
        return corpus
    job.shards_folder.mkdir(parents=True, exist_ok=True)
    try:
        numbers = [n for n in job.missing_shards() if n % part[1] == part[0]]
        with report_full_disk(job.path.parent):
            _prepare_shards(job, numbers, processes)
        missing, count = len(job.missing_shards()), len(job.shards)
        if missing:
            rank_zero_info(
                f"{job.name} {job.split}: {count - missing:,} of {count:,} shards are prepared; "
                "the other parts prepare the rest"
            )
            return None
        with report_full_disk(job.path.parent):
            _finish(job)
    except FileNotFoundError:  # another process finished first and removed the shards
        if not job.path.is_dir():
            raise
    finally:
        with suppress(OSError):  # the folder is not empty: finished shards are kept
            job.shards_folder.rmdir()
    return Corpus(job.path)


def _prepare_shards(job: PrepareJob, numbers: list[int], processes: int | None) -> None:
    """Prepare these shards, in this process or in several."""
    if processes is None:
        processes = min(os.cpu_count() or 1, len(numbers) // SHARDS_A_PROCESS)
    processes = max(1, min(processes, len(numbers)))
    title = f"{job.title} in {processes} process{'es' * (processes > 1)}"
    total, done = num_samples_of(job, numbers), 0
    with progress_bar(total=total, desc=title, unit=" documents", delay=2) as bar:
        if processes > 1:
            finished = _prepare_in_processes(job, numbers, processes)
        else:
            finished = (_prepare_shard(job, number, bar.update) for number in numbers)
        with closing(finished):
            for num_shards, count in enumerate(finished, start=1):
                done += count
                bar.update(done - bar.n)
                if total is None:  # estimate it by the shards so far
                    bar.total = done * len(numbers) // num_shards


def num_samples_of(job: PrepareJob, numbers: list[int]) -> int | None:
    """Count the documents and bad samples of these shards; None if counting would take long."""
    total = 0
    for number in numbers:
        count = num_samples(job.shards[number], job.split)
        if count is None:
            return None
        total += count
    return total


def _prepare_in_processes(job: PrepareJob, numbers: list[int], processes: int) -> Iterator[int]:
    """Prepare these shards in several processes; yield the results of `_prepare_shard`."""
    # "spawn", because a forked copy of a process with threads may deadlock.
    context = multiprocessing.get_context("spawn")
    stopped, others = context.Event(), multiprocessing.active_children()
    workers: list[BaseProcess] = []
    with ProcessPoolExecutor(processes, context, _start_process, (job, stopped)) as pool:
        try:
            with blocked():  # the processes start here
                waiting = [pool.submit(_prepare_shard_in_process, number) for number in numbers]
                workers += [p for p in multiprocessing.active_children() if p not in others]
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{job.title}: one of {processes} processes was killed, perhaps because memory "
                "ran out; finished shards are kept, run it again with fewer --processes"
            ) from error
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            end_processes(workers)


# Set in the processes that `_prepare_in_processes` starts: their job, and an event that stops it.
_job: PrepareJob | None = None
_stopped: Event | None = None


def _start_process(job: PrepareJob, stopped: Event) -> None:
    global _job, _stopped
    _job, _stopped = job, stopped
    start_worker()
    torch.set_num_threads(1)


def _prepare_shard_in_process(number: int) -> int:
    """Write one shard, and return the number of its documents and bad samples."""

    def end_if_stopped() -> None:
        if _stopped.is_set():
            raise SystemExit

    return _prepare_shard(_job, number, end_if_stopped)


def _prepare_shard(job: PrepareJob, number: int, after_each: Callable[[], object]) -> int:
    """Write one shard, and return the number of its documents and bad samples.

    Args:
        job: the job.
        number: number of the shard.
        after_each: called after each document; if it raises, the shard is not written.
    """
    count = 0
    with ShardWriter(job, number) as shard:
        for document in job.shards[number].documents(job.split):
            shard.add(document)
            after_each()
            count += 1
    return count


def _finish(job: PrepareJob) -> None:
    """Merge all shards into the corpus and report what it contains."""
    name, split = job.name, job.split
    shards = [job.shard_path(number) for number in range(len(job.shards))]
    whole = shards[0] if len(shards) == 1 else partial_folder(job.shards_folder / "whole")
    try:
        if len(shards) > 1:
            merge(shards, whole, job.origin)
        facts = json.loads((whole / "corpus.json").read_text())
        check_result(name, split, facts["num_documents"], facts["skipped"])
        if "latent_moments" in facts:
            check_std(
                Moments.merge([facts["latent_moments"]]),
                Moments.merge([facts["pixel_moments"]]),
                facts["num_images"],
            )
        publish_folder(whole, job.path)
    except UserError:
        shutil.rmtree(job.shards_folder)  # the same shards would fail again
        raise
    finally:
        if len(shards) > 1:  # it was not published
            shutil.rmtree(whole, ignore_errors=True)
    shutil.rmtree(job.shards_folder, ignore_errors=True)
    details = f" ({counted(facts['num_tokens'], 'token')}, {counted(facts['num_images'], 'image')})"
    count, skipped, num_cut = facts["num_documents"], facts["skipped"], facts["num_cut"]
    rank_zero_info(summary(name, split, count, skipped, details, num_cut=num_cut))


def summary(
    name: str,
    split: Split,
    count: int,
    skipped: dict[str, int],
    details: str = "",
    unit: str = "document",
    num_cut: int = 0,
    verb: str = "prepared",
) -> str:
    """Write a line such as "emoji train: prepared 1,200 documents, skipped 1: 1 damaged image"."""
    line = f"{name} {split}: {verb} {counted(count, unit)}{details}"
    if num_cut:
        line += f", cut {num_cut:,} longer than a row between their parts"
    if skipped:
        line += f", skipped {sum(skipped.values()):,}: {format_reasons(skipped)}"
    return line


def format_reasons(skipped: dict[str, int]) -> str:
    """List how many samples were skipped for each reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def check_result(name: str, split: Split, num_documents: int, skipped: dict[str, int]) -> None:
    """Check that a source has usable documents.

    Raises:
        UserError: every sample was skipped, or there is none to train on.
    """
    if num_documents == 0 and skipped:
        advice = "repair them or change the data's arguments"
        if any(reason.startswith("longer than a row") for reason in skipped):
            advice = "give a larger data.row_length or model.patch_size, or a smaller image_size"
        elif "missing image" in skipped:
            advice = "put the images where the captions name them, or give their folder as `images`"
        number = sum(skipped.values())
        documents = f"all {number:,} documents" if number > 1 else "the only document"
        raise UserError(
            f"{name}: {documents} of the {split} split {'are' if number > 1 else 'is'} unusable "
            f"({format_reasons(skipped)}); {advice}"
        )
    if num_documents == 0 and split == "train":
        raise UserError(f"{name}: there are no documents to train on; check its paths")
