"""Links, files and names in the documentation exist."""

import dataclasses
import inspect
import pydoc
import re
from pathlib import Path

import pytest
import yaml

import tf_lightning
from callbacks.evaluate import Evaluate
from support.markdown import PAGES, ROOT, blocks, commands, name, prose
from tf_lightning import Mixture, SamplingConfig

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CLASS = re.compile(r"(?<![\w./-])(?:tf_lightning|callbacks|evaluation)(?:\.(?!md\b|py\b)\w+)+")
REPOSITORY_FILE = re.compile(r"^(configs|benchmarks|docs|tests)/[\w./*-]*$")


def anchors(page) -> set[str]:
    """The anchors that headings get."""
    titles = HEADING.findall(prose(page))
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_command_or_a_sentence_names_exists(page):
    words = [word for words in commands(page) for word in words]
    words += re.findall(r"`([^`\s]+)`", prose(page))
    for word in words:
        if REPOSITORY_FILE.match(word):
            assert list(ROOT.glob(word)), f"{name(page)} names {word}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_class_that_a_page_names_can_be_imported(page):
    text = prose(page) + "\n".join(block.text for block in blocks(page))
    for dotted in CLASS.findall(text):
        assert pydoc.locate(dotted) is not None, f"{name(page)} names {dotted}"


def test_the_navigation_lists_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entries) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        values = entries.values() if isinstance(entries, dict) else entries
        return [page for entry in values for page in pages(entry)]

    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(nav)) == sorted(there)


def options_under(page: str, heading: str) -> set[str]:
    """The names in the first column of the tables below a heading of a guide."""
    text = (ROOT / "docs" / page).read_text()
    section = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?`) \| ", section, re.MULTILINE)
    return {option for cell in cells for option in re.findall(r"`(\w+)`", cell)}


def test_the_guide_lists_every_sampling_option():
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert options_under("generation.md", "Options") == fields


@pytest.mark.parametrize(
    "page, heading, cls",
    [("data.md", "Options", Mixture), ("evaluation.md", "Change the protocol", Evaluate)],
)
def test_the_guides_list_options_that_exist(page, heading, cls):
    options = options_under(page, heading)
    assert options and options <= inspect.signature(cls).parameters.keys()


def test_the_reference_has_every_public_name():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", "\n".join(map(Path.read_text, pages)), re.MULTILINE)
    assert set(tf_lightning.__all__) <= set(shown)


def test_the_page_about_the_code_names_every_file_and_no_other():
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", prose(ROOT / "docs" / "architecture.md")))
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "tf_lightning" / path).exists(), path
    for package in ("tf_lightning", "callbacks", "evaluation"):
        root = ROOT / package if package == "tf_lightning" else ROOT
        for file in (ROOT / package).rglob("[a-z]*.py"):
            assert str(file.relative_to(root)) in named, f"{file} is not on the page"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
