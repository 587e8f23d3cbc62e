"""The tutorials' commands and programs run, in miniature."""

import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from support.markdown import PAGES, ROOT, blocks, name, shell_lines
from support.own_pictures import write_own_pictures
from support.runs import shapes
from tf_lightning.cli.main import main
from tf_lightning.generation import sampling

TUTORIALS = ROOT / "docs" / "tutorials"
NOT_RUN = ("source", "tensorboard")  # of an interactive shell, and a server
FEW = {"guidance_scale": 2.0, "num_inference_steps": 2, "max_new_tokens": 8}
TRAINER = {
    "accelerator": "cpu",
    "precision": "32-true",
    "max_steps": 2,
    "val_check_interval": 2,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
}
MODEL = {"transformer": {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}}
WORLD = {
    "init_args": {
        "sources": {
            "captions": shapes("Captions", 40),
            "text": shapes("Texts", 40),
            "edits": shapes("Edits", 10),
        }
    }
}
EVALUATE = {
    "class_path": "callbacks.evaluate.Evaluate",
    "init_args": {
        "prompts": {"class_path": "callbacks.prompts.ShapesPrompts", "init_args": {"count": 5}},
        "metrics": [{"class_path": "callbacks.metrics.ImageQuality"}],
        "sampling": FEW,
    },
}
REPORT = {"num_prompts": 2, "sampling": FEW}
MINIATURES = {  # what follows a recipe to make it small
    "quickstart": {
        "trainer": TRAINER,
        "evaluate": EVALUATE,
        "shapes_report": REPORT,
        "model": MODEL,
        "data": WORLD,
    },
    "eval/quickstart": {"evaluate": EVALUATE, "data": WORLD},
    "my_pictures": {"trainer": TRAINER, "evaluate": {"sampling": FEW}, "model": MODEL},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder that the tutorials share, with the recipes and their miniatures."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "configs").symlink_to(ROOT / "configs")
    for recipe, small in MINIATURES.items():
        file = folder / "miniatures" / f"{recipe}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(small))
    return folder


def in_miniature(words: list[str]) -> list[str]:
    """A command line with a miniature after each recipe that has one."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        found.append(word)
        if before == "-c" and word.removeprefix("configs/").removesuffix(".yaml") in MINIATURES:
            found += ["-c", word.replace("configs/", "miniatures/", 1)]
    return found


def made(target: str) -> list[str]:
    """The command of a target of the Makefile."""
    recipe = re.search(
        rf"^{target}:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    return recipe[1].split()


def run(words: list[str], monkeypatch) -> None:
    """Run a command of a tutorial in this process."""
    if words[0] == "make":
        words = made(words[1])
    if words[0] == "tf-lightning":
        main(in_miniature(words[1:]))
    elif words[:2] == ["python", "-m"]:
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
    else:
        assert words[0] in NOT_RUN, f"a tutorial has a command of another kind: {words}"


def follow(page: str, folder: Path, monkeypatch) -> None:
    """Do what a tutorial says, in order."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in blocks(TUTORIALS / page):
        if block.language == "bash":
            for words in shell_lines(block.text):
                run(words, monkeypatch)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)


@pytest.fixture(scope="module")
def quickstart(workspace) -> Path:
    """The workspace after the first tutorial."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        follow("quickstart.md", workspace, monkeypatch)
    return workspace


def test_the_quickstart_trains_generates_and_inspects(quickstart):
    for file in (
        *("runs/quickstart/report.json", "runs/quickstart/sheet.png"),
        *("out/0000.png", "out/0003.json", "out/sheet.html", "fast/0000.png"),
        *("curves.png", "inspected", "runs/unet/checkpoints/last.ckpt", "runs/slower/config.yaml"),
    ):
        assert (quickstart / file).exists(), file


def test_the_evaluation_measures_sweeps_and_predicts(quickstart, monkeypatch, capsys):
    follow("evaluate.md", quickstart, monkeypatch)
    evaluations = quickstart / "runs" / "quickstart-eval"
    assert len(list(evaluations.glob("*/validate/metrics.json"))) == 4
    assert len(list(evaluations.glob("*/validate/guidance.png"))) == 1
    assert "fid[shapes]" in capsys.readouterr().out
    assert list((quickstart / "runs" / "quickstart" / "predict").glob("*.jsonl"))


def test_own_images_are_trained_on_and_generated(workspace, monkeypatch):
    write_own_pictures(workspace / "my_pictures", 40)
    follow("own_images.md", workspace, monkeypatch)
    assert len(list((workspace / "out").glob("*.png"))) >= 4
    for file in (
        *("inspected/documents.png", "inspected/exclude.txt"),
        "runs/my_pictures/media/generated-val-step0000002.png",
    ):
        assert (workspace / file).is_file(), file


def test_the_python_tutorial_generates_streams_and_saves(quickstart, monkeypatch):
    follow("python.md", quickstart, monkeypatch)
    assert (quickstart / "circle-3.png").is_file()
    assert list((quickstart / "my_model").iterdir())


OTHERS = [
    pytest.param(block.text, id=name(page))
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and page.parent != TUTORIALS
]


@pytest.mark.parametrize("text", OTHERS)
def test_the_python_of_other_pages_runs(text, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    for run in ("before", "after"):
        if not Path("runs", run).exists():
            Path("runs", run).symlink_to("quickstart")
    names = dict(vars(sampling))  # the example of a new option stands among them
    exec(compile(text, "documentation", "exec"), names)
    if "option(" in text:
        source = inspect.getsource(sampling)
        assert " ".join(text.split()) in " ".join(source.split())


def test_there_is_no_other_tutorial():
    followed = {"quickstart.md", "evaluate.md", "own_images.md", "python.md"}
    assert {page.name for page in TUTORIALS.iterdir()} == followed
