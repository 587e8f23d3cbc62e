"""A corpus in the making: what it is made of, and its shards, each complete or not there at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tf_lightning.data.corpus import BadSample, Latents, RawDocument, Skipped, Source, Split
from tf_lightning.data.corpus_writer import CorpusWriter
from tf_lightning.tokenizer import Tokenizer

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
