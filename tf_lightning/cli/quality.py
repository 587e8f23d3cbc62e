"""Report on the quality of the data, and a suggested filter list, for `tf-lightning inspect`."""

from collections.abc import Iterator, Sequence
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np

from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import identified, num_samples
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.quality import KINDS, LONG, LONG_RATIO, SMALL, SMALL_SHARE, Quality
from tf_lightning.files import atomic_file
from tf_lightning.progress import progress_bar

SMALLEST = 3  # image files that are named
BAR_LENGTH = 40  # characters
LABEL_LENGTH = 45
FAR_RATIO = 4 / 3  # a longer image loses more than a quarter of its longer side to a square
MANY_SHARE = 0.1  # share of the images that are longer, above which buckets are advised
RATIOS = {  # largest width / height of a bar, as long as it is not square
    "narrower than 1:3": 1 / 3,
    "1:3 to 1:2": 1 / 2,
    "1:2 to 2:3": 2 / 3,
    "2:3 to 9:10": 9 / 10,
    "about square": 10 / 9,
    "10:9 to 3:2": 3 / 2,
    "3:2 to 2:1": 2,
    "2:1 to 3:1": 3,
    "wider than 3:1": np.inf,
}


def measure(data: Mixture, limit: int | None) -> dict[str, Quality]:
    """Read the documents of each source and measure them.

    Args:
        data: the data.
        limit: documents of each source and split to read at most; None: all.
    """
    found = {}
    for name, source in data.sources.items():
        found[name] = quality = Quality(getattr(source, "image_size", None))
        for split in ("train", "val"):
            documents = islice(identified(name, source, split), limit)
            total = num_samples(source, split) if limit is None else limit
            bar = {"total": total, "unit": " documents", "delay": 2}
            for document_id, document in progress_bar(documents, f"checking {name} {split}", **bar):
                quality.add(split, document_id, document)
    return found


def describe_quality(name: str, quality: Quality, corpora: Sequence[Corpus]) -> Iterator[str]:
    """Describe the quality of a source in lines of text.

    Args:
        name: name of the source.
        quality: its measures.
        corpora: its corpora, of all splits.
    """
    num = quality.num
    yield f"{name}: quality of {num['train']:,} training and {num['val']:,} held-out documents"
    if not len(quality):
        return
    findings = [finding.kind for finding in quality.findings()]
    notes = {SMALL: f", below {SMALL_SHARE:g} of image_size", LONG: f", over {LONG_RATIO:g}:1"}
    for kind in KINDS:
        yield line(kind + notes.get(kind, ""), f"{findings.count(kind):,}")
    if quality.shared:
        yield line("further documents of an image file", f"{quality.shared:,}")
    systems = ", ".join(f"{system} {number:,}" for system, number in quality.writing().items())
    yield line("writing systems (not languages)", systems)
    if quality.characters:
        characters = np.frombuffer(quality.characters, np.int64)
        yield line("characters of a text", distribution(characters))
        tokens = np.concatenate([corpus.layout().part_lengths for corpus in corpora])
        yield line("tokens of a text or its first caption", distribution(tokens[tokens >= 0]))
    if quality.sizes:
        smallest = [f"{w} x {h} ({name})" for w, h, name in quality.smallest(SMALLEST)]
        yield line("smallest images", ", ".join(smallest))
        yield from ratio_bars(quality.ratios())


def line(label: str, value: str) -> str:
    """Return a line of a report."""
    return f"  {label:<{LABEL_LENGTH}} {value}"


def distribution(values: np.ndarray) -> str:
    """Describe numbers by their mean and some quantiles."""
    if not len(values):
        return "none"
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], method="nearest").tolist()
    return (
        f"mean {values.mean():,.1f}, 5% below {low:,}, median {middle:,}, 95% below {high:,}, "
        f"longest {int(values.max()):,}"
    )


def ratio_bars(ratios: np.ndarray) -> Iterator[str]:
    """Draw a bar for each range of aspect ratios that images have."""
    place = np.searchsorted([*RATIOS.values()][:-1], ratios)
    counts = np.bincount(place, minlength=len(RATIOS)).tolist()
    for label, number in zip(RATIOS, counts, strict=True):
        if number:
            bar = "#" * -(-BAR_LENGTH * number // max(counts))
            yield line(f"width:height {label}", f"{number:>11,} {bar}")


def shape_advice(ratios: np.ndarray) -> Iterator[str]:
    """Advise aspect-ratio buckets if many images are far from square.

    Args:
        ratios: width / height of each image file.
    """
    longer = np.maximum(ratios, 1 / ratios)
    share = float((longer > FAR_RATIO).mean()) if len(ratios) else 0
    if share > MANY_SHARE:
        limit = np.ceil(2 * np.quantile(longer, 0.95)) / 2
        yield (
            f"{share:.0%} of the images lose more than a quarter of their longer side, because "
            f"images are cropped to squares; --data.max_aspect_ratio {min(limit, LONG_RATIO):g} "
            "keeps their shapes"
        )


HEADER = """\
# Documents that may be left out, as `tf-lightning inspect` suggests.
# Each line has the id of a document, a tab and the reason. Remove a line to keep its document, or
# begin it with #. Ids of your own may be added; the reason may be missing.
# Where documents repeat each other, the list keeps a training document rather than a held-out one,
# and an earlier document rather than a later one.
# tf-lightning prepare -c CONFIG --exclude FILE
# tf-lightning fit -c CONFIG --data.exclude FILE
"""


def filter_list(qualities: dict[str, Quality]) -> tuple[str, int]:
    """Write a filter list, and count its documents.

    A document with several findings has one line, under the first of their headings.

    Args:
        qualities: the measures of each source.
    """
    text, listed = HEADER, set()
    for name, quality in qualities.items():
        findings = quality.findings()
        reasons: dict[str, list[str]] = {}
        for finding in findings:
            reasons.setdefault(finding.id, []).append(finding.reason)
        for kind, group in groupby(findings, lambda finding: finding.kind):
            ids = [finding.id for finding in group]
            new = [found for found in ids if found not in listed]
            listed.update(new)
            above = f", of which {len(ids) - len(new):,} above" if len(new) < len(ids) else ""
            text += f"\n# {name}: {kind} ({len(ids):,}{above})\n"
            text += "".join(f"{name}\t{'; '.join(reasons[name])}\n" for name in new)
    return text, len(listed)


def write_list(folder: Path, text: str) -> Path:
    """Write a filter list into a folder; a different one that is there stays, as it may be edited.

    Returns:
        The file, exclude.txt or a free name such as exclude-2.txt.
    """
    names = (f"exclude-{number}.txt" if number > 1 else "exclude.txt" for number in count(1))
    for path in (folder / name for name in names):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return path
        if not path.exists():
            break
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
