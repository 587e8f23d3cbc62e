"""Outputs of `generate` on disk, and which of them a repeated command keeps."""

import json
import shutil

import pytest
from PIL import Image

from tf_lightning.cli.outputs import (
    digest,
    number_outputs,
    read_prompts,
    write_output,
    write_sheet,
    written_outputs,
)
from tf_lightning.errors import UserError

RED, BLUE = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
RECORD = {"prompt": [("text", "a <red> circle")], "seed": 7, "interval": (0.0, 1.0)}


def test_an_output_is_its_images_and_a_json_of_its_parts(tmp_path):
    write_output(tmp_path, "0007", RECORD, ["see", RED, "and", BLUE])
    record = json.loads((tmp_path / "0007.json").read_text())
    parts = [["text", "see"], ["image", "0007.png"], ["text", "and"], ["image", "0007-1.png"]]
    assert record["parts"] == parts and record["seed"] == 7
    colors = [Image.open(tmp_path / parts[n][1]).getpixel((0, 0)) for n in (1, 3)]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("change", ["nothing", "seed", "picture", "json", "torn", "list"])
def test_only_an_output_made_in_the_same_way_is_kept(tmp_path, change):
    write_output(tmp_path, "0007", RECORD, [RED])
    record = RECORD | {"seed": 8} if change == "seed" else RECORD
    if change == "picture":
        (tmp_path / "0007.png").unlink()
    if change == "json":
        (tmp_path / "0007.json").unlink()
    if change == "list":
        (tmp_path / "0007.json").write_text("[]")
    if change == "torn":
        (tmp_path / "0007.json").write_text('{"prompt": ')
    (name,) = number_outputs(tmp_path, [record], written_outputs(tmp_path))
    assert name == ("0007" if change == "nothing" else "0008")


def test_new_outputs_continue_the_numbers_of_a_folder_and_replace_nothing(tmp_path):
    records = [RECORD | {"seed": seed} for seed in (7, 8)]
    assert number_outputs(tmp_path, records, {}) == ["0007", "0008"]
    write_output(tmp_path, "0007", records[0], [RED, "and", BLUE])
    (tmp_path / "0012.png").write_bytes(b"of another program")
    (tmp_path / "0031.json").write_text("[]")
    (tmp_path / "notes-0099.json").write_text("{}")
    blue = RECORD | {"prompt": [("text", "a blue circle")]}
    wanted = [records[0], blue, records[1], RECORD | {"seed": 31}]
    names = number_outputs(tmp_path, wanted, written_outputs(tmp_path))
    assert names == ["0007", "0032", "0008", "0033"]


def test_a_sheet_shows_written_outputs_and_escapes_text(tmp_path):
    write_output(tmp_path, "0007", RECORD, [RED, "a & b"])
    (tmp_path / "0008.json").write_text("[]")  # not an output
    page = write_sheet(tmp_path).read_text()
    assert page.count("<figure>") == 1 and 'src="0007.png"' in page
    assert "a &lt;red&gt; circle" in page and "a &amp; b" in page


def test_the_digest_of_a_prompt_depends_on_its_text_and_pixels():
    prompts = [["a", RED], ["a", BLUE], [RED, "a"], ["b", RED], ["a"]]
    assert len(set(map(digest, prompts))) == 5
    assert digest(["a", RED.copy()]) == digest(["a", RED])


def test_prompts_begin_after_the_byte_order_mark_and_end_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa red\u2028circle\r\n\r\na square".encode())
    assert read_prompts(tmp_path / "a.txt") == [
        [("text", "a red\u2028circle")],
        [("text", "a square")],
    ]
    (tmp_path / "a.jsonl").write_text('\ufeff["a\u2028b"]\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == [[("text", "a\u2028b")]]
    (tmp_path / "a.json").write_text(json.dumps(["a circle", {"parts": ["a square"]}], indent=1))
    assert read_prompts(tmp_path / "a.json") == [[("text", "a circle")], [("text", "a square")]]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("torch")])
def test_a_full_disk_is_told_with_its_folder_and_leaves_nothing(fault, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("tf_lightning.files.shutil.disk_usage", lambda folder: usage)

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match=f"no space left on the disk of {tmp_path}; free some"):
        write_output(tmp_path, "0000", {}, [Image.new("RGB", (4, 4))])
    assert not list(tmp_path.iterdir())
