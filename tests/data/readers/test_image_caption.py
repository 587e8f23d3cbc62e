"""WebDataset tars become captioned images; damaged members are skipped, the others are kept."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from support.files import encoded_image, write_tar
from tf_lightning.data import CaptionTars, ImageCaptionData
from tf_lightning.data.documents import Skipped


def read(path, **arguments):
    return list(
        CaptionTars(str(path), val_fraction=0, image_size=16, **arguments).documents("train")
    )


def test_the_caption_is_read_from_txt_or_json(tmp_path):
    files = {
        "0/a.b.png": b"",
        "0/000.png": encoded_image("red"),
        "0/000.txt": b" red \n",
        "0/000.json": json.dumps({"caption": "not this"}).encode(),
        "0/001.json": json.dumps({"caption": "blue"}).encode(),
        "0/001.PNG": encoded_image("blue"),
    }
    skipped, red, blue = read(write_tar(tmp_path / "a.tar", files))
    assert skipped.reason.startswith("no caption: found png; wanted one of txt, text, caption")
    assert (red[0], blue[0]) == ("red", "blue")
    assert red[1].size == blue[1].size == (16, 16)
    assert np.asarray(blue[1])[0, 0].tolist() == [0, 0, 255]


def test_bad_samples_are_skipped_with_a_reason(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, "PNG")
    files = {
        "0.png": file.getvalue()[:4000],
        "0.txt": b"torn",
        "1.png": encoded_image(),
        "2.txt": b"alone",
        "3.png": encoded_image(),
        "3.txt": b"  ",
        "4.png": encoded_image(),
        "4.json": b"{}",
        "5.png": encoded_image(),
        "5.txt": b"\xff",
        "6.png": encoded_image(),
        "6.txt": b"good",
    }
    found = read(write_tar(tmp_path / "a.tar", files))
    reasons = Counter(document.reason.split(";")[0] for document in found[:-1])
    assert reasons == {
        "truncated image": 1,
        "no image: found txt": 1,
        "no caption: found png": 1,
        "no caption: found nothing": 1,
        "image without caption": 1,
        "text that is not UTF-8": 1,
    }
    assert found[-1][0] == "good"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_are_read(tmp_path, mode):
    files = {"0.png": encoded_image("white", mode=mode), "0.txt": b"white"}
    ((_, image),) = read(write_tar(tmp_path / "a.tar", files))
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.asarray(image).min() == 255


def test_a_truncated_tar_is_read_up_to_the_damage(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"0.png": encoded_image(), "0.txt": b"red", "1.png": encoded_image()})
    path.write_bytes(path.read_bytes()[: 5 * 512 + 20])  # ends inside 1.png
    found = read(str(path))
    assert [document[0] for document in found if not isinstance(document, Skipped)] == ["red"]
    assert Skipped("damaged tar, read up to the damage") in found


def test_a_file_that_is_not_a_tar_is_skipped(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    found = read(str(tmp_path / "a.tar"))
    assert found == [Skipped("damaged tar, read up to the damage")]


def test_all_emoji_are_read(data_dir, tmp_path):
    data = ImageCaptionData(
        str(data_dir / "emoji" / "*.tar"),
        val_fraction=0.05,
        image_size=64,
        autoencoder="pixels",
        patch_size=8,
        row_length=256,
        vocab_size=1000,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup()
    train, val = (data.corpora[split]["captions"] for split in ("train", "val"))
    assert len(train) + len(val) == 1202
    assert 0.03 < len(val) / 1202 < 0.07
    assert train.skipped == val.skipped == {}
    assert train.layout().pairs().all()
    caption, latents = train.document(0)
    assert data.tokenizer.decode(caption.tolist()) == "left right arrow"
    with tarfile.open(data_dir / "emoji" / "00000.tar") as tar:
        pixels = np.asarray(Image.open(tar.extractfile("000000000.png")))
    assert np.abs((latents.permute(1, 2, 0).numpy() + 1) * 127.5 - pixels).max() < 0.1
    batch = next(iter(data.train_dataloader()))
    assert batch.latents.shape[1:] == (3, 64, 64)
    assert batch.latents.shape[0] == (batch.image_ids >= 0).sum() / 64
