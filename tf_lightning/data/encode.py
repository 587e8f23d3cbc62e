"""Corpora encoded by a Trainer's ranks: each writes shards of its own, whoever else does.

Workers of a rank read shards piece by piece; the rank itself tokenises and encodes what they read,
in each shard's order, so that a shard is the same whatever the ranks and workers.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from tf_lightning.data.corpus.prepare import VOCABULARY, Job, ShardWriter, corpora_of, prepare
from tf_lightning.data.documents import RawDocument, Skipped
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError

DOCUMENTS_AT_ONCE = 64
LONGEST_WAIT = timedelta(days=30)  # of the rank that ends first for the one that ends last


class Piece(NamedTuple):
    """Some documents of a shard, one after another."""

    place: int  # of the shard in the work of all ranks
    documents: list[RawDocument | Skipped]
    last: bool = False  # nothing follows in this shard


class Pieces(IterableDataset):
    """What one worker of a rank reads.

    Args:
        work: shards by job and number, the same list on every rank.
        rank: which of them are this one's: every `world_size`-th.
        world_size: ranks.
    """

    def __init__(self, work: list[tuple[Job, int]], rank: int, world_size: int):
        self.work, self.rank, self.world_size = work, rank, world_size

    def __iter__(self) -> Iterator[Piece | UserError]:
        """Pieces of every shard that is not finished; an error is sent, to arrive as it is."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(self.rank, len(self.work), self.world_size)[number::workers]
        try:
            for place in mine:
                job, shard = self.work[place]
                if job.shard(shard).is_dir():
                    continue
                documents = iter(job.shards[shard].documents(job.split))
                while piece := list(islice(documents, DOCUMENTS_AT_ONCE)):
                    yield Piece(place, piece)
                yield Piece(place, [], last=True)
        except UserError as error:
            yield error


class EncodeData(L.LightningDataModule):
    """The shards of a Mixture's corpora, for `Encoder`.

    Args:
        data: whose sources, tokenizer and autoencoder are used.
        folder: to write; of nothing else, and on a disk that all ranks share.
    """

    def __init__(self, data: Mixture, folder: Path):
        super().__init__()
        self.prepare_data_per_node = False
        self.data, self.folder = data, folder

    def prepare_data(self) -> None:
        """Train the tokenizer; refuse a folder where something else was encoded."""
        jobs = self._plan()
        for job in jobs:
            others = set(corpora_of(self.folder, job.name, job.split)) - {job.path}
            if others:
                raise UserError(
                    f"{others.pop()} was encoded from other files or with other settings; delete "
                    "it, or give another folder with --data.encoded"
                )
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / VOCABULARY).write_bytes(self.data.tokenizer.proto)

    def setup(self, stage: str | None = None) -> None:
        """List the work, alike on all ranks: what is finished is passed over by its rank."""
        self.jobs = self._plan()
        waiting = [job for job in self.jobs if not job.path.is_dir()]
        self.work = [(job, number) for job in waiting for number in range(len(job.shards))]

    def _plan(self) -> list[Job]:
        kept = replace(self.data.latents, moments=True)
        return [job for jobs in self.data.jobs(self.folder, kept).values() for job in jobs.values()]

    def predict_dataloader(self) -> DataLoader:
        """This rank's pieces."""
        pieces = Pieces(self.work, self.trainer.global_rank, self.trainer.world_size)
        workers = self.data.num_workers
        return DataLoader(pieces, batch_size=None, num_workers=workers, collate_fn=as_it_is)

    def transfer_batch_to_device(self, batch: Piece, device, dataloader_idx: int) -> Piece:
        """Nothing to do: pictures go where the autoencoder is when there are enough of them."""
        return batch

    def finish(self) -> None:
        """Join the shards of each corpus, when all ranks are done."""
        for job in self.jobs:
            prepare(job)


def as_it_is(piece: Piece) -> Piece:
    """What a DataLoader is to make of a piece."""
    return piece


class Encoder(L.LightningModule):
    """Writes the pieces that its rank is given; use it with `with`, which leaves no half shards."""

    def __init__(self):
        super().__init__()
        self.opened: dict[int, ShardWriter] = {}
        self.num_documents = 0

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for shard in self.opened.values():
            shard.__exit__(kind or KeyboardInterrupt, *error)

    def on_predict_start(self) -> None:
        """Show this rank's shards on the first rank, and get ready to wait for the others."""
        work, ranks = len(self.trainer.datamodule.work), self.trainer.world_size
        mine = -(-work // ranks)
        told = f"encoding, rank 0 of {ranks}" if ranks > 1 else "encoding"
        silent = not self.trainer.is_global_zero
        self.bar = tqdm(total=mine, desc=told, unit=" shards", delay=2, disable=silent)
        self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if ranks > 1 else None

    def predict_step(self, piece: Piece | UserError, batch_index: int) -> int:
        """Write a piece; how many documents it has."""
        if isinstance(piece, UserError):
            raise piece
        if piece.place not in self.opened:
            self.opened[piece.place] = ShardWriter(*self.trainer.datamodule.work[piece.place])
        for document in piece.documents:
            self.opened[piece.place].add(document)
        self.num_documents += len(piece.documents)
        if piece.last:
            with self.opened.pop(piece.place):
                self.bar.update()
        self.bar.set_postfix(documents=f"{self.num_documents:,}", refresh=False)
        return len(piece.documents)

    def on_predict_end(self) -> None:
        """Wait for the others."""
        self.bar.close()
        if self.group is not None:
            dist.barrier(self.group)
