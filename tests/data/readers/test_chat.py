"""Conversations become documents in which only the answers have an LM loss."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from callbacks.unigram import token_counts
from support.files import encoded_image, write_lines, write_parquet
from support.tiny import SIZES, all_outputs
from tf_lightning.batch import IGNORE_INDEX, max_noise_levels, pack
from tf_lightning.data import ChatFiles, Mixture
from tf_lightning.data.corpus.parts import CONTEXT_IMAGE
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.corpus.writer import CorpusWriter
from tf_lightning.data.documents import ContextText, ContextTurn, TurnText
from tf_lightning.errors import UserError
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
        ({"text": "a"}, "no messages: found text; wanted one of messages, conversations"),
        ({"data": ["a", 3]}, "message whose content is of type int"),
        ({"messages": [{"role": "user"}]}, "no role and content: found role; wanted one of role"),
        ({"messages": [{"role": "judge", "content": ""}]}, "message of the unknown role 'judge'"),
        ({"data": ["a question"]}, "conversation without an answer to a question"),
        ({"data": []}, "conversation without an answer to a question"),
        ("[" * 100_000, "JSON nested too deeply"),
        ({"data": ["what is <image>", "a tag"]}, "conversation with <image> but no image"),
        ({"data": ["<video>\nwhat?", "a cat"]}, "conversation with <video>, which is not read"),
        ({"data": ["what?", "a cat"], "video": "a.mp4"}, "conversation with video, which is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>?"}]}]},
            "conversation with <image> but no image",
        ),
        ({"instruction": "q", "output": "a", "history": ["a"]}, "history that is not a list"),
    ],
)
def test_a_bad_line_is_skipped_with_a_reason(tmp_path, line, reason):
    (found, good) = read(tmp_path, line, {"data": ["q", "a"]})
    assert found.reason.startswith(reason) and good[1] == "a"


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


# Layouts


def targets(folder, *records, name="a.jsonl", image_size=16) -> list[list[str]]:
    """Return the learned texts of each document, with "<eos>" where one ends a turn."""
    write_lines(folder / name, list(records))
    source = ChatFiles(f"{folder}/{name}", val_fraction=0, image_size=image_size)
    return [
        [
            part + "<eos>" if isinstance(part, TurnText) or part is document[-1] else str(part)
            for part in document
            if isinstance(part, str) and not isinstance(part, ContextText)
        ]
        for document in source.documents("train")
    ]


def share_gpt(*said, **rest) -> dict:
    names = ["human", "gpt"] * len(said)
    turns = [{"from": n, "value": text} for n, text in zip(names, said, strict=False)]
    return {"conversations": turns} | rest


LAYOUTS = {
    "UltraChat": {"data": TALK},
    "messages": {"messages": MESSAGES},
    "a list of messages": MESSAGES,
    "messages as JSON": {"conversations": json.dumps(MESSAGES)},
    "ShareGPT": share_gpt(*TALK),
    "ShareGPT that begins with an answer": {
        "conversations": [{"from": "gpt", "value": "hello"}, *share_gpt(*TALK)["conversations"]]
    },
    "system": {"messages": [{"role": "system", "content": "be brief"}, *MESSAGES]},
    "a column system": share_gpt(*TALK, system="be brief"),
    "a last question": {"messages": [*MESSAGES, {"role": "user", "content": "and?"}]},
    "contents of parts": {
        "messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    },
    "LLaVA": share_gpt("<image>\nwhat is red", *TALK[1:], image="red.png"),
    "BAGEL without image": share_gpt(*TALK, image="None"),
    "two images": share_gpt("<image>\n<image>\nwhat is red", *TALK[1:], image=["red.png"] * 2),
    "images in contents": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TALK[0]}]},
            *MESSAGES[1:],
        ],
        "images": ["red.png"],
    },
    "OpenAI": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "red.png"}}]},
            *MESSAGES[1:],
        ]
    },
    "tools": {
        "messages": [
            MESSAGES[0],
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
            {"role": "tool", "content": "found"},
            *MESSAGES[1:],
        ],
        "tools": [{"name": "look"}],
    },
    "prompt and completion": {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
}

# Layouts whose messages can say what they weigh, and how the two answers are masked.
MASKS = {"weight": 0, "train": False, "training": False, "loss": False}


def masked(layout, key: str, answers: tuple[int, ...]):
    """Return a record with `key` false in the answers of these numbers, and true in others."""
    record = json.loads(json.dumps(layout))
    turns = record if isinstance(record, list) else None
    for name in ("messages", "conversations", "prompt"):
        turns = record[name] if turns is None and name in record else turns
    if isinstance(turns, str):
        record["conversations"] = turns = json.loads(turns)
    if isinstance(record, dict) and "completion" in record:
        turns = turns + record["completion"]
    said = [turn for turn in turns if turn.get("content", turn.get("value")) is not None]
    said = [turn for turn in said if "color" in str(turn) or "shape" in str(turn)]
    for number, turn in enumerate(said):
        turn[key] = MASKS[key] if number in answers else 1 - MASKS[key]
    return record


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_only_the_answers_and_their_ends_are_learned(layout, tmp_path):
    (tmp_path / "red.png").write_bytes(encoded_image("red"))
    expected = ["a color<eos>", "a shape<eos>"]
    if layout == "tools":
        expected = ['[{"name": "look"}]<eos>', *expected]
    assert targets(tmp_path, LAYOUTS[layout]) == [expected]


@pytest.mark.parametrize("key", MASKS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "UltraChat"])
def test_in_every_layout_a_masked_answer_is_only_read(layout, key, tmp_path):
    (tmp_path / "red.png").write_bytes(encoded_image("red"))
    first, second, both = (masked(LAYOUTS[layout], key, those) for those in ((0,), (1,), (0, 1)))
    calls = ['[{"name": "look"}]<eos>'] if layout == "tools" else []
    expected = [[*calls, "a shape<eos>"], [*calls, "a color<eos>"]]
    assert targets(tmp_path, first, second) == expected
    write_lines(tmp_path / "a.jsonl", [first, both])
    source = ChatFiles(f"{tmp_path}/a.jsonl", val_fraction=0, image_size=16)
    read_only, nothing = source.documents("train")
    (turn,) = (part for part in read_only if isinstance(part, ContextTurn))
    assert turn == "a color"
    if layout != "tools":
        assert nothing.reason == "conversation whose answers are all masked"


@pytest.mark.parametrize(
    ("place", "said", "reason"),
    [
        (1, {"weight": 0.5}, "message with weight: 0.5; only 0, 1, false and true are read"),
        (1, {"train_detail": [{"begin_offset": 0}]}, "message with train_detail: [{'begin_offset'"),
        (0, {"train": True}, "message of a user that is to be learned; only answers are"),
    ],
)
def test_a_loss_that_is_not_known_is_counted(place, said, reason, tmp_path):
    messages = [m | said if i == place else m for i, m in enumerate(MESSAGES)]
    (found,) = read(tmp_path, {"messages": messages})
    assert found.reason.startswith(reason)


def test_tools_history_and_reasoning_are_read(tmp_path):
    answer = {"role": "assistant", "content": "a color", "reasoning_content": "hm"}
    tools = {"tools": [{"name": "look"}], "system_prompt": "be brief"}
    alpaca = {"instruction": "and a circle", "output": "a shape", "history": [TALK[:2]]}
    thought, earlier, caller = read(
        tmp_path,
        {"messages": [MESSAGES[0], answer]} | tools,
        alpaca,
        {"messages": [MESSAGES[0], MESSAGES[1] | {"function_call": {"name": "look"}}]},
    )
    assert thought == [
        '<|system|>\nbe brief\n<|system|>\n[{"name": "look"}]\n'
        "<|user|>\nwhat is red\n<|assistant|>\n",
        "<think>\nhm\n</think>\n\na color",
    ]
    assert earlier == read(tmp_path, {"data": TALK})[0]
    assert caller[1] == 'a color\n{"name": "look"}'


def test_a_masked_answer_has_the_tokens_of_a_learned_one_but_no_target(data, tmp_path):
    tokenizer = data().tokenizer
    found = read(tmp_path, {"messages": MESSAGES}, {"messages": masked(MESSAGES, "weight", (0,))})
    batches = []
    for number, document in enumerate(found):
        (tmp_path / str(number)).mkdir()
        writer = CorpusWriter(tmp_path / str(number), tokenizer, None, 128, 2)
        writer.add(document)
        writer.close({}, [])
        parts = Corpus(tmp_path / str(number)).document(0)
        batches.append(pack([[parts]], [0], tokenizer=tokenizer, row_length=128, patch_size=2))
    learned_both, learned_last = batches
    torch.testing.assert_close(learned_both.input_ids, learned_last.input_ids)
    answers = [tokenizer.encode(text) + [tokenizer.eos_id] for text in TALK[1::2]]
    assert learned(learned_both) == answers[0] + answers[1]
    assert learned(learned_last) == answers[1]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "what is red", "input": "", "output": "a color"},
        {"prompt": "what is red", "completion": "a color"},
        {"question": "what is red", "answer": "a color"},
    ],
)
def test_records_of_one_question_and_one_answer(record, tmp_path):
    assert targets(tmp_path, record) == [["a color<eos>"]]


@pytest.mark.parametrize("form", ["array", "pretty", ".gz", "parquet"])
def test_conversations_in_arrays_and_packed(form, tmp_path):
    records = [share_gpt(*TALK), {"messages": MESSAGES}]
    file = tmp_path / {".gz": "a.jsonl.gz", "parquet": "a.parquet"}.get(form, "a.json")
    if form == "parquet":
        write_parquet(file, [{"messages": MESSAGES}, {"messages": MESSAGES}])
    elif form == ".gz":
        write_lines(file, records)
    else:
        file.write_text(json.dumps(records, indent=2 if form == "pretty" else None))
    found = list(ChatFiles(str(file), val_fraction=0).documents("train"))
    expected = ["<|user|>\nwhat is red\n<|assistant|>\n", "a color",
                "<|user|>\nand a circle\n<|assistant|>\n", "a shape"]  # fmt: skip
    assert found == [expected] * 2


def test_keys_of_conversations_can_be_chosen(tmp_path):
    turns = [{"who": "user", "says": "q"}, {"who": "bot", "says": "a"}]
    file = write_lines(tmp_path / "a.jsonl", [{"talk": turns}])
    keys = {"messages_key": "talk", "role_key": "who", "content_key": "says"}
    (document,) = ChatFiles(str(file), val_fraction=0, **keys).documents("train")
    assert document == ["<|user|>\nq\n<|assistant|>\n", "a"]


def test_a_column_of_messages_may_be_in_upper_case(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [{"Messages": MESSAGES}])
    (document,) = ChatFiles(str(file), val_fraction=0).documents("train")
    assert document[1] == TALK[1]


def test_images_without_a_size_are_refused(tmp_path):
    record = share_gpt("<image>\nwhat is red", "a color", image="red.png")
    with pytest.raises(UserError, match="have images; give the source an image_size"):
        read(tmp_path, record)


def test_an_image_in_a_question_stays_readable(tmp_path):
    """Its noise level is limited, wherever it stands; that of an image in an answer is not."""
    text = torch.tensor([5, 6])
    image = torch.zeros(3, 4, 4)
    asked = [~text, image, ~text, text, ~text, image, image, ~text, text]
    assert max_noise_levels(asked, 0.5) == [0.5, 0.5, 0.5]
    drawn = [~text, image, text, ~text, image]
    assert max_noise_levels(drawn, 0.5) == [1.0, 1.0]
    edit = [~text, image, ~text, image]
    assert max_noise_levels(edit, 0.5) == [0.5, 1.0]


def test_a_conversation_that_is_cut_inside_a_question_has_no_end_to_learn(data):
    made = data()
    batch = pack([[[~torch.tensor([7, 8, 9])]]], [0], tokenizer=made.tokenizer, row_length=16,
                 patch_size=2)  # fmt: skip
    assert learned(batch) == []


def test_images_of_questions_are_stored_as_context(tmp_path):
    (tmp_path / "red.png").write_bytes(encoded_image("red"))
    write_lines(tmp_path / "a.jsonl", [LAYOUTS["LLaVA"], LAYOUTS["UltraChat"]] * 4)
    source = ChatFiles(f"{tmp_path}/a.jsonl", val_fraction=0, image_size=16)
    made = Mixture(
        {"chat": source}, vocab_size=300, row_length=128, autoencoder="pixels", patch_size=8,
        caption_drop_prob=1.0, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    made.setup()
    corpus = made.corpora["train"]["chat"]
    assert CONTEXT_IMAGE in corpus.layout().part_lengths
    batch = next(iter(made.train_dataloader()))
    assert batch.num_images and batch.t.max() <= 0.5  # none lost its text
