"""`tf-lightning inspect`: what a configuration's data holds, and how the model sees it."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from tf_lightning.autoencoder import load_autoencoder
from tf_lightning.batch import Document, as_latents, document_length, is_image
from tf_lightning.data.corpus import Corpus
from tf_lightning.data.drawings import Shown, draw_documents, draw_rows
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError
from tf_lightning.gallery import write_picture, write_text
from tf_lightning.pixels import to_picture

EPILOG = """\
examples:
  tf-lightning inspect -c configs/quickstart.yaml
  tf-lightning inspect -c configs/emoji.yaml -o look --documents 40

It prepares the data as `prepare` does, unless that was done, and writes
  report.txt      documents, tokens, pictures, what was skipped and why, how long documents are
  documents.png   documents as the model is shown them: text from its tokens, pictures from its
                  latents, captions dropped and turned about as in training
  rows.png        the first rows of training: what stands at each position, and in which document
Any value of the configuration can be changed behind it, as in --data.row_length 1024.
"""
ROWS_SEARCHED = 500  # for documents of every source
BAR = 40  # characters


def run_inspect(args: list[str]) -> None:
    """Prepare, count, draw, and say what was written."""
    options, rest = _parser().parse_known_args(args)
    from tf_lightning.lightning_cli import build

    data = build(["-c", str(options.config), *rest], run=False, prog="inspect").datamodule
    if not isinstance(data, Mixture):
        raise UserError(
            f"{type(data).__name__} has no documents to inspect; give the configuration of a "
            "Transfusion, whose data are text or documents with pictures"
        )
    data.prepare_data()
    data.setup()
    folder = options.out or data.cache_dir / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    report = "\n".join(
        line
        for split, corpora in data.corpora.items()
        for name, corpus in corpora.items()
        for line in describe(f"{name} {split}", corpus, data.num_patches(corpus), data.row_length)
    )
    rows, padding = _rows(data, options.rows)
    report += f"\npadding of the first {options.rows} rows of training: {padding:.1%}\n"
    print(report)
    write_text(folder / "report.txt", report)
    write_picture(folder / "rows.png", rows)
    shown = pick_documents(data, options.documents, options.seed)
    write_picture(folder / "documents.png", draw_documents(shown))
    print(f"Wrote {folder}/documents.png ({len(shown)} documents), rows.png and report.txt.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tf-lightning inspect",
        description="Count a configuration's data and draw it as the model sees it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="YAML file of a run")
    told = "folder to write (default: inspect/ in the data's cache_dir)"
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help=told)
    for name, default, what in (
        ("documents", 24, "documents to draw"),
        ("rows", 8, "rows to draw"),
    ):
        told = f"{what}, the same number of each source as far as it goes (default: {default})"
        told = told if name == "documents" else f"{what}, from the first on (default: {default})"
        parser.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=told)
    told = "of the choice of documents (default: 0)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=told)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def describe(title: str, corpus: Corpus, num_patches: int, row_length: int) -> list[str]:
    """Counts, reasons for skipping, and a histogram of lengths in tokens, patches counted."""
    count = len(corpus)
    layout = corpus.layout()
    lengths, alone = layout.lengths(num_patches), layout.lengths(0)
    images = int((layout.lengths(1) - alone).sum())
    tokens = int(alone.sum()) - 2 * count - 2 * images  # without <bos>, <eos>, <boi>, <eoi>
    lines = [
        f"{title}: {count:,} documents, {tokens:,} text tokens, {images:,} pictures "
        f"of {num_patches} patches, {int(lengths.sum()):,} positions",
        *(f"  skipped {number:,}: {reason}" for reason, number in corpus.skipped.items()),
    ]
    return lines + histogram(lengths, row_length) if count else lines


def histogram(lengths: np.ndarray, longest: int) -> list[str]:
    """A bar for each doubling of length: documents of so many tokens.

    Args:
        lengths: positions of each document, (num_documents,).
        longest: the row's length.
    """
    edges = [1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    edges[-1] += 1  # the last bar holds the longest too
    counts, _ = np.histogram(lengths, edges)
    used = np.flatnonzero(counts)
    return [
        f"  {edges[i]:>7,} to {edges[i + 1] - 1:>7,} tokens {counts[i]:>11,} "
        f"{'#' * -(-BAR * int(counts[i]) // int(counts.max()))}".rstrip()
        for i in range(used[0], used[-1] + 1)
    ]


def _rows(data: Mixture, count: int) -> tuple[Image.Image, float]:
    """The first rows of training, drawn; and how much of them is padding."""
    loader = data.train_dataloader()
    batch = loader.collate_fn([loader.dataset[row] for row in range(count)])
    fill = batch.row_tokens / data.row_length
    titles = [
        f"row {row}: {data.source_names[int(batch.source_ids[row])]}, {float(fill[row]):.1%} full"
        for row in range(count)
    ]
    return draw_rows(batch, data.tokenizer, titles), 1 - float(fill.mean())


def pick_documents(data: Mixture, count: int, seed: int = 0) -> list[Shown]:
    """Random documents of training, of every source as many as of another where it has them."""
    dataset, random = data.train_dataloader().dataset, np.random.default_rng(seed)
    share = -(-count // len(data.source_names))
    found: dict[str, list[Document]] = {name: [] for name in data.source_names}
    for row in random.permutation(ROWS_SEARCHED).tolist():
        _, documents, source = dataset[row]
        mine = found[data.source_names[source]]
        if documents and len(mine) < share:
            mine.append(documents[random.integers(len(documents))])
        if all(len(documents) == share for documents in found.values()):
            break
    autoencoder = load_autoencoder(data.autoencoder_name) if data.autoencoder_name else None
    picked = [(name, document) for name, documents in found.items() for document in documents]
    return [
        (
            f"{name}, {document_length(document, data.patch_size)} tokens",
            [
                to_picture(autoencoder.decode(as_latents(part)[None])[0])
                if is_image(part)
                else data.tokenizer.decode(part.tolist())
                for part in document
            ],
        )
        for name, document in picked[:count]
    ]
