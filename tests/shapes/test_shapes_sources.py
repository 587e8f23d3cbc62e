"""The shapes world as sources of documents."""

import pickle

import numpy as np
import pytest

from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import parse, text_log_prob
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.sources import ShapesCaptions, ShapesEdits, ShapesTexts
from tf_lightning.shapes.world import held_out

SOURCES = [
    source(num_documents=40, num_val=20) for source in (ShapesCaptions, ShapesTexts, ShapesEdits)
]


def plain(documents):
    return [
        [part if isinstance(part, str) else part.tobytes() for part in document]
        for document in documents
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_the_number_of_documents_is_as_requested_and_they_repeat(source):
    assert plain(source.documents("train")) == plain(
        pickle.loads(pickle.dumps(source)).documents("train")
    )
    assert len(list(source.documents("train"))) == 40
    assert len(list(source.documents("val"))) == 20


@pytest.mark.parametrize("source", SOURCES)
def test_the_fingerprint_depends_on_all_that_determines_the_documents(source):
    kind = type(source)
    prints = [
        source.fingerprint("train"),
        source.fingerprint("val"),
        kind(num_documents=41, num_val=20).fingerprint("train"),
        kind(num_documents=40, num_val=20, seed=9).fingerprint("train"),
    ]
    assert len(set(prints)) == 4
    assert kind(num_documents=40, num_val=99).fingerprint("train") == prints[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_describe_their_images(split):
    for text, image in ShapesCaptions(num_documents=40, num_val=40).documents(split):
        assert image.mode == "RGB" and image.size == (64, 64)
        meaning = read(np.asarray(image)).meaning
        assert parse(text) == meaning
        assert held_out(meaning) == (split == "val" and len(meaning.objects) == 2)


def test_texts_belong_to_the_grammar():
    assert all(text_log_prob(text) > -100 for (text,) in ShapesTexts(50, 0).documents("train"))


def test_edits_show_the_image_before_and_after():
    for before, instruction, after in ShapesEdits(40, 0).documents("train"):
        old, new = read(np.asarray(before)).meaning, read(np.asarray(after)).meaning
        assert old != new and not held_out(old) and not held_out(new)
        assert len(new.objects) == len(old.objects) - instruction.startswith("remove")


def test_arguments_out_of_range_are_refused():
    with pytest.raises(UserError, match="num_documents=0"):
        ShapesTexts(num_documents=0)
    with pytest.raises(UserError, match="two_objects=1.5"):
        ShapesCaptions(two_objects=1.5)
