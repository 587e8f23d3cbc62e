"""Random and damaged files for readers: JSON, parquet of any types, tars of any headers.

All of them are functions of a random.Random, so a failure is found again by its seed.
"""

import io
import json
import random
import re
import string
import tarfile
from pathlib import Path

import pyarrow
from pyarrow import parquet

from support import mutations, training_datasets
from support.files import encoded_image
from support.training_datasets import COLORS, color_of
from tf_lightning import data
from tf_lightning.data.documents import AnyText
from tf_lightning.data.readers import captions, chat, edits, json_records, text

READERS = (
    data.TextFiles, data.CaptionTars, data.CaptionRows, data.CaptionJson, data.CaptionFolders,
    data.InterleavedFiles, data.EditFiles, data.ChatFiles, data.ImageFiles, data.ClassFolders,
)  # fmt: skip
KEYS = (
    *text.TEXT_KEYS, *captions.IMAGE_KEYS, *captions.CAPTION_KEYS, *chat.COLUMNS, *chat.ROLE_KEYS,
    *chat.CONTENT_KEYS, *edits.SOURCE_KEYS, *edits.INSTRUCTION_KEYS, *edits.TARGET_KEYS,
    *edits.OMNIGEN, *edits.BAGEL, "images", "annotations", "id", "image_id", "file_name",
    "sentences", "split", "filename", "filepath", "texts", "parts", "text_list", "image_info",
    "image_name",
    "matched_text_index", "type", "image_url", "url", "bytes", "path", "img_id", *chat.CALL_KEYS,
    *chat.LOSS_KEYS, *chat.REASONING_KEYS, *json_records.LIST_KEYS,
)  # fmt: skip
NAMES = ("red.png", "none.png", "", "None", "x" * 300, "..", "/", "\0", "~", "http://a.b/c",
         "data:,x", "forbidden/a.png", "pipe", "é\ud800")  # fmt: skip
WORDS = ("user", "assistant", "human", "gpt", "system", "tool", "train", "val", "<image>", " ",
         "<|image_1|>", "\u2028", "\ufeff", "a red circle")  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip some bytes, cut off the end, or both."""
    content = bytearray(content)
    what = rng.randrange(3)
    if what != 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    if what != 1:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def json_value(rng: random.Random, depth: int = 0):
    """A JSON value of any type, with the keys and values that readers look for."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return rng.choice(NAMES + WORDS)
    if kind == 3:
        return rng.choice([0, 1, -1, 2**63, 1e300, 0.5, float("nan"), float("inf")])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return "".join(rng.choices(string.printable, k=rng.randrange(20)))
    if kind == 6:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(KEYS, rng.randrange(5))
    return {key: json_value(rng, depth + 1) for key in keys}


def json_file(folder: Path, rng: random.Random) -> Path:
    """A file of random JSON: lines, an array, or one object."""
    records = [json_value(rng) for _ in range(rng.randrange(5))]
    form = rng.randrange(4)
    content = {
        0: "\n".join(map(json.dumps, records)),
        1: json.dumps(records),
        2: json.dumps(records, indent=1),
        3: json.dumps({rng.choice(KEYS): json_value(rng) for _ in range(4)}),
    }[form].encode()
    if rng.random() < 0.2 and content:
        content = damaged(content, rng)
    file = folder / rng.choice(["a.json", "a.jsonl", "a", "edit_turns.json", "a.jsonl.gz"])
    file.write_bytes(content)
    return file


def column(rng: random.Random, count: int) -> pyarrow.Array:
    """A parquet column of a random type."""
    image = encoded_image("red")
    makers = [
        lambda: rng.choice(NAMES[:8] + WORDS), lambda: rng.choice([image, b"", b"\xff\xfe"]),
        lambda: rng.randrange(-9, 9), lambda: rng.random(), lambda: None,
        lambda: rng.random() < 0.5,
        lambda: [rng.choice(WORDS)] * rng.randrange(3), lambda: [image] * rng.randrange(3),
        lambda: {"bytes": image, "path": "a"},
        lambda: {"bytes": None, "path": rng.choice(NAMES[:5])},
        lambda: [{"role": rng.choice(WORDS), "content": rng.choice(WORDS)}] * rng.randrange(3),
        lambda: [[rng.choice(WORDS)]] * rng.randrange(3),
    ]  # fmt: skip
    make = rng.choice(makers)
    values = [make() if rng.random() < 0.8 else None for _ in range(count)]
    found = pyarrow.array(values)
    if pyarrow.types.is_string(found.type) and rng.random() < 0.2:
        return pyarrow.array([b"\xff\xfe"] * count, pyarrow.binary()).view(pyarrow.string())
    return found


def parquet_file(folder: Path, rng: random.Random) -> Path:
    """A parquet file of random columns."""
    names, count = rng.sample(KEYS, rng.randrange(1, 5)), rng.randrange(1, 4)
    names = list(dict.fromkeys(names))
    table = pyarrow.table([column(rng, count) for _ in names], names=names)
    file = folder / "a.parquet"
    parquet.write_table(table, file)
    if rng.random() < 0.2:
        file.write_bytes(damaged(file.read_bytes(), rng))
    return file


def tar_file(folder: Path, rng: random.Random) -> Path:
    """A tar of random headers: types, sizes and names of up to 300 bytes."""
    stream = io.BytesIO()
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for _ in range(rng.randrange(6)):
            stem = rng.choice(["0", "a.b", "x" * rng.choice([90, 300]), "._0", "a/../b", "/a", ""])
            kind = rng.choice(["jpg", "png", "txt", "json", "tiff", "JPEG", "", "input.jpg"])
            content = rng.choice(
                [encoded_image("red"), b"red", b"{}", json.dumps(json_value(rng)).encode(), b""]
            )
            member = tarfile.TarInfo(f"{stem}.{kind}")
            member.size = len(content)
            if rng.random() < 0.2:
                member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"S",
                                          tarfile.FIFOTYPE, b"Z"])  # fmt: skip
                member.linkname = "/etc/passwd"
                member.size = 0
            tar.addfile(member, io.BytesIO(content[: member.size]))
    content = stream.getvalue()
    if rng.random() < 0.4:
        content = damaged(content, rng)
    file = folder / rng.choice(["a.tar", "a.tar.gz", "a"])
    file.write_bytes(content)
    return file


def csv_file(folder: Path, rng: random.Random) -> Path:
    """A table of random names, quotes, delimiters and line ends."""
    pieces = (
        "a.png",
        "red.png",
        "red",
        '"',
        '""',
        ",",
        ",",
        ";",
        "\n",
        "\n",
        "\r",
        "\t",
        "\0",
        "é",
    )
    header = ",".join(rng.sample(KEYS, rng.randrange(1, 4))) + rng.choice(["\n", "\r", ""])
    text = header + "".join(rng.choices(pieces, k=rng.randrange(60)))
    file = folder / rng.choice(["a.csv", "a.tsv", "a.txt"])
    file.write_bytes(text.encode(rng.choice(["utf-8", "latin-1", "utf-16"])))
    return file


SEEDS = (
    training_datasets.img2dataset, training_datasets.bagel_captions, training_datasets.karpathy,
    training_datasets.mmc4, training_datasets.mint,
    lambda folder: training_datasets.coco(folder)[0],
    lambda folder: training_datasets.obelics(folder)[0],
)  # fmt: skip


def damaged_dataset(folder: Path, rng: random.Random) -> Path:
    """A damaged file of a public dataset, perhaps under the name of another format."""
    inside = folder / "dataset"
    inside.mkdir()
    file = rng.choice(SEEDS)(inside)
    content = damaged(file.read_bytes(), rng)
    if rng.random() < 0.3:
        file = file.with_name(rng.choice(["a.tar", "a.parquet", "a.json", "a.txt", "a.csv", "a"]))
    file.write_bytes(content)
    return file


MAKERS = (json_file, csv_file, parquet_file, tar_file, damaged_dataset)


def all_bombs() -> None:
    """Make all bombs, which takes some seconds."""
    for kind in mutations.BOMBS:
        mutations.bomb(kind)


def read_bomb(folder: Path, rng: random.Random) -> None:
    """Read a small file that expands to a large one, or a tar whose headers promise much."""
    reader = rng.choice(READERS)
    if rng.random() < 0.2:
        name, content = rng.choice(["a.tar", "a"]), mutations.bomb_tar(rng)
    else:
        kind = rng.choice(mutations.BOMBS)
        name, content = bomb_name(kind, rng), mutations.bomb(kind)
    (folder / name).write_bytes(content)
    sized = {} if reader is data.TextFiles else {"image_size": 16}
    source = reader(str(folder / name), val_fraction=0, **sized)
    source.fingerprint("train")
    for _ in source.documents("train"):
        pass


def bomb_name(kind: str, rng: random.Random) -> str:
    """Name a bomb as what it is, or as another kind of file."""
    filling, _, codec = kind.partition(".")
    packed = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2", "xz": ".xz"}.get(codec, "")
    usual = {"dictionary": "a.parquet", "image": "a.png", "zeros": "a.tar"}.get(filling, "a.jsonl")
    return rng.choice([usual, "a.txt", "a.json", "a.csv", "a"]) + packed


def wrong_pairs(document: list) -> list[tuple[str, str]]:
    """Return the pairs of caption and image color that differ.

    Damage may change words or pixels, so only known colors are compared. In MINT-1T the words
    follow their image; in an edit they describe the image after them.
    """
    marks = [
        re.sub(r"[ !]", "", part) if isinstance(part, str) else (color_of(part),)
        for part in document
    ]
    words = [mark for mark in marks if isinstance(mark, str) and mark in COLORS]
    shown = [mark[0] for mark in marks if isinstance(mark, tuple) and mark[0]]
    if len(document) == 3 and not isinstance(document[0], str):  # an edit
        shown = shown[1:]
    if len(words) != len(shown) or any(isinstance(part, AnyText) for part in document):
        return []
    return [pair for pair in zip(words, shown, strict=True) if pair[0] != pair[1]]
