"""Every command line in the documentation is one that its program accepts."""

import re
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.markdown import PAGES, ROOT, blocks, commands, name
from tf_lightning.cli.main import main
from tf_lightning.cli.parser import Parser

LIGHTNING = ("fit", "validate", "test", "predict", "prepare", "inspect")  # have --print_config
PLACEHOLDERS = {"CONFIG": "configs/quickstart.yaml", "CKPT": "last.ckpt", "VERB": "fit"}
PLACEHOLDERS |= dict.fromkeys(("FOLDER", "DIR", "FILE", "NAME"), "somewhere")


def words_of(line: list[str]) -> tuple[str, ...]:
    """A command without its environment variables and redirections, its placeholders filled in."""
    while "=" in line[0]:
        line = line[1:]
    kept = line[: next((i for i, word in enumerate(line) if word.startswith(">")), len(line))]
    return tuple(PLACEHOLDERS.get(word, word) for word in kept)


LINES = sorted({words_of(line) for page in PAGES for line in commands(page)})


def lines(program: str) -> list:
    """The commands of a program, each with the name of its test."""
    found = [line for line in LINES if line[0] == program]
    return [pytest.param(line, id=" ".join(line)) for line in found]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the recipes, and the files that the commands name, as the current one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs" / "model" / "0.16b.yaml", tmp_path / "model.yaml")
    monkeypatch.chdir(tmp_path)


class Parsed(Exception):
    """Raised in place of running a command whose options were accepted."""


@pytest.fixture
def no_run(monkeypatch):
    """Makes the verbs with a parser of their own end after parsing."""
    parse_args = Parser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    def stop(*_):
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_and_stop)
    monkeypatch.setattr("tf_lightning.cli.plan.read_plan", stop)  # after the configuration is built


@pytest.mark.parametrize("line", lines("tf-lightning"))
def test_tf_lightning_accepts_a_documented_command(line, checkout, no_run, capsys):
    verb, *options = line[1:]
    if not options:  # a sentence names the verb
        options = ["--help"]
    elif verb in LIGHTNING:
        options = [*options, "--print_config=skip_null"]
    with suppress(Parsed):
        try:
            main([verb, *options])
        except SystemExit as ended:
            assert ended.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("line", lines("python"))
def test_a_documented_program_exists_and_knows_its_options(line):
    program, options = line[1], [word for word in line[2:] if word.startswith("--")]
    if program == "-c":
        compile(line[2], "documentation", "exec")
        return
    if program == "-m":
        source = Path(find_spec(line[2]).origin)
        if line[2] == "pytest":
            return
    else:
        source = ROOT / program
    own = options[: options.index("--")] if "--" in options else options  # the rest is passed on
    for option in own:
        assert f'"{option.partition("=")[0]}"' in source.read_text(), option


@pytest.mark.parametrize("line", lines("make"))
def test_a_documented_target_exists(line):
    assert re.search(rf"^{line[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_documentation_has_commands_of_every_kind():
    tested = {"tf-lightning", "python", "make"}
    others = {"source", "export", "echo", "tensorboard", "aws"}  # of the shell, or a server
    assert {line[0] for line in LINES} == tested | others
    verbs = {line[1] for line in LINES if line[0] == "tf-lightning"}
    assert verbs >= {*LIGHTNING, "generate", "export", "model-config"} - {"test"}


BLOCKS = [(page, block) for page in PAGES for block in blocks(page)]
YAML = [pytest.param(b.text, id=name(page)) for page, b in BLOCKS if b.language == "yaml"]


def test_every_block_is_of_a_language_that_a_test_runs_or_reads():
    """Python is run by test_tutorials.py."""
    languages = {block.language for _, block in BLOCKS}
    assert languages == {"bash", "python", "yaml", "text", ""}


@pytest.mark.parametrize("text", YAML)
def test_a_documented_part_of_a_configuration_is_one(text, checkout, capsys):
    Path("part.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", "configs/quickstart.yaml", "-c", "part.yaml", "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err
    printed = capsys.readouterr().out
    for key in ("data_parallel_size", "init_from", "text/*.jsonl"):
        assert key not in text or key in printed
