"""configs/my_pictures.yaml trains on pictures of many modes, with captions in three layouts."""

from pathlib import Path

import pytest
from PIL import Image

from support.own_pictures import write_own_pictures
from tf_lightning.cli.main import main

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "my_pictures.yaml"
FEW = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=2"),
    *("--data.batch_size=1", "--data.row_length=256"),
    "--model.transformer={dim: 32, num_layers: 1, num_heads: 2, ffn_dim: 48, vocab_size: 300}",
]
COMMON = ["-c", str(RECIPE), "--data.paths", "my_pictures", *FEW]


@pytest.fixture
def my_pictures(tmp_path, monkeypatch) -> Path:
    """A folder of 60 pictures in the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_own_pictures(tmp_path / "my_pictures", 60)


def test_a_folder_of_captioned_images_is_trained_on_and_captioned(my_pictures, capsys):
    main(["inspect", *COMMON, "-o", "look"])
    report = capsys.readouterr().out
    for line in (
        "captions: tables with a row for each caption: my_pictures/table/metadata.jsonl\n",
        "captions: images with a text file beside each: 20 files, such as my_pictures/texts/IMG_",
        "captions: images whose file or folder names are the captions: 20 files, such as my_p",
        '"a red square" is my_pictures/table/IMG_0003.png\n',
    ):
        assert line in report
    assert "skipped" not in report
    main(["fit", *COMMON])
    run = my_pictures.parent / "runs" / "my_pictures"
    assert (run / "checkpoints" / "last.ckpt").is_file() and (run / "config.yaml").is_file()
    few = ["-n", "1", "--num-inference-steps", "1", "-o", "out"]
    main(["generate", "runs/my_pictures", "a red disc", *few])
    assert Image.open(next(Path("out").glob("*.png"))).size == (64, 64)
    main(["predict", *COMMON, "--ckpt_path", "runs/my_pictures"])
    assert list(run.rglob("*.jsonl"))


@pytest.mark.parametrize("count", [2, 3])
def test_two_images_are_enough(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_own_pictures(tmp_path / "my_pictures", 9) / "names"
    for file in sorted(folder.iterdir())[count:]:
        file.unlink()
    main(["fit", *COMMON, "--data.paths", str(folder)])
    assert (tmp_path / "runs" / "my_pictures" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the folder my_pictures has no files; put images with captions into it"),
        (["--data.paths", "none"], "there is no file or folder 'none'; check the path"),
    ],
)
def test_a_folder_without_pictures_ends_in_one_sentence(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pictures").mkdir()
    with pytest.raises(SystemExit):
        main(["fit", *COMMON, *options])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tf-lightning: error: {message}")
