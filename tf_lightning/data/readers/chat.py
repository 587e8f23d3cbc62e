"""Conversations from JSON lines in the two layouts of UltraChat."""

from collections.abc import Iterator
from pathlib import Path

from tf_lightning.data.documents import BadSample, ContextText, RawDocument, TurnText
from tf_lightning.data.readers.files import FileSource
from tf_lightning.data.readers.formats import parse_json, read_lines

Message = tuple[str, str]  # role, content


class ChatFiles(FileSource):
    """Conversations from .jsonl files, one a line. Only the answers have an LM loss.

    A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}
    (UltraChat 200k; a first message with the role "system" is allowed), or {"data": ["question",
    "answer", ...]} (UltraChat). The document reads <|user|>, question, <|assistant|>, answer, <eos>
    for each turn, and the LM loss counts the answers and their <eos>. Messages after the last
    answer are left out.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """Yield each line; see `FileSource.samples`."""
        for number, line in enumerate(read_lines(file)):
            yield str(number), line

    def document(self, sample: bytes) -> RawDocument:
        """See `FileSource.document`."""
        messages = read_messages(sample)
        roles = [role for role, _ in messages]
        start = int(roles[:1] == ["system"])
        count = (len(messages) - start) // 2 * 2  # without a last question that has no answer
        if count == 0 or roles[start : start + count] != ["user", "assistant"] * (count // 2):
            raise BadSample("conversation whose questions and answers do not alternate")
        return conversation(messages[: start + count])


def conversation(messages: list[Message]) -> RawDocument:
    """Convert messages that end with an answer to the parts of a document.

    The last answer is plain text: the end of the document adds its <eos>.
    """
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
    """Parse a line of either layout.

    Raises:
        BadSample: the line is in neither layout.
    """
    match parse_json(line):
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
