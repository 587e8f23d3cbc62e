"""`tf-lightning generate`: options, prompts, written files, and refused mistakes."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import runs
from tf_lightning.cli import outputs
from tf_lightning.cli.generate import build_parser, name_texts
from tf_lightning.cli.main import main
from tf_lightning.cli.parser import flag
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.sampling import SamplingConfig


@pytest.fixture(scope="session")
def checkpoint(run) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@pytest.fixture
def picture(tmp_path) -> str:
    """An image file that is neither square nor RGB nor of the model's size."""
    path = tmp_path / "in.png"
    Image.new("RGBA", (100, 80), (255, 0, 0, 128)).save(path)
    return str(path)


def prompt_of(*args: str) -> list[tuple[str, str]]:
    options = build_parser().parse_args(name_texts(["CKPT", *args]))
    assert options.checkpoint == "CKPT"
    return options.parts


def test_text_and_images_keep_the_order_of_the_command_line():
    assert prompt_of("a", "b") == [("text", "a"), ("text", "b")]
    assert prompt_of("a", "--image", "x") == [("text", "a"), ("image", "x")]
    assert prompt_of("--image", "x", "a") == [("image", "x"), ("text", "a")]
    assert prompt_of("--image=x", "a", "-n", "2", "-o", "b", "--image", "y", "c", "-n3") == [
        *(("image", "x"), ("text", "a"), ("image", "y"), ("text", "c"))
    ]
    assert prompt_of("--text=-a", "--seed", "-1", "") == [("text", "-a"), ("text", "")]


def test_text_is_answered_with_images_and_a_record_of_their_options(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    command = [
        "generate",
        checkpoint,
        "a red circle",
        "-o",
        str(out),
        "-n",
        "2",
        "--num-inference-steps",
        "2",
    ]
    main([*command, "--seed", "7"])
    assert sorted(path.name for path in out.iterdir()) == [
        *("0007.json", "0007.png", "0008.json", "0008.png", "sheet.html")
    ]
    assert str(out) in capsys.readouterr().out
    record = json.loads((out / "0008.json").read_text())
    assert record.pop("checkpoint_modified") and record.pop("prompt_digest")
    assert record == {
        "prompt": [["text", "a red circle"]],
        "seed": 8,
        "output_modality": "image",
        "checkpoint": checkpoint,
        "weights": "ema",
        "dtype": "float32",
        "guidance_scale": 3.0,
        "image_guidance_scale": None,
        "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0,
        "num_inference_steps": 2,
        "nfe": 2,
        "sampler": None,
        "timestep_shift": 1.0,
        "parts": [["image", "0008.png"]],
    }
    first, second = (np.asarray(Image.open(out / name), int) for name in ("0007.png", "0008.png"))
    assert first.shape == (64, 64, 3) and (first != second).any()


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(checkpoint, tmp_path):
    command = ["generate", checkpoint, "a red circle", "--num-inference-steps", "2"]
    main([*command, "-o", str(tmp_path / "many"), "-n", "3"])
    main([*command, "-o", str(tmp_path / "one"), "-n", "1", "--seed", "2"])
    many, one = (
        np.asarray(Image.open(tmp_path / f), int) for f in ("many/0002.png", "one/0002.png")
    )
    assert np.abs(many - one).max() <= 1


def test_shifted_steps_give_another_image_and_are_recorded(checkpoint, tmp_path):
    command = ["generate", checkpoint, "a red circle", "-n", "1", "--num-inference-steps", "3"]
    command += ["--sampler", "DPMSolverMultistepScheduler-SDE", "-o"]
    main([*command, str(tmp_path / "even")])
    main([*command, str(tmp_path / "shifted"), "--timestep-shift", "2.5"])
    even, shifted = (
        np.asarray(Image.open(tmp_path / name / "0000.png")) for name in ("even", "shifted")
    )
    assert (even != shifted).any()
    assert json.loads((tmp_path / "shifted" / "0000.json").read_text())["timestep_shift"] == 2.5


def test_an_image_of_any_size_and_mode_is_answered_with_text(checkpoint, picture, capsys):
    main(["generate", checkpoint, "--image", picture, "--max-new-tokens", "3"])
    words = capsys.readouterr().out
    assert words.endswith("\n") and len(words) > 1


def test_the_output_modality_can_be_chosen(checkpoint, picture, tmp_path, capsys):
    main(["generate", checkpoint, "imagine", "--output-modality", "text", "--max-new-tokens", "3"])
    assert "Wrote" not in capsys.readouterr().out
    out = str(tmp_path / "out")
    arguments = ["--output-modality", "image", "-n", "1", "--num-inference-steps", "2", "-o", out]
    main(["generate", checkpoint, "--image", picture, *arguments])
    assert (tmp_path / "out" / "0000.png").exists()


def test_a_single_text_is_streamed_with_the_options_of_the_command(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(
        TransfusionPipeline, "stream", lambda self, p, **how: calls.append(how) or []
    )
    options = ["--max-new-tokens", "3", "--temperature", "0.5", "--seed", "7"]
    main(["generate", checkpoint, "imagine", "--output-modality", "text", *options])
    assert calls == [{"seed": 7, "sampling": SamplingConfig(max_new_tokens=3, temperature=0.5)}]


def test_every_sampling_option_is_an_option_of_the_command():
    parser = build_parser()
    flags = {name for action in parser._actions for name in action.option_strings}
    assert {flag(option.name) for option in fields(SamplingConfig)} <= flags
    help_text = " ".join(parser.format_help().split())
    assert "Divides the logits of text, >= 0; 0 always takes the most probable token." in help_text
    assert "(default: 3.0)" in help_text


def test_help_is_printed_without_torch():
    code = (
        "import sys\nfrom tf_lightning.cli.main import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and "--num-inference-steps" in shown.stdout


def test_a_prompt_is_required(checkpoint, fails):
    code, line = fails("generate", checkpoint)
    assert code == 1 and "there is no prompt" in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--num-inference-steps", "0"], 1, "num_inference_steps=0 must be at least 1"),
        (["--num-inference-steps", "1001"], 1, "num_inference_steps=1001 must be from 1 to 990"),
        (["--num-inference-steps", "many"], 2, "--num-inference-steps"),
        (["-n", "0"], 2, "0 is not a number of at least 1"),
        (["--seed", "0.5"], 2, "0.5 is not a whole number below"),
        (["--seed", str(2**70)], 2, "is not a whole number below"),
        (["--dtype", "float8"], 2, "--dtype"),
        (["--max-new-tokens", "-1"], 1, "max_new_tokens=-1 must be at least 1"),
        (["--temperature", "-1"], 1, "temperature=-1.0 must be at least 0; 0 is greedy"),
        (["--temperature", "nan"], 1, "temperature=nan must be at least 0; 0 is greedy"),
        (["--sampler", "Euler"], 1, "must be one of DDPMScheduler, DDIMScheduler"),
        (["--sampler", "FlowMatchEulerDiscreteScheduler"], 1, "does not fit a model that predicts"),
        (["--timestep-shift", "0"], 1, "timestep_shift=0.0 must be from 0.01 to 100"),
        (
            ["--sampler", "UniPCMultistepScheduler", "--timestep-shift", "2.5"],
            1,
            "timestep_shift=2.5 does not fit UniPCMultistepScheduler, whose steps",
        ),
        (["--guidance-interval", "0.5"], 2, "'0.5' must be two numbers such as 0.2,0.8"),
        (
            ["--guidance-interval", "1,0"],
            1,
            "guidance_interval=(1.0, 0.0) must be two noise levels",
        ),
        (["--guidance-rescale", "2"], 1, "guidance_rescale=2.0 must be from 0"),
        (["--output-modality", "text", "--top-k", "0"], 1, "top_k=0 must be at least 1"),
        (["--output-modality", "text", "--top-p", "0"], 1, "top_p=0.0 must be above 0"),
        (["--output-modality", "any", "--max-images", "0"], 1, "max_images=0 must be at least 1"),
        (["--color", "red"], 2, "--color"),
        (["--code-top-k", "9"], 1, "--code-top-k does not apply: this model's images are denoised"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_limit(
    arguments, code, words, checkpoint, tmp_path, fails
):
    told = fails("generate", checkpoint, "a red circle", "-o", str(tmp_path / "out"), *arguments)
    assert told[0] == code and words in told[1]
    assert not (tmp_path / "out" / "0000.png").exists()


def test_an_empty_prompt_generates_without_a_condition(checkpoint, tmp_path, capsys):
    main(["generate", checkpoint, "", "-n", "1", "--num-inference-steps", "2", "-o", str(tmp_path)])
    assert Image.open(tmp_path / "0000.png").size == (64, 64)
    record = json.loads((tmp_path / "0000.json").read_text())
    assert record["prompt"] == [["text", ""]]
    # Without a condition both branches of guidance are equal, so the scale changes nothing.
    more = ["--guidance-scale", "9", "-o", str(tmp_path / "more")]
    main(["generate", checkpoint, "", "-n", "1", "--num-inference-steps", "2", *more])
    files = [folder / "0000.png" for folder in (tmp_path, tmp_path / "more")]
    one, other = (np.asarray(Image.open(file), int) for file in files)
    assert np.abs(one - other).max() <= 1


def test_the_folder_of_a_run_means_its_last_checkpoint(checkpoint, run, tmp_path):
    how = ["a red circle", "-n", "1", "--num-inference-steps", "2", "-o"]
    main(["generate", checkpoint, *how, str(tmp_path / "file")])
    main(["generate", str(run), *how, str(tmp_path / "folder")])
    assert all(
        (tmp_path / "file" / "0000.png").read_bytes() == (tmp_path / f / "0000.png").read_bytes()
        for f in ("file", "folder")
    )


def test_weights_and_precision_can_be_chosen_and_are_recorded(checkpoint, tmp_path):
    how = ["a red circle", "-n", "1", "--num-inference-steps", "2", "--device", "cpu", "-o"]
    for name, options in {
        "ema": [],
        "raw": ["--weights", "raw"],
        "bf16": ["--dtype", "bfloat16"],
    }.items():
        main(["generate", checkpoint, *how, str(tmp_path / name), *options])
    images = {name: (tmp_path / name / "0000.png").read_bytes() for name in ("ema", "raw", "bf16")}
    assert len(set(images.values())) == 3
    records = {name: json.loads((tmp_path / name / "0000.json").read_text()) for name in images}
    assert [records[name]["weights"] for name in images] == ["ema", "raw", "ema"]
    assert [records[name]["dtype"] for name in images] == ["float32", "float32", "bfloat16"]
    raw = TransfusionPipeline.from_pretrained(checkpoint, weights="raw")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, weight in raw.model.net.state_dict().items():
        assert torch.equal(weight, saved[f"net.{name}"]), name


def test_weights_that_an_export_does_not_hold_are_refused(checkpoint, tmp_path, fails):
    main(["export", checkpoint, "--only", "net", "-o", str(tmp_path / "exported")])
    code, line = fails("generate", tmp_path / "exported", "a", "--weights", "raw")
    assert code == 1 and "holds the ema weights; export the checkpoint again" in line


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "meta:0:0"])
def test_a_device_that_is_not_there_is_refused(device, checkpoint, fails):
    code, line = fails("generate", checkpoint, "a", "--device", device)
    assert code == 1 and f"device={device!r} is not on this machine; give cpu" in line


def test_a_prompt_that_is_too_long_is_refused(checkpoint, fails, tmp_path):
    code, line = fails("generate", checkpoint, "a red circle " * 99, "-o", str(tmp_path / "out"))
    assert code == 1 and "this model was trained on rows of 256; shorten the prompt" in line
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def prompts(tmp_path, picture) -> Path:
    """A file of interleaved prompts beside the image that it names."""
    lines = [
        {"parts": [{"image": "in.png"}, {"text": "make it red"}]},
        ["a red circle"],
        ["one blue square"],
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def drawn(folder: Path) -> dict[str, float]:
    """Return the time at which each image of a folder was written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}


def test_prompts_of_a_file_give_the_same_outputs_as_on_the_command_line(
    checkpoint, prompts, tmp_path
):
    how = ["--num-inference-steps", "2", "-n", "2"]
    main(["generate", checkpoint, "--prompts", str(prompts), "-o", str(tmp_path / "file"), *how])
    assert sorted(drawn(tmp_path / "file")) == [f"000{n}.png" for n in range(6)]
    typed = ["--image", str(tmp_path / "in.png"), "make it red"]
    main(["generate", checkpoint, *typed, "-o", str(tmp_path / "typed"), *how])
    for name in ("0000.png", "0001.png"):
        one, other = (np.asarray(Image.open(tmp_path / f / name), int) for f in ("file", "typed"))
        assert np.abs(one - other).max() <= 1
    sheet = (tmp_path / "file" / "sheet.html").read_text()
    assert sheet.count("<img") == 6 and "one blue square" in sheet


def test_each_line_of_a_text_file_is_a_prompt(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\none blue square\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out")]
    main(["generate", checkpoint, *arguments, "--output-modality", "text", "--max-new-tokens", "3"])
    wrote = f"Wrote 2 texts: {tmp_path}/out/0000.json and 1 more; all outputs are in "
    assert wrote in capsys.readouterr().out
    records = [json.loads((tmp_path / "out" / f"000{n}.json").read_text()) for n in (0, 1)]
    assert [r["prompt"] for r in records] == [
        [["text", "a red circle"]],
        [["text", "one blue square"]],
    ]
    assert all(kind == "text" for r in records for kind, _ in r["parts"])


def test_outputs_are_kept_unless_something_changed(checkpoint, prompts, tmp_path, capsys):
    command = ["generate", checkpoint, "--prompts", str(prompts), "-o", str(tmp_path / "out")]
    main([*command, "--num-inference-steps", "2"])
    before = drawn(tmp_path / "out")
    (tmp_path / "out" / "0001.json").unlink()
    main([*command, "--num-inference-steps", "2"])
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Wrote 1 image (2 were there already): {out}/0000.png and 2 more; all outputs are in "
        f"{out}/sheet.html"
    )
    after = drawn(tmp_path / "out")
    assert after.keys() - before.keys() == {"0003.png"} and after.items() > before.items()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "in.png")  # same name, another picture
    main([*command, "--num-inference-steps", "2"])
    assert "Wrote 1 image (2 were there already): " in capsys.readouterr().out.splitlines()[-1]
    main([*command, "--num-inference-steps", "3"])
    assert "Wrote 3 images: " in capsys.readouterr().out.splitlines()[-1]
    assert drawn(tmp_path / "out").items() > after.items()  # nothing was replaced
    sheet = (tmp_path / "out" / "sheet.html").read_text()
    assert sheet.count("<figure>") == 3 + 1 + 3


def test_an_interrupted_command_keeps_its_outputs_and_can_be_repeated(
    checkpoint, prompts, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = [
        "generate",
        checkpoint,
        "--prompts",
        str(prompts),
        "-o",
        str(out),
        "--num-inference-steps",
        "2",
    ]
    command += ["--batch-size", "1"]
    write, count = outputs.write_output, []

    def write_two(*args):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(write(*args))

    monkeypatch.setattr(outputs, "write_output", write_two)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130
    assert f"Kept 2 outputs in {out}; the same command makes the rest." in capsys.readouterr().err
    names = sorted(file.name for file in out.iterdir())
    assert names == ["0000.json", "0000.png", "0001.json", "0001.png", "sheet.html"]
    monkeypatch.undo()
    before = drawn(out)
    main(command)
    assert "Wrote 1 image (2 were there already): " in capsys.readouterr().out.splitlines()[-1]
    assert drawn(out).items() > before.items()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no prompts; give one in each line"),
        ("{", "has a line that is not JSON"),
        ("[3]", "has a part that is neither text nor image"),
        ("[]", "has a line without parts"),
        ('[{"image": "nowhere.png"}]', "nowhere.png: missing image"),
    ],
)
def test_an_unusable_file_of_prompts_is_refused(content, words, checkpoint, tmp_path, fails):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    code, line = fails("generate", checkpoint, "--prompts", str(file), "-o", str(tmp_path / "out"))
    assert code == 1 and words in line


def test_a_prompt_and_a_file_of_prompts_are_refused_together(checkpoint, prompts, fails):
    code, line = fails("generate", checkpoint, "a red circle", "--prompts", str(prompts))
    assert code == 1 and "both a prompt and --prompts are given; leave one out" in line


def test_a_file_that_is_no_image_is_refused(checkpoint, tmp_path, fails):
    text = tmp_path / "in.png"
    text.write_text("not a picture")
    assert fails("generate", checkpoint, "--image", str(text)) == (
        *(1, f"tf-lightning: error: {text}: undecodable image; give a PNG or JPEG file"),
    )
    missing = str(tmp_path / "nowhere.png")
    code, line = fails("generate", checkpoint, "--image", missing)
    assert code == 1 and f"{missing}: missing image" in line


def test_a_truncated_image_is_refused(checkpoint, run, tmp_path, fails):
    path = tmp_path / "cut.png"
    path.write_bytes((run / "samples" / "0000.png").read_bytes()[:-200])
    code, line = fails("generate", checkpoint, "--image", str(path))
    assert code == 1 and "truncated image" in line


def test_a_folder_that_cannot_be_made_is_reported_before_generation(
    checkpoint, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(
        "tf_lightning.generation.pipeline.TransfusionPipeline.iterate",
        lambda *args, **kwargs: 1 / 0,
    )
    (tmp_path / "file").write_text("")
    code, line = fails("generate", checkpoint, "a red circle", "-o", str(tmp_path / "file"))
    assert code == 1 and str(tmp_path / "file") in line


def test_the_command_refuses_images_for_a_model_of_text_alone(tmp_path, picture, fails):
    def only_text(config: dict) -> None:
        data = config["data"]["init_args"]
        del data["sources"]["captions"]
        data["autoencoder"] = None
        config["trainer"]["max_steps"] = 3
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]

    main(["fit", "-c", str(runs.write_config(tmp_path, only_text))])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for prompt in (["a red circle"], ["--image", picture]):
        code, line = fails("generate", checkpoint, *prompt, "-o", str(tmp_path / "out"))
        assert code == 1 and "trained on text alone" in line
    main(["generate", checkpoint, "imagine", "--output-modality", "text", "--max-new-tokens", "2"])
