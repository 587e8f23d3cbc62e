"""A prepared corpus returns the documents of its source; damage is found."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import document_length
from tf_lightning.data.corpus.prepare import plan_corpus, prepare, summary
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import AnyText, ContextText, Source
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer


class Given:
    """A source of given documents; not a subclass of Source."""

    def __init__(self, documents: list):
        self.given = documents

    def documents(self, split):
        yield from self.given

    def fingerprint(self, split):
        return repr((split, self.given))


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8))


DOCUMENTS = [
    ["a red circle", noise(0)],
    ["only text"],
    [noise(1)],
    [noise(2), "now blue", noise(3), "and so on"],
    [noise(4), "a caption"],
    [noise(5), "now blue", noise(6)],
    ["a red", noise(7), "circle"],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    return train_tokenizer(iter(["a red circle only text and so on"]), path, vocab_size=300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer) -> Corpus:
    job = plan_corpus(
        Given(DOCUMENTS),
        "train",
        name="given",
        directory=tmp_path_factory.mktemp("cache"),
        tokenizer=tokenizer,
        autoencoder=load_autoencoder("pixels"),
        row_length=64,
        patch_size=4,
    )
    return prepare(job)


def test_documents_read_back_in_order(corpus, tokenizer):
    assert len(corpus) == len(DOCUMENTS)
    assert corpus.image_shape == (3, 8, 12)
    for index, raw in enumerate(DOCUMENTS):
        document = corpus.document(index)
        assert len(document) == len(raw)
        for part, original in zip(document, raw, strict=True):
            if isinstance(original, str):
                assert part.dtype == torch.int64
                assert tokenizer.decode(part.tolist()) == original
            else:
                assert part.dtype == torch.float32
                pixels = (part.permute(1, 2, 0).numpy() + 1) * 127.5
                assert np.abs(pixels - np.asarray(original)).max() < 0.1


def test_lengths_are_those_of_packing(corpus):
    expected = [document_length(corpus.document(n), patch_size=4) for n in range(len(corpus))]
    assert corpus.layout().lengths(num_patches=6).tolist() == expected


def test_pairs_are_one_text_and_one_image(corpus):
    assert corpus.layout().pairs().tolist() == [True, False, False, False, True, False, False]


def test_edits_are_an_image_an_instruction_and_an_image(corpus):
    assert corpus.layout().edits().nonzero()[0].tolist() == [5]


def test_image_patches_counts_the_patches_of_all_images_of_the_last_one_and_at_the_end(corpus):
    total, last, final = corpus.layout().image_patches(num_patches=6)
    assert total.tolist() == [6, 0, 6, 12, 6, 12, 6]
    assert last.tolist() == [6, 0, 6, 6, 6, 6, 6]
    assert final.tolist() == [6, 0, 6, 0, 0, 6, 0]


def test_pickling_keeps_the_path_and_reads_the_same_files(corpus):
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).document(0)[1], corpus.document(0)[1])


def test_any_class_with_the_two_methods_is_a_source():
    assert issubclass(Given, Source)
    assert not issubclass(Corpus, Source)


def another_image(parts, documents):
    parts[1, 0] = 7  # document 0 has the image of document 6


def another_caption(parts, documents):
    parts[0, 0] = parts[2, 0]  # document 0 has the first tokens of document 1


def moved_boundary(parts, documents):
    documents[4] -= 1  # the last text of document 3 becomes a part of document 4


def exchanged_images(parts, documents):
    parts[[10, 12], 0] = parts[[12, 10], 0]  # document 5 has its images in the opposite order


@pytest.mark.parametrize(
    "change, document",
    [
        (another_image, 0),
        (another_caption, 0),
        (moved_boundary, 3),
        (moved_boundary, 4),
        (exchanged_images, 5),
    ],
)
def test_checksums_find_a_wrong_index_whose_numbers_are_in_range(
    change, document, corpus, tmp_path
):
    folder = shutil.copytree(corpus.path, tmp_path / "damaged")
    parts, documents = (np.load(folder / f"{name}.npy") for name in ("parts", "documents"))
    change(parts, documents)
    np.save(folder / "parts.npy", parts), np.save(folder / "documents.npy", documents)
    damaged = Corpus(folder)
    with pytest.raises(UserError, match="is damaged; delete the folder"):
        damaged.document(document)
    assert torch.equal(damaged.document(2)[0], corpus.document(2)[0])


# Long documents and several wordings


def test_a_long_document_is_cut_between_its_parts(mixture):
    """Nothing is lost: texts and images keep their order, each image stays whole."""
    image = Image.new("RGB", (8, 8), "red")
    long = [part for n in range(12) for part in (f"text {n} of many words", image)]
    source = Given([[*long, "end " * 200]])
    data = mixture({"documents": source}, row_length=64)
    data.setup()
    corpus = data.corpora["train"]["documents"]
    pieces = [corpus.document(i) for i in range(len(corpus))]
    assert len(pieces) > 3 and corpus.skipped == {}
    assert all(document_length(piece, data.patch_size) <= 64 for piece in pieces)
    parts = [part for piece in pieces for part in piece]
    assert sum(part.ndim == 3 for part in parts) == 12
    tokens = [token for part in parts if part.ndim == 1 for token in part.tolist()]
    texts = [*(part for part in long if isinstance(part, str)), "end " * 200]
    assert tokens == [token for text in texts for token in data.tokenizer.encode(text)]
    facts = json.loads((corpus.path / "corpus.json").read_text())
    assert facts["num_cut"] == 1
    assert "cut 1 longer than a row" in summary("a", "train", 9, {}, num_cut=facts["num_cut"])


@pytest.mark.parametrize(
    "document",
    [
        ["a long caption " * 40, Image.new("RGB", (8, 8))],
        [Image.new("RGB", (8, 8)), "make it red " * 40, Image.new("RGB", (8, 8))],
        [ContextText("<|user|>"), Image.new("RGB", (8, 8)), ContextText("what? " * 50), "red"],
    ],
    ids=["caption", "edit", "conversation"],
)
def test_parts_that_need_each_other_are_not_cut(document, mixture):
    data = mixture({"documents": Given([document, ["good", Image.new("RGB", (8, 8))]])})
    data.setup()
    corpus = data.corpora["train"]["documents"]
    assert len(corpus) == 1 and list(corpus.skipped) == ["longer than a row of 64 tokens"]


def test_all_wordings_of_a_text_are_stored(mixture):
    image = Image.new("RGB", (8, 8), "red")
    captions = ["red", "a red one", "all of it is red"]
    documents = [[AnyText(captions), image], ["alone"], [AnyText(["b", "b"]), image]]
    data = mixture({"documents": Given(documents)})
    data.setup()
    corpus, decode = data.corpora["train"]["documents"], data.tokenizer.decode
    assert [decode(corpus.document(0, wording=w)[0].tolist()) for w in (0, 0.5, 0.99)] == captions
    for wording, caption in zip((0, 0.5, 0.99), captions, strict=True):
        layout = corpus.layout(wordings=np.full(len(corpus), wording))
        lengths = [document_length(corpus.document(i, wording=wording), 4) for i in range(3)]
        assert layout.lengths(4).tolist() == lengths
        assert layout.part_lengths[0] == len(data.tokenizer.encode(caption))
    assert corpus.layout().pairs().tolist() == [True, False, True]
    assert decode(corpus.document(2, wording=0.9)[0].tolist()) == "b"
    rows = data.train_dataloader().dataset
    seen = {decode(d[0].tolist()) for r in range(40) for d in rows[r][1] if len(d) == 2
            and d[0].ndim == 1}  # fmt: skip
    assert set(captions) <= seen
