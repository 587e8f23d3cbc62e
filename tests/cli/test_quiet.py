"""Warnings of the commands are one plain line."""

import warnings

import pytest

from tf_lightning.cli.quiet import silence_warnings
from tf_lightning.training import horizon


@pytest.fixture
def shown(monkeypatch):
    """A function that returns what is printed for a warning of a file."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        silence_warnings()

        def show(category: type[Warning], file: str) -> str:
            return warnings.formatwarning(category("give\nfewer"), category, file, 7)

        yield show


def test_a_warning_to_the_user_has_no_place_in_the_source(shown):
    for file in (horizon.__file__, "/lib/lightning/pytorch/loops/fit_loop.py"):
        assert shown(UserWarning, file) == "tf-lightning: warning: give fewer\n"


@pytest.mark.parametrize(
    ("category", "file"),
    [(DeprecationWarning, horizon.__file__), (UserWarning, "/lib/torch/nn/modules/module.py")],
)
def test_another_warning_keeps_its_place(category, file, shown):
    assert shown(category, file).startswith(f"{file}:7: ")
