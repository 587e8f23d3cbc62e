"""Metric values are written with everything they depend on."""

import hashlib
import json
from importlib import metadata
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.prompts import Prompt
from callbacks.protocol import (
    MetricRecord,
    installed_version,
    prompts_hash,
    save_records,
    write_records,
)

RECORDS = [MetricRecord("val/fid[shapes]", 1.25, {"guidance_scale": 3.0, "weights": "ema"})]


def test_the_hash_depends_on_the_order_of_prompts():
    asked = [Prompt("a"), Prompt("b")]
    assert prompts_hash(asked) == hashlib.sha256(b"a\nb").hexdigest()[:12]
    assert prompts_hash(asked[::-1]) != prompts_hash(asked)


def test_the_file_has_the_hash_of_the_checkpoint_the_versions_and_each_protocol(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    path = tmp_path / "made" / "metrics.json"
    write_records(path, RECORDS, checkpoint=str(checkpoint), global_step=7)
    content = json.loads(path.read_text())
    assert content["checkpoint_hash"] == hashlib.sha256(b"weights").hexdigest()[:12]
    assert (content["checkpoint"], content["global_step"]) == ("last.ckpt", 7)
    assert content["numbers"] == [
        {
            "name": "val/fid[shapes]",
            "value": 1.25,
            "protocol": {"guidance_scale": 3.0, "weights": "ema"},
        }
    ]
    assert {"torch", "torchmetrics", "open_clip_torch", "diffusers"} <= content["versions"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    numbers = [
        MetricRecord("a", float("nan"), {}),
        MetricRecord("b", float("inf"), {}),
        MetricRecord("c", 1.5, {}),
    ]
    path = tmp_path / "metrics.json"
    write_records(path, numbers, checkpoint=None, global_step=1)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert [number["value"] for number in read["numbers"]] == [None, None, 1.5]


def test_a_package_that_is_not_installed_has_no_version():
    assert installed_version("no-such-package") is None
    assert installed_version("torch") == metadata.version("torch")


@pytest.mark.parametrize(
    ("fn", "tag", "place"),
    [
        (TrainerFn.FITTING, "val", "metrics/step0000007-val.json"),
        (TrainerFn.FITTING, "coco", "metrics/step0000007-coco.json"),
        (TrainerFn.VALIDATING, "val", "validate/metrics.json"),
        (TrainerFn.VALIDATING, "coco", "validate/metrics-coco.json"),
    ],
)
def test_fit_writes_a_file_for_each_step_and_an_evaluation_a_file(fn, tag, place, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    fit = fn == TrainerFn.FITTING
    trainer = SimpleNamespace(
        logger=None,
        default_root_dir=str(tmp_path),
        state=SimpleNamespace(fn=fn),
        strategy=SimpleNamespace(broadcast=lambda folder: folder),
        is_global_zero=False,
        global_step=7 if fit else 0,
        ckpt_path=str(tmp_path / "last.ckpt"),
    )
    module = SimpleNamespace(loaded_step=9)
    save_records(trainer, module, RECORDS, tag)
    assert not (tmp_path / place).exists()  # other ranks write nothing
    trainer.is_global_zero = True
    save_records(trainer, module, RECORDS, tag)
    content = json.loads((tmp_path / place).read_text())
    assert content["global_step"] == (7 if fit else 9)
    assert content["checkpoint"] == (None if fit else "last.ckpt")
