"""Errors of sharded runs; test_resume_ranks.py compares them with one process."""

from types import SimpleNamespace

import pytest

from callbacks.evaluate import Evaluate
from callbacks.prompts import ShapesPrompts
from callbacks.retrieval import RetrievalAccuracy
from callbacks.sampling import refuse_shards
from callbacks.shapes_report import ShapesReport
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.errors import UserError


def callbacks() -> list:
    return [
        Evaluate(prompts=ShapesPrompts(count=2), metrics=[]),
        RetrievalAccuracy(source="captions"),
        ShapesReport(),
    ]


@pytest.mark.parametrize("callback", callbacks(), ids=lambda callback: type(callback).__name__)
def test_callbacks_that_sample_refuse_a_sharded_model(callback):
    module = SimpleNamespace(device_mesh=object(), hparams={"prediction_type": "epsilon"})
    with pytest.raises(UserError, match=f"{type(callback).__name__} cannot sample a sharded model"):
        callback.setup(None, module, "fit")


def test_an_unsharded_model_is_not_refused():
    refuse_shards(SimpleNamespace(device_mesh=None), None)


def test_reading_a_sharded_checkpoint_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "meta.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match="is a sharded checkpoint.*save_distributed_checkpoint: fal"
    ):
        read_checkpoint(tmp_path)
