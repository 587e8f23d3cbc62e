"""Lazy images are read from their tars and files during training; they are not copied."""

import gzip
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.files import write_parquet, write_tar
from tf_lightning.data import CaptionRows, CaptionTars, ImageCaptionData, InterleavedData
from tf_lightning.data.corpus.lazy_images import LazyImages, decodes_alike
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.images import load_image
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesCaptions

SIZES = {"autoencoder": "pixels", "patch_size": 4, "row_length": 64, "vocab_size": 300}


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Write three tars of four captioned images; two tars make a shard."""
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key in range(4):
                file = io.BytesIO()
                noise(4 * number + key).save(file, "PNG")
                caption = f"an image of noise {4 * number + key}".encode()
                for name, content in ((f"{key}.png", file.getvalue()), (f"{key}.txt", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 15_000)
    return tmp_path


def read(folder, **options) -> ImageCaptionData:
    data = ImageCaptionData(
        f"{folder}/*.tar", val_fraction=0.0, image_size=8, lazy_images=True,
        cache_dir=str(folder / "cache"), **SIZES, **options,
    )  # fmt: skip
    data.prepare_data()
    return data


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_images_in_tars_keep_their_captions_across_shards(tars):
    data = read(tars)
    assert len(data.sources["captions"].shards("train")) == 2
    corpus = data.corpora["train"]["captions"]
    assert (corpus.path / "latents.bin").stat().st_size == 0
    for number in range(12):
        text, image = corpus.document(number)
        assert data.tokenizer.decode(text.tolist()) == f"an image of noise {number}"
        assert torch.equal(image, pixels(noise(number)))


def test_lazy_images_are_flipped(tars):
    corpus = read(tars, hflip=True).corpora["train"]["captions"]
    found = [corpus.document(3, np.random.default_rng(n))[1] for n in range(40)]
    flipped = [torch.equal(image, pixels(noise(3)).flip(-1)) for image in found]
    assert 8 < sum(flipped) < 32
    plain = [torch.equal(image, pixels(noise(3))) for image in found]
    assert sum(plain) + sum(flipped) == 40


def test_a_batch_has_pixels_in_minus_one_to_one(tars):
    data = read(tars)
    (_, documents, _), *_ = rows = [data.train_dataloader().dataset[0]]
    latents = data.train_dataloader().collate_fn(rows).latents
    shown = [part for document in documents for part in document if part.ndim == 3]
    assert latents.dtype == torch.float32
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(latents, torch.stack(shown).float() / 127.5 - 1)


def test_workers_read_lazy_images(tars):
    alone, workers = (read(tars, num_workers=n, batch_size=2) for n in (0, 2))
    loaders = alone.train_dataloader(), workers.train_dataloader()
    for a, b, _ in zip(*loaders, range(5), strict=False):
        assert torch.equal(a.latents, b.latents)


def test_image_files_are_read_in_place(tmp_path):
    noise(1).save(tmp_path / "one.png")
    line = {"parts": ["before and after", {"image": "one.png"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    data = InterleavedData(
        f"{tmp_path}/a.jsonl", val_fraction=0.0, image_size=8, lazy_images=True,
        cache_dir=str(tmp_path / "cache"), **SIZES,
    )  # fmt: skip
    data.prepare_data()
    corpus = data.corpora["train"]["interleaved"]
    assert torch.equal(corpus.document(0)[1], pixels(noise(1)))
    (tmp_path / "one.png").write_bytes(b"another file")
    with pytest.raises(UserError, match="image 0 at byte 0 of .*one.png cannot be read any more"):
        corpus.document(0)


def colored_noise(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, kind)
    return file.getvalue()


def write_captions(folder) -> None:
    """Write a tar, a compressed tar and a parquet file, each of four captioned images."""
    for number, pack in enumerate((lambda content: content, gzip.compress)):
        files = {}
        for key in range(4):
            seed = 4 * number + key
            files |= {f"{key}.png": colored_noise(seed), f"{key}.txt": f"noise {seed}".encode()}
        tar = write_tar(folder / "plain", files)
        (folder / f"{number}.tar{number * '.gz'}").write_bytes(pack(tar.read_bytes()))
    rows = [
        {"image": {"bytes": colored_noise(seed), "path": None}, "caption": f"noise {seed}"}
        for seed in range(8, 12)
    ]
    write_parquet(folder / "2.parquet", rows)


@pytest.mark.parametrize("shard_bytes", [10**9, 1])
def test_image_files_in_parquet_and_compressed_tars_are_copied_unchanged(
    shard_bytes, tmp_path, monkeypatch
):
    write_captions(tmp_path)
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", shard_bytes)
    tars = CaptionTars([f"{tmp_path}/0.tar", f"{tmp_path}/1.tar.gz"], val_fraction=0, image_size=8)
    rows = CaptionRows(f"{tmp_path}/2.parquet", val_fraction=0, image_size=8)
    data = Mixture(
        {"tars": tars, "rows": rows}, lazy_images=True, cache_dir=str(tmp_path / "cache"), **SIZES
    )
    data.prepare_data()
    corpora = data.corpora["train"]
    copied = {"tars": range(4, 8), "rows": range(8, 12)}  # 0.tar is read in place
    for name, seeds in copied.items():
        copy = (corpora[name].path / "pictures.bin").read_bytes()
        assert copy == b"".join(map(colored_noise, seeds))
    for name, seeds in {"tars": range(8), "rows": range(8, 12)}.items():
        assert len(corpora[name]) == len(seeds)
        for number, seed in enumerate(seeds):
            text, image = corpora[name].document(number)
            assert data.tokenizer.decode(text.tolist()) == f"noise {seed}"
            assert torch.equal(image, pixels(noise(seed)))


def test_generated_images_and_other_autoencoders_are_refused(tmp_path):
    sizes = SIZES | {"row_length": 512, "patch_size": 16}
    source = {"shapes": ShapesCaptions(4, 2)}
    data = Mixture(source, lazy_images=True, cache_dir=str(tmp_path), **sizes)
    with pytest.raises(
        UserError, match="lazy_images and crops need images that are read from files"
    ):
        data.prepare_data()
    with pytest.raises(UserError, match='reads pixels, .* give autoencoder "pixels"'):
        Mixture(source, lazy_images=True, **(sizes | {"autoencoder": "shapes"}))


def check_of(path: Path) -> tuple[int, int]:
    return 0, zlib.crc32(path.read_bytes())


def transparent() -> Image.Image:
    image = noise(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((8, 8)))
    return image


def turned() -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    return noise(1), exif


@pytest.mark.parametrize(
    "save, alike",
    [
        (lambda file: noise(1).save(file, "PNG"), True),
        (lambda file: noise(1).save(file, "JPEG"), True),
        (lambda file: noise(1).save(file, "JPEG", progressive=True, subsampling=0), True),
        (lambda file: noise(1).resize((16, 12)).save(file, "PNG"), False),
        (lambda file: transparent().save(file, "PNG"), False),
        (lambda file: turned()[0].save(file, "JPEG", exif=turned()[1]), True),
        (lambda file: noise(1).save(file, "BMP"), False),
    ],
    ids=["png", "jpeg", "progressive", "other size", "transparent", "turned", "bmp"],
)
def test_torchcodec_decodes_only_files_for_which_it_agrees_with_pillow(save, alike, tmp_path):
    path = tmp_path / "image"
    save(path)
    wanted = load_image(path, 8)
    assert decodes_alike(wanted, path.read_bytes()) == alike
    place = [[0, 0, path.stat().st_size, alike]]
    images = LazyImages([str(path)], np.array(place), tmp_path)
    assert torch.equal(images.read(0, check_of(path), (8, 8)), pixels(wanted))


@pytest.mark.parametrize("change", ["cut", "other kind"])
def test_a_changed_file_is_refused_by_both_decoders(change, tmp_path):
    path = tmp_path / "image.png"
    noise(1).save(path)
    size = path.stat().st_size
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(b"x" * size)
    with pytest.raises(UserError, match="image 0 at byte 0 of .*cannot be read any more"):
        LazyImages([str(path)], np.array([[0, 0, size, 1]]), tmp_path).read(
            0, check_of(path), (8, 8)
        )


def test_a_replaced_image_is_refused(tmp_path):
    path = tmp_path / "image.bmp"  # the file size depends only on the image size
    noise(1).save(path)
    check = check_of(path)
    images = LazyImages([str(path)], np.array([[0, 0, path.stat().st_size, 0]]), tmp_path)
    assert torch.equal(images.read(0, check, (8, 8)), pixels(noise(1)))
    noise(2).save(path)
    with pytest.raises(UserError, match="image 0 at byte 0 of .*cannot be read any more"):
        images.read(0, check, (8, 8))


def test_a_project_moves_with_images_and_corpora(tars, tmp_path_factory, monkeypatch):
    old = tmp_path_factory.mktemp("old") / "project"
    tars.rename(old)
    arguments = {"val_fraction": 0.0, "image_size": 8, "lazy_images": True, "cache_dir": "cache"}
    monkeypatch.chdir(old)
    ImageCaptionData("*.tar", **arguments, **SIZES).prepare_data()
    new = old.rename(tmp_path_factory.mktemp("new") / "project")
    monkeypatch.chdir(new)
    corpora = {path: path.stat().st_mtime_ns for path in new.glob("cache/*/corpus.json")}
    data = ImageCaptionData("*.tar", **arguments, **SIZES)
    data.setup()
    corpus = data.corpora["train"]["captions"]
    assert torch.equal(corpus.document(7)[1], pixels(noise(7)))
    assert {path: path.stat().st_mtime_ns for path in new.glob("cache/*/corpus.json")} == corpora
    monkeypatch.chdir(new.parent)
    with pytest.raises(UserError, match="cannot be read any more"):
        Corpus(new / "cache" / corpus.name).document(7)
