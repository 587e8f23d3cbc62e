"""Every metric of `evaluation`, fed with random items by one process or by two.

`run_rank` stands here because a started process can import this module, but no test module.
"""

import torch
from torch import distributed
from torchmetrics import Metric

from evaluation.bleu import BLEU4
from evaluation.cider import CIDEr
from evaluation.clip_score import CLIPScore
from evaluation.composition import TASKS, Composition
from evaluation.features import Features
from evaluation.fid import FID
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from evaluation.perplexity import Perplexity
from support.extractors import first_pixels

NUM_ITEMS = 31
SHARES = {  # the items of rank 0 and of rank 1
    "uneven": [range(0, NUM_ITEMS, 2), range(1, NUM_ITEMS, 2)],
    "very uneven": [range(4), range(4, NUM_ITEMS)],
    "nothing for one": [range(NUM_ITEMS), range(0)],
}
METRICS = [
    *("fid", "fid with a reference", "kid", "inception score", "clip score"),
    *("perplexity", "cider", "bleu", "composition"),
]
WORDS = "a red blue cat dog on the mat".split()


def metrics(folder) -> dict[str, Metric]:
    """One instance of each of METRICS; `folder` has the CLIP model and the FID reference."""
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
    """Update a metric with item `index`, which depends on the index only."""
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


def values(metric: Metric, share: range) -> dict[str, float]:
    """The metric's values and the counts of its protocol after the items of `share`."""
    for index in share:
        feed(metric, index)
    found = metric.compute()
    found = found if isinstance(found, dict) else {"value": found}
    counts = {k: v for k, v in metric.protocol.items() if isinstance(v, int | float)}
    return {name: float(value) for name, value in (found | counts).items()}


def keep_reference(folder, share: range) -> None:
    """Write the FID reference that `metrics` reads, from the real images of `share`."""
    fid = metrics(folder)["fid with a reference"]
    for index in share:
        feed(fid, 100 + index)
    fid.keep_real()


def all_values(folder, rank: int | None) -> dict[tuple[str, str], dict[str, float]]:
    """Values by (name of SHARES, name of METRICS) for a rank's items, or for all items if None."""
    return {
        (kind, name): values(metric, range(NUM_ITEMS) if rank is None else shares[rank])
        for kind, shares in SHARES.items()
        for name, metric in metrics(folder).items()
    }


def run_rank(rank: int, folder) -> None:
    """Compute all values as one of two processes and save them in `folder`."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    keep_reference(folder, SHARES["very uneven"][rank])
    distributed.barrier()  # rank 0 writes the file that both read
    torch.save(all_values(folder, rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()
