"""The stream of rows: complete epochs, full rows, token shares, and no state."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from tf_lightning.batch import document_length, images_read_later
from tf_lightning.data import packing as corpus_rows
from tf_lightning.data.corpus.parts import (
    ALTERNATIVE,
    CONTEXT_IMAGE,
    IMAGE,
    choose_wordings,
    select_layout,
)
from tf_lightning.data.packing import CorpusRows, best_fit, fill_rows
from tf_lightning.data.stream import Rows, RowSampler, ValidationRows

N = 4  # patches of a 2 x 2 image at patch size 1


class Documents:
    """A corpus in memory: text n is `lengths[n]` times the token n, with an image if `images`."""

    name = "documents"
    image_shapes = {}  # all images have one shape

    def __init__(self, lengths: list[int], images: bool = False):
        self.texts, self.images = lengths, images

    def __len__(self):
        return len(self.texts)

    def document(self, index, random=None, wording=0.0):
        text = torch.full((self.texts[index],), index)
        return [text, torch.zeros(1, 2, 2)] if self.images else [text]

    def fetch(self, documents):
        """Do nothing: they are in memory."""

    def parts(self, length):
        return [length, IMAGE] if self.images else [length]

    def layout(self, documents, wordings=None):
        parts = [part for length in self.texts for part in self.parts(length)]
        starts = np.arange(len(self) + 1) * len(self.parts(0))
        parts = np.stack([np.zeros(len(parts), int), parts], 1)
        return select_layout(parts, starts, documents, wordings)

    def cached(self, question, answer):
        return answer()


class Shapes(Documents):
    """Documents of a corpus whose images have several shapes."""

    image_shapes = {(1, 2, 2): 1, (1, 2, 3): 1}


class Edits(Documents):
    """Documents of image n, text n, image -n."""

    def document(self, index, random=None, wording=0.0):
        images = (torch.full((1, 2, 2), float(sign * index)) for sign in (1, -1))
        return [next(images), torch.full((self.texts[index],), index), next(images)]

    def parts(self, length):
        return [IMAGE, length, IMAGE]


def numbers(row) -> list[int]:
    """List the documents of a row."""
    return [int(part[0]) for document in row for part in document if part.ndim == 1]


def stream(lengths, images=False, row_length=32, seed=(0, 0), **probabilities) -> CorpusRows:
    corpus = Documents(lengths, images)
    return CorpusRows(corpus, row_length=row_length, num_patches=N, seed=seed, **probabilities)


@pytest.mark.parametrize("corpus, pack", [(Documents, best_fit), (Shapes, fill_rows)])
def test_rows_of_images_of_several_shapes_are_packed_by_fill_rows(corpus, pack):
    lengths = np.random.default_rng(0).integers(5, 12, 300).tolist()
    rows = CorpusRows(corpus(lengths), row_length=32, num_patches=N, seed=(0, 0))
    order = np.random.default_rng((0, 0, corpus_rows.CHOICES, 0, 0, 0)).permutation(300)
    packed = pack([lengths[place] + 2 for place in order], 32)  # with <bos> and <eos>
    epoch = [numbers(rows.row(index)) for index in range(rows.rows_per_epoch)]
    assert epoch == [order[row].tolist() for row in packed]
    later = [numbers(rows.row(rows.rows_per_epoch + index)) for index in range(len(epoch))]
    assert later != epoch and sorted(sum(later, [])) == list(range(300))


def test_each_epoch_has_each_document_once_in_another_order():
    rows = stream(list(range(1, 31)))
    epochs, index = [], 0
    for _ in range(3):
        found = []
        while len(found) < 30:
            found += numbers(rows.row(index))
            index += 1
        epochs.append(found)
    assert all(sorted(found) == list(range(30)) for found in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_row_is_the_same_whatever_was_read_before():
    lengths = np.random.default_rng(0).integers(1, 30, 40).tolist()
    in_order = [numbers(stream(lengths).row(0))]
    reader = stream(lengths)
    in_order = [numbers(reader.row(index)) for index in range(100)]
    reader = stream(lengths)
    places = np.random.default_rng(1).permutation(100).tolist()
    assert {place: numbers(reader.row(place)) for place in places} == dict(enumerate(in_order))


@pytest.mark.parametrize("copies", [False, True])
def test_epochs_of_many_windows_are_complete_and_rows_are_found_directly(monkeypatch, copies):
    monkeypatch.setattr(corpus_rows, "WINDOW", 16)
    lengths = np.random.default_rng(0).integers(1, 15, 101).tolist()
    options = {"images": True, "image_first_prob": 0.3, "caption_drop_prob": 0.2}
    rows = stream(lengths, row_length=48, clean_copies=copies, **options)
    assert rows.num_windows == 7
    per_epoch, counts = rows.rows_per_epoch, Counter()
    for index in range(4 * per_epoch):
        row = rows.row(index)
        assert 0 < sum(document_length(d, 1) for d in row) <= 48
        counts[index // per_epoch] += len(row)
    assert set(counts.values()) == {101}  # each epoch is complete; the next test checks its texts
    far = stream(lengths, row_length=48, clean_copies=copies, **options)
    assert numbers(far.row(3 * per_epoch + 5)) == numbers(rows.row(3 * per_epoch + 5))


def test_windows_hold_each_document_once_and_change_from_epoch_to_epoch(monkeypatch):
    monkeypatch.setattr(corpus_rows, "WINDOW", 16)
    rows = stream(list(np.random.default_rng(0).integers(1, 15, 101)))
    size = rows.rows_per_epoch
    epochs = [[numbers(rows.row(e * size + n)) for n in range(size)] for e in range(3)]
    assert all(sorted(sum(epoch, [])) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    first = epochs[0][: size // 7]  # a window has documents of the whole corpus
    assert max(sum(first, [])) - min(sum(first, [])) > 50


def test_another_seed_gives_another_order():
    assert numbers(stream([1] * 50, seed=(0, 0)).row(0)) != numbers(
        stream([1] * 50, seed=(0, 1)).row(0)
    )


def test_images_come_first_and_captions_are_dropped_with_their_probabilities():
    rows = stream([5] * 5000, images=True, image_first_prob=0.2, caption_drop_prob=0.1)
    kinds = Counter()
    for index in range(rows.rows_per_epoch):
        for document in rows.row(index):
            kinds["".join("TI"[part.ndim == 3] for part in document)] += 1
    total = kinds.total()
    assert total == 5000
    assert kinds["IT"] / total == pytest.approx(0.2, abs=0.02)
    assert kinds["I"] / total == pytest.approx(0.8 * 0.1, abs=0.015)
    assert kinds["TI"] / total == pytest.approx(0.8 * 0.9, abs=0.02)


def test_edits_lose_their_instruction_and_half_of_these_their_first_image():
    corpus, kinds = Edits([5] * 5000), Counter()
    rows = CorpusRows(
        corpus, row_length=32, num_patches=N, seed=(0, 0), caption_drop_prob=0.2, image_first_prob=1
    )
    lengths = []
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        lengths.append(sum(document_length(document, 1) for document in row))
        for document in row:
            images = [part[0, 0, 0].item() for part in document if part.ndim == 3]
            assert images[-1] <= 0 and all(image == -images[-1] for image in images[:-1])
            kinds["".join("TI"[part.ndim == 3] for part in document)] += 1
    assert max(lengths) <= 32
    assert rows.fill == pytest.approx(sum(lengths) / (32 * len(lengths)))
    assert kinds.total() == 5000
    for kind, share in {"ITI": 0.8, "II": 0.1, "I": 0.1}.items():
        assert kinds[kind] / 5000 == pytest.approx(share, abs=0.02)


class Pages(Documents):
    """Documents of text n, image n, text, image -n, and of a text or image at the end."""

    end: list = [1]

    def document(self, index, random=None, wording=0.0):
        text = torch.full((self.texts[index],), index)
        images = [torch.full((1, 2, 2), float(sign * index)) for sign in (1, -1)]
        end = {1: [text[:1]], IMAGE: [images[1]], CONTEXT_IMAGE: [images[1]]}
        return [text, images[0], text[:1], images[1], *(end[part][0] for part in self.end)]

    def parts(self, length):
        return [length, IMAGE, 1, IMAGE, *self.end]


@pytest.mark.parametrize("clean_copies", [False, True])
def test_documents_of_text_and_images_lose_all_texts_for_guidance(clean_copies):
    corpus, kinds, lengths = Pages([5] * 3000), Counter(), []
    options = {"caption_drop_prob": 0.2, "clean_copies": clean_copies}
    rows = CorpusRows(corpus, row_length=40, num_patches=N, seed=(0, 0), **options)
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        length = sum(document_length(document, 1) for document in row)
        if clean_copies:
            length += N * sum(sum(images_read_later(document)) for document in row)
        lengths.append(length)
        kinds.update("".join("TI"[part.ndim == 3] for part in document) for document in row)
        assert all(document[-1][0, 0, 0] <= 0 for document in row if document[-1].ndim == 3)
    assert max(lengths) <= 40
    assert rows.fill == pytest.approx(sum(lengths) / (40 * len(lengths)))
    for kind, share in {"TITIT": 0.8, "II": 0.1, "I": 0.1}.items():
        assert kinds[kind] / 3000 == pytest.approx(share, abs=0.02)


def test_an_image_that_is_only_read_needs_no_document_without_text():
    """Questions about images are not dropped; nothing is generated after their texts."""
    corpus = Pages([5] * 100)
    corpus.end = [CONTEXT_IMAGE]
    rows = CorpusRows(corpus, row_length=40, num_patches=N, seed=(0, 0), caption_drop_prob=1.0)
    assert all(len(document) == 5 for i in range(rows.rows_per_epoch) for document in rows.row(i))


class Worded(Documents):
    """Captioned images; caption n has 3 wordings of 1, 2 and 3 tokens."""

    def document(self, index, random=None, wording=0.0):
        place = list(choose_wordings(self.parts(1), wording))[0]
        return [torch.full((place + 1,), index), torch.zeros(1, 2, 2)]

    def parts(self, length):
        return [1, ALTERNATIVE - 2, ALTERNATIVE - 3, IMAGE]


def test_each_epoch_draws_a_wording_anew():
    rows = CorpusRows(Worded([1] * 900), row_length=64, num_patches=N, seed=(0, 0))
    epochs = []
    for epoch in range(4):
        found = {}
        for index in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            row = rows.row(index)
            found |= {int(text[0]): len(text) for text, _ in row}
            assert sum(document_length(document, 1) for document in row) <= 64
        assert len(found) == 900
        counts = Counter(found.values())
        assert all(counts[n] == pytest.approx(300, abs=60) for n in (1, 2, 3))
        epochs.append(found)
    same = np.mean([epochs[0][n] == epochs[1][n] for n in range(900)])
    assert same == pytest.approx(1 / 3, abs=0.06)
    seen = [{epoch[n] for epoch in epochs} for n in range(900)]
    assert np.mean([len(wordings) == 3 for wordings in seen]) == pytest.approx(36 / 81, abs=0.07)
    again = CorpusRows(Worded([1] * 900), row_length=64, num_patches=N, seed=(0, 0))
    last = 4 * rows.rows_per_epoch - 1  # a row does not depend on those read before
    for one, two in zip(again.row(last), rows.row(last), strict=True):
        assert torch.equal(one[0], two[0])
    (first,) = {len(text) for text, _ in CorpusRows(
        Worded([1] * 9), row_length=64, num_patches=N).row(0)}  # fmt: skip
    assert first == 1  # validation reads the first wording


def test_planned_lengths_equal_the_rows_lengths_with_dropped_captions():
    rows = stream([3, 9, 14] * 50, images=True, image_first_prob=0.5, caption_drop_prob=0.5)
    lengths = [
        sum(document_length(document, 1) for document in rows.row(index))
        for index in range(rows.rows_per_epoch)
    ]
    assert max(lengths) <= 32
    assert rows.fill == pytest.approx(sum(lengths) / (32 * len(lengths)))


def test_a_document_drawn_twice_differs_in_its_choices():
    rows = stream([5], images=True, image_first_prob=0.5)
    firsts = {rows.row(epoch)[0][0].ndim for epoch in range(20)}
    assert firsts == {1, 3}


def test_token_shares_are_the_weights_whatever_the_fill():
    full, half, ragged = [28] * 300, [15] * 300, list(range(1, 29)) * 10
    sources = [stream(full, row_length=30), stream(half, row_length=30)]
    sources.append(stream(ragged, row_length=30))
    assert sources[0].fill == 1
    assert sources[1].fill == pytest.approx(17 / 30)
    weights = [0.5, 0.2, 0.3]
    rows, tokens = Rows(sources, weights), np.zeros(3)
    for index in range(2000):
        _, row, source = rows[index]
        tokens[source] += sum(document_length(document, 1) for document in row)
    assert tokens / tokens.sum() == pytest.approx(weights, abs=0.01)


def test_rows_of_a_source_come_in_order_without_gaps():
    rows = Rows([stream([28] * 7), stream([3] * 9)], [1.0, 3.0])
    found = {0: [], 1: []}
    for index in range(25_000):  # several cycles
        row_id, row, source = rows[index]
        assert row_id == index
        if len(found[source]) < 40:
            found[source].append(numbers(row))
    for source, corpus in enumerate(rows.corpora):
        assert found[source] == [numbers(corpus.row(n)) for n in range(40)]


def test_epochs_are_counted_by_source():
    rows = Rows([stream([28] * 7), stream([3] * 9)], [1.0, 3.0])
    sizes = [corpus.rows_per_epoch for corpus in rows.corpora]
    assert sizes == [7, 2]
    seen = [sum(rows[n][2] == source for n in range(12_345)) for source in (0, 1)]
    assert rows.epochs(12_345) == [seen[0] / 7, seen[1] / 2]


def test_rows_of_a_source_continue_across_cycles():
    rows = Rows([stream([28] * 7), stream([3] * 9)], [1.0, 3.0])
    places = range(9_900, 10_100)
    of_first = [index for index in places if rows[index][2] == 0]
    expected = len([p for p in rows.cycle[:9_900] if p == 0])
    for number, index in enumerate(of_first[:20]):
        assert numbers(rows[index][1]) == numbers(rows.corpora[0].row(expected + number))


def test_validation_reads_each_document_once_caption_first():
    rows = CorpusRows(Documents([3, 9, 14] * 7, True), row_length=32, num_patches=N)
    found = [ValidationRows(rows, 2)[index] for index in range(rows.rows_per_epoch)]
    assert sorted(n for _, row, _ in found for n in numbers(row)) == list(range(21))
    assert {source for _, _, source in found} == {2}
    assert all(
        [part.ndim for part in document] == [1, 3] for _, row, _ in found for document in row
    )


def test_validation_gives_every_rank_the_same_number_of_rows():
    rows = CorpusRows(Documents([28] * 7), row_length=30, num_patches=N)
    padded = ValidationRows(rows, 0, world_size=4)
    assert len(padded) == 8
    assert numbers(padded[6][1]) == [6]
    assert padded[7] == (7, [], 0)


def test_an_empty_corpus_validates_on_nothing():
    rows = CorpusRows(Documents([]), row_length=30, num_patches=N)
    assert len(ValidationRows(rows, 0, world_size=2)) == 0


def sampled(start=0, num_batches=6, **arguments) -> list[int]:
    rows = Rows([stream([28] * 7)], [1.0])
    return list(RowSampler(rows, lambda: start, num_batches=num_batches, **arguments))


def test_two_ranks_read_the_same_rows_as_one():
    one = sampled(start=10, batch_size=6)
    two = [sampled(start=10, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    assert one == list(range(10, 46))
    for step in range(6):
        both = two[0][3 * step : 3 * step + 3] + two[1][3 * step : 3 * step + 3]
        assert both == one[6 * step : 6 * step + 6]


def test_a_resumed_sampler_continues_and_keeps_its_length():
    rows, start = Rows([stream([28] * 7)], [1.0]), 0
    sampler = RowSampler(rows, lambda: start, batch_size=4, num_batches=3)
    assert list(sampler) == list(range(12))
    start = 8
    assert list(sampler)[:4] == [8, 9, 10, 11]
    assert len(sampler) == 12


def test_rows_are_the_same_in_another_process():
    rows = Rows([stream([28] * 7), stream([3] * 9)], [1.0, 3.0])
    copy = pickle.loads(pickle.dumps(rows))
    assert [numbers(copy[n][1]) for n in range(50)] == [numbers(rows[n][1]) for n in range(50)]
