"""ImageData: images are stored once and served in an order that depends on (seed, row)."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.files import encoded_image, write_tar
from tf_lightning.data import CaptionTars, ImageData, ImageFiles
from tf_lightning.data.image_only import (
    PADDING_ROW,
    Augment,
    ImageStore,
    TrainImages,
    ValImages,
    first_image,
    store_images,
    zoomed,
)
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesCaptions, ShapesEdits, ShapesTexts

COLORS = [(i, 255 - i, 7) for i in range(40)]
UNCHANGED = Augment(hflip=False)


@pytest.fixture
def tar(tmp_path) -> Path:
    files = {}
    for number, color in enumerate(COLORS):
        files |= {f"{number:03d}.png": encoded_image(color), f"{number:03d}.txt": b"a color"}
    return write_tar(tmp_path / "images.tar", files)


def source(tar, **arguments) -> CaptionTars:
    return CaptionTars(str(tar), **{"val_fraction": 0.3, "image_size": 16} | arguments)


def colors(batches) -> list[tuple[int, ...]]:
    images = torch.cat([batch.images for batch in batches])
    return [tuple(c) for c in ((images[:, :, 8, 8] + 1) * 127.5).round().int().tolist()]


# The store


def test_the_store_holds_usable_images_and_counts_the_others(tmp_path):
    tar = write_tar(
        tmp_path / "some.tar",
        {
            "0.png": encoded_image((1, 2, 3)),
            "0.txt": b"good",
            "1.png": b"\x89PNG bad",
            "1.txt": b"bad",
        },
    )
    store = store_images(source(tar, val_fraction=0), "train", tmp_path / "cache")
    assert store.images.shape == (1, 16, 16, 3) and store.images[0, 0, 0].tolist() == [1, 2, 3]
    assert store.skipped == {"undecodable image": 1}


def test_store_is_made_once_and_again_when_its_files_change(tmp_path, tar):
    first = store_images(source(tar), "train", tmp_path / "cache")
    assert store_images(source(tar), "train", tmp_path / "cache").path == first.path
    with tarfile.open(tar, "a"):
        pass
    write_tar(tmp_path / "images.tar", {"0.png": encoded_image((1, 2, 3)), "0.txt": b"other"})
    other = store_images(source(tar, val_fraction=0), "train", tmp_path / "cache")
    assert other.path != first.path and len(other) == 1


def test_an_interrupted_store_leaves_nothing(tmp_path, tar):
    class Interrupted(CaptionTars):
        def documents(self, split):
            for number, document in enumerate(super().documents(split)):
                if number == 5:
                    raise KeyboardInterrupt
                yield document

    with pytest.raises(KeyboardInterrupt):
        store_images(Interrupted(str(tar), image_size=16), "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_images_of_all_kinds_of_documents_are_stored(tmp_path):
    edits = store_images(ShapesEdits(3, 1), "train", tmp_path)
    assert len(edits) == 6
    before, _, after = next(ShapesEdits(3, 1).documents("train"))
    assert np.array_equal(edits.images[0], np.asarray(before))
    assert np.array_equal(edits.images[1], np.asarray(after))


def test_sources_without_images_or_of_several_sizes_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no usable image"):
        first_image(ShapesTexts(3, 1))
    with pytest.raises(UserError, match=r"undecodable image"):
        bad = write_tar(tmp_path / "bad.tar", {"0.png": b"bad", "0.txt": b"bad"})
        first_image(source(bad, val_fraction=0))

    class Two(ShapesTexts):
        def documents(self, split):
            yield [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))]

    with pytest.raises(UserError, match="8x8 and of 8x16"):
        store_images(Two(3, 1), "train", tmp_path)


def test_damaged_store_is_not_read_silently(tmp_path, tar):
    store = store_images(source(tar), "train", tmp_path / "cache")
    file = store.path / "pictures.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        ImageStore(store.path)


def test_image_files_are_documents_of_one_image(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded_image((9, 8, 7)))
    (tmp_path / "b/2.png").write_bytes(b"bad")
    store = store_images(
        ImageFiles(str(tmp_path / "**/*.png"), val_fraction=0, image_size=16), "train", tmp_path
    )
    assert len(store) == 3 and store.skipped == {"undecodable image": 1}


# The order


def test_each_epoch_shows_each_image_once_in_another_order(tmp_path, tar):
    store = store_images(source(tar), "train", tmp_path)
    images, count = TrainImages(store, UNCHANGED, seed=3), len(store)
    seen = [
        tuple(((images[r].images[:, 0, 0] + 1) * 127.5).round().int().tolist()) for r in range(80)
    ]
    first, second = seen[:count], seen[count : 2 * count]
    assert sorted(first) == sorted(second) and first != second
    assert len(set(first)) == count and set(first) <= set(COLORS)


def test_augmentation_depends_on_the_row_alone(tmp_path, tar):
    store = store_images(ShapesCaptions(5, 3), "train", tmp_path)
    one, two = (TrainImages(store, Augment(zoom=1.5), seed=3) for _ in range(2))
    assert torch.equal(one[27].images, two[27].images)
    seen = {one[row].images.numpy().tobytes() for row in range(6 * len(store))}
    assert len(seen) > 2 * len(store)  # more than each image and its flipped copy


def test_validation_shows_every_image_once_and_pads_for_the_ranks(tmp_path, tar):
    store = store_images(source(tar), "val", tmp_path)
    assert len(store) % 3
    images = ValImages(store, world_size=3)
    rows = [int(images[row].rows) for row in range(len(images))]
    assert len(rows) % 3 == 0
    assert rows == [*range(len(store)), *[PADDING_ROW] * (-len(store) % 3)]
    values = images[3].images
    np.testing.assert_array_equal(
        ((values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), store.images[3]
    )


def test_the_data_module_resumes_where_a_run_was(tmp_path, tar):
    def data():
        made = ImageData(source(tar), batch_size=4, augment=UNCHANGED, cache_dir=str(tmp_path))
        made.prepare_data()
        made.setup()
        return made

    assert data().image_size == (16, 16)
    batches = iter(data().train_dataloader())
    seen = colors([next(batches) for _ in range(5)])
    later = data()
    later.load_state_dict({"next_row": 12, "global_step": 3})
    assert later.state_dict() == {"next_row": 12, "global_step": 3, "seed": 0}
    batches = iter(later.train_dataloader())
    assert colors([next(batches) for _ in range(2)]) == seen[12:]


def test_nothing_to_validate_on_is_one_sentence(tmp_path, tar):
    data = ImageData(source(tar, val_fraction=0), cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="val_fraction"):
        data.prepare_data()
    facts = json.loads(next(tmp_path.glob("pictures-train-*/store.json")).read_text())
    assert facts["shape"] == [40, 16, 16, 3]


# Changes


def test_changes_that_are_switched_off_are_not_made():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    random = np.random.default_rng(0)
    assert np.array_equal(UNCHANGED(image, random), image)
    flipped = {Augment()(image, random).tobytes() for _ in range(20)}
    assert flipped == {image.tobytes(), np.ascontiguousarray(image[:, ::-1]).tobytes()}


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("place", [(0.0, 1.0), (0.5, 0.5)])
def test_zooming_keeps_the_image_size_and_scales_a_square(scale, place):
    image = np.full((40, 40, 3), 255, np.uint8)
    image[12:28, 12:28] = 0
    out = zoomed(image, scale, np.array(place))
    assert out.shape == (40, 40, 3)
    dark = np.argwhere(out[..., 0] < 128)
    first = 12 * scale + (40 - 40 * scale) * np.array(place)  # position of the square's corner
    wanted = np.clip([first, first + 16 * scale], 0, 40)
    np.testing.assert_allclose([dark.min(0), dark.max(0) + 1], wanted, atol=1)


def test_zoom_below_one_is_one_sentence():
    with pytest.raises(UserError, match="zoom=0.5"):
        Augment(zoom=0.5)


def test_validation_shows_the_held_out_images_of_the_source(tmp_path):
    data = ImageData(ShapesCaptions(5, 3), batch_size=2, cache_dir=str(tmp_path))
    data.setup()
    (_, expected), *_ = ShapesCaptions(5, 3).documents("val")
    image = next(iter(data.val_dataloader())).images[0]
    np.testing.assert_array_equal(
        ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected)
    )
