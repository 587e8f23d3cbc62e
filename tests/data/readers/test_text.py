"""Text files become documents with one text."""

import json

import pytest

from tf_lightning.data import TextData, TextFiles
from tf_lightning.data.documents import Skipped
from tf_lightning.errors import UserError


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("first line\r\n second — line\n".encode())
    source = TextFiles(f"{tmp_path}/*.txt", val_fraction=0)
    assert list(source.documents("train")) == [["first line\r\n second — line\n"]]


def test_each_jsonl_line_is_a_document(tmp_path):
    texts = ["one", "two\nlines", "三"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = TextFiles([f"{tmp_path}/a.jsonl"], val_fraction=0)
    assert list(source.documents("train")) == [[text] for text in texts]


def test_bad_lines_are_skipped(tmp_path):
    lines = [b'{"text": "good"}', b"{", b'{"other": 1}', b'{"text": 3}', b"[]", b"\xff", b"null"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = list(TextFiles([f"{tmp_path}/a.jsonl"], val_fraction=0).documents("train"))
    assert found[0] == ["good"]
    assert len(found) == len(lines)
    assert all(isinstance(document, Skipped) for document in found[1:])


def test_text_that_is_not_utf8_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    source = TextFiles([f"{tmp_path}/a.txt"], val_fraction=0)
    assert list(source.documents("train")) == [Skipped("text that is not UTF-8")]


def test_a_file_of_another_format_is_a_user_error(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="a.zip is a ZIP archive, which must be unpacked"):
        list(TextFiles([f"{tmp_path}/a.zip"]).documents("train"))


def test_all_of_wikitext_is_prepared(data_dir, tmp_path):
    data = TextData(
        str(data_dir / "wikitext-2" / "test.txt"),
        val_paths=str(data_dir / "wikitext-2" / "valid.txt"),
        row_length=256,
        vocab_size=2000,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup()
    assert data.source_names == ["text"]
    assert data.tokenizer.vocab_size == 2000
    corpus = data.corpora["val"]["text"]
    ids = [token for n in range(len(corpus)) for token in corpus.document(n)[0].tolist()]
    assert data.tokenizer.decode(ids) == (data_dir / "wikitext-2" / "valid.txt").read_text()
    assert corpus.layout().lengths(0).max() == 256
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape == (8, 256)
    assert batch.row_tokens.float().mean() > 250
