"""Changed checkpoints: files of one process, and folders of a sharded run."""

import copy
import io
import os
import pickle
import pickletools
import random
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from support.hostile_folders import VALUES, small_checkpoint
from support.mutations import damaged, places_in
from support.sharded_folders import flip_bit as flip_bit_of
from support.sharded_folders import write_sharded
from tf_lightning.checkpoint import TRANSFUSION, newest_sound, read_checkpoint
from tf_lightning.checkpoint_file import write_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.tokenizer.tokenizer import Tokenizer

PICKLE = "/data.pkl"
INTEGERS = (b"K", b"M", b"J")  # opcodes of integers with 1, 2 and 4 bytes


class RunsCode:
    """A pickle of it makes a file when it is loaded with Python's own unpickler."""

    def __init__(self, marker: Path, function: Callable = os.mkdir):
        self.marker, self.function = marker, function

    def __reduce__(self):
        return self.function, (str(self.marker),)


@cache
def whole() -> bytes:
    """Return the file of a small checkpoint with weights, their average and an optimizer state."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(small_checkpoint(), Path(folder, "a.ckpt"))
        return Path(folder, "a.ckpt").read_bytes()


def flip_bit(folder: Path, rng: random.Random) -> None:
    """Flip a bit of a checkpoint; every reader refuses it."""
    content = bytearray(whole())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    must_be_refused(folder, bytes(content), rng, f"bit {bit}")


def damage_checkpoint(folder: Path, rng: random.Random) -> None:
    """Change a checkpoint in a way that its checksum finds, or write another that is whole."""
    kind = rng.randrange(7)
    if kind < 2:
        content = damaged(whole(), rng) if kind else spliced(whole(), rng)
        if content != whole():
            must_be_refused(folder, content, rng, "damage")
    elif kind == 2:
        read_foreign_pickle(folder, rng)
    else:
        makers = {3: change_values, 4: exchange_members, 5: change_sizes, 6: expand_a_weight}
        content = makers[kind](rng)
        reader = rng.choice(READERS)
        reader(save(folder, content))


def must_be_refused(folder: Path, content: bytes, rng: random.Random, what: str) -> None:
    """Read a file with any reader, which raises UserError."""
    reader = rng.choice(READERS)
    reader(save(folder, content))
    raise AssertionError(f"{reader.__name__} loaded a checkpoint after {what}")


def save(folder: Path, content: bytes) -> Path:
    """Write a checkpoint into a folder of a run."""
    file = folder / "run" / "checkpoints" / "step.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def read(file: Path) -> None:
    read_checkpoint(file)


def read_lazily(file: Path) -> None:
    read_checkpoint(file, mmap=True)


def resume(file: Path) -> None:
    newest_sound([file], TRANSFUSION)


def read_tokenizer(file: Path) -> None:
    Tokenizer(file)


def generate(file: Path) -> None:
    TransfusionPipeline.from_pretrained(file, device="cpu").encode("a red circle")


def read_run(file: Path) -> None:
    read_checkpoint(file.parent.parent)


READERS = (read, read_run, read_lazily, resume, read_tokenizer, generate)


def spliced(content: bytes, rng: random.Random) -> bytes:
    """Put a piece of a file to another place of it, or leave a piece out."""
    start, end, place = (rng.randrange(len(content)) for _ in range(3))
    start, end = sorted((start, end))
    piece, rest = content[start:end], content[:start] + content[end:]
    return rest if rng.random() < 0.3 else rest[:place] + piece + rest[place:]


def change_values(rng: random.Random) -> bytes:
    """Write a whole checkpoint, with its checksum, in which a value is of another type."""
    checkpoint = small_checkpoint()
    for _ in range(rng.randint(1, 3)):
        places = [p for p in places_in(checkpoint) if rng.random() < 0.3 or p[0] is not checkpoint]
        inside, key = rng.choice(places)
        tensors = [torch.tensor([]), torch.tensor(torch.nan), torch.ones(3, dtype=torch.int64),
                   torch.ones(2, 2).to_sparse(), torch.ones(1, device="meta")]  # fmt: skip
        inside[key] = rng.choice([*copy.deepcopy(VALUES), *tensors])
    return bytes_of(checkpoint)


def bytes_of(checkpoint: Any) -> bytes:
    """Return a checkpoint's file with its checksum."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(checkpoint, Path(folder, "a.ckpt"))
        return Path(folder, "a.ckpt").read_bytes()


def members_of(content: bytes) -> dict[str, bytes]:
    """Return the members of a checkpoint's archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive without a checksum, as an older version wrote it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return file.getvalue()


def exchange_members(rng: random.Random) -> bytes:
    """Exchange, remove, empty, damage or compress members of the archive."""
    members = members_of(whole())
    one, other = rng.sample(sorted(members), 2)
    match rng.randrange(5):
        case 0:
            members[one], members[other] = members[other], members[one]
        case 1:
            del members[one]
        case 2:
            members[one] = b""
        case 3:
            members[one] = damaged(members[one], rng)
        case 4:
            return compressed()
    return archive_of(members)


@cache
def compressed() -> bytes:
    """Return a small archive in which a weight has 600 MB."""
    members, file = members_of(whole()), io.BytesIO()
    name = next(name for name in members if name.endswith("/data/0"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in members.items():
            with archive.open(zipfile.ZipInfo(member), "w") as opened:
                opened._compressor = zlib.compressobj(1, wbits=-15)
                opened._zinfo.compress_type = zipfile.ZIP_DEFLATED
                for piece in [bytes(2**20)] * 600 if member == name else [content]:
                    opened.write(piece)
    return file.getvalue()


def change_sizes(rng: random.Random) -> bytes:
    """Let integers in the archive's pickle lie: sizes, strides, offsets, counts."""
    members = members_of(whole())
    name = next(name for name in members if name.endswith(PICKLE))
    content = bytearray(members[name])
    codes = [(op, place) for op, _, place in pickletools.genops(bytes(content))]
    places = [place for op, place in codes if op.code.encode("latin-1") in INTEGERS]
    for place in rng.sample(places, rng.randint(1, 3)):
        size = {b"K": 1, b"M": 2, b"J": 4}[bytes(content[place : place + 1])]
        content[place + 1 : place + 1 + size] = rng.choice(
            [b"\xff" * size, b"\0" * size, b"\xff" * (size - 1) + b"\x7f", rng.randbytes(size)]
        )
    members[name] = bytes(content)
    return archive_of(members)


def expand_a_weight(rng: random.Random) -> bytes:
    """Write a checkpoint in which one number in the file is a weight of any shape."""
    checkpoint = small_checkpoint()
    part = rng.choice(["state_dict", "state_dict", "tokenizer"])
    shape = rng.choice([(2**20, 2**20), (2**40,), (1,) * 60, (0, 2**40), (2**16, 2**12)])
    one = torch.zeros(1).expand(shape) if 0 not in shape else torch.empty(shape)
    if part == "state_dict":
        checkpoint[part][rng.choice(sorted(checkpoint[part]))] = one
    else:
        checkpoint[part] = (
            one.byte() if one.numel() < 2**20 else torch.zeros(1).byte().expand(shape)
        )
    return bytes_of(checkpoint)


def read_foreign_pickle(folder: Path, rng: random.Random) -> None:
    """Read a pickle that would run code, in each form that torch.save has or had."""
    marker = folder / "ran"
    checkpoint = small_checkpoint()
    function = rng.choice([os.mkdir, exec_in_a_module, torch.load, pickle.loads, io.open])
    inside, key = rng.choice([p for p in places_in(checkpoint) if p[0] is not checkpoint])
    inside[key] = RunsCode(marker, function)
    file = io.BytesIO()
    form = rng.randrange(3)
    if form == 2:
        pickle.dump({"image_codec": RunsCode(marker, function)}, file)
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=form == 0)
    path = save(folder, file.getvalue())
    try:
        rng.choice(READERS)(path)
    except UserError:
        if marker.exists():
            raise AssertionError("a checkpoint ran code") from None
        raise
    raise AssertionError("a checkpoint that names a foreign function was loaded")


def exec_in_a_module(path: str) -> None:
    """Run code, as a function of an installed package may."""
    os.mkdir(path)


# Folders of a sharded run


@cache
def sharded_folder() -> Path:
    """Write a sharded checkpoint once, as a run with FSDP2 does."""
    return write_sharded(small_checkpoint(), Path(tempfile.mkdtemp(), "step.ckpt"), num_files=2)


def read_sharded(folder: Path, rng: random.Random) -> None:
    """Look for the newest sound checkpoint in a folder with one that is changed."""
    target = folder / "run" / "checkpoints" / "step.ckpt"
    shutil.copytree(sharded_folder(), target)
    marker, file = folder / "ran", target / rng.choice([".metadata", ".metadata", "meta.pt"])
    kind = rng.randrange(6)
    if kind < 4:  # a folder of somebody else, whose checksums would be right
        (target / "checksums.txt").unlink()
    else:
        file = rng.choice(sorted(target.iterdir()))
    match kind:
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(damaged(file.read_bytes(), rng))
        case 2:
            value = RunsCode(marker, rng.choice([os.mkdir, exec_in_a_module]))
            metadata = pickle.loads((target / ".metadata").read_bytes())
            metadata.planner_data = {"a": value}
            content = rng.choice([value, metadata, {"image_codec": value}])
            file.write_bytes(pickle.dumps(content, protocol=rng.randrange(6)))
        case 3:
            (target / ".metadata").write_bytes(changed_integers(target / ".metadata", rng))
        case 4:
            flip_bit_of(file, rng.randrange(8 * file.stat().st_size))
        case 5:
            content = damaged(file.read_bytes(), rng)
            kind = kind if content != file.read_bytes() else 0
            file.write_bytes(content)
    try:
        rng.choice([resume, read_weights, generate])(target)
        if kind > 3:
            raise AssertionError(f"a sharded checkpoint with damage in {file.name} was loaded")
    finally:
        if marker.exists():
            raise AssertionError("the metadata of a sharded checkpoint ran code")


def read_weights(folder: Path) -> None:
    """Read all weights."""
    dict(read_checkpoint(folder)["state_dict"])


def changed_integers(file: Path, rng: random.Random) -> bytes:
    """Change an integer of a pickle."""
    content = bytearray(file.read_bytes())
    codes = [(op.code.encode("latin-1"), place) for op, _, place in pickletools.genops(content)]
    place = rng.choice([place for code, place in codes if code in INTEGERS])
    content[place + 1] = rng.randrange(256)
    return bytes(content)
