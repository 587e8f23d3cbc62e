"""Damaged files: each sample is read correctly, skipped and counted, or refused in one sentence.

Bytes of each file are flipped at random, or its end is cut off, with a fixed seed. Fewer samples
may be read afterwards, but no image gets the caption of another.

    FUZZ_ROUNDS=1000 python -m pytest tests/data/readers/test_fuzz.py  # takes minutes
"""

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support import training_datasets
from support.files import encoded_image, write_lines, write_parquet
from support.hostile_files import damaged, wrong_pairs
from support.sources import GreyImages
from support.training_datasets import COLORS
from tf_lightning.data import (
    CaptionJson,
    CaptionRows,
    CaptionTars,
    EditFiles,
    InterleavedFiles,
    TextFiles,
)
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import Skipped
from tf_lightning.data.image_only import ImageStore, store_images
from tf_lightning.errors import UserError

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 60))


def images(folder: Path) -> str:
    return str(training_datasets.write_images(folder / "images"))


def metadata(folder: Path) -> Path:
    training_datasets.write_images(folder)
    rows = [{"file_name": f"{color}.png", "text": color} for color in COLORS]
    return write_lines(folder / "metadata.jsonl", rows)


def metadata_csv(folder: Path) -> Path:
    training_datasets.write_images(folder)
    lines = "".join(f"{color}.png,{color}\n" for color in COLORS)
    (folder / "metadata.csv").write_text("file_name,text\n" + lines)
    return folder / "metadata.csv"


def packed_tar(folder: Path) -> Path:
    content = training_datasets.img2dataset(folder).read_bytes()
    (folder / "a.tar.gz").write_bytes(gzip.compress(content, 1))
    return folder / "a.tar.gz"


def long_names(folder: Path) -> Path:
    """A tar with names that need pax headers, which have no checksum."""
    tar = folder / "long.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for number, color in enumerate(COLORS):
            for kind, content in ("png", encoded_image(color)), ("txt", color.encode()):
                member = tarfile.TarInfo(f"{'a' * 120}{number}.{kind}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return tar


def magicbrush(folder: Path) -> Path:
    names, rows = list(COLORS), []
    for before, after in zip(names, names[1:], strict=False):
        images = [{"bytes": encoded_image(c), "path": None} for c in (before, after)]
        rows.append({"img_id": before, "source_img": images[0], "instruction": after,
                     "target_img": images[1]})  # fmt: skip
    return write_parquet(folder / "a.parquet", rows)


CAPTIONS = {
    "tar": (training_datasets.img2dataset, CaptionTars),
    "tar.gz": (packed_tar, CaptionTars),
    "pax tar": (long_names, CaptionTars),
    "metadata.jsonl": (metadata, CaptionRows),
    "metadata.csv": (metadata_csv, CaptionRows),
    "BAGEL parquet": (training_datasets.bagel_captions, CaptionRows),
    "Karpathy": (training_datasets.karpathy, CaptionJson),
    "MagicBrush parquet": (magicbrush, EditFiles),
    "MMC4": (training_datasets.mmc4, InterleavedFiles),
    "OBELICS": (lambda folder: training_datasets.obelics(folder)[0], InterleavedFiles),
    "MINT-1T": (training_datasets.mint, InterleavedFiles),
}
FOLDERS = {"MMC4": images, "OBELICS": lambda folder: str(folder / "downloaded")}


def whole_or_counted(file: Path, good: int, found: int, all_of_them: int) -> bool:
    """Return whether missing documents were counted; plain lines cut at a line's end are not."""
    return good == all_of_them or good < found or file.suffix in (".csv", ".jsonl")


@pytest.mark.parametrize("name", CAPTIONS)
def test_damage_yields_no_wrong_pair_and_raises_no_error(name, tmp_path):
    write, kind = CAPTIONS[name]
    file = write(tmp_path)
    options = {"images": FOLDERS[name](tmp_path)} if name in FOLDERS else {}
    source = kind(str(file), val_fraction=0, image_size=16, **options)
    whole, clean = file.read_bytes(), list(source.documents("train"))
    assert not any(isinstance(d, Skipped) or wrong_pairs(d) for d in clean)
    rng, skipped, kept = random.Random(name), 0, 0
    for _ in range(ROUNDS):
        file.write_bytes(damaged(whole, rng))
        found = list(source.documents("train"))
        good = [document for document in found if not isinstance(document, Skipped)]
        assert [pair for document in good for pair in wrong_pairs(document)] == []
        skipped += len(found) - len(good)
        kept += len(good)
        assert whole_or_counted(file, len(good), len(found), len(clean))
    assert skipped and kept


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".parquet"])
def test_damaged_text_is_read_or_skipped(packed, tmp_path):
    texts = [f"text {n} of many" for n in range(50)]
    if packed == ".parquet":
        file = training_datasets.fineweb(tmp_path, texts)
    else:
        file = training_datasets.dolma(tmp_path, texts, packed)
    source = TextFiles(str(file), val_fraction=0)
    whole, rng = file.read_bytes(), random.Random(packed)
    for _ in range(ROUNDS):
        file.write_bytes(damaged(whole, rng))
        found = list(source.documents("train"))
        good = [document for document in found if not isinstance(document, Skipped)]
        assert len(good) <= len(texts)
        assert whole_or_counted(file, len(good), len(found), len(texts))


def damage_one_file(folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Damage one file of a folder; return its path and its content before."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, rng))
    return path, whole


def test_a_damaged_image_store_is_read_or_refused(tmp_path):
    store = store_images(GreyImages(num_documents=20), "train", tmp_path)
    rng, refused = random.Random(0), 0
    for _ in range(ROUNDS):
        path, whole = damage_one_file(store.path, rng)
        try:
            opened = ImageStore(store.path)
            assert opened.images.shape[1:] == (8, 8, 3)
            assert np.asarray(opened.images).dtype == np.uint8
        except UserError as error:
            assert "delete the folder" in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused


MOMENTS = {"autoencoder": "shapes", "patch_size": 1, "sample_posterior": True, "hflip": True}
KINDS = {"latents": {}, "moments": MOMENTS, "in place": {}}


def a_corpus(kind: str, mixture, folder: Path) -> Corpus:
    """Prepare 20 captioned images; for "in place" they are in a parquet file."""
    source = GreyImages(side=16, num_documents=20)
    if kind == "in place":
        images = [image for _, image in source.documents("train")]
        rows = [{"image": {"bytes": as_png(x)}, "caption": f"{n}"} for n, x in enumerate(images)]
        file = write_parquet(folder / "a.parquet", rows)
        source = CaptionRows(str(file), val_fraction=0, image_size=16)
    data = mixture({"pictures": source}, lazy_images=kind == "in place", **KINDS[kind])
    data.setup()
    return data.corpora["train"]["pictures"]


def as_png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_corpus_is_read_unchanged_or_refused(kind, tmp_path, mixture):
    corpus = a_corpus(kind, mixture, tmp_path)
    clean = [corpus.document(number) for number in range(20)]
    rng, refused, read = random.Random(0), 0, 0
    for _ in range(2 * ROUNDS):
        path, whole = damage_one_file(corpus.path, rng)
        try:
            opened = Corpus(corpus.path)
            found = opened.layout()
            found.lengths(4), found.pairs(), found.edits(), found.image_patches(4)
            for number, parts in enumerate(map(opened.document, range(len(opened)))):
                assert all(map(torch.equal, parts, clean[number]))
                read += 1
        except UserError as error:
            told = "delete the folder" in str(error) or path.name == "pictures.npy"
            assert told and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused and read


def test_links_and_paths_in_tars_are_never_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.png").write_bytes(encoded_image("red"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (
            ("0.txt", tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
            ("0.png", tarfile.SYMTYPE, "../secret.png"),
            ("1.txt", tarfile.LNKTYPE, "../secret.txt"),
            ("1.png", tarfile.LNKTYPE, str(tmp_path / "secret.png")),
            ("2.png", tarfile.FIFOTYPE, ""),
            ("3.png", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name in ("../../up", str(tmp_path / "absolute")):
            for suffix, content in ("png", encoded_image("blue")), ("txt", b"blue"):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    before = sorted(path for path in tmp_path.rglob("*"))
    source = CaptionTars(str(tmp_path / "a.tar"), val_fraction=0, image_size=16)
    found = [training_datasets.shown(document) for document in source.documents("train")]
    assert found == [["blue", "<blue>"]] * 2  # the links are ignored, the files are read
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not (tmp_path.parent.parent / "up.png").exists()


def test_a_negative_size_ends_a_tar(tmp_path):
    """Without the check, tarfile would loop forever (CVE-2025-8194)."""
    file = training_datasets.img2dataset(tmp_path)
    whole = bytearray(file.read_bytes())
    whole[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024, in base 256
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    file.write_bytes(whole)
    found = list(CaptionTars(str(file), val_fraction=0).documents("train"))
    assert found == [Skipped("damaged tar, read up to the damage")]


def test_a_truncated_tar_is_counted(tmp_path):
    file = training_datasets.img2dataset(tmp_path)
    with tarfile.open(file) as tar:
        start = tar.getmembers()[9].offset  # between two samples, where tarfile raises no error
    os.truncate(file, start)
    *found, last = CaptionTars(str(file), val_fraction=0, image_size=16).documents("train")
    assert len(found) == 3 and last == Skipped("damaged tar, read up to the damage")
