"""What `predict` writes."""

import json

import runs

from callbacks.predictions import CaptionWriter
from tf_lightning.cli import main
from tf_lightning.data.shapes_sources import ShapesCaptions


def test_each_held_out_picture_gets_a_caption_beside_its_own(run):
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    for _ in range(2):  # the second run begins a new file
        main(["predict", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint])
    file = run / "predict" / "captions-0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    source = ShapesCaptions(runs.NUM_CAPTIONS, runs.NUM_VAL)
    own = [caption for caption, _ in source.documents("val")]
    assert sorted(line["caption"] for line in lines) == sorted(own)
    assert all(line.keys() == {"caption", "written"} for line in lines)


def test_captions_are_written_batch_by_batch():
    assert CaptionWriter().interval.on_batch and not CaptionWriter().interval.on_epoch
