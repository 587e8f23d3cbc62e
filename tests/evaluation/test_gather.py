"""Two processes that share the work unevenly say, both, the number that one process says."""

import math

import pytest
import torch
from torch import distributed, multiprocessing
from torchmetrics import Metric

from evaluation.bleu import BLEU4
from evaluation.cider import CIDEr
from evaluation.clip_score import CLIPScore
from evaluation.composition import TASKS, Composition
from evaluation.features import Features
from evaluation.fid import FID
from evaluation.gather import canonical
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from evaluation.perplexity import Perplexity
from support.extractors import first_pixels, tiny_clip

NUM_ITEMS = 31
SHARES = {  # of the items, by rank
    "uneven": [range(0, NUM_ITEMS, 2), range(1, NUM_ITEMS, 2)],
    "very uneven": [range(4), range(4, NUM_ITEMS)],
    "nothing for one": [range(NUM_ITEMS), range(0)],
}
NAMES = [
    *("fid", "fid with a reference", "kid", "inception score", "clip score"),
    *("perplexity", "cider", "bleu", "composition"),
]
WORDS = "a red blue cat dog on the mat".split()


def metrics(folder) -> dict[str, Metric]:
    extractor, reference = first_pixels(6), folder / "reference.safetensors"
    return {
        "fid": FID(extractor),
        "fid with a reference": FID(extractor, reference=reference),
        "kid": KID(extractor, subset_size=9, subsets=5),
        "inception score": InceptionScore(extractor, splits=3),
        "clip score": CLIPScore(f"local-dir:{folder / 'clip'}", scale=-100.0),
        "perplexity": Perplexity(),
        "cider": CIDEr(),
        "bleu": BLEU4(),
        "composition": Composition(),
    }


def feed(metric: Metric, index: int) -> None:
    """Gives a metric the item of an index, the same whoever asks."""
    generator = torch.Generator().manual_seed(index)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)]
    captions = [" ".join(words[:5]), " ".join(words[2:8]), " ".join(words[4:])]
    numbers = torch.randn(2, 6, generator=generator)
    match metric:
        case FID() | KID() | InceptionScore():
            for real in (True, False):
                metric.update(Features(numbers + real, numbers * 3), real=real)
        case CLIPScore():
            images = torch.randint(256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
            metric.update(images, captions[:1])
        case Perplexity():
            metric.update(numbers.abs().flatten()[: index % 7 + 1], num_bytes=index + 3)
        case CIDEr() | BLEU4():
            metric.update(captions[:1], [captions[1:]])
        case Composition():
            metric.update(TASKS[index % 6], index % 4 == 0)


def values(metric: Metric, share) -> dict[str, float]:
    """Everything that a metric says after its share of the items."""
    for index in share:
        feed(metric, index)
    found = metric.compute()
    found = found if isinstance(found, dict) else {"value": found}
    counts = {k: v for k, v in metric.protocol.items() if isinstance(v, int | float)}
    return {name: float(value) for name, value in (found | counts).items()}


def keep_reference(folder, share) -> None:
    """Real pictures, shared out, into the file that `metrics` reads."""
    fid = metrics(folder)["fid with a reference"]
    for index in share:
        feed(fid, 100 + index)
    fid.keep_real()


def everything(folder, rank: int | None) -> dict[tuple[str, str], dict[str, float]]:
    """What each metric says for each way of sharing; without a rank, of all items."""
    return {
        (kind, name): values(metric, range(NUM_ITEMS) if rank is None else shares[rank])
        for kind, shares in SHARES.items()
        for name, metric in metrics(folder).items()
    }


def work(rank: int, folder) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    keep_reference(folder, SHARES["very uneven"][rank])
    distributed.barrier()  # rank 0 writes the file that both read
    torch.save(everything(folder, rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What one process says, then what each of two says."""
    alone, shared = (tmp_path_factory.mktemp(name) for name in ("alone", "shared"))
    for folder in (alone, shared):
        tiny_clip(folder / "clip")
    keep_reference(alone, range(NUM_ITEMS))
    multiprocessing.start_processes(work, (shared,), nprocs=2, start_method="forkserver")
    return [everything(alone, None), *(torch.load(shared / f"{rank}.pt") for rank in (0, 1))]


@pytest.mark.slow  # two processes import everything anew
@pytest.mark.filterwarnings("ignore:.*biased upwards", "ignore:.*without.*update")
@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_say_what_one_says(found, kind, name):
    alone, *shared = (values[kind, name] for values in found)
    assert all(math.isfinite(value) for value in alone.values())
    for values_of_rank in shared:
        assert values_of_rank == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_rows_in_canonical_order_do_not_depend_on_who_had_which():
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(canonical(rows[order]), canonical(rows))
    assert torch.equal(canonical(rows).sort(0).values, rows.sort(0).values)
