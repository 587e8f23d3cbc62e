"""`tf-lightning generate`: prompts in order, files written, mistakes told."""

import json

import numpy as np
import pytest
import runs
from PIL import Image

from tf_lightning.cli import main
from tf_lightning.generate_command import build_parser, name_texts


@pytest.fixture(scope="session")
def checkpoint(run) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@pytest.fixture
def picture(tmp_path) -> str:
    """A picture that is neither square nor RGB nor of the model's size."""
    path = tmp_path / "in.png"
    Image.new("RGBA", (100, 80), (255, 0, 0, 128)).save(path)
    return str(path)


@pytest.fixture
def fails(capsys):
    """Runs a command that has to fail: its exit code and its one line on standard error."""

    def command(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(["generate", *args])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tf-")]
        assert len(lines) == 1
        return stop.value.code, lines[0]

    return command


def prompt_of(*args: str) -> list[tuple[str, str]]:
    options = build_parser().parse_args(name_texts(["CKPT", *args]))
    assert options.checkpoint == "CKPT"
    return options.parts


def test_text_and_pictures_keep_the_order_they_were_typed_in():
    assert prompt_of("a", "b") == [("text", "a"), ("text", "b")]
    assert prompt_of("a", "--image", "x") == [("text", "a"), ("image", "x")]
    assert prompt_of("--image", "x", "a") == [("image", "x"), ("text", "a")]
    assert prompt_of("--image=x", "a", "-n", "2", "-o", "b", "--image", "y", "c", "-n3") == [
        *(("image", "x"), ("text", "a"), ("image", "y"), ("text", "c"))
    ]
    assert prompt_of("--text=-a", "--seed", "-1", "") == [("text", "-a"), ("text", "")]


def test_words_are_answered_with_pictures_and_how_they_were_made(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    command = ["generate", checkpoint, "a red circle", "-o", str(out), "-n", "2", "--steps", "2"]
    main([*command, "--seed", "7"])
    assert sorted(path.name for path in out.iterdir()) == [
        *("0007.json", "0007.png", "0008.json", "0008.png")
    ]
    assert str(out) in capsys.readouterr().out
    record = json.loads((out / "0008.json").read_text())
    assert record == {
        "prompt": [["text", "a red circle"]],
        "seed": 8,
        "checkpoint": checkpoint,
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "sampler": "DDIMScheduler",
    }
    first, second = (np.asarray(Image.open(out / name), int) for name in ("0007.png", "0008.png"))
    assert first.shape == (64, 64, 3) and (first != second).any()


def test_a_seed_gives_the_same_picture_alone_and_among_others(checkpoint, tmp_path):
    command = ["generate", checkpoint, "a red circle", "--steps", "2"]
    main([*command, "-o", str(tmp_path / "many"), "-n", "3"])
    main([*command, "-o", str(tmp_path / "one"), "-n", "1", "--seed", "2"])
    many, one = (
        np.asarray(Image.open(tmp_path / f), int) for f in ("many/0002.png", "one/0002.png")
    )
    assert np.abs(many - one).max() <= 1


def test_a_picture_of_any_size_and_mode_is_answered_with_words(checkpoint, picture, capsys):
    main(["generate", checkpoint, "--image", picture, "--max-new-tokens", "3"])
    words = capsys.readouterr().out
    assert words.endswith("\n") and len(words) > 1


def test_the_answer_can_be_asked_for(checkpoint, picture, tmp_path, capsys):
    main(["generate", checkpoint, "imagine", "--answer", "text", "--max-new-tokens", "3"])
    assert "Wrote" not in capsys.readouterr().out
    out = str(tmp_path / "out")
    arguments = ["--answer", "image", "-n", "1", "--steps", "2", "-o", out]
    main(["generate", checkpoint, "--image", picture, *arguments])
    assert (tmp_path / "out" / "0000.png").exists()


def test_a_prompt_is_required(checkpoint, fails):
    code, line = fails(checkpoint)
    assert code == 1 and "there is no prompt" in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "0"], 1, "num_inference_steps=0 must be from 1 to 1000"),
        (["--steps", "many"], 2, "--steps"),
        (["-n", "0"], 2, "0 is not a number of at least 1"),
        (["--max-new-tokens", "-1"], 2, "-1 is not a number of at least 1"),
        (["--temperature", "-1"], 2, "-1 is not a number of at least 0"),
        (["--temperature", "nan"], 2, "nan is not a number of at least 0"),
        (["--sampler", "Euler"], 2, "DDIMScheduler"),
        (["--colour", "red"], 2, "--colour"),
    ],
)
def test_an_option_out_of_range_is_told_with_its_limit(
    arguments, code, words, checkpoint, tmp_path, fails
):
    told = fails(checkpoint, "a red circle", "-o", str(tmp_path / "out"), *arguments)
    assert told[0] == code and words in told[1]
    assert not (tmp_path / "out" / "0000.png").exists()


def test_a_file_that_is_no_picture_is_told(checkpoint, tmp_path, fails):
    text = tmp_path / "in.png"
    text.write_text("not a picture")
    assert fails(checkpoint, "--image", str(text)) == (
        *(1, f"tf-lightning: error: {text}: undecodable picture; give a PNG or JPEG file"),
    )
    missing = str(tmp_path / "nowhere.png")
    code, line = fails(checkpoint, "--image", missing)
    assert code == 1 and f"{missing}: missing picture" in line


def test_a_truncated_picture_is_told(checkpoint, run, tmp_path, fails):
    path = tmp_path / "cut.png"
    path.write_bytes((run / "samples" / "0000.png").read_bytes()[:-200])
    code, line = fails(checkpoint, "--image", str(path))
    assert code == 1 and "truncated picture" in line


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_drawn(
    checkpoint, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr("tf_lightning.model.Model.draw", lambda *args, **kwargs: 1 / 0)
    (tmp_path / "file").write_text("")
    code, line = fails(checkpoint, "a red circle", "-o", str(tmp_path / "file"))
    assert code == 1 and str(tmp_path / "file") in line


def test_a_model_of_text_alone_refuses_pictures(tmp_path, picture, fails):
    def only_text(config: dict) -> None:
        data = config["data"]["init_args"]
        del data["sources"]["captions"]
        data["autoencoder"] = None
        config["trainer"]["max_steps"] = 3
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]

    main(["fit", "-c", str(runs.write_config(tmp_path, only_text))])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for prompt in (["a red circle"], ["--image", picture]):
        code, line = fails(checkpoint, *prompt, "-o", str(tmp_path / "out"))
        assert code == 1 and "trained on text alone" in line
    main(["generate", checkpoint, "imagine", "--answer", "text", "--max-new-tokens", "2"])
