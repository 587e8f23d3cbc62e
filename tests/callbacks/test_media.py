"""Images and tables reach every logger that takes them, and files otherwise."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.media import log_image, log_table, markdown_table
from support import runs
from tf_lightning.cli.main import main

COLUMNS, ROWS = ["reference captions", "generated caption"], [("a|b\nc", "<b>*d*</b>")]
RED = Image.new("RGB", (4, 4), (255, 0, 0))


class Recorder(Logger):
    """A logger that keeps what it is given; the methods are those of WandbLogger."""

    def __init__(self, **methods):
        self.given, self.methods = {}, methods

    name, version, save_dir = "stub", "0", None
    experiment = SimpleNamespace()

    def log_hyperparams(self, params, *args, **kwargs):
        """Ignore them."""

    def log_metrics(self, metrics, step=None):
        self.given |= dict.fromkeys(metrics, step)


class Wandb(Recorder):
    """The methods of WandbLogger that the callbacks use, with its arguments."""

    def log_image(self, key, images, step=None):
        assert isinstance(images, list)
        self.given[key] = [images[0].size, step]

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        assert isinstance(columns, list) and isinstance(data[0], list)
        self.given[key] = [columns, data, step]


class Mlflow(Recorder):
    """The parts of MLFlowLogger that the callbacks use: its client and the id of the run."""

    run_id = "run7"

    def __init__(self):
        super().__init__()
        self.experiment = SimpleNamespace(log_image=self.image, log_text=self.text)

    def image(self, run_id, image, artifact_file):
        self.given[artifact_file] = run_id

    text = image


def give(folder, *loggers) -> None:
    """Log an image and a table after 9 steps, the last of which has the index 8."""
    trainer = SimpleNamespace(loggers=loggers)
    log_image(trainer, folder, 9, "generated/val", RED)
    log_table(trainer, folder, 9, "captions/val", COLUMNS, ROWS)


def files_in(folder) -> list[str]:
    """The files that are written beside the loggers: the images."""
    return [path.name for path in (folder / "media").iterdir()]


def test_the_stub_has_the_methods_of_wandb():
    for name in ("log_image", "log_table"):
        assert hasattr(WandbLogger, name)


def test_weights_and_biases_gets_images_and_tables(tmp_path):
    logger = Wandb()
    give(tmp_path, CSVLogger(tmp_path), logger)
    table = [COLUMNS, [["a|b\nc", "<b>*d*</b>"]], 8]
    assert logger.given == {"generated/val": [(4, 4), 8], "captions/val": table}
    assert files_in(tmp_path) == ["generated-val-step0000009.png"]


def test_mlflow_gets_images_and_texts(tmp_path):
    logger = Mlflow()
    give(tmp_path, logger)
    files = ["generated-val-step0000009.png", "captions-val-step0000009.md"]
    assert logger.given == dict.fromkeys(files, "run7") and files_in(tmp_path) == files[:1]


def test_tensorboard_gets_them_as_the_second_of_two_loggers(tmp_path):
    board = TensorBoardLogger(tmp_path, name="board", version="")
    give(tmp_path, CSVLogger(tmp_path), board)
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["generated/val"]
    (text,) = events.Tensors("captions/val/text_summary")
    assert b"generated caption" in text.tensor_proto.string_val[0]
    assert text.step == events.Images("generated/val")[0].step == 8
    assert files_in(tmp_path) == ["generated-val-step0000009.png"]


@pytest.mark.parametrize("loggers", ["none", "csv"])
def test_files_keep_the_images_and_the_tables_that_no_logger_takes(loggers, tmp_path):
    give(tmp_path, *([CSVLogger(tmp_path)] if loggers == "csv" else []))
    kept = Image.open(tmp_path / "media" / "generated-val-step0000009.png")
    assert (np.asarray(kept) == np.asarray(RED)).all()
    table = (tmp_path / "media" / "captions-val-step0000009.md").read_text()
    assert table == markdown_table(COLUMNS, ROWS) + "\n"


def test_a_cell_has_no_markup():
    assert markdown_table(COLUMNS, ROWS).splitlines() == [
        "| reference captions | generated caption |",
        "| --- | --- |",
        r"| a\|b<br>c | &lt;b&gt;\*d\*&lt;/b&gt; |",
    ]


@pytest.mark.parametrize("logger", [False, "csv"])
def test_a_run_without_tensorboard_loses_no_image_caption_or_report(logger, tmp_path, monkeypatch):
    def change(config: dict) -> None:
        trainer = config["trainer"]
        kept = ("Checkpoint", "TextPerplexity", "Evaluate", "ShapesReport")
        trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].endswith(kept)]
        csv = {"save_dir": "runs", "name": "run", "version": ""}
        csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv}
        trainer["logger"] = csv if logger else False
        trainer["max_steps"] = 3

    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(runs.write_config(tmp_path, change))])
    (report,) = tmp_path.rglob("report.json")
    names = {path.name for path in (report.parent / "media").iterdir()}
    assert names == {
        "data-step0000000.md",
        "generated-val-step0000003.png",
        "captioned-val-step0000003.png",
        "captions-val-step0000003.md",
        "text-val-step0000003.md",
    }
    assert (report.parent / "metrics" / "step0000003-val.json").exists()
    assert yaml.safe_load((report.parent / "config.yaml").read_text())["trainer"]["max_steps"] == 3
