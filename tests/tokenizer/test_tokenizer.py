"""Texts round-trip, special tokens cannot be forged, and bad files are refused."""

import io
import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lightning.errors import Interrupted, UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["a red circle above a blue square", "the lobster is blue , and the circle is not ."] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(
        iter(TEXTS), tmp_path_factory.mktemp("tokenizer") / "a.model", vocab_size=320
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_every_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "a\r\n\tb\n", "naïve 日本語 🙂", "x\x00y", "ﬁ e\u0301"]
)
def test_spaces_line_ends_and_unseen_characters_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_counts_sum_to_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    inside, beginning = tokenizer.byte_counts()
    assert len(inside) == len(beginning) == tokenizer.vocab_size
    counted = [beginning[i] for i in ids[:1]] + [inside[i] for i in ids[1:]]
    assert sum(counted) == len(tokenizer.decode(ids).encode())


def test_specials_have_no_bytes(tokenizer):
    specials = ("bos_id", "eos_id", "boi_id", "eoi_id", "pad_id")
    for counts in tokenizer.byte_counts():
        assert {counts[getattr(tokenizer, name)] for name in specials} == {0}


@pytest.mark.parametrize("forged", ["<boi>", "<eoi>", "<s>", "</s>", "<unk>", "<pad>"])
def test_user_text_never_becomes_a_special_token(tokenizer, forged):
    ids = tokenizer.encode(f"a {forged} b{forged}")
    specials = {"bos_id", "eos_id", "boi_id", "eoi_id", "pad_id"}
    assert not {getattr(tokenizer, name) for name in specials} & set(ids)
    assert tokenizer.decode(ids) == f"a {forged} b{forged}"


def test_image_tokens_are_the_last_two_entries(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto).get_piece_size()
    assert (tokenizer.boi_id, tokenizer.eoi_id) == (pieces, pieces + 1)
    assert tokenizer.vocab_size == pieces + 2 == 320


def test_decoding_drops_specials(tokenizer):
    t, ids = tokenizer, tokenizer.encode("red circle")
    assert t.decode([t.bos_id, *ids, t.boi_id, t.eoi_id, t.eos_id, t.pad_id]) == "red circle"


def test_training_again_gives_the_same_file(tokenizer, tmp_path):
    assert (
        train_tokenizer(iter(TEXTS), tmp_path / "b.model", vocab_size=320).proto == tokenizer.proto
    )


def test_a_small_corpus_pads_the_vocabulary_with_unused_pieces(tmp_path):
    tokenizer = train_tokenizer(iter(["ab ab"]), tmp_path / "small.model", vocab_size=5000)
    assert tokenizer.vocab_size == 5000
    for text in ("ba ab", "<unused300>", "a <unused4997>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 300


def test_copies_encode_equally(tokenizer):
    for copy in (Tokenizer.from_proto(tokenizer.proto), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode("a blue circle") == tokenizer.encode("a blue circle")
        assert copy.fingerprint == tokenizer.fingerprint


def test_a_llama_style_file_works(tmp_path):
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=proto,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(proto.getvalue())
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert (tokenizer.boi_id, tokenizer.vocab_size) == (310, 312)
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="none.model cannot be read .*; give a sentencepiece"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"not a model" * 9])
def test_a_corrupt_file_is_a_user_error(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(UserError, match="bad.model is not a sentencepiece model; give another"):
        Tokenizer(tmp_path / "bad.model")


def test_a_piece_that_is_not_utf_8_is_refused(tokenizer, tmp_path):
    piece = tokenizer._processor.id_to_piece(tokenizer.encode("circle")[-1]).encode()
    (tmp_path / "bad.model").write_bytes(tokenizer.proto.replace(piece, piece[:-1] + b"\xe9"))
    with pytest.raises(UserError, match="bad.model is not a sentencepiece model; give another"):
        Tokenizer(tmp_path / "bad.model")


def test_a_file_without_bos_and_eos_is_a_user_error(tmp_path):
    with (tmp_path / "bare.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(UserError, match="lacks a bos or eos piece; train it with"):
        Tokenizer(tmp_path / "bare.model")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "sentence"),
    [([], 320, "no text to train"), (TEXTS, 100, "vocab_size=100 is too small .* at least 2")],
)
def test_training_errors_leave_no_file(tmp_path, texts, vocab_size, sentence):
    with pytest.raises(UserError, match=sentence):
        train_tokenizer(iter(texts), tmp_path / "a.model", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_the_vocab_size_of_the_error_message_is_enough(tmp_path):
    with pytest.raises(UserError) as caught:
        train_tokenizer(iter(TEXTS), tmp_path / "a.model", vocab_size=100)
    enough = int(str(caught.value).split()[-1])
    assert train_tokenizer(iter(TEXTS), tmp_path / "a.model", enough).vocab_size == enough


@pytest.mark.parametrize("error", [UserError("a file"), OSError(5, "a disk"), Interrupted(15)])
def test_an_error_of_the_texts_is_raised_as_it_is(error, tmp_path):
    def texts():
        yield "a text"
        raise error

    with pytest.raises(type(error)) as raised:
        train_tokenizer(texts(), tmp_path / "a.model", vocab_size=320)
    assert raised.value is error and not list(tmp_path.iterdir())


def test_a_lone_surrogate_does_not_stop_training(tmp_path):
    assert (
        train_tokenizer(iter([*TEXTS, "bad \ud800 text"]), tmp_path / "a.model", 320).vocab_size
        == 320
    )
