"""Row r is the same for any number of ranks and workers, also after a resume."""

from types import SimpleNamespace

import pytest
import torch

from support.sources import GreyImages, RepeatedWord

ROWS_PER_STEP, STEPS = 8, 3


def rows_seen(mixture, ranks: int, workers: int, resumed_at: int) -> list[tuple]:
    """Rows of some steps of all ranks in the order of the stream, resumed after some steps."""
    by_rank = []
    for rank in range(ranks):
        sources = {"words": RepeatedWord("red", 5, 40), "pictures": GreyImages(num_documents=30)}
        data = mixture(sources, {"words": 1, "pictures": 2}, batch_size=ROWS_PER_STEP // ranks)
        data.num_workers = workers
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=ranks, global_step=resumed_at, max_steps=100,
            accumulate_grad_batches=1,
        )  # fmt: skip
        next_row = resumed_at * ROWS_PER_STEP
        data.load_state_dict({"next_row": next_row, "global_step": resumed_at})
        data.setup()
        loader = iter(data.train_dataloader())
        by_rank.append([next(loader) for _ in range(STEPS)])
    steps = zip(*by_rank, strict=True)
    return [row for step in steps for batch in step for row in rows_of(batch)]


def rows_of(batch) -> list[tuple]:
    """All fields of each row of a batch."""
    found = []
    for row in range(len(batch.input_ids)):
        images = batch.image_ids[row][batch.image_ids[row] >= 0].unique()
        pictures = (batch.latents[images], batch.noise[images], batch.t[images])
        text = (batch.input_ids[row], batch.labels[row], batch.document_ids[row])
        found.append((*text, batch.source_ids[row], *pictures))
    return found


@pytest.mark.parametrize("ranks, workers", [(1, 2), (1, 4), (2, 0), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_workers_see_the_rows_of_one_process(mixture, ranks, workers):
    alone, shared = (rows_seen(mixture, *how, 5) for how in ((1, 0), (ranks, workers)))
    assert len(alone) == len(shared) == ROWS_PER_STEP * STEPS
    for a, b in zip(alone, shared, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resumed_run_reads_the_next_rows(mixture):
    whole, resumed = rows_seen(mixture, 1, 0, 0), rows_seen(mixture, 2, 1, 1)
    assert len({row[0].numpy().tobytes() for row in whole}) > 20  # rows differ
    for a, b in zip(whole[ROWS_PER_STEP:], resumed, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
