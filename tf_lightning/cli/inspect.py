"""`tf-lightning inspect`: what a configuration's data holds, and how the model sees it.

What a model is trained on, drawn: documents with their pictures in place, and packed rows.

Shapes: B rows, T places a row.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import Batch, Document, as_latents, document_length, is_image
from tf_lightning.cli.parser import Parser, positive_int
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.images import to_image
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file

PAD, TEXT, SPECIAL, IMAGE, COPY = range(5)
KINDS = ("padding", "text", "<bos> <boi> <eoi> <eos>", "image", "clean copy")
# Two tones of each, for a document or an image and the next one.
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
LINE, STRIP, LABEL = 1024, 22, 18  # pixels: a line's width, a strip's height, of the words above it
COLUMN, PICTURE, GAP = 300, 128, 10
MAX_CHARACTERS = 500  # of a text
FONT = ImageFont.load_default(13)

Shown = tuple[str, list[str | Image.Image]]  # a title, texts and pictures in order


def kinds(batch: Batch, tokenizer) -> np.ndarray:
    """What each position holds, (B, T): PAD, TEXT, SPECIAL, IMAGE or COPY."""
    ids, image_ids = batch.input_ids.numpy(), batch.image_ids.numpy()
    specials = [tokenizer.bos_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id]
    found = np.where(np.isin(ids, specials), SPECIAL, TEXT)
    found[image_ids >= 0] = IMAGE
    found[image_ids >= batch.num_images] = COPY
    found[batch.document_ids.numpy() < 0] = PAD
    return found


def draw_rows(batch: Batch, tokenizer, titles: Sequence[str]) -> Image.Image:
    """Each row as strips from left to right; a number stands where each document begins."""
    held, documents = kinds(batch, tokenizer), batch.document_ids.numpy()
    images = batch.image_ids.numpy()
    drawn = [
        _draw_row(*row, title) for *row, title in zip(held, documents, images, titles, strict=True)
    ]
    legend = _legend()
    page = Image.new("RGB", (LINE + 2 * GAP, sum(p.height for p in [legend, *drawn])), "white")
    top = 0
    for part in [legend, *drawn]:
        page.paste(part, (GAP, top))
        top += part.height
    return page


def _draw_row(
    held: np.ndarray, documents: np.ndarray, images: np.ndarray, title: str
) -> Image.Image:
    """One row of T positions, as many lines of LINE pixels as it takes."""
    width = max(1, LINE // len(held))  # of a position
    line = LINE // width
    height = STRIP + LABEL
    lines = -(-len(held) // line)
    page = Image.new("RGB", (LINE, LABEL + 4 + lines * (height + 4)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((0, 2), title, "black", FONT)
    tone = np.where(images >= 0, images, documents) % 2
    colours = TONES[held, tone]  # (T, 3)
    begins = np.flatnonzero(np.diff(documents, prepend=-2) != 0)
    for number in range(lines):
        here = slice(number * line, (number + 1) * line)
        top = LABEL + 4 + number * (height + 4)
        pixels = colours[None, here].repeat(STRIP, 0).repeat(width, 1)
        page.paste(Image.fromarray(pixels), (0, top + LABEL))
        free = 0  # where the next number may stand
        for begin in begins[(begins >= here.start) & (begins < here.stop)]:
            left = int(begin - here.start) * width
            draw.line((left, top + LABEL - 4, left, top + LABEL - 1), "black")
            if documents[begin] >= 0 and left >= free:
                label = str(documents[begin])
                draw.text((left, top + 1), label, "black", FONT)
                free = left + draw.textlength(label, FONT) + 4
    return page


def _legend() -> Image.Image:
    page = Image.new("RGB", (LINE, 34), "white")
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
    """A sheet of documents from top to bottom, each under its title, where there is most room."""
    cells = [_draw_document(*document) for document in documents]
    heights, places = [GAP] * columns, []
    for cell in cells:
        column = heights.index(min(heights))
        places.append((GAP + column * (COLUMN + GAP), heights[column]))
        heights[column] += cell.height + GAP
    page = Image.new("RGB", (GAP + columns * (COLUMN + GAP), max(heights)), "white")
    for cell, place in zip(cells, places, strict=True):
        page.paste(cell, place)
    return page


def _draw_document(title: str, parts: list[str | Image.Image]) -> Image.Image:
    pieces = [_draw_text(title, "dimgrey")]
    pieces += [_draw_text(p) if isinstance(p, str) else _enlarged(p) for p in parts]
    height = sum(piece.height + 4 for piece in pieces) + 8
    page = Image.new("RGB", (COLUMN, height), "white")
    ImageDraw.Draw(page).rectangle((0, 0, COLUMN - 1, height - 1), outline="silver")
    top = 6
    for piece in pieces:
        page.paste(piece, (8, top))
        top += piece.height + 4
    return page


def _enlarged(picture: Image.Image) -> Image.Image:
    """Its pixels as they are, where it is small."""
    scale = max(1, PICTURE // picture.width) * picture.width
    size = (
        min(scale, COLUMN - 16),
        round(picture.height * min(scale, COLUMN - 16) / picture.width),
    )
    return picture.resize(size, Image.Resampling.NEAREST)


def _draw_text(text: str, colour: str = "black") -> Image.Image:
    more = len(text) - MAX_CHARACTERS
    shown = text[:MAX_CHARACTERS] + (f" ... and {more:,} characters more" if more > 0 else "")
    lines = [row for line in shown.splitlines() for row in textwrap.wrap(line, 42) or [""]]
    page = Image.new("RGB", (COLUMN - 16, 17 * max(1, len(lines))), "white")
    ImageDraw.Draw(page).multiline_text((0, 0), "\n".join(lines), colour, FONT, spacing=3)
    return page


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
    from tf_lightning.cli.lightning import build

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
    with atomic_file(folder / "report.txt") as file:
        file.write_text(report)
    with atomic_file(folder / "rows.png") as file:
        rows.save(file, format="PNG")
    shown = pick_documents(data, options.documents, options.seed)
    with atomic_file(folder / "documents.png") as file:
        draw_documents(shown).save(file, format="PNG")
    print(f"Wrote {folder}/documents.png ({len(shown)} documents), rows.png and report.txt.")


def _parser() -> Parser:
    parser = Parser(
        "inspect",
        "Count a configuration's data and draw it as the model sees it.",
        EPILOG,
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
        parser.add_argument(f"--{name}", type=positive_int, default=default, metavar="N", help=told)
    told = "of the choice of documents (default: 0)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=told)
    return parser


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
                to_image(autoencoder.decode(as_latents(part)[None])[0])
                if is_image(part)
                else data.tokenizer.decode(part.tolist())
                for part in document
            ],
        )
        for name, document in picked[:count]
    ]
