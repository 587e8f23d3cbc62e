"""Conversations from disk: .jsonl in UltraChat's two layouts. Only the answers are learned."""

import json
from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.documents import BadSample, ContextText, RawDocument, TurnText
from tf_lightning.data.readers.files import FileSource

Message = tuple[str, str]  # role, content


class ChatFiles(FileSource):
    """Each line is a conversation, a document of questions and answers in turn.

    A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}
    (UltraChat 200k; a first message may be of "system"), or {"data": ["question", "answer", ...]}
    (UltraChat). Written as <|user|> question <|assistant|> answer <eos>, a line each, where the
    answers and their <eos> alone have an LM loss. What follows the last answer is left out.

    Args:
        paths: .jsonl files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' conversations held out, in [0, 1).
    """

    def samples(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """As `FileSource.samples`: each line."""
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                yield str(number), line

    def document(self, sample: bytes) -> RawDocument:
        """As `FileSource.document`."""
        messages = read_messages(sample)
        roles = [role for role, _ in messages]
        start = int(roles[:1] == ["system"])
        count = (len(messages) - start) // 2 * 2  # a last question has no answer
        if count == 0 or roles[start : start + count] != ["user", "assistant"] * (count // 2):
            raise BadSample("conversation without questions and answers in turn")
        return conversation(messages[: start + count])


def conversation(messages: list[Message]) -> RawDocument:
    """The parts of a conversation that ends with an answer, whose <eos> is the document's."""
    document: RawDocument = []
    question = ""
    for role, content in messages:
        if role == "assistant":
            document += [ContextText(f"{question}<|assistant|>\n"), TurnText(content)]
            question = ""
        else:
            question += f"<|{role}|>\n{content}\n"
    return [*document[:-1], str(document[-1])]


def read_messages(line: bytes) -> list[Message]:
    """Roles and contents of a line of either layout.

    Raises:
        BadSample: it is of neither.
    """
    try:
        content = json.loads(line)
    except ValueError as error:
        raise BadSample("line that is not JSON") from error
    match content:
        case {"messages": list() as turns}:
            return [_message(turn) for turn in turns]
        case {"data": list() as texts} if all(isinstance(text, str) for text in texts):
            return [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    raise BadSample('line without "messages" or "data"')


def _message(turn: dict[str, str]) -> Message:
    match turn:
        case {"role": str() as role, "content": str() as text}:
            return role, text
    raise BadSample("message without role and content")
