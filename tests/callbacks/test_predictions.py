"""`predict` answers each document once and continues after it was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.predictions import PredictionWriter, document_key, read_lines
from support import runs
from tf_lightning.cli.main import main
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.shapes.sources import ShapesCaptions


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    """A folder for the predictions, so that the session's run stays unchanged."""
    return tmp_path_factory.mktemp("predict")


def predict(run: Path, folder: Path, *arguments: str, writer: dict | None = None) -> Path:
    """Run the command on the session's checkpoint and return the folder of its output."""

    def change(config: dict) -> None:
        config["data"]["init_args"]["cache_dir"] = str(run.parent / "data")
        name = "callbacks.predictions.PredictionWriter"
        config["trainer"]["callbacks"] = [{"class_path": name, "init_args": writer or {}}]

    config = runs.write_config(folder, change)
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    main(["predict", "-c", str(config), "--ckpt_path", checkpoint, *arguments])
    return folder / "run" / "predict"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def own_captions() -> list[str]:
    source = ShapesCaptions(runs.NUM_CAPTIONS, runs.NUM_VAL)
    return sorted(caption for caption, _ in source.documents("val"))


def test_each_validation_image_gets_a_caption_beside_its_own(run, folder):
    lines = read(predict(run, folder) / "text-0.jsonl")
    assert sorted(line["caption"] for line in lines) == own_captions()
    assert all(isinstance(line["answer"], str) for line in lines)


def test_a_run_that_was_killed_continues(run, folder, monkeypatch):
    file = predict(run, folder) / "text-0.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    # Line 1 is in another rank's file, line 2 is complete, line 3 is cut, the rest is missing.
    (file.parent / "text-7.jsonl").write_text(lines[0])
    file.write_text(lines[1] + lines[2][:20])
    asked, generate = [], TransfusionPipeline.__call__
    monkeypatch.setattr(
        TransfusionPipeline,
        "__call__",
        lambda self, p, **how: asked.extend(p) or generate(self, p, **how),
    )
    predict(run, folder)
    assert len(asked) == len(lines) - 2
    ours = file.read_text().splitlines(keepends=True)
    assert ours[0] == lines[1] and sorted([lines[0], *ours]) == sorted(lines)
    (file.parent / "text-7.jsonl").unlink()
    asked.clear()
    before = file.read_bytes()
    for _ in range(2):  # other options: everything is generated again, once, beside the others
        predict(run, folder, writer={"sampling": {"max_new_tokens": 3}})
        others = read(file.parent.with_name("predict-2") / file.name)
        assert len(asked) == len(others) == len(lines)
    assert file.read_bytes() == before


def test_captions_are_answered_with_images(run, folder):
    how = {"output_modality": "image", "sampling": {"num_inference_steps": 2}}
    out = predict(run, folder, writer=how)
    lines = read(out / "image-0.jsonl")
    assert sorted(line["caption"] for line in lines) == own_captions()
    images = [np.asarray(Image.open(out / line["answer"])) for line in lines]
    assert all(image.shape == (64, 64, 3) for image in images)
    assert len({image.tobytes() for image in images}) == len(images)


def test_images_depend_on_the_sampler_and_its_shift(run, tmp_path, capsys):
    how = {"num_inference_steps": 3, "sampler": "DDPMScheduler"}

    def writer(**changed) -> dict:
        return {"output_modality": "image", "sampling": how | changed}

    def images(shift: float) -> dict[str, bytes]:
        out = predict(run, tmp_path / str(shift), writer=writer(timestep_shift=shift))
        names = [line["answer"] for line in read(out / "image-0.jsonl")]
        return {name: (out / name).read_bytes() for name in names}

    even, shifted = images(1.0), images(2.5)
    assert even.keys() == shifted.keys() and even != shifted
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(SystemExit):
        predict(run, new, writer=writer(sampler="UniPCMultistepScheduler", timestep_shift=2.0))
    assert "timestep_shift=2.0 does not fit UniPCMultistepScheduler" in capsys.readouterr().err
    assert not (new / "run" / "predict").exists()


def test_two_ranks_answer_each_document_once(run, tmp_path, folder):
    arguments = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    out = predict(run, tmp_path, *arguments)
    ranks = [read(out / f"text-{rank}.jsonl") for rank in (0, 1)]
    assert all(ranks)
    assert sorted(line["caption"] for lines in ranks for line in lines) == own_captions()
    alone = read(predict(run, folder) / "text-0.jsonl")
    answers = lambda lines: sorted((line["caption"], line["answer"]) for line in lines)  # noqa: E731
    assert answers(ranks[0] + ranks[1]) == answers(alone)


def test_the_key_of_a_document_depends_on_its_content():
    text, image = torch.tensor([3, 4]), torch.randn(3, 4, 4)
    assert document_key([text, image]) == document_key([text.clone(), image.clone()])
    others = [[text + 1, image], [text, image + 1], [text]]
    assert len({document_key(d) for d in [[text, image], *others]}) == 4


def test_incomplete_lines_are_skipped(tmp_path):
    file = tmp_path / "text-0.jsonl"
    file.write_text('{"run": "a", "key": "1"}\n{"run": "a", "k')
    assert read_lines(file) == [{"run": "a", "key": "1"}]


def test_answers_are_written_after_each_batch():
    assert PredictionWriter().interval.on_batch and not PredictionWriter().interval.on_epoch
