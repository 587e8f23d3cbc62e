"""The table of the data at the start of a run has the numbers of the data."""

from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.data_table import COLUMNS, DataTable, source_rows
from support.fits import fit, shapes_data, shapes_module
from support.sources import GreyImages, RepeatedWord
from tf_lightning.batch import document_length
from tf_lightning.data.documents import AnyText, Skipped


class Several(GreyImages):
    """Images with two captions, and two bad samples."""

    def documents(self, split: str):
        for number, (text, image) in enumerate(super().documents(split)):
            yield [AnyText([text, f"{text} and nothing else"]), image]
            if number < 2:
                yield Skipped("too dark")


def cells(data, max_steps: int) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in source_rows(data, max_steps)]


def prepared(mixture, **options):
    sources = {
        "pictures": Several(num_documents=40, num_val=5),
        "words": RepeatedWord("red", 5, num_documents=30, num_val=0),
        "unused": RepeatedWord("blue", 3, num_documents=20, num_val=4),
    }
    weights = {"pictures": 3, "words": 1, "unused": 0}
    data = mixture(sources, weights, **options)
    data.prepare_data()
    data.train_dataloader()
    return data


def test_the_counts_are_those_of_the_sources(mixture):
    data = prepared(mixture)
    encode = data.tokenizer.encode
    texts = {
        "pictures": [t for d in data.sources["pictures"].documents("train")
                     if isinstance(d, list) for t in d[0].texts],
        "words": [d[0] for d in data.sources["words"].documents("train")],
    }  # fmt: skip
    pictures, words, unused = cells(data, 10)
    for row, name in ((pictures, "pictures"), (words, "words")):
        tokens = [len(encode(text)) for text in texts[name]]
        assert row["text tokens"] == f"{sum(tokens):,}"
        assert row["mean tokens of a text"] == f"{sum(tokens) / len(tokens):,.1f}"
    assert (pictures["source"], words["source"]) == ("pictures", "words")
    assert (pictures["training documents"], pictures["held-out documents"]) == ("40", "5")
    assert (pictures["images"], words["images"]) == ("40", "0")
    assert (pictures["skipped"], words["skipped"]) == ("2 too dark", "0")
    assert (words["training documents"], words["held-out documents"]) == ("30", "0")
    assert unused["share of tokens"] == "0.0%" and unused["epochs in this run"] == "0.00"


def test_padding_is_that_of_an_epoch(mixture):
    data = prepared(mixture)
    for row, rows in zip(cells(data, 10), data.rows.corpora, strict=True):
        epoch = [document for index in range(rows.rows_per_epoch) for document in rows.row(index)]
        used = sum(document_length(document, data.patch_size) for document in epoch)
        padding = 1 - used / (rows.rows_per_epoch * data.row_length)
        assert padding > 0.01 and row["padding"] == f"{padding:.1%}"


def test_shares_and_epochs_are_those_of_the_rows_that_the_run_reads(mixture):
    """Counted in the rows themselves, for two ranks and an accumulation of three batches."""
    data = prepared(mixture, batch_size=5)
    data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3, global_rank=0)
    steps = 40
    rows = [data.rows[row] for row in range(steps * 5 * 2 * 3)]
    for number, row in enumerate(cells(data, steps)[:2]):
        mine = [documents for _, documents, source in rows if source == number]
        epochs = sum(map(len, mine)) / len(data.corpora["train"][row["source"]])
        assert float(row["epochs in this run"]) == pytest.approx(epochs, rel=0.02)
    shares = [float(row["share of tokens"].rstrip("%")) for row in cells(data, steps)]
    assert shares == pytest.approx([75, 25, 0], abs=0.5)
    assert cells(data, -1)[0]["epochs in this run"] == "unknown"


def test_tensorboard_has_the_table_of_a_run(tmp_path):
    data = shapes_data(tmp_path / "data")
    board = TensorBoardLogger(tmp_path, name="board", version="")
    callbacks: list[L.Callback] = [DataTable()]
    fit(shapes_module(), data, max_steps=2, logger=board, callbacks=callbacks)
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (text,) = events.Tensors("data/text_summary")
    content = text.tensor_proto.string_val[0].decode()
    assert text.step == 0 and "epochs in this run" in content
    assert "ShapesCaptions" in content and "ShapesTexts" in content


def test_a_run_without_tensorboard_writes_the_table(tmp_path):
    options = {"max_steps": 1, "default_root_dir": tmp_path, "callbacks": [DataTable()]}
    fit(shapes_module(), shapes_data(tmp_path / "data"), **options)
    content = (tmp_path / "media" / "data-step0000000.md").read_text()
    assert content.startswith("| source | training documents |")
