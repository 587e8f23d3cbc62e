"""Datasets of PyTorch: their rows are those of the data module, for any ranks and workers."""

from itertools import islice

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, DistributedSampler

from support.compare import same_batch
from support.sources import GreyImages, RepeatedWord
from tf_lightning.data import TrainingBatches, TrainingRows
from tf_lightning.errors import UserError


@pytest.fixture
def data(mixture):
    """Text and images with every choice that is made at random, in batches of 3 rows."""
    data = mixture(
        {"words": RepeatedWord("red", 5, 50), "pictures": GreyImages(num_documents=60)},
        hflip=True,
        image_first_prob=0.5,
        timestep_distribution="logit_normal",
        timestep_shift=3.0,
        seed=7,
    )
    data.setup()
    return data


@pytest.fixture
def ours(data):
    """The first batches of the data module."""
    return list(islice(data.train_dataloader(), 12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_in_batches_are_those_of_the_data_module(data, ours, num_workers):
    rows = TrainingRows(data, num_rows=36)
    loader = DataLoader(rows, batch_size=3, num_workers=num_workers, collate_fn=rows.collate)
    assert len(loader) == 12
    assert all(map(same_batch, loader, ours))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_batches_of_all_ranks_are_those_of_the_data_module(data, ours, world_size, num_workers):
    ranks = []
    for rank in range(world_size):
        batches = TrainingBatches(data, 12 // world_size, rank=rank, world_size=world_size)
        loader = DataLoader(batches, batch_size=None, num_workers=num_workers)
        assert len(loader) == 12 // world_size
        ranks.append(list(loader))
    in_turn = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert len(in_turn) == 12 and all(map(same_batch, in_turn, ours))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_with_a_distributed_sampler_read_every_row_once(data, num_workers):
    rows = TrainingRows(data, num_rows=20)
    read = []
    for rank in range(2):
        sampler = DistributedSampler(rows, 2, rank, shuffle=False, drop_last=True)
        arguments = {"sampler": sampler, "num_workers": num_workers, "collate_fn": list}
        for row in (row for items in DataLoader(rows, 3, **arguments) for row in items):
            assert same_batch(rows.collate([row]), rows.collate([rows[row[0]]]))
            read.append(row[0])
    assert sorted(read) == list(range(20))


def test_reading_resumes_at_any_row_with_other_ranks(data, ours):
    for rank in range(2):
        resumed = TrainingBatches(data, first_row=4 * 3, rank=rank, world_size=2)
        assert all(map(same_batch, islice(resumed, 4), ours[4 + rank :: 2]))
    rows = TrainingRows(data, num_rows=5, first_row=12)
    assert [row[0] for row in rows] == [12, 13, 14, 15, 16]
    assert same_batch(rows.collate([rows[0], rows[1], rows[2]]), ours[4])


def test_an_epoch_has_every_document_of_the_smallest_share_and_the_next_one_another_order(mixture):
    data = mixture({"words": RepeatedWord("red", 5, 50)})
    epoch = TrainingRows(data)
    texts = [tuple(text.tolist()) for _, row, _ in epoch for (text,) in row]
    assert len(texts) == len(set(texts)) == 50
    again = TrainingRows(data, first_row=len(epoch))
    other = [tuple(text.tolist()) for _, row, _ in again for (text,) in row]
    assert sorted(other) == sorted(texts) and other != texts


def test_a_corpus_is_a_dataset_of_documents(data):
    corpus = data.corpora["train"]["pictures"]
    documents = list(DataLoader(corpus, batch_size=None, num_workers=2))
    assert len(documents) == len(corpus) == 60
    grey = [round((float(image[0, 0, 0]) + 1) * 127.5) for _, image in documents]
    assert grey == list(range(60))
    assert torch.equal(corpus[-1][0], documents[-1][0])


def test_ranks_are_those_of_the_process_group(data):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        batches = TrainingBatches(data)
    finally:
        torch.distributed.destroy_process_group()
    assert (batches.rank, batches.world_size) == (1, 3)
    alone = TrainingBatches(data)
    assert (alone.rank, alone.world_size) == (0, 1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"rank": 2, "world_size": 2}, "rank=2 must be less than world_size=2; give both"),
        ({"rank": 1}, "rank=1 must be less than world_size=1"),
        ({"first_row": -1}, "first_row=-1 must be at least 0"),
        ({"num_batches": 0}, "num_batches=0 must be"),
    ],
)
def test_numbers_out_of_range_are_refused(data, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainingBatches(data, **arguments)


def test_items_out_of_range_and_lengths_without_an_end_are_errors(data):
    with pytest.raises(IndexError):
        TrainingRows(data, num_rows=3)[3]
    with pytest.raises(TypeError):
        len(TrainingBatches(data))
