"""`inspect` counts the data and draws documents and rows."""

import io
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from support import runs
from support.files import encoded_image, write_lines, write_tar
from support.sources import GreyImages, InterleavedImages, RepeatedWord
from tf_lightning.batch import document_length, pack
from tf_lightning.cli.inspect import (
    COPY,
    IMAGE,
    PAD,
    SPECIAL,
    TEXT,
    TONES,
    announcement,
    describe,
    describe_padding,
    draw_rows,
    histogram,
    kinds,
    pick_documents,
)
from tf_lightning.cli.main import main
from tf_lightning.cli.quality import (
    distribution,
    filter_list,
    ratio_bars,
    shape_advice,
    write_list,
)
from tf_lightning.data import TextFiles
from tf_lightning.data.quality import Quality
from tf_lightning.shapes.sources import ShapesTexts


class Specials:
    bos_id, eos_id, boi_id, eoi_id = 1, 2, 8, 9


WORDS, LATENTS = torch.tensor([5, 6]), torch.zeros(1, 2, 1)  # two patches


def packed(rows, **options):
    options = {"tokenizer": Specials, "row_length": 16, "patch_size": 1} | options
    return pack(rows, list(range(len(rows))), **options)


def test_the_kind_of_each_position_is_the_one_that_was_packed():
    batch = packed([[[WORDS, LATENTS], [WORDS]], [[LATENTS, WORDS]]], clean_copies=True)
    b, t, i, c = SPECIAL, TEXT, IMAGE, COPY
    expected = [
        [b, t, t, b, i, i, b, b, b, t, t, b, *[PAD] * 4],
        [b, b, i, i, c, c, b, t, t, b, *[PAD] * 6],
    ]
    assert kinds(batch, Specials).tolist() == expected


@pytest.mark.parametrize("row_length", [16, 1500])
def test_a_drawn_row_shows_each_position_in_the_color_of_its_kind(row_length):
    batch = packed([[[WORDS, LATENTS]] * 2], row_length=row_length)
    drawn = np.asarray(draw_rows(batch, Specials, ["a row"]))
    (held,) = kinds(batch, Specials)
    width = max(1, 1024 // row_length)
    line = drawn[34 + 22 + 18 + 11, 10 : 10 + 1024]  # the middle of the first strip
    for place in range(min(row_length, 1024)):
        pixel = line[place * width + width // 2].tolist()
        assert pixel in TONES[held[place]].tolist(), place


def test_the_counts_equal_those_of_the_documents(mixture):
    data = mixture({"pictures": GreyImages(num_documents=30), "words": RepeatedWord("red", 5)})
    data.setup()
    corpus = data.corpora["train"]["pictures"]
    tokens = sum(len(data.tokenizer.encode(f"grey {n}")) for n in range(30))
    first, *bars = describe("pictures train", corpus, 4, 64)
    assert first == (
        f"pictures train: 30 documents, {tokens} text tokens, 30 images of 4 patches, "
        f"{tokens + 30 * (4 + 4)} positions"
    )
    assert sum(int(bar.split("positions")[1].split()[0]) for bar in bars) == 30


def test_padding_and_length_of_documents_are_those_of_an_epoch(mixture):
    data = mixture({"pictures": GreyImages(num_documents=30), "words": RepeatedWord("red", 5)})
    data.setup()
    lines = describe_padding(data)
    for name, line, rows in zip(data.sources, lines, data.training_rows().corpora, strict=True):
        epoch = [document for index in range(rows.rows_per_epoch) for document in rows.row(index)]
        lengths = [document_length(document, data.patch_size) for document in epoch]
        padding = 1 - sum(lengths) / (rows.rows_per_epoch * data.row_length)
        assert line == (
            f"{name} train: documents of {np.mean(lengths):.0f} positions on average, packed into "
            f"rows of {data.row_length} with {padding:.1%} padding"
        )


def test_a_histogram_counts_every_length_once():
    lengths = np.array([1, 2, 3, 3, 4, 7, 8, 100, 100])
    lines = [line.split() for line in histogram(lengths, 100)]
    assert [(a, c, n) for a, _, c, _, n, *_ in lines] == [
        ("1", "1", "1"), ("2", "3", "3"), ("4", "7", "2"), ("8", "15", "1"), ("16", "31", "0"),
        ("32", "63", "0"), ("64", "100", "2"),
    ]  # fmt: skip
    assert [line[-1] for line in lines] == [
        "#" * n if n else "0" for n in (14, 40, 27, 14, 0, 0, 27)
    ]


def test_documents_of_every_source_are_picked_with_their_parts_in_order(mixture):
    sources = {
        "words": RepeatedWord("red", 5),
        "stories": InterleavedImages(),
        "pictures": GreyImages(),
    }
    data = mixture(sources, caption_drop_prob=0.0, image_first_prob=0.0)
    data.setup()
    shown = pick_documents(data, 9)
    assert [title.split(",")[0] for title, _ in shown] == [n for n in sources for _ in range(3)]
    for title, parts in shown[-3:]:
        text, image = parts
        assert text == f"grey {np.asarray(image)[0, 0, 0]}", title
    assert [parts for _, parts in pick_documents(data, 9)][0] == shown[0][1]
    assert [parts for _, parts in pick_documents(data, 9, seed=1)][0] != shown[0][1]


def test_no_document_is_drawn_twice(mixture):
    data = mixture({"pictures": GreyImages(num_documents=5)}, caption_drop_prob=0.0)
    data.setup()
    shown = pick_documents(data, 24)
    number = len(data.corpora["train"]["pictures"])
    assert len(shown) == number
    assert len({np.asarray(parts[-1]).tobytes() for _, parts in shown}) == number


def test_the_command_writes_the_files_that_it_names(tmp_path, capsys):
    config = runs.write_config(tmp_path)
    main(["inspect", "-c", str(config), "-o", str(tmp_path / "look"), "--documents", "6"])
    out = capsys.readouterr().out
    report = (tmp_path / "look" / "report.txt").read_text()
    assert out.startswith(report)
    assert "captions train: 40 documents" in report and "text val: 6 documents" in report
    assert "(6 documents), rows.png and report.txt." in out
    assert {p.name for p in (tmp_path / "look").iterdir()} - {"exclude.txt"} == {
        "documents.png", "report.txt", "rows.png"
    }  # fmt: skip
    for name in ("rows", "documents"):
        assert Image.open(tmp_path / "look" / f"{name}.png").width > 1000


def test_skipped_samples_are_counted_by_reason(tmp_path, capsys):
    files = {"0.png": encoded_image("red"), "0.txt": b"red", "1.png": b"bad", "1.txt": b"bad"}
    tar = write_tar(tmp_path / "a.tar", files)

    def change(config: dict) -> None:
        sources = config["data"]["init_args"]["sources"]
        arguments = {"paths": str(tar), "val_fraction": 0, "image_size": 64}
        sources["captions"] = {
            "class_path": "tf_lightning.data.CaptionTars", "init_args": arguments
        }  # fmt: skip

    main(["inspect", "-c", str(runs.write_config(tmp_path, change))])
    assert "  skipped 1: undecodable image\n" in capsys.readouterr().out
    assert (tmp_path / "data" / "inspect" / "rows.png").is_file()


@pytest.fixture
def only_data(tmp_path):
    """A function that writes a configuration of one source and no model."""

    def write(source: dict, **options) -> str:
        data = {"sources": {"mine": source}, "row_length": 128, "cache_dir": str(tmp_path / "data")}
        (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data | options}))
        return str(tmp_path / "data.yaml")

    return write


def test_chats_are_shown_with_their_questions(tmp_path, only_data, capsys):
    """Questions are loss-masked, which their token ids express."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    write_lines(tmp_path / "chat.jsonl", [{"messages": turns}] * 30)
    arguments = {"paths": str(tmp_path / "chat.jsonl"), "val_fraction": 0.1}
    config = only_data({"class_path": "tf_lightning.data.ChatFiles", "init_args": arguments})
    main(["inspect", "-c", config])
    assert "mine train: 27 documents" in capsys.readouterr().out


def test_class_folders_need_no_model_that_fits(tmp_path, only_data, capsys):
    for color in ("red", "blue"):
        for number in range(6):
            file = tmp_path / "images" / color / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded_image(color, size=(64, 64)))
    arguments = {"paths": f"{tmp_path}/images/*/*.png", "val_fraction": 0.25, "image_size": 64}
    source = {"class_path": "tf_lightning.data.ClassFolders", "init_args": arguments}
    config = only_data(source, autoencoder="pixels")
    wrong = ["--model.transformer.num_heads=3", "--model.latent_channels=4", "--model.patch_size=8"]
    wrong += ["--trainer.devices=7", "--trainer.accelerator=gpu"]
    main(["prepare", "-c", config, "--processes", "1", *wrong])
    main(["inspect", "-c", config, *wrong])
    assert "8 images of 64 patches" in capsys.readouterr().out


def pictures(folder, count: int):
    """A folder of captioned pictures; the last of them is a copy of the first."""
    folder.mkdir()
    for number in range(count):
        colors = np.random.default_rng(number % (count - 1)).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(colors).resize((64, 64)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"thing {number % (count - 1)}")
    return {"paths": f"{folder}/*.png", "val_fraction": 0.2, "image_size": 64}


def test_the_list_that_is_written_leaves_out_what_it_names(tmp_path, only_data, capsys):
    arguments = pictures(tmp_path / "pictures", 21)
    source = {"class_path": "tf_lightning.data.CaptionFolders", "init_args": arguments}
    config = only_data(source, autoencoder="pixels", row_length=2048)
    main(["inspect", "-c", config])
    out = capsys.readouterr().out
    file = tmp_path / "data" / "inspect" / "exclude.txt"
    copy = f"{tmp_path}/pictures/20.png\tcopy of {tmp_path}/pictures/00.png"
    assert [x for x in file.read_text().splitlines() if x[:1] not in ("#", "")] == [copy]
    assert re.search(r"^  copies of an earlier document +1$", out, re.MULTILINE)
    assert re.search(r"^  writing systems \(not languages\) +Latin 21$", out, re.MULTILINE)
    assert f"tf-lightning prepare -c {config} --exclude {file}" in out

    main(["prepare", "-c", config, "--processes", "1", "--exclude", str(file)])
    train = f"Train on them with\n  tf-lightning fit -c {config} --data.exclude {file}\n"
    assert capsys.readouterr().out.endswith(train)
    main(["inspect", "-c", config, "--data.exclude", str(file)])
    out = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"^mine \w+: (\d+) documents", out, re.MULTILINE)]
    assert sum(counts) == 20 and "skipped 1: named in the filter list" in out
    assert "copies of an earlier document                 0" in out

    main(["inspect", "-c", config, "--quality", "0"])
    assert "copies" not in capsys.readouterr().out


def test_an_edited_list_is_not_overwritten(tmp_path):
    assert write_list(tmp_path, "one\n").name == "exclude.txt"
    assert write_list(tmp_path, "one\n").name == "exclude.txt"
    (tmp_path / "exclude.txt").write_text("edited\n")
    assert write_list(tmp_path, "one\n").name == "exclude-2.txt"
    assert write_list(tmp_path, "two\n").name == "exclude-3.txt"
    assert (tmp_path / "exclude.txt").read_text() == "edited\n"


def test_a_document_with_several_faults_has_one_line_in_the_list():
    quality = Quality(64)
    small = Image.open(io.BytesIO(encoded_image(size=(8, 30))))
    small.info["file"] = encoded_image(size=(8, 30))
    for number in range(2):
        quality.add("train", f"a\tb{number}".replace("\t", " "), ["text", small])
    text, count = filter_list({"mine": quality})
    headings = ["copies of an earlier document (1)", "small images (2, of which 1 above)"]
    headings += ["long images (2, of which 2 above)"]
    assert re.findall("^# mine: (.*)$", text, re.MULTILINE) == headings
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert count == 2 and lines == [
        "a b1\tcopy of a b0; small image of 8 x 30 pixels; long image of 8 x 30 pixels",
        "a b0\tsmall image of 8 x 30 pixels; long image of 8 x 30 pixels",
    ]


def test_aspect_ratios_and_lengths_are_counted_once():
    ratios = np.array([0.2, 0.4, 1.0, 1.0, 1.05, 1.9, 2.5, 7.0])
    bars = [line.split("width:height ")[1] for line in ratio_bars(ratios)]
    assert [(bar[:16].strip(), int(bar.split("#")[0].split()[-1])) for bar in bars] == [
        ("narrower than 1:", 1), ("1:3 to 1:2", 1), ("about square", 3), ("3:2 to 2:1", 1),
        ("2:1 to 3:1", 1), ("wider than 3:1", 1),
    ]  # fmt: skip
    assert distribution(np.arange(1, 102)) == (
        "mean 51.0, 5% below 6, median 51, 95% below 96, longest 101"
    )


def test_buckets_are_advised_if_many_images_are_far_from_square():
    photos = [1.5, 2 / 3, 4 / 3, 1.0]  # two of them lose a third
    for ratios, expected in (
        (photos, "50% of the images lose more than a quarter .*--data.max_aspect_ratio 1.5 keeps"),
        ([9.0, 1.0], "50% .*--data.max_aspect_ratio 3 keeps"),
        ([1.8] + 19 * [1.0], None),
        ([4 / 3, 0.75], None),
        ([], None),
    ):
        advice = "".join(shape_advice(np.array(ratios)))
        assert re.match(expected, advice) if expected else not advice, ratios


def test_many_documents_are_announced_with_how_to_look_at_fewer(tmp_path):
    sources = {"mine": ShapesTexts(900, num_val=100)}
    assert list(announcement(sources)) == []
    first, *fewer = announcement(sources | {"more": ShapesTexts(300, num_val=0)})
    assert first.startswith("Preparing 1,300 documents, unless they are prepared already")
    option = "--data.sources.mine.init_args.num_documents 1000"
    assert fewer[0] == f"To look at fewer documents of mine, give {option}."
    (tmp_path / "a.txt").write_text("a text")
    assert list(announcement({"text": TextFiles(f"{tmp_path}/a.txt")})) == []
    unknown = TextFiles(f"{tmp_path}/a.txt")
    unknown.num_samples = lambda split: None
    first, fewer = announcement({"text": unknown})
    assert first.startswith("Preparing all documents,") and "give fewer files" in fewer


@pytest.mark.parametrize("arguments", [["--documents", "0"], ["-c", "none.yaml"], []])
def test_mistakes_are_reported_without_a_traceback(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *arguments])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_images_without_text_are_refused(tmp_path, capsys):
    config = "configs/autoencoder/shapes.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "-c", config, f"--data.init_args.cache_dir={tmp_path}"])
    assert stop.value.code == 1
    assert "ImageData has no documents to inspect; give" in capsys.readouterr().err
