"""Rows with clean copies of images: lengths, shares of tokens and noise levels."""

import numpy as np
import pytest

from support.sources import GreyImages, InterleavedImages, RepeatedWord
from tf_lightning.errors import UserError

COPYING = {"image_first_prob": 0.5, "caption_drop_prob": 0.3, "clean_copies": True}


def test_clean_copies_count_in_row_lengths_and_token_shares(mixture):
    sources = {
        "words": RepeatedWord("red", 5),
        "pictures": GreyImages(),
        "stories": InterleavedImages(),
    }
    data = mixture(sources, {"words": 2, "pictures": 5, "stories": 3}, batch_size=50, **COPYING)
    data.setup()
    loader, tokens, copied = data.train_dataloader(), np.zeros(3), 0
    for batch, _ in zip(loader, range(40), strict=False):  # `pack` refuses rows that are too long
        np.add.at(tokens, batch.source_ids.numpy(), batch.row_tokens.numpy())
        copied += len(batch.copied)
        assert len(batch.patch_index) == 4 * (batch.num_images + len(batch.copied))
    assert copied > 1000
    assert tokens / tokens.sum() == pytest.approx([0.2, 0.5, 0.3], abs=0.01)
    for rows in data.train_dataloader().dataset.corpora:
        lengths = [_length(rows.row(index)) for index in range(rows.rows_per_epoch)]
        assert rows.fill == pytest.approx(sum(lengths) / (64 * len(lengths)))


def _length(row: list) -> int:
    """Count the positions of a row's documents with clean copies, part by part."""
    total = 0
    for document in row:
        total += 2
        for index, part in enumerate(document):
            read = index + 1 < len(document)
            total += len(part) if part.ndim == 1 else 6 + 4 * read
    return total


def test_documents_with_clean_copies_are_seen_equally_often(mixture):
    sources = {"pictures": GreyImages(), "stories": InterleavedImages()}
    data = mixture(sources, **(COPYING | {"caption_drop_prob": 0.0}))
    data.setup()
    rows = data.train_dataloader().dataset
    per_epoch = [corpus.rows_per_epoch for corpus in rows.corpora]
    shares = rows.counts / rows.counts.sum()
    assert shares == pytest.approx(np.array(per_epoch) / sum(per_epoch), abs=5e-3)


def test_documents_too_long_with_their_copies_are_left_out_with_a_message(mixture, monkeypatch):
    said = []
    monkeypatch.setattr("tf_lightning.data.packing.rank_zero_info", said.append)
    data = mixture({"stories": InterleavedImages(num_documents=100)}, row_length=30, **COPYING)
    data.setup()
    (rows,) = data.train_dataloader().dataset.corpora
    found = [document for n in range(rows.rows_per_epoch) for document in rows.row(n)]
    assert len(found) == 90
    assert max(sum(part.ndim == 3 for part in document) for document in found) == 2
    (told,) = said
    assert told.startswith("10 of 100 documents of stories-train-")  # they need 26 or 38 positions
    assert told.endswith(
        "longer than row_length=30 with clean copies of their images; they are left out"
    )


def test_a_corpus_without_room_for_its_copies_is_refused(mixture):
    data = mixture({"pictures": GreyImages(num_documents=1)}, row_length=13, **COPYING)
    data.setup()
    with pytest.raises(UserError, match="1 of 1 documents .* row_length=13 .*; raise row_length"):
        data.train_dataloader()


def test_validation_has_clean_copies(mixture):
    data = mixture({"stories": InterleavedImages()}, **COPYING)
    data.setup()
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert sum(len(batch.copied) for batch in batches) > 0
    assert max(batch.t.max() for batch in batches) > 0.9  # no image is limited
