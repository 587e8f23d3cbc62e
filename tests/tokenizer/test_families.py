"""Tokenizers of the Llama family encode and decode as `transformers` does."""

import json
from pathlib import Path

import pytest

from support.language_models import (
    edit_json,
    tiny,
    train_byte_fallback,
    train_byte_level,
    with_sentencepiece,
)
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.huggingface import write_pretrained
from tf_lightning.tokenizer.tokenizer import Tokenizer

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "a red circle,  naïve 日本語 🙂\n",
    "The lobster's blue, 12345 and\t\tnot  .",
    " leading and trailing  ",
    "e\u0301 caf\u00e9 x\x00y",
    "<tool_call>{}</tool_call> <think>|||PHONE||| b",
    "a <|im_end|> b<|user|>\n c [INST] d</s><s>x",
    "",
]


def llama3():
    tokenizer = train_byte_level(WORDS.format("{1,3}"))
    return tokenizer, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], []


def qwen3():
    from tokenizers import normalizers

    tokenizer = train_byte_level(WORDS.format(""), normalizers.NFC())
    return tokenizer, [None, "<|im_end|>", "<|endoftext|>"], ["<tool_call>", "<think>"]


def olmo2():
    return train_byte_level(), ["<|endoftext|>", "<|endoftext|>"], ["|||PHONE|||"]


def llama2():
    return train_byte_fallback("normalizer"), ["<s>", "</s>"], []


def mistral():
    return train_byte_fallback("first"), ["<s>", "</s>", "[INST]"], []


def phi3():
    from tokenizers import AddedToken

    tokenizer = train_byte_fallback("normalizer")
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    return tokenizer, ["<s>", "<|endoftext|>"], []


FAMILIES = [llama3, qwen3, olmo2, llama2, mistral, phi3]


def make_folder(folder: Path, family) -> Path:
    """Write a family's tokenizer, and a config.json with three more rows than it has entries."""
    tokenizer, (bos, eos, *others), plain = family()
    tokenizer.add_special_tokens([token for token in (bos, eos, *others) if token])
    tokenizer.add_tokens(plain)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tiny(vocab_size=tokenizer.get_vocab_size() + 3).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(tmp_path_factory, request) -> Path:
    return make_folder(tmp_path_factory.mktemp("family"), request.param)


def test_texts_are_encoded_and_decoded_as_by_transformers(folder):
    """A special token in a text stays text in both."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == (ours.eos_id if theirs.bos_token_id is None else theirs.bos_token_id)
    for text in TEXTS:
        ids = ours.encode(text)
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        assert ids == theirs.encode(text, **plain)
        assert ours.decode(ids) == theirs.decode(ids)
        inside, first = ours.byte_counts()
        counted = sum(inside[i] for i in ids[1:]) + sum(first[i] for i in ids[:1])
        assert counted == len(ours.decode(ids).encode())


def test_a_written_tokenizer_is_read_by_transformers(folder, tmp_path):
    from transformers import AutoTokenizer

    ours = Tokenizer(folder)
    write_pretrained(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:5]:  # without special tokens
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_tokens_that_only_the_configuration_names_are_added_as_by_transformers(tmp_path):
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path, llama2)
    token = {"content": "<|extra|>", "special": False, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    number = Tokenizer(folder).boi_id - 3  # the first row without a piece
    edit_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(number): token}})
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("a <|extra|> b")
    assert number in ids and ids == theirs.encode("a <|extra|> b", add_special_tokens=False)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}),
        ("tokenizer_config.json", {"eos_token": []}),
        ("tokenizer.json", {"added_tokens": [{}]}),
        ("config.json", {"pad_token_id": []}),
    ],
)
def test_damaged_values_are_refused_in_one_sentence(tmp_path, file, change):
    folder = make_folder(tmp_path, llama2)
    edit_json(folder / file, change)
    with pytest.raises(UserError, match="tokenizer files in .* are damaged .*Error.*download them"):
        Tokenizer(folder)


def both_files(folder: Path) -> Tokenizer:
    """Write tokenizer.model and the same vocabulary as tokenizer.json; return the former."""
    from transformers import AutoTokenizer

    tiny(vocab_size=300).config.save_pretrained(folder)
    with_sentencepiece(folder)
    pieces = Tokenizer(folder)
    write_pretrained(pieces, folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return pieces


def test_of_two_files_the_one_with_more_tokens_counts(tmp_path):
    pieces = both_files(tmp_path)
    assert Tokenizer(tmp_path).proto == pieces.proto  # the same vocabulary
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = [token["id"] for token in content["added_tokens"]]
    content["added_tokens"] += [
        content["added_tokens"][ids.index(2)] | {"id": 300, "content": "<|end|>"}
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    edit_json(tmp_path / "config.json", {"vocab_size": 310})
    edit_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>"})
    made = Tokenizer(tmp_path)
    assert made.is_json and made.eos_id == 300
    assert made.encode("a red circle") == pieces.encode("a red circle")


def test_an_end_of_text_that_tokenizer_model_lacks_is_refused(tmp_path):
    both_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    edit_json(tmp_path / "config.json", {"eos_token_id": [301, 2], "vocab_size": 310})
    with pytest.raises(UserError, match="ends texts with token 301, which its .* of 300 pieces"):
        Tokenizer(tmp_path)
