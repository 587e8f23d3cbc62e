"""configs/my_pictures.yaml trains on a folder of captioned images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tf_lightning.cli.main import main

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "my_pictures.yaml"
FEW = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=2"),
    *("--data.batch_size=1", "--data.row_length=256"),
    "--model.transformer={dim: 32, num_layers: 1, num_heads: 2, ffn_dim: 48, vocab_size: 300}",
]


@pytest.fixture
def my_pictures(tmp_path, monkeypatch) -> Path:
    """A folder of 60 images with metadata.jsonl, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_pictures"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for number in range(60):
            color = ("red", "green", "blue")[number % 3]
            Image.new("RGB", (80, 70), color).save(folder / f"{number}.png")
            lines.write(json.dumps({"file_name": f"{number}.png", "text": f"all {color}"}) + "\n")
    return folder


def test_a_folder_of_captioned_images_is_trained_on_and_captioned(my_pictures):
    common = ["-c", str(RECIPE), "--data.paths", "my_pictures", *FEW]
    main(["fit", *common])
    run = my_pictures.parent / "runs" / "my_pictures"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert checkpoint.is_file() and (run / "config.yaml").is_file()
    main(
        [
            "generate",
            str(checkpoint),
            "all red",
            "-n",
            "1",
            "--num-inference-steps",
            "1",
            "-o",
            "out",
        ]
    )
    assert Image.open(next(Path("out").glob("*.png"))).size == (64, 64)
    main(["predict", *common, "--ckpt_path", str(checkpoint)])
    assert list(run.rglob("*.jsonl"))
