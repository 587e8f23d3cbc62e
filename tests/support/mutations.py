"""Changes of a file that its format gives a meaning: values of other types, sizes that lie, bombs.

All of them are functions of a random.Random. `mutated` finds out what a content is. No change puts
a value of one record into another, so that what is still read must fit together.
"""

import bz2
import io
import json
import lzma
import random
import re
import struct
import tarfile
import zlib
from functools import cache
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

NUMBERS: list[Any] = [0, 1, -1, 255, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30, 0.5, 1e308]
VALUES: list[Any] = [
    *(None, True, False, "", " ", "\0", "x" * 300, "x" * 10**5, "é\ud800", "..", "/", "<image>"),
    *([], [[]], [None], {}, {"a": None}, {"bytes": None, "path": None}, [0] * 99, *NUMBERS),
]
# Texts that json.dumps does not write.
LITERALS = (
    "[" * 10**5, "[" * 900 + "]" * 900, '{"a":' * 10**5, "1" + "0" * 5000, "-1e999", "NaN",
    "Infinity", '"\\ud800"', '"' + "x" * 10**6 + '"', "", "{}{}", "'", "\ufeff", "0x1f", "1_000",
)  # fmt: skip
PLACEHOLDER = "@literal@"
SIZES = (0, 1, 0x7FFF, 0xFFFF, 30_000, 2**31 - 1, 2**32 - 1)
MEGABYTE = 2**20


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a content as its format suggests, or damage its bytes."""
    if rng.random() < 0.3 or not content:
        return damaged(content, rng)
    for codec, magic in (("gzip", b"\x1f\x8b"), ("zstd", b"\x28\xb5\x2f\xfd")):
        if content.startswith(magic):
            inner = pyarrow.input_stream(io.BytesIO(content), compression=codec).read()
            return packed(mutated(inner, rng), codec)
    if content.startswith(b"PAR1"):
        return change_parquet(content, rng)
    if content[257:262] == b"ustar":
        return change_tar(content, rng)
    if content[:1] in b"[{":
        return change_json(content, rng)
    if any(content.startswith(magic) for magic in IMAGE_SIZES):
        return change_image(content, rng)
    return change_text(content, rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip, insert, remove or overwrite some bytes, or cut off the end."""
    content = bytearray(content or b"\0")
    place = rng.randrange(len(content))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        case 1:
            content[place] ^= 1 << rng.randrange(8)
        case 2:
            del content[place:]
        case 3:
            content[place:place] = rng.randbytes(rng.choice([1, 2, 8]))
        case 4:
            del content[place]
        case 5:
            content[place : place + 8] = rng.choice([b"\0", b"\xff", b"\x7f", b" ", b"9"]) * 8
        case 6:
            content += rng.choice([b"\0", b"\n", b"]", b"PAR1", bytes(512), rng.randbytes(99)])
    return bytes(content)


class ZstdPacker:
    """Compresses piece by piece."""

    def __init__(self):
        self.file = pyarrow.BufferOutputStream()
        self.stream = pyarrow.CompressedOutputStream(self.file, "zstd")

    def compress(self, content: bytes) -> bytes:
        self.stream.write(content)
        return b""

    def flush(self) -> bytes:
        self.stream.close()
        return self.file.getvalue().to_pybytes()


PACKERS = {
    "gzip": lambda: zlib.compressobj(1, wbits=31),
    "bz2": lambda: bz2.BZ2Compressor(1),
    "xz": lambda: lzma.LZMACompressor(preset=0),
    "zstd": ZstdPacker,
}


def packed(content: bytes, codec: str) -> bytes:
    """Compress a content; equal contents give equal files."""
    packer = PACKERS[codec]()
    return packer.compress(content) + packer.flush()


# Text and JSON


def change_text(content: bytes, rng: random.Random) -> bytes:
    """Replace a number, or the end of a line, by something of another kind."""
    found = list(re.finditer(rng.choice([rb"-?\d+", rb"\r?\n", rb"[,\t;|]", rb'"']), content))
    if not found:
        return damaged(content, rng)
    place = rng.choice(found)
    other = rng.choice([b"", b"\0", b'"', b"\n\n", b",,,", b"\r", b"9" * 5000, b"\xff\xfe", b"-1"])
    return content[: place.start()] + other + content[place.end() :]


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or wrap one value of a JSON file or of one of its lines."""
    lines = content.split(b"\n")
    try:
        value = json.loads(content)
        number = None
    except (ValueError, RecursionError):
        number = rng.randrange(len(lines))
        try:
            value = json.loads(lines[number])
        except (ValueError, RecursionError):
            return damaged(content, rng)
    literal = rng.choice(LITERALS)
    changed = json.dumps(change_value(value, rng)).replace(f'"{PLACEHOLDER}"', literal)
    changed = changed.encode("utf-8", "surrogatepass")
    if number is None:
        return changed
    lines[number] = changed
    return b"\n".join(lines)


def change_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove or wrap one value inside of a JSON value."""
    places = list(places_in(value))
    if not places:
        return rng.choice([*VALUES, PLACEHOLDER])
    inside, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del inside[key]
        case 1:
            inside[key] = [inside[key]]
        case 2:
            inside[key] = str(inside[key])
        case 3:
            inside[key] = {"a": inside[key]}
        case 4:
            inside[key] = PLACEHOLDER
        case _:
            inside[key] = rng.choice(VALUES)
    return value


def places_in(value: Any):
    """Yield (container, key) of each value inside of a JSON value."""
    keys = {dict: list, list: lambda items: range(len(items))}.get(type(value), lambda _: ())
    for key in keys(value):
        yield value, key
        yield from places_in(value[key])


# Containers


def change_tar(content: bytes, rng: random.Random) -> bytes:
    """Change a field of a header, with the right checksum."""
    changed = bytearray(content)
    try:
        starts = [member.offset for member in tarfile.open(fileobj=io.BytesIO(content))]
    except (tarfile.TarError, ValueError, EOFError, OSError):
        return damaged(content, rng)
    if not starts:
        return damaged(content, rng)
    header = memoryview(changed)[(start := rng.choice(starts)) : start + 512]
    field, values = rng.choice(TAR_FIELDS)
    value = rng.choice(values)
    if field == 0 and rng.random() < 0.5:  # a name that another file of this kind has
        own, others = changed[start : start + 100], [content[s : s + 100] for s in starts]
        kind = own.rstrip(b"\0")[-3:]
        value = rng.choice([other for other in others if other.rstrip(b"\0")[-3:] == kind])
    header[field : field + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    header.release()
    return bytes(changed)


NAMES = (b"", b"../../x.jpg", b"/etc/passwd", b"._0.jpg", b"a.", b".jpg", b"\xff\xfe.txt", b"a/")
TAR_FIELDS = (  # offset in the header, and values
    (0, [name.ljust(100, b"\0") for name in NAMES] + [b"x" * 100]),
    (124, [b"%011o\0" % size for size in (0, 1, 511, 513, 2**20 + 1, 8**11 - 1)]
          + [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0", b"9" * 12, b" " * 12]),
    (156, [bytes([kind]) for kind in b"\0" b"0123456 7xgLKSVDNXZ"]),
    (157, [b"/etc/passwd\0", b"0.jpg\0"]),
    (257, [b"ustar  \0", b"ustar\0" b"00", b"\0" * 8, b"x" * 8]),
    (345, [b"x" * 155, b"../..\0"]),
)  # fmt: skip


def change_parquet(content: bytes, rng: random.Random) -> bytes:
    """Damage the footer or the header of a page, or let the footer's length lie."""
    changed, length = bytearray(content), int.from_bytes(content[-8:-4], "little")
    footer = len(content) - 8 - length
    if rng.random() < 0.2:
        size = rng.choice([*SIZES, length - 1, length + 1, len(content)])
        changed[-8:-4] = struct.pack("<I", size & 0xFFFFFFFF)
        return bytes(changed)
    if rng.random() < 0.4:
        table = parquet.read_metadata(io.BytesIO(content))
        group = table.row_group(rng.randrange(table.num_row_groups))
        column = group.column(rng.randrange(group.num_columns))
        start = column.dictionary_page_offset if rng.random() < 0.5 else None
        place = (start or column.data_page_offset) + rng.randrange(30)
    else:
        place = footer + rng.randrange(length)
    if rng.random() < 0.5:
        changed[place] ^= rng.randrange(1, 256)
    else:
        changed[place : place + 5] = b"\xff\xff\xff\xff" + rng.choice([b"\x0f", b"\x07", b"\xff"])
    return bytes(changed)


# Images

IMAGE_SIZES = {  # first bytes: how width and height are written, and where
    b"\x89PNG": (">I", (16, 20)),
    b"BM": ("<I", (18, 22)),
    b"GIF8": ("<H", (6, 8)),
    b"RIFF": ("<H", (26, 28)),
    b"\xff\xd8\xff": (">H", None),  # after the marker of a frame
    b"II*\0": ("<I", None),  # entries of a directory
    b"P6": ("", None),
}


def change_image(content: bytes, rng: random.Random) -> bytes:
    """Let the width or the height of an image lie, or cut off, double or damage its end."""
    if rng.random() < 0.3:
        half = len(content) // 2
        return rng.choice(
            [content[:half], content * 2, content[:half] + damaged(content[half:], rng)]
        )
    magic = next(magic for magic in IMAGE_SIZES if content.startswith(magic))
    layout, places = IMAGE_SIZES[magic]
    size = rng.choice(SIZES)
    if magic == b"P6":
        return re.sub(rb"\d+", b"%d" % size, content, count=rng.randint(1, 3))
    if magic == b"II*\0":
        (start,) = struct.unpack("<I", content[4:8])
        (count,) = struct.unpack("<H", content[start : start + 2])
        places = [start + 2 + 12 * number + 8 for number in range(count)]
    elif places is None:
        frame = re.search(rb"\xff[\xc0\xc2]", content)
        places = [frame.start() + 5, frame.start() + 7] if frame else [4]
    changed = bytearray(content)
    for place in rng.sample(list(places), rng.randint(1, min(2, len(places)))):
        struct.pack_into(layout, changed, place, size & (2 ** (8 * struct.calcsize(layout)) - 1))
    if magic == b"\x89PNG":
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    return bytes(changed)


# Bombs


@cache
def bomb(name: str) -> bytes:
    """Make a small file that a careless reader expands to more than 512 MB."""
    kind, _, codec = name.partition(".")
    if kind == "dictionary":  # one long text for each of many rows
        rows = pyarrow.array(["x" * 8 * MEGABYTE]).take(pyarrow.array([0] * 99))
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": rows}), file)
        return file.getvalue()
    if kind == "image":
        file = io.BytesIO()
        Image.new(codec, (16_000, 11_000)).save(file, "PNG", compress_level=1)
        return file.getvalue()
    filling = {
        "line": b"a",
        "array": b"[",
        "lines": b'{"a": "' + b"x" * (MEGABYTE - 10) + b'"}\n',
        "zeros": b"\0",
        "spaces": b" ",
    }[kind]
    megabyte, packer = filling * (MEGABYTE // len(filling)), PACKERS[codec]()
    pieces = [packer.compress(b"[" if kind == "spaces" else b"")]
    pieces += [packer.compress(megabyte) for _ in range(600)]
    return b"".join([*pieces, packer.flush()])


BOMBS = [f"{kind}.{codec}" for kind in ("line", "array", "lines", "zeros", "spaces")
         for codec in ("gzip", "zstd")]  # fmt: skip
BOMBS += ["line.bz2", "zeros.xz", "dictionary.", "image.1", "image.RGB"]


def bomb_tar(rng: random.Random) -> bytes:
    """Make a tar whose headers promise large names, attributes or sparse files."""
    name = rng.choice(["0.jpg", "0.txt", "0.json"])
    member = tarfile.TarInfo(name)
    member.size, member.type = (
        rng.choice([2**28, 2**33, 8**11]),
        rng.choice([b"L", b"x", b"g", b"0", b"S"]),
    )
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(rng.choice([0, 512, 10_240]))
