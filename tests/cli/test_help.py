"""The help: fast, a screen long, and in agreement with the code."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

from tf_lightning.cli import help as screens
from tf_lightning.cli.main import LIGHTNING, VERBS, main
from tf_lightning.cli.named_callbacks import NAMED

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {path: line for group in screens.GROUPS.values() for path, line in group.items()}


def printed(args: list[str], capsys) -> str:
    """Returns what a command prints; it must succeed."""
    try:
        main(args)
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["fti"], 1),
        *(([verb, "--help"], 0) for verb in LIGHTNING),
    ],
)
def test_help_version_and_a_misspelt_verb_import_neither_torch_nor_lightning(args, code):
    """Counts the slow imports, since a limit in seconds would depend on the machine."""
    script = (
        "import sys\nfrom tf_lightning.cli.main import main\ncode = 0\n"
        f"try:\n    main({args!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy', 'yaml'} & sys.modules.keys()\n"
        "sys.exit(f'{heavy} were imported' if heavy else code)"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


def test_version_is_the_packages(capsys):
    assert printed(["--version"], capsys).startswith("tf-lightning 0.")


def test_the_overview_names_every_command(capsys):
    for args in ([], ["-h"], ["--help"]):
        text = printed(args, capsys)
        assert all(f"tf-lightning {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_command_has_help_under_the_programs_name(verb, capsys):
    text = printed([verb, "--help"], capsys)
    assert text.startswith("usage: tf-lightning ") and verb in text.splitlines()[0]


@pytest.mark.parametrize("verb", LIGHTNING)
def test_the_screen_of_a_verb_shows_commands_recipes_and_classes(verb, capsys):
    text = printed([verb, "--help"], capsys)
    assert text.count(f"\n  tf-lightning {verb} -c") >= 3
    assert "--print_config" in text and f"tf-lightning {verb} --help all" in text
    shown = [path.rpartition(".")[2] for path in CLASSES.keys() - screens.CALLBACKS.keys()]
    assert all(name in text for name in [*shown, *NAMED])
    assert len(text.splitlines()) < 90
    assert max(len(line) for line in text.splitlines()) <= 104


def test_every_recipe_and_folder_of_recipes_is_on_the_screen():
    configs = ROOT / "configs"
    found = {path.name for path in configs.glob("*.yaml")} - {"small.yaml"}
    found |= {f"{path.name}/" for path in configs.iterdir() if path.is_dir()}
    assert set(screens.RECIPES) == found


@pytest.mark.parametrize("path", CLASSES)
def test_the_classes_on_the_screen_exist_and_have_help(path, capsys):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__doc__
    text = printed(["fit", "--help", name], capsys)
    assert text.startswith("usage: tf-lightning fit") and name in text


def test_every_callback_data_module_and_source_is_on_the_screen():
    for file in (ROOT / "callbacks").glob("*.py"):
        importlib.import_module(f"callbacks.{file.stem}")
    ours = {"callbacks", "tf_lightning"}
    callbacks, data = subclasses(L.Callback), subclasses(L.LightningDataModule)
    shown = {path.rpartition(".")[2] for path in CLASSES}
    for found in (callbacks, data):
        named = {c.__name__ for c in found if c.__module__.split(".")[0] in ours}
        # No user names these; TrainingProgress and PrintScores have keys of their own.
        inner = {"SaveFitConfig", "StreamData", "ShardData", "TrainingProgress", "PrintScores"}
        inner |= {"Interrupts", "LastCheckpoint", "MissedWork", "EarlierRun"}
        assert {name for name in named if not name.startswith("_")} - inner <= shown
    sources = importlib.import_module("tf_lightning.data").__all__
    files = {
        name for name in sources if name.endswith(("Files", "Tars", "Rows", "Json", "Folders"))
    }
    assert files - {"TrainingRows"} <= shown  # not a source


def subclasses(cls: type) -> set[type]:
    """Returns all subclasses."""
    return {found for child in cls.__subclasses__() for found in {child, *subclasses(child)}}


@pytest.mark.parametrize(
    ("topic", "option"),
    [
        ("trainer", "--trainer.max_steps"),
        ("checkpoint", "--checkpoint.every_n_train_steps"),
        ("model", "--model.lr"),
        ("data", "--data.row_length"),
        ("all", "--trainer.max_steps"),
    ],
)
def test_more_help_is_one_word_away(topic, option, capsys):
    assert option in printed(["fit", "--help", topic], capsys)


@pytest.mark.parametrize(("given", "meant"), [("fti", "fit"), ("generat", "generate")])
def test_a_misspelt_command_names_the_nearest(given, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main([given])
    assert stop.value.code == 1
    assert f"unknown command {given!r}; did you mean {meant!r}?" in capsys.readouterr().err


def test_a_misspelt_name_after_help_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help", "Evalute"])
    assert stop.value.code == 2
    assert "no help about 'Evalute'; did you mean 'Evaluate'?" in capsys.readouterr().err
