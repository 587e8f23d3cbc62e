"""Contact sheets, and files that are whole or absent."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from callbacks.sheet import (
    TILE_WIDTH,
    Tile,
    contact_sheet,
    run_folder,
    write_picture,
    write_text,
)


def tiles(count: int, right: bool = True) -> list[Tile]:
    return [Tile(Image.new("RGB", (64, 64), "blue"), "a blue picture", right)] * count


def test_a_sheet_has_a_row_of_tiles_for_each_six():
    width, height = TILE_WIDTH, 190
    sheet = contact_sheet([("first", tiles(7)), ("second", tiles(1))])
    assert sheet.size == (6 * width, (30 + 2 * height) + (30 + height))
    blue = (np.asarray(sheet) == (0, 0, 255)).all(-1)
    assert blue.sum() == 8 * 128 * 128


def test_larger_words_have_more_room():
    small, large = (contact_sheet([("title", tiles(1, False))], 1, size) for size in (10, 20))
    assert (small.size, large.size) == ((250, 30 + 190), (250, 60 + 252))


def test_only_words_that_do_not_fit_are_red():
    def reds(right: bool) -> int:
        pixels = np.asarray(contact_sheet([("title", tiles(1, right))]), int)
        return ((pixels[..., 0] > 200) & (pixels[..., 1] < 50) & (pixels[..., 2] < 50)).sum()

    assert reds(False) > 50 and reds(True) == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    write_picture(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    with pytest.raises(TypeError):
        write_text(tmp_path / "a.json", None)
    assert (tmp_path / "a.json").read_text() == "new"
    assert Image.open(tmp_path / "a.png").size == (2, 2)


@pytest.mark.parametrize(
    ("verb", "place"), [("fit", "run"), ("validate", "run/validate"), ("test", "run/test")]
)
def test_an_evaluation_writes_into_a_folder_of_its_own(verb, place, tmp_path):
    from lightning.pytorch.trainer.states import TrainerFn

    fn = {"fit": TrainerFn.FITTING, "validate": TrainerFn.VALIDATING, "test": TrainerFn.TESTING}
    trainer = SimpleNamespace(
        log_dir=str(tmp_path / "run"), state=SimpleNamespace(fn=fn[verb]), default_root_dir="no"
    )
    assert run_folder(trainer) == tmp_path / place and (tmp_path / place).is_dir()
