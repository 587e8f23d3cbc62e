"""What the command line decides by itself."""

import pytest
import torch

from tf_lightning.cli.lightning import fast_precision, names_model_class


@pytest.mark.parametrize(
    ("capability", "precision"),
    [("avx512_bf16", "bf16-mixed"), ("amx_bf16", "bf16-mixed"), ("avx512_f", "32-true")],
)
def test_a_cpu_multiplies_bf16_only_where_it_has_the_instructions(
    capability, precision, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert fast_precision("cpu") == precision


def test_a_torch_that_does_not_tell_gets_full_precision(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "32-true"


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        ("model: {lr: 1.0}", ["-c", "FILE"], False),
        ("model: {class_path: a.B, init_args: {}}", ["fit", "-c", "FILE", "--x", "1"], True),
        ("model: {class_path: a.B}", ["fit", "--config=FILE"], True),
        ("class_path: a.B", ["fit", "-c", "absent.yaml", "--model", "FILE"], True),
        ("data: {class_path: a.B}", ["fit", "-c", "FILE"], False),
        ("model: {lr: 1.0}", ["fit", "-c", "FILE", "--model.class_path=a.B"], True),
        ("model: {lr: 1.0}", ["fit", "--model.help", "a.B"], True),
        ("model: {lr: 1.0", ["fit", "-c", "FILE"], False),  # the parser says what is wrong
        ("- 1", ["fit", "-c", "FILE"], False),
    ],
)
def test_a_model_is_transfusion_unless_its_class_is_named(content, options, named, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert names_model_class([option.replace("FILE", str(file)) for option in options]) is named
