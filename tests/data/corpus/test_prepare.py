"""Preparation counts unusable samples, leaves no partial corpus and is done once."""

import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from support import training_datasets
from support.files import encoded_image, write_lines
from support.training_datasets import COLORS
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.data import CaptionRows
from tf_lightning.data.corpus.prepare import plan_corpus, prepare, summary
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.corpus.writer import CorpusWriter
from tf_lightning.data.documents import Skipped
from tf_lightning.errors import UserError
from tf_lightning.progress import progress_bar
from tf_lightning.shapes.sources import ShapesTexts
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer


class Given:
    """A source of given documents that counts how often it is read."""

    def __init__(self, *documents, fingerprint: str = "given"):
        self.given, self.name, self.reads = documents, fingerprint, 0

    def documents(self, split):
        self.reads += 1
        for document in self.given:
            if isinstance(document, Exception):
                raise document
            yield document

    def fingerprint(self, split):
        return self.name


def red_image(side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), "red")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    return train_tokenizer(iter(["a red circle only text and so on"]), path, vocab_size=300)


@pytest.fixture
def run(tmp_path, tokenizer):
    """Call `prepare` with arguments that suit most tests."""

    def prepare_here(source, split="train", **changed):
        arguments = {
            "name": "given",
            "directory": tmp_path / "cache",
            "tokenizer": tokenizer,
            "autoencoder": load_autoencoder("pixels"),
            "row_length": 16,
            "patch_size": 4,
        }
        return prepare(plan_corpus(source, split, **(arguments | changed)))

    return prepare_here


def test_the_bar_says_of_how_many_documents_and_with_how_many_processes(run, monkeypatch):
    bars = []

    def spy(*args, **options):
        bars.append((options["desc"], options["total"]))
        return progress_bar(*args, **options)

    monkeypatch.setattr("tf_lightning.data.corpus.prepare.progress_bar", spy)
    run(ShapesTexts(7, num_val=3), autoencoder=None)
    run(Given(["text"]))
    assert [total for _, total in bars] == [7, None]
    assert bars[0][0] == "preparing given train in 1 process"


def test_bad_samples_are_counted_by_reason(run):
    source = Given(
        ["red", red_image()],
        Skipped("truncated image"),
        Skipped("truncated image"),
        [],
        ["", ""],
        ["half a \ud800 pair"],
        ["red", red_image(12)],
        ["a caption of many, many words, longer than a row", red_image()],
        [red_image()],
    )
    corpus = run(source)
    assert len(corpus) == 2
    assert corpus.skipped == {
        "truncated image": 2,
        "empty document": 2,
        "text is not Unicode": 1,
        "image of another size than the first": 1,
        "longer than a row of 16 tokens": 1,
    }


def test_the_report_is_one_line():
    line = summary("emoji", "train", 1200, {"truncated image": 2, "missing image": 1})
    assert line == (
        "emoji train: prepared 1,200 documents, skipped 3: 2 truncated image, 1 missing image"
    )
    assert summary("emoji", "val", 3, {}) == "emoji val: prepared 3 documents"


def test_a_document_that_fills_its_row_exactly_is_kept(run, tokenizer):
    # <bos> <boi> 4 patches <eoi> <eos> leave 8 of 16.
    words = "aaaaaaaaaaaaaaaa"
    texts = [words[:n] for n in range(1, len(words))]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    corpus = run(Given(*([text, red_image()] for text in texts)))
    assert len(corpus) == sum(length <= 8 for length in lengths)
    assert corpus.layout().lengths(4).max() == 16


def test_long_text_is_cut_into_rows_completely(run, tokenizer):
    text = "only text and so on " * 20
    corpus = run(Given([text[:100], text[100:]], ["red"]))
    ids = [corpus.document(n)[0].tolist() for n in range(len(corpus))]
    assert {len(piece) for piece in ids[:-2]} == {14}
    assert sum(ids[:-1], []) == tokenizer.encode(text[:100]) + tokenizer.encode(text[100:])
    assert tokenizer.decode(ids[-1]) == "red"


def test_images_are_encoded_in_order_over_many_batches(run):
    greys = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(200)]
    corpus = run(Given(*([grey] for grey in greys)))
    values = [corpus.document(n)[0].mean().item() * 127.5 + 127.5 for n in range(200)]
    assert np.rint(values).tolist() == list(range(200))


def test_a_prepared_corpus_is_used_again(run):
    source = Given(["red"])
    first = run(source)
    assert run(source).path == first.path
    assert source.reads == 1


def test_two_processes_at_once_make_one_corpus(run, tmp_path):
    class Overtaken(Given):
        def documents(self, split):  # another process prepares the same corpus meanwhile
            run(Given(["red", red_image()]))
            yield from super().documents(split)

    corpus = run(Overtaken(["red", red_image()]))
    assert len(corpus) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [corpus.path.name]


@pytest.mark.parametrize("changed", ["source", "split", "tokenizer", "row_length", "patch_size"])
def test_another_origin_is_another_corpus(run, changed, tmp_path):
    first = run(Given(["red"]))
    others = {
        "source": {},
        "split": {"split": "val"},
        "tokenizer": {
            "tokenizer": train_tokenizer(iter(["other text"]), tmp_path / "b.model", 290)
        },
        "row_length": {"row_length": 32},
        "patch_size": {"patch_size": 2},
    }
    source = Given(["red"], fingerprint="other" if changed == "source" else "given")
    assert run(source, **others[changed]).path != first.path


def test_another_autoencoder_is_another_corpus(run):
    first = run(Given(["red"]))
    assert run(Given(["red"]), autoencoder=None).path != first.path


@pytest.mark.parametrize("fault", [RuntimeError("disk"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing_behind(run, tmp_path, fault):
    class Interrupted(Given):
        def documents(self, split):
            yield ["red", red_image()]
            raise fault

    with pytest.raises(type(fault)):
        run(Interrupted())
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(run(Given(["red"]))) == 1


def test_an_empty_corpus_is_a_user_error(run, tmp_path):
    with pytest.raises(UserError, match="given: there are no documents to train on; check"):
        run(Given())
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_validation_split_is_an_empty_corpus(run):
    corpus = run(Given(), "val")
    assert len(corpus) == 0
    assert corpus.layout().lengths(4).tolist() == corpus.layout().pairs().tolist() == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_wholly_bad_corpus_is_a_user_error(run, split):
    source = Given(Skipped("truncated image"), Skipped("truncated image"), [])
    with pytest.raises(UserError, match=rf"all 3 documents of the {split} split .*2 truncated"):
        run(source, split)


def test_images_without_an_autoencoder_are_a_user_error(run):
    with pytest.raises(UserError, match="the data has images; name an autoencoder"):
        run(Given(["red", red_image()]), autoencoder=None)


def test_images_that_do_not_divide_into_patches_are_a_user_error(run):
    with pytest.raises(UserError, match="10x10 pixels do not divide .* multiple of 4"):
        run(Given(["red", red_image(10)]))


def test_the_facts_are_readable(run):
    corpus = run(Given(["red", red_image()], Skipped("missing image")))
    facts = json.loads((corpus.path / "corpus.json").read_text())
    assert (facts["num_documents"], facts["num_images"]) == (1, 1)
    assert facts["image_shape"] == [3, 8, 8]
    assert facts["skipped"] == {"missing image": 1}


@pytest.mark.parametrize("change", ["nothing", "missing", "mended", "replaced"])
def test_images_that_were_missing_or_replaced_are_noticed(change, mixture, tmp_path):
    images = training_datasets.write_images(tmp_path / "images")
    if change == "mended":
        (images / "red.png").rename(tmp_path / "away.png")
    lines = [{"file_name": f"{color}.png", "text": color} for color in COLORS]
    file = write_lines(images / "metadata.jsonl", lines)

    def prepared() -> Corpus:
        source = CaptionRows(str(file), val_paths=str(file), image_size=16)
        data = mixture({"pictures": source})
        data.setup()
        return data.corpora["train"]["pictures"]

    before = prepared()
    match change:
        case "missing":
            (images / "red.png").unlink()
        case "mended":
            (tmp_path / "away.png").rename(images / "red.png")
        case "replaced":
            (images / "red.png").write_bytes(encoded_image("blue", "PNG", (24, 24)))
    after = prepared()
    assert (before.path == after.path) == (change == "nothing")
    assert before.skipped == ({"missing image": 1} if change == "mended" else {})
    assert after.skipped == ({"missing image": 1} if change == "missing" else {})


def test_skipped_samples_are_told_in_every_run(mixture, caplog):
    source = Given(["red", red_image()], Skipped("missing image"))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            mixture({"pictures": source}).setup()
        assert "skipped 1: 1 missing image" in caplog.text
    assert "to read them again, delete" in caplog.text


def test_a_flood_of_reasons_is_counted_together(mixture):
    skipped = [Skipped(f"reason {number}") for number in range(1000)]
    data = mixture({"pictures": Given(["red", red_image()], *skipped)})
    data.setup()
    reasons = data.corpora["train"]["pictures"].skipped
    assert len(reasons) <= 101 and sum(reasons.values()) == 1000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, None])
def test_a_full_disk_is_named_and_nothing_is_left(number, mixture, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(number, "full") if number else OSError("9 requested and 0 written")

    data = mixture({"pictures": Given(["red", red_image()])})
    monkeypatch.setattr(CorpusWriter, "_add_image", fail)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("tf_lightning.files.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="no space left on the disk of .*cache; free some, or name"):
        data.setup()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".model"]


def test_another_error_of_writing_is_not_called_a_full_disk(mixture, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(CorpusWriter, "_add_image", fail)
    with pytest.raises(OSError, match="broken disk"):
        mixture({"pictures": Given(["red", red_image()])}).setup()
