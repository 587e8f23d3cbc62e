"""Preparation of corpora by the ranks of a Trainer, on any number of devices and nodes.

Each rank writes its own shards. The DataLoader workers of a rank read its shards piece by piece;
the rank itself tokenizes and encodes the pieces in order, so a shard's files do not depend on the
number of ranks and workers.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tf_lightning.data.corpus.encoded import TOKENIZER_FILE, find_corpora
from tf_lightning.data.corpus.folders import LocalFolder
from tf_lightning.data.corpus.prepare import PrepareJob, ShardWriter, prepare
from tf_lightning.data.documents import RawDocument, Skipped
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.processes import Loader, start_worker
from tf_lightning.progress import progress_bar

DOCUMENTS_PER_PIECE = 64
MAX_WAIT = timedelta(days=30)  # how long the first rank that finishes waits for the last one

Shard = tuple[PrepareJob, int]  # a job and the number of a shard


class ShardPiece(NamedTuple):
    """Some consecutive documents of a shard."""

    index: int  # index of the shard in ShardData.shards
    documents: list[RawDocument | Skipped]
    last: bool = False  # the shard has no further pieces


class ShardPieces(IterableDataset):
    """The documents that one rank has to write, piece by piece.

    Args:
        shards: all shards, the same list on every rank.
        rank: this rank; it takes every `world_size`-th shard.
        world_size: number of ranks.
    """

    def __init__(self, shards: list[Shard], rank: int, world_size: int):
        self.shards, self.rank, self.world_size = shards, rank, world_size

    def __iter__(self) -> Iterator[ShardPiece | UserError]:
        """Yield the pieces of every unfinished shard of this worker.

        A UserError is yielded instead of raised, because a DataLoader would wrap it in a traceback.
        """
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = range(self.rank, len(self.shards), self.world_size)[worker_id::num_workers]
        try:
            for index in mine:
                job, number = self.shards[index]
                if job.shard_path(number).is_dir():
                    continue
                documents = iter(job.shards[number].documents(job.split))
                while piece := list(islice(documents, DOCUMENTS_PER_PIECE)):
                    yield ShardPiece(index, piece)
                yield ShardPiece(index, [], last=True)
        except UserError as error:
            yield error


class ShardData(L.LightningDataModule):
    """The shards of several jobs, served to `ShardEncoder`.

    Args:
        plan: makes the list of jobs. Rank 0 calls it first, because the first call may train the
            tokenizer.
        folder: the folder to write, on a disk that all ranks share; it holds nothing else.
        num_workers: processes of each rank that read documents.
    """

    def __init__(self, plan: Callable[[], list[PrepareJob]], folder: Path, num_workers: int):
        super().__init__()
        self.prepare_data_per_node = False
        self.plan, self.folder, self.num_workers = plan, folder, num_workers

    def prepare_data(self) -> None:
        """Train the tokenizer and create the folders.

        Raises:
            UserError: the folder holds corpora of the same names with other settings.
        """
        jobs = self.plan()
        for job in jobs:
            found = set(find_corpora(LocalFolder(self.folder), job.name, job.split))
            if others := found - {job.path.name}:
                raise UserError(
                    f"{self.folder / others.pop()} was encoded from other files or with other "
                    "settings; delete it, or give another folder with --data.encoded"
                )
        for job in jobs:
            job.shards_folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / TOKENIZER_FILE) as partial:
            partial.write_bytes(jobs[0].writer_arguments["tokenizer"].proto)

    def setup(self, stage: str | None = None) -> None:
        """List the shards of all unfinished corpora, in the same order on all ranks."""
        self.jobs = self.plan()
        unfinished = [job for job in self.jobs if not job.path.is_dir()]
        self.shards = [(job, number) for job in unfinished for number in range(len(job.shards))]

    def predict_dataloader(self) -> DataLoader:
        """Load the pieces of this rank's shards."""
        pieces = ShardPieces(self.shards, self.trainer.global_rank, self.trainer.world_size)
        return Loader(
            pieces,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=unchanged,
            worker_init_fn=start_worker,
        )

    def transfer_batch_to_device(self, batch: ShardPiece, device, dataloader_idx: int):
        """Do nothing: the writer moves images to the device when it has enough of them."""
        return batch

    def merge_shards(self) -> None:
        """Merge the shards of each corpus; call it on one rank when all ranks have finished."""
        for job in self.jobs:
            prepare(job)


def unchanged(piece: ShardPiece) -> ShardPiece:
    """Return the piece; a picklable collate function."""
    return piece


class ShardEncoder(L.LightningModule):
    """Writes the shards of one rank; a context manager that removes unfinished shards at its end.

    Use it with `Trainer.predict` and `ShardData`.
    """

    def __init__(self):
        super().__init__()
        self.open_shards: dict[int, ShardWriter] = {}
        self.num_documents = 0

    def __enter__(self) -> "ShardEncoder":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for shard in self.open_shards.values():
            shard.__exit__(kind or KeyboardInterrupt, *error)

    def on_predict_start(self) -> None:
        """Create the progress bar and the process group in which ranks wait for each other."""
        num_ranks = self.trainer.world_size
        total = -(-len(self.trainer.datamodule.shards) // num_ranks)
        title = f"encoding, rank 0 of {num_ranks}" if num_ranks > 1 else "encoding"
        silent = not self.trainer.is_global_zero
        self.bar = progress_bar(total=total, desc=title, unit=" shards", delay=2, disable=silent)
        self.group = dist.new_group(backend="gloo", timeout=MAX_WAIT) if num_ranks > 1 else None

    def predict_step(self, piece: ShardPiece | UserError, batch_index: int) -> int:
        """Write a piece and return its number of documents."""
        if isinstance(piece, UserError):
            raise piece
        if piece.index not in self.open_shards:
            job, number = self.trainer.datamodule.shards[piece.index]
            self.open_shards[piece.index] = ShardWriter(job, number)
        for document in piece.documents:
            self.open_shards[piece.index].add(document)
        self.num_documents += len(piece.documents)
        if piece.last:
            with self.open_shards.pop(piece.index):
                self.bar.update()
        self.bar.set_postfix(documents=f"{self.num_documents:,}", refresh=False)
        return len(piece.documents)

    def on_predict_end(self) -> None:
        """Wait for the other ranks."""
        self.bar.close()
        if self.group is not None:
            dist.barrier(self.group)
