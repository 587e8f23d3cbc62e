"""Captioned images in every format, in which each image shows the code that its caption names.

A file is changed, and what is still read must fit together. Codes, names and ids have many digits,
so that no damage turns one into another: a damaged one is unknown, and not compared.
"""

import base64
import hashlib
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.files import write_lines, write_parquet, write_tar
from support.mutations import change_image, mutated, packed
from tf_lightning import data
from tf_lightning.data import Skipped
from tf_lightning.data.documents import AnyText

RECORDS, SLOTS, SIDE = 5, 2, 16
Files = dict[str, bytes]  # name and content of each file of a record's images


def digits(record: int, slot: int, kind: str) -> str:
    """Return 12 hexadecimal digits for a caption ("text") or a name ("name")."""
    return hashlib.sha256(f"{kind} {record} {slot}".encode()).hexdigest()[:12]


@cache
def squares(record: int, slot: int) -> np.ndarray:
    """Return the 4 x 4 squares, black or white, that stand for a code."""
    bits = hashlib.sha256(f"pixels {record} {slot}".encode()).digest()[:2]
    return np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(4, 4).astype(bool)


CODES = [(record, slot) for record in range(RECORDS) for slot in range(SLOTS)]
TEXTS = {digits(*code, "text"): code for code in CODES}
PIXELS = {squares(*code).tobytes(): code for code in CODES}


@cache
def picture(record: int, slot: int = 0, file_format: str = "PNG") -> bytes:
    """Return the image file of a code."""
    gray = (squares(record, slot).repeat(4, 0).repeat(4, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(file, file_format)
    return file.getvalue()


def text(record: int, slot: int = 0) -> str:
    """Return the caption of a code."""
    return f"a picture of {digits(record, slot, 'text')}"


def name(record: int, slot: int = 0, suffix: str = "png") -> str:
    """Return the file name of an image."""
    return f"{digits(record, slot, 'name')}.{suffix}"


def number(record: int) -> int:
    """Return the id of a record."""
    return int(digits(record, 0, "id"), 16)


def codes_in(part: Any) -> list[tuple[int, int]]:
    """Return the codes that a part of a document names or shows; unknown ones are left out."""
    if isinstance(part, str):
        return [code for word, code in TEXTS.items() if any(word in t for t in every_text(part))]
    gray = np.asarray(part.convert("L")).astype(int)[1::4, 1::4]
    code = PIXELS.get((gray > 127).tobytes())
    return [] if code is None else [code]


def every_text(part: str) -> tuple[str, ...]:
    """Return a text, or all of an image's captions."""
    return part.texts if isinstance(part, AnyText) else (part,)


def is_wrong(document: list) -> bool:
    """Return whether a document has parts of two records, or of one record in another order."""
    codes = [code for part in document for code in codes_in(part)]
    return len({record for record, _ in codes}) > 1 or codes != sorted(codes)


# Each format: writes images and records, and returns what a reader is given.


def images(folder: Path, slots: int = 1, suffix: str = "png") -> None:
    """Write the image files of all records."""
    file_format = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    for record in range(RECORDS):
        for slot in range(slots):
            file = folder / name(record, slot, suffix)
            file.write_bytes(picture(record, slot, file_format))


def tar(folder: Path, order: str = "pairs", caption: str = "txt", suffix: str = "jpg") -> Path:
    """Write a tar with the files of a sample next to each other, or all images first."""
    members = []
    file_format = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    for record in range(RECORDS):
        stem = "x" * (120 if order == "long" else 0) + digits(record, 0, "name")
        words = text(record) if caption == "txt" else json.dumps({"caption": text(record)})
        members.append((f"{stem}.{suffix}", picture(record, 0, file_format)))
        members.append((f"{stem}.{caption}", words.encode()))
    if order == "images first":
        members.sort(key=lambda member: member[0].endswith(caption))
    return write_tar(folder / "a.tar", dict(members))


def tar_gz(folder: Path) -> Path:
    file = tar(folder)
    (folder / "a.tar.gz").write_bytes(packed(file.read_bytes(), "gzip"))
    file.unlink()
    return folder / "a.tar.gz"


def rows(image: Callable[[int], Any], **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Make a record for each image."""
    columns = {"image": image, "text": text, **more}
    return [{key: make(n) for key, make in columns.items()} for n in range(RECORDS)]


def json_lines(folder: Path, suffix: str = "") -> Path:
    images(folder)
    return write_lines(folder / f"metadata.jsonl{suffix}", rows(name))


def json_array(folder: Path) -> Path:
    images(folder)
    file = folder / "a.json"
    file.write_text(json.dumps(rows(name), indent=1))
    return file


def data_urls(folder: Path) -> Path:
    def as_url(n: int) -> str:
        return "data:image/png;base64," + base64.b64encode(picture(n)).decode()

    return write_lines(folder / "a.jsonl", rows(as_url))


def table(folder: Path, delimiter: str = ",") -> Path:
    images(folder)
    lines = [("file_name", "text"), *((name(n), text(n)) for n in range(RECORDS))]
    file = folder / ("a.csv" if delimiter == "," else "a.tsv")
    file.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return file


def parquet_rows(folder: Path) -> Path:
    return write_parquet(folder / "a.parquet", rows(picture))


def parquet_paths(folder: Path) -> Path:
    images(folder)
    return write_parquet(folder / "a.parquet", rows(name))


def bagel_captions(folder: Path) -> Path:
    def captions(n: int) -> str:
        return json.dumps({"a": text(n), "b": text(n) + "!"})

    records = [{"image": picture(n), "captions": captions(n)} for n in range(RECORDS)]
    return write_parquet(folder / "a.parquet", records)


def folders(folder: Path, suffix: str = "png") -> Path:
    images(folder, suffix=suffix)
    for n in range(RECORDS):
        (folder / name(n)).with_suffix(".txt").write_text(text(n))
    return folder / f"*.{suffix}"


def coco(folder: Path) -> Path:
    images(folder)
    content = {
        "images": [{"id": number(n), "file_name": name(n)} for n in range(RECORDS)],
        "annotations": [
            {"image_id": number(n), "id": n, "caption": text(n)}
            for _ in range(2)
            for n in reversed(range(RECORDS))
        ],
    }
    file = folder / "captions.json"
    file.write_text(json.dumps(content))
    return file


def karpathy(folder: Path) -> Path:
    images(folder)
    records = [
        {"filepath": ".", "filename": name(n), "split": "train", "sentences": [{"raw": text(n)}]}
        for n in range(RECORDS)
    ]
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": records, "dataset": "coco"}))
    return file


def turns(n: int) -> list[dict[str, str]]:
    """Return a conversation about two images."""
    return [
        turn
        for slot in range(SLOTS)
        for turn in (
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": text(n, slot)},
        )
    ]


def llava(folder: Path) -> Path:
    images(folder, SLOTS)
    records = [
        {"id": n, "image": [name(n, slot) for slot in range(SLOTS)], "conversations": turns(n)}
        for n in range(RECORDS)
    ]
    file = folder / "a.json"
    file.write_text(json.dumps(records))
    return file


def chat_lines(folder: Path) -> Path:
    images(folder, SLOTS)
    records = [
        {"messages": [
            message
            for slot in range(SLOTS)
            for message in (
                {"role": "user", "content": [{"type": "image", "path": name(n, slot)},
                                             {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": text(n, slot)},
            )
        ]}
        for n in range(RECORDS)
    ]  # fmt: skip
    return write_lines(folder / "a.jsonl", records)


def chat_parquet(folder: Path) -> Path:
    records = [
        {"images": [picture(n, slot) for slot in range(SLOTS)], "conversations": turns(n)}
        for n in range(RECORDS)
    ]
    return write_parquet(folder / "a.parquet", records)


def parts(folder: Path) -> Path:
    images(folder, SLOTS)
    records = [
        {"parts": [p for s in range(SLOTS) for p in ({"image": name(n, s)}, {"text": text(n, s)})]}
        for n in range(RECORDS)
    ]
    return write_lines(folder / "a.jsonl", records)


def obelics(folder: Path) -> Path:
    records = [
        {"images": [None, picture(n), None], "texts": ["See:", None, text(n)]}
        for n in range(RECORDS)
    ]
    return write_parquet(folder / "a.parquet", records)


def mmc4(folder: Path) -> Path:
    images(folder)
    records = [
        {"text_list": ["See:", text(n)],
         "image_info": [{"image_name": name(n), "matched_text_index": 1}]}
        for n in range(RECORDS)
    ]  # fmt: skip
    return write_lines(folder / "a.jsonl", records)


def mint(folder: Path) -> Path:
    files = {}
    for n in range(RECORDS):
        pages, file = (
            [Image.open(io.BytesIO(picture(n, slot))) for slot in range(SLOTS)],
            io.BytesIO(),
        )
        pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
        record = {"images": ["a", None, "b", None], "texts": [None, text(n), None, text(n, 1)]}
        files |= {f"{digits(n, 0, 'name')}.json": json.dumps(record).encode()}
        files |= {f"{digits(n, 0, 'name')}.tiff": file.getvalue()}
    return write_tar(folder / "a.tar", files)


def edit_parquet(folder: Path) -> Path:
    records = [
        {"source_img": {"bytes": picture(n), "path": None}, "instruction": text(n, 1),
         "target_img": {"bytes": picture(n, 1), "path": None}}
        for n in range(RECORDS)
    ]  # fmt: skip
    return write_parquet(folder / "a.parquet", records)


def omnigen(folder: Path) -> Path:
    images(folder, SLOTS)
    records = [
        {"instruction": f"Change <img><|image_1|></img> to {text(n, 1)}",
         "input_images": [name(n)], "output_image": name(n, 1)}
        for n in range(RECORDS)
    ]  # fmt: skip
    return write_lines(folder / "a.jsonl", records)


FORMATS: dict[str, tuple[Callable[[Path], Path], type]] = {
    "tar": (tar, data.CaptionTars),
    "tar, images first": (lambda folder: tar(folder, "images first"), data.CaptionTars),
    "tar of PNG and JSON": (lambda folder: tar(folder, "pairs", "json", "png"), data.CaptionTars),
    "tar, long names": (lambda folder: tar(folder, "long"), data.CaptionTars),
    "tar.gz": (tar_gz, data.CaptionTars),
    "JSON lines": (json_lines, data.CaptionRows),
    "JSON lines, gz": (lambda folder: json_lines(folder, ".gz"), data.CaptionRows),
    "JSON lines, zst": (lambda folder: json_lines(folder, ".zst"), data.CaptionRows),
    "JSON array": (json_array, data.CaptionRows),
    "data URLs": (data_urls, data.CaptionRows),
    "CSV": (table, data.CaptionRows),
    "TSV": (lambda folder: table(folder, "\t"), data.CaptionRows),
    "parquet": (parquet_rows, data.CaptionRows),
    "parquet of paths": (parquet_paths, data.CaptionRows),
    "BAGEL parquet": (bagel_captions, data.CaptionRows),
    "folder": (folders, data.CaptionFolders),
    "folder of WebP": (lambda folder: folders(folder, "webp"), data.CaptionFolders),
    "COCO": (coco, data.CaptionJson),
    "Karpathy": (karpathy, data.CaptionJson),
    "LLaVA": (llava, data.CaptionJson),
    "chat lines": (chat_lines, data.ChatFiles),
    "chat parquet": (chat_parquet, data.ChatFiles),
    "parts": (parts, data.InterleavedFiles),
    "OBELICS": (obelics, data.InterleavedFiles),
    "MMC4": (mmc4, data.InterleavedFiles),
    "MINT-1T": (mint, data.InterleavedFiles),
    "MagicBrush parquet": (edit_parquet, data.EditFiles),
    "OmniGen": (omnigen, data.EditFiles),
}


@cache
def written(kind: str) -> tuple[str, Files]:
    """Write a format once; return the name of what a reader is given, and all files."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = FORMATS[kind][0](Path(folder))
        return path.name, {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read_pairs(folder: Path, rng: random.Random) -> None:
    """Change one file of a dataset of any format; what is still read must fit together."""
    kind = rng.choice(list(FORMATS))
    given, files = written(kind)
    changed = rng.choice(sorted(files) if rng.random() < 0.3 else [given, *sorted(files)][:1])
    changed = changed if changed in files else rng.choice(sorted(files))
    for file, content in files.items():
        (folder / file).write_bytes(mutated(content, rng) if file == changed else content)
    documents = read(kind, folder / given)
    wrong = [document for document in documents if is_wrong(document)]
    if wrong:
        raise AssertionError(f"wrong pairs in {kind} after a change of {changed}: {wrong}")


def read(kind: str, path: Path) -> list[list]:
    """Read the documents of a file in a format."""
    source = FORMATS[kind][1](str(path), val_fraction=0, image_size=SIDE)
    source.fingerprint("train")
    return [d for d in source.documents("train") if not isinstance(d, Skipped)]


def read_changed_image(folder: Path, rng: random.Random) -> None:
    """Load an image file of any format with a changed header or content."""
    file_format = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
    content = picture(rng.randrange(RECORDS), 0, file_format)
    known = file_format != "JPEG2000" and rng.random() < 0.7
    content = change_image(content, rng) if known else mutated(content, rng)
    (folder / "image").write_bytes(content)
    data_image(folder / "image")


def data_image(file: Path) -> None:
    """Load an image, which has the asked size, or is refused."""
    from tf_lightning.data.documents import BadSample
    from tf_lightning.data.images import load_image
    from tf_lightning.data.readers.interleaved import _pages

    for load in (lambda: load_image(file, SIDE), lambda: _pages(file.read_bytes())):
        try:
            load()
        except BadSample:
            pass
