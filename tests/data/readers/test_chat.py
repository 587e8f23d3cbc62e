"""Conversations become documents in which only the answers have an LM loss."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from callbacks.unigram import token_counts
from support.tiny import SIZES, all_outputs
from tf_lightning.batch import IGNORE_INDEX, pack
from tf_lightning.data import ChatFiles, Mixture
from tf_lightning.data.documents import ContextText, Skipped, TurnText
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training.module import Transfusion

TALK = ["what is red", "a color", "and a circle", "a shape"]
ROLES = ["user", "assistant"] * 2
MESSAGES = [{"role": role, "content": text} for role, text in zip(ROLES, TALK, strict=True)]


def read(folder, *lines) -> list:
    (folder / "a.jsonl").write_text(
        "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    )
    return list(ChatFiles(f"{folder}/a.jsonl", val_fraction=0).documents("train"))


def test_both_layouts_become_alternating_questions_and_answers(tmp_path):
    found = read(tmp_path, {"prompt": TALK[0], "messages": MESSAGES}, {"id": "0", "data": TALK})
    expected = [
        "<|user|>\nwhat is red\n<|assistant|>\n",
        "a color",
        "<|user|>\nand a circle\n<|assistant|>\n",
        "a shape",
    ]
    assert found == [expected, expected]
    assert [type(part) for part in found[0]] == [ContextText, TurnText, ContextText, str]


def test_a_system_message_is_context_and_a_last_question_is_left_out(tmp_path):
    system = {"role": "system", "content": "be brief"}
    (document,) = read(tmp_path, {"messages": [system, *MESSAGES[:3]]})
    first = "<|system|>\nbe brief\n<|user|>\nwhat is red\n<|assistant|>\n"
    assert document == [first, "a color"] and type(document[1]) is str


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line that is not JSON"),
        ({"text": "a"}, 'line without "messages" or "data"'),
        ({"data": ["a", 3]}, 'line without "messages" or "data"'),
        ({"messages": [{"role": "user"}]}, "message without role and content"),
        ({"messages": MESSAGES[1:]}, "conversation whose questions and answers do not alternate"),
        ({"data": ["a question"]}, "conversation whose questions and answers do not alternate"),
        ({"data": []}, "conversation whose questions and answers do not alternate"),
    ],
)
def test_a_bad_line_is_skipped_with_a_reason(tmp_path, line, reason):
    assert read(tmp_path, line) == [Skipped(reason)]


@pytest.fixture
def data(tmp_path):
    """Prepare and open conversations; some of them fill a row."""

    def build(row_length: int = 128) -> Mixture:
        read(tmp_path, *({"data": [*TALK[:3], f"a shape {n}"]} for n in range(40)))
        source = ChatFiles(f"{tmp_path}/a.jsonl", val_fraction=0.2)
        made = Mixture(
            {"chat": source},
            vocab_size=300,
            row_length=row_length,
            batch_size=2,
            cache_dir=str(tmp_path / "cache"),
        )
        made.setup()
        return made

    return build


def learned(batch, row: int = 0) -> list[int]:
    """Return the targets of a row in order."""
    return [x for x in batch.labels[row].tolist() if x != IGNORE_INDEX]


def test_only_answers_and_their_eos_are_targets(data):
    made = data()
    document = made.corpora["train"]["chat"].document(0)
    batch = pack([[document]], [0], tokenizer=made.tokenizer, row_length=128, patch_size=2)
    tokenizer, eos = made.tokenizer, made.tokenizer.eos_id
    last = tokenizer.decode(batch.input_ids[0].tolist()).rpartition("shape ")[2]
    answers = [tokenizer.encode(text) for text in ("a color", f"a shape {last}")]
    assert learned(batch) == [*answers[0], eos, *answers[1], eos]
    at = batch.target_index[: len(answers[0])].tolist()
    assert batch.input_ids[0, [i + 1 for i in at]].tolist() == answers[0]  # the next tokens
    assert (batch.input_ids >= 0).all()
    assert batch.labels[0].ge(0).logical_or(batch.labels[0].eq(IGNORE_INDEX)).all()


def test_the_loss_equals_the_cross_entropy_of_the_answers(data):
    """The cross-entropy at the positions of questions is not in the loss, whatever its value."""
    made = data()
    tokenizer, document = made.tokenizer, made.corpora["train"]["chat"].document(0)
    batch = pack([[document]], [0], tokenizer=tokenizer, row_length=128, patch_size=2)
    torch.manual_seed(0)
    module = Transfusion(TransformerConfig(300, **SIZES), ema_decay=0.0)
    module.configure_model()
    nll = module.loss_sums(module.net, batch).nll
    logits, _ = all_outputs(module.net, batch, DenseAttention(batch))
    every = F.cross_entropy(logits[0, :-1], batch.input_ids[0, 1:], reduction="none")

    markers = [tokenizer.encode(f"<|user|>\n{text}\n<|assistant|>\n") for text in TALK[::2]]
    first, second = len(markers[0]), len(markers[1])
    answer = len(tokenizer.encode("a color")) + 1  # and its <eos>
    end = int(batch.row_tokens)
    is_answer = torch.zeros(127, dtype=torch.bool)
    is_answer[first : first + answer] = True  # positions that predict the answer; <bos> is at 0
    is_answer[first + answer + second : end - 1] = True
    torch.testing.assert_close(nll, every[is_answer])
    assert every[: end - 1][~is_answer[: end - 1]].min() > 0


def test_a_conversation_longer_than_a_row_is_split_and_stays_masked(data):
    short, whole = (data(row_length).corpora["train"]["chat"] for row_length in (16, 128))
    texts = [
        np.concatenate([part.numpy() for i in range(len(c)) for part in c.document(i)])
        for c in (short, whole)
    ]
    assert len(short) > len(whole) and (texts[0] < 0).any()
    np.testing.assert_array_equal(*texts)


def test_token_frequencies_include_context_tokens(data):
    made = data()
    counts = token_counts(made.corpora["train"]["chat"], 300, made.tokenizer.eos_id, first=True)
    corpus = made.corpora["train"]["chat"]
    assert counts.sum() == sum(
        len(p) for i in range(len(corpus)) for p in corpus.document(i)
    ) + len(corpus)
