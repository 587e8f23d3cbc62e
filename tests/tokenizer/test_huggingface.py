"""Tokenizers of language models: ids of `transformers`, no forged special tokens, padding."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.language_models import END, edit_json, tiny, with_json, with_sentencepiece
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.huggingface import write_pretrained
from tf_lightning.tokenizer.tokenizer import Tokenizer

TEXT = "a red circle,  naïve 日本語 🙂\n"


def make_folder(folder, kind="json", vocab_size=300):
    """A folder with a config and a tokenizer of 290 (json) or 300 pieces."""
    folder.mkdir(exist_ok=True)
    architecture = "Qwen2" if kind == "json" else "Llama"  # whose tokenizer class fits
    tiny(architecture, vocab_size=vocab_size).config.save_pretrained(folder)
    {"json": with_json, "sentencepiece": with_sentencepiece}[kind](folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


def test_ids_equal_transformers(folder, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert tokenizer.eos_id == theirs.eos_token_id


def test_image_tokens_follow_the_last_embedding_row(tokenizer):
    assert (tokenizer.boi_id, tokenizer.eoi_id, tokenizer.vocab_size) == (300, 301, 302)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0  # Qwen2 has no bos token


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_round_trip_and_byte_counts_sum_to_their_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    inside, beginning = tokenizer.byte_counts()
    assert len(inside) == tokenizer.vocab_size and inside == beginning
    assert sum(inside[i] for i in ids) == len(text.encode())


@pytest.mark.parametrize("forged", [END, "<boi>", "<eoi>"])
def test_user_text_never_becomes_a_special_token(tokenizer, forged):
    ids = tokenizer.encode(f"a {forged} b{forged}")
    assert not {tokenizer.eos_id, tokenizer.boi_id, tokenizer.eoi_id} & set(ids)
    assert tokenizer.decode(ids) == f"a {forged} b{forged}"


def test_a_special_token_that_a_text_could_forge_is_refused(tmp_path):
    folder = make_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="so a document could forge it; set"):
        Tokenizer(folder)


def test_specials_and_padding_rows_are_dropped(tokenizer):
    t, ids = tokenizer, tokenizer.encode("red")
    assert t.decode([t.bos_id, *ids, 295, t.boi_id, t.eoi_id, t.eos_id]) == "red"
    assert {t.byte_counts()[0][i] for i in (t.eos_id, 295, t.boi_id, t.eoi_id)} == {0}


def test_copies_encode_equally(tokenizer):
    for copy in (Tokenizer.from_proto(tokenizer.proto), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
        assert copy.fingerprint == tokenizer.fingerprint


def test_a_lone_surrogate_is_a_unicode_error(tokenizer):
    with pytest.raises(UnicodeError):
        tokenizer.encode("bad \ud800")


def test_a_tokenizer_json_is_read_with_the_config_beside_it(folder, tokenizer):
    assert Tokenizer(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("rows", [300, 310])
def test_a_sentencepiece_model_is_padded_to_the_embedding_rows(tmp_path, rows):
    folder = make_folder(tmp_path, "sentencepiece", rows)
    plain, padded = Tokenizer(folder / "tokenizer.model"), Tokenizer(folder)
    assert padded.encode(TEXT) == plain.encode(TEXT)
    assert (plain.boi_id, padded.boi_id) == (300, rows)
    assert (plain.proto == padded.proto) == (rows == 300)


@pytest.mark.parametrize("text", [TEXT, "a", "x\x00y", "<s> </s> <unk> <0x41>", ""])
def test_a_tokenizer_json_converted_from_sentencepiece_is_equal(tmp_path, text):
    """The folders of Llama 2 and Mistral have both files; they differ in a leading space."""
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path, "sentencepiece")
    pieces = Tokenizer(folder)
    write_pretrained(pieces, folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    made = Tokenizer(folder)
    ids = pieces.encode(text)
    assert made.is_json and made.encode(text) == ids
    assert made.decode(ids) == pieces.decode(ids) == text
    assert (made.bos_id, made.eos_id, made.boi_id) == (pieces.bos_id, pieces.eos_id, pieces.boi_id)
    assert made.byte_counts() == pieces.byte_counts()


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
@pytest.mark.parametrize("rows", [280, 400])
def test_the_tokenizer_of_another_model_is_refused(tmp_path, kind, rows):
    folder = make_folder(tmp_path, kind, rows)
    with pytest.raises(UserError, match=f"entries but its model has {rows} embedding rows; copy"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", "{}", "has no vocabulary that maps"),
        ("config.json", None, "there is no config.json in"),
        ("tokenizer.model", "words", "tokenizer.model is not a sentencepiece model"),
    ],
)
def test_missing_and_broken_files_are_refused(tmp_path, file, content, message):
    folder = make_folder(tmp_path)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(folder)


def test_the_eos_token_must_be_named_and_may_be_in_config_json(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="does not name an end-of-text token"):
        Tokenizer(folder)
    edit_json(folder / "config.json", {"eos_token_id": [0, 5], "bos_token_id": 1})
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, 0)  # 1 is not a special token
