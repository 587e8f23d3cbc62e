"""`tf-lightning inspect`: count the data of a configuration and draw what the model sees.

Files are written: counts and histograms, a sheet of documents, a drawing of packed rows, and a list
of documents that may be left out.

Shapes: B rows, T positions in a row.
"""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import (
    Batch,
    Document,
    as_latents,
    document_length,
    is_image,
    unmasked_ids,
)
from tf_lightning.cli.lightning import build_data
from tf_lightning.cli.parser import Parser, non_negative_int, path_type, positive_int
from tf_lightning.cli.prepare import prepare_data
from tf_lightning.cli.quality import (
    BAR_LENGTH,
    describe_quality,
    filter_list,
    measure,
    shape_advice,
    write_list,
)
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import Source, num_samples
from tf_lightning.data.images import to_image
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.packing import CorpusRows
from tf_lightning.data.quality import Quality
from tf_lightning.data.readers.source_report import report_source
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.folders import check_writable
from tf_lightning.progress import counted
from tf_lightning.remote.urls import hide_logins

PAD, TEXT, SPECIAL, IMAGE, COPY = range(5)
KINDS = ("padding", "text", "<bos> <boi> <eoi> <eos>", "image", "clean copy")
# Two tones of each kind, alternating between neighboring documents or images.
TONES = np.array(
    [
        [(225, 225, 225), (225, 225, 225)],
        [(66, 113, 186), (118, 158, 219)],
        [(20, 20, 20), (20, 20, 20)],
        [(222, 128, 42), (242, 175, 105)],
        [(58, 150, 90), (120, 195, 145)],
    ],
    np.uint8,
)
# Sizes in pixels.
LINE_WIDTH, STRIP_HEIGHT, LABEL_HEIGHT = 1024, 22, 18
COLUMN_WIDTH, MIN_IMAGE_WIDTH, GAP = 300, 128, 10
MAX_CHARACTERS = 500  # characters of a text on the sheet
FONT = ImageFont.load_default(13)

Shown = tuple[str, list[str | Image.Image]]  # title; texts and images in order


def kinds(batch: Batch, tokenizer) -> np.ndarray:
    """Return the kind of each position, (B, T): PAD, TEXT, SPECIAL, IMAGE or COPY."""
    ids, image_ids = batch.input_ids.numpy(), batch.image_ids.numpy()
    specials = [tokenizer.bos_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id]
    found = np.where(np.isin(ids, specials), SPECIAL, TEXT)
    found[image_ids >= 0] = IMAGE
    found[image_ids >= batch.num_images] = COPY
    found[batch.document_ids.numpy() < 0] = PAD
    return found


def draw_rows(batch: Batch, tokenizer, titles: Sequence[str]) -> Image.Image:
    """Draw each row as strips from left to right, with a number where each document begins."""
    held, documents = kinds(batch, tokenizer), batch.document_ids.numpy()
    images = batch.image_ids.numpy()
    drawn = [
        _draw_row(*row, title) for *row, title in zip(held, documents, images, titles, strict=True)
    ]
    legend = _legend()
    page = Image.new(
        "RGB", (LINE_WIDTH + 2 * GAP, sum(p.height for p in [legend, *drawn])), "white"
    )
    top = 0
    for part in [legend, *drawn]:
        page.paste(part, (GAP, top))
        top += part.height
    return page


def _draw_row(
    held: np.ndarray, documents: np.ndarray, images: np.ndarray, title: str
) -> Image.Image:
    """Draw one row of T positions in lines of LINE_WIDTH pixels."""
    width = max(1, LINE_WIDTH // len(held))  # pixels of a position
    line = LINE_WIDTH // width
    height = STRIP_HEIGHT + LABEL_HEIGHT
    lines = -(-len(held) // line)
    page = Image.new("RGB", (LINE_WIDTH, LABEL_HEIGHT + 4 + lines * (height + 4)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((0, 2), title, "black", FONT)
    tone = np.where(images >= 0, images, documents) % 2
    colors = TONES[held, tone]  # (T, 3)
    begins = np.flatnonzero(np.diff(documents, prepend=-2) != 0)
    for number in range(lines):
        here = slice(number * line, (number + 1) * line)
        top = LABEL_HEIGHT + 4 + number * (height + 4)
        pixels = colors[None, here].repeat(STRIP_HEIGHT, 0).repeat(width, 1)
        page.paste(Image.fromarray(pixels), (0, top + LABEL_HEIGHT))
        free = 0  # where the next number does not overlap the last
        for begin in begins[(begins >= here.start) & (begins < here.stop)]:
            left = int(begin - here.start) * width
            draw.line((left, top + LABEL_HEIGHT - 4, left, top + LABEL_HEIGHT - 1), "black")
            if documents[begin] >= 0 and left >= free:
                label = str(documents[begin])
                draw.text((left, top + 1), label, "black", FONT)
                free = left + draw.textlength(label, FONT) + 4
    return page


def _legend() -> Image.Image:
    page = Image.new("RGB", (LINE_WIDTH, 34), "white")
    draw, left = ImageDraw.Draw(page), 0
    for tones, name in zip(TONES, KINDS, strict=True):
        for tone in tones:
            draw.rectangle((left, 10, left + 10, 22), tuple(tone.tolist()))
            left += 11
        draw.text((left + 4, 8), name, "black", FONT)
        left += 30 + round(draw.textlength(name, FONT))
    draw.text((left, 8), "0, 1, 2, ...: a document begins", "black", FONT)
    return page


def draw_documents(documents: Sequence[Shown], columns: int = 4) -> Image.Image:
    """Draw documents in columns, each at the end of the shortest column."""
    cells = [_draw_document(*document) for document in documents]
    heights, places = [GAP] * columns, []
    for cell in cells:
        column = heights.index(min(heights))
        places.append((GAP + column * (COLUMN_WIDTH + GAP), heights[column]))
        heights[column] += cell.height + GAP
    page = Image.new("RGB", (GAP + columns * (COLUMN_WIDTH + GAP), max(heights)), "white")
    for cell, place in zip(cells, places, strict=True):
        page.paste(cell, place)
    return page


def _draw_document(title: str, parts: list[str | Image.Image]) -> Image.Image:
    pieces = [_draw_text(title, "dimgray")]
    pieces += [_draw_text(p) if isinstance(p, str) else _enlarged(p) for p in parts]
    height = sum(piece.height + 4 for piece in pieces) + 8
    page = Image.new("RGB", (COLUMN_WIDTH, height), "white")
    ImageDraw.Draw(page).rectangle((0, 0, COLUMN_WIDTH - 1, height - 1), outline="silver")
    top = 6
    for piece in pieces:
        page.paste(piece, (8, top))
        top += piece.height + 4
    return page


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge a small image by a whole factor, and fit a large one into its column."""
    width = max(1, MIN_IMAGE_WIDTH // image.width) * image.width
    width = min(width, COLUMN_WIDTH - 16)
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.NEAREST)


def _draw_text(text: str, color: str = "black") -> Image.Image:
    more = len(text) - MAX_CHARACTERS
    shown = text[:MAX_CHARACTERS] + (f" ... and {more:,} characters more" if more > 0 else "")
    lines = [row for line in shown.splitlines() for row in textwrap.wrap(line, 42) or [""]]
    page = Image.new("RGB", (COLUMN_WIDTH - 16, 17 * max(1, len(lines))), "white")
    ImageDraw.Draw(page).multiline_text((0, 0), "\n".join(lines), color, FONT, spacing=3)
    return page


EPILOG = """\
examples:
  tf-lightning inspect -c configs/quickstart.yaml
  tf-lightning inspect -c configs/emoji.yaml -o look --documents 40

The data is prepared first, as `prepare` does, and `fit` uses what is prepared. Then these files are
written:
  report.txt      documents, tokens, images, skipped samples with reasons, lengths of documents;
                  for each source also duplicates, writing systems, and sizes of image files
  exclude.txt     documents that may be left out, with reasons: duplicates, texts in an unusual
                  writing system, small and long images. Edit it, then `tf-lightning prepare -c
                  CONFIG --exclude FILE`. Only written if there are any
  documents.png   documents as the model sees them: text decoded from its tokens, images from
                  their latents, with captions dropped and parts reordered as in training
  rows.png        the first rows of training: the kind of each position, and its document
Options of the configuration may follow, as in --data.row_length 1024.
"""
MANY_DOCUMENTS = 1_000  # more are announced before they are prepared


def run_inspect(args: list[str]) -> None:
    """Prepare the data, count it, draw it, and print what was written."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    recipes = [word for file in options.config for word in ("-c", file)]
    data = build_data([*recipes, *rest], parser).datamodule
    if not isinstance(data, Mixture):
        raise UserError(
            f"{type(data).__name__} has no documents to inspect; give the configuration of a "
            "Transfusion model, whose data has text"
        )
    folder = options.out or data.cache_dir / "inspect"
    check_writable(folder)
    understood = [line for name in data.sources for line in report_source(name, data.sources[name])]
    for line in understood if data.encoded else [*understood, *announcement(data.sources)]:
        print(line, flush=True)
    prepare_data(data)
    data.setup()
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(data, options.rows)
    lines = [*describe_all(data), *describe_padding(data)]
    qualities = measure(data, options.quality) if options.quality != 0 else {}
    for name, quality in qualities.items():
        corpora = [corpora[name] for corpora in data.corpora.values()]
        lines += ["", *describe_quality(name, quality, corpora)]
    if qualities and data.image_storage.max_aspect_ratio == 1 and not data.num_codes:
        lines += shape_advice(np.concatenate([one.ratios() for one in qualities.values()]))
    report = "\n".join(lines) + "\n"
    print(report)
    with atomic_file(folder / "report.txt") as partial:
        partial.write_text("\n".join([*understood, report]), encoding="utf-8")
    shown = pick_documents(data, options.documents, options.seed)
    for name, drawing in {"rows.png": rows, "documents.png": draw_documents(shown)}.items():
        with atomic_file(folder / name) as partial:
            drawing.save(partial, format="PNG")
    drawn = counted(len(shown), "document")
    print(f"Wrote {folder}/documents.png ({drawn}), rows.png and report.txt.")
    suggest_filter(qualities, folder, shlex.join(map(hide_logins, [*recipes, *rest])))


def announcement(sources: dict[str, Source]) -> Iterator[str]:
    """Describe how many documents will be prepared, if they are many, and how to read fewer.

    Args:
        sources: the sources by name.
    """
    counts = [
        num_samples(source, split) for source in sources.values() for split in ("train", "val")
    ]
    if None not in counts and sum(counts) <= MANY_DOCUMENTS:
        return
    number = "all" if None in counts else f"{sum(counts):,}"
    yield f"Preparing {number} documents, unless they are prepared already; `fit` uses them too."
    for name, source in sources.items():
        if hasattr(source, "num_documents"):
            option = f"--data.sources.{name}.init_args.num_documents {MANY_DOCUMENTS}"
            yield f"To look at fewer documents of {name}, give {option}."
        elif hasattr(source, "files"):
            yield f"To look at fewer documents of {name}, give fewer files in its paths."


def suggest_filter(qualities: dict[str, Quality], folder: Path, options: str) -> None:
    """Write the documents that may be left out into a filter list, and say how to use it.

    Args:
        qualities: the measures of each source.
        folder: where the list is written, if there are such documents.
        options: the configuration, as on the command line.
    """
    text, count = filter_list(qualities)
    if not count:
        return
    path = write_list(folder, text)
    print(
        f"Wrote {path}, which names {counted(count, 'document')} that may be left out, with "
        "reasons. Edit it, and leave them out with\n"
        f"  tf-lightning prepare {options} --exclude {path}\n"
        f"  tf-lightning fit {options} --data.exclude {path}"
    )


def _parser() -> Parser:
    parser = Parser(
        "inspect",
        "Report statistics of the data and draw examples.",
        EPILOG,
        usage="tf-lightning inspect -c CONFIG [-o FOLDER] [--documents N] [--rows N] "
        "[--quality N] [--seed N] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE",
        help="YAML file of a run; further files change its values")  # fmt: skip
    add("-o", "--out", type=path_type, metavar="FOLDER",
        help="folder for the files (default: inspect/ in the data's cache_dir)")  # fmt: skip
    add("--documents", type=positive_int, default=24, metavar="N",
        help="documents to draw, equally many from each source (default: 24)")  # fmt: skip
    add("--rows", type=positive_int, default=8, metavar="N",
        help="rows to draw, from the first one on (default: 8)")  # fmt: skip
    add("--quality", type=non_negative_int, metavar="N",
        help="documents of each source and split to check for duplicates and other faults, from "
        "the first one on; 0: none (default: all)")  # fmt: skip
    add("--seed", type=non_negative_int, default=0, metavar="N",
        help="seed for choosing the documents (default: 0)")  # fmt: skip
    return parser


def describe_all(data: Mixture) -> list[str]:
    """Describe the corpora of all splits and sources."""
    return [
        line
        for split, corpora in data.corpora.items()
        for name, corpus in corpora.items()
        for line in describe(f"{name} {split}", corpus, data.num_patches(corpus), data.row_length)
    ]


def describe_padding(data: Mixture) -> list[str]:
    """Describe the padding in an epoch of each source, and the mean length of its documents."""
    streams = data.training_rows().corpora
    return [
        f"{name} train: documents of {rows.mean_length:,.0f} positions on average, packed into "
        f"rows of {rows.row_length:,} with {1 - rows.fill:.1%} padding"
        for name, rows in zip(data.source_names, streams, strict=True)
    ]


def describe(title: str, corpus: Corpus, num_patches: int, row_length: int) -> list[str]:
    """Describe a corpus: counts, reasons for skipping, and a histogram of lengths in positions."""
    count = len(corpus)
    layout = corpus.layout()
    lengths = layout.lengths(num_patches)
    images = int(layout.num_images().sum())
    in_images = int(layout.image_patches(num_patches).total.sum())
    tokens = int(lengths.sum()) - in_images - 2 * count - 2 * images  # without <bos>, <eoi> etc.
    several = len(corpus.image_shapes) > 1
    patches = f" of {num_patches} patches" if images and not several else ""
    patches = f" of {len(corpus.image_shapes)} shapes" if several else patches
    lines = [
        f"{title}: {counted(count, 'document')}, {counted(tokens, 'text token')}, "
        f"{counted(images, 'image')}{patches}, {counted(int(lengths.sum()), 'position')}",
        *(f"  skipped {number:,}: {reason}" for reason, number in corpus.skipped.items()),
    ]
    return lines + histogram(lengths, row_length) if count else lines


def histogram(lengths: np.ndarray, longest: int) -> list[str]:
    """Draw one bar for each doubling of length, as lines of text.

    Args:
        lengths: positions of each document, (num_documents,).
        longest: row length, which no document exceeds.
    """
    edges = [1]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    edges[-1] += 1  # the last bar includes the row length
    counts, _ = np.histogram(lengths, edges)
    used = np.flatnonzero(counts)
    return [
        f"  {edges[i]:>7,} to {edges[i + 1] - 1:>7,} positions {counts[i]:>8,} "
        f"{'#' * -(-BAR_LENGTH * int(counts[i]) // int(counts.max()))}".rstrip()
        for i in range(used[0], used[-1] + 1)
    ]


def _rows(data: Mixture, count: int) -> Image.Image:
    """Draw the first rows of training."""
    loader = data.train_dataloader()
    batch = loader.collate_fn([loader.dataset[row] for row in range(count)])
    fill = batch.row_tokens / data.row_length
    titles = [
        f"row {row}: {data.source_names[int(batch.source_ids[row])]}, {float(fill[row]):.1%} full"
        for row in range(count)
    ]
    return draw_rows(batch, data.tokenizer, titles)


def pick_documents(data: Mixture, count: int, seed: int = 0) -> list[Shown]:
    """Pick random training documents, equally many of each source if it has enough."""
    random = np.random.default_rng(seed)
    share = -(-count // len(data.source_names))
    corpora = data.train_dataloader().dataset.corpora
    found = {
        name: pick_from(rows, share, random)
        for name, rows in zip(data.source_names, corpora, strict=True)
    }
    autoencoder = load_autoencoder(data.autoencoder_name) if data.autoencoder_name else None
    picked = [(name, document) for name, documents in found.items() for document in documents]
    return [
        (
            f"{name}, {document_length(document, data.patch_size)} positions",
            [
                to_image(autoencoder.decode(as_latents(part)[None])[0])
                if is_image(part)
                else data.tokenizer.decode(unmasked_ids(part).tolist())
                for part in document
            ],
        )
        for name, document in picked[:count]
    ]


def pick_from(rows: CorpusRows, count: int, random: np.random.Generator) -> list[Document]:
    """Pick random documents of a source, each once, from as many rows as possible."""
    chosen = random.permutation(rows.rows_per_epoch)[:count].tolist()
    shuffled = []
    for row in map(rows.row, chosen):  # an epoch has each document once
        shuffled.append([row[i] for i in random.permutation(len(row))])
    turns = chain.from_iterable(zip_longest(*shuffled))
    return [document for document in turns if document is not None][:count]
