"""Conversations with or without images, from JSON and parquet.

All of them become the same document, whatever layout they are stored in:

    <|system|> text <|user|> question <|assistant|> answer <eos> <|user|> question ...

Only answers are targets of the LM loss, each with its <eos>. Everything else is `ContextText`, and
the images of questions are read but never generated.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tf_lightning.data.documents import BadSample, ContextText, TurnText
from tf_lightning.data.readers.files import ContextImage, ImagePathSource, as_image_file
from tf_lightning.data.readers.formats import (
    file_format,
    first_present,
    missing,
    parse_record,
    read_parquet,
    read_records,
    refuse,
)
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt

MESSAGES_KEYS = ("messages", "conversations", "conversation")
IMAGES_KEYS = ("image", "images")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# Records of one question and one answer: Alpaca, and the layouts of fine-tuning services.
QUESTION_KEYS, ANSWER_KEYS = ("instruction", "prompt", "question", "query"), (
    "output", "completion", "response", "answer",
)  # fmt: skip
COLUMNS = (*MESSAGES_KEYS, "data", *IMAGES_KEYS, *QUESTION_KEYS, "input", "system", *ANSWER_KEYS)
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
IMAGE_MARKER = re.compile(r"\n?<image>\n?")

ImageFile = bytes | Path
Message = tuple[str, list[str | ImageFile]]  # role, content
Parts = list[str | ImageFile | ContextImage]
# The images that no marker has named yet. None: the record names no images, so "<image>" is text.
WaitingImages = Iterator[ImageFile] | None


@dataclass(eq=False)
class ChatFiles(ImagePathSource):
    """Conversations from JSON lines, JSON arrays and parquet. Only the answers have an LM loss.

    A record is one of
    - {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": ...}]}, as
      in UltraChat 200k and OpenAI's format, also with a content of parts (text, image);
    - {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": ...}]}, as in
      ShareGPT, LLaVA and BAGEL, with an "image" or "images" for each <image> marker;
    - {"data": ["question", "answer", ...]}, as in UltraChat;
    - {"instruction", "input", "output"}, as in Alpaca;
    - {"prompt", "completion"}, each a text or both lists of messages, as in TRL;
    - the list of messages itself.

    System and tool messages are context. Messages after the last answer, and answers before the
    first question, are left out.

    Args:
        paths: files or globs to train on.
        image_size: side of the square images in pixels; null: no conversation has images.
        messages_key: key or column of the messages; null: the first of MESSAGES_KEYS.
        role_key: key of a message's role; null: "role" or "from".
        content_key: key of a message's text; null: "content" or "value".
        image_key: key or column of the images; null: "image" or "images".
    """

    image_size: PositiveInt | None = None
    messages_key: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    image_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "image_size", "images", "messages_key", "role_key", "content_key", "image_key",
    )  # fmt: skip

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each record; see `FileSource.samples`."""
        match file_format(file):
            case "json":
                records = read_records(file, is_message)
            case "parquet":
                names = (self.messages_key, self.image_key, *COLUMNS)
                records = read_parquet(file, [name for name in names if name], "messages_key")
            case _:
                raise refuse(file, "conversations are read from .jsonl, .json and .parquet files")
        for number, record in enumerate(records):
            yield str(number), (self.image_folder(file), record)

    def parts(self, sample: tuple[Path, Any]) -> Parts:
        """List texts and images in order; see `ImageFileSource.parts`."""
        folder, record = sample
        keys = self.messages_key, self.role_key, self.content_key, self.image_key
        parts = conversation(read_messages(parse_record(record), folder, *keys))
        if self.image_size is None and not all(isinstance(part, str) for part in parts):
            raise UserError("the conversations have images; give the source an image_size")
        return parts


def is_conversation(record: Any) -> bool:
    """Return whether a record of JSON or parquet is a conversation, in any known layout."""
    if isinstance(record, list):
        return bool(record) and is_message(record[0])
    if not isinstance(record, dict):
        return False
    return any(isinstance(record.get(key), list) for key in (*MESSAGES_KEYS, "data"))


def is_message(value: Any) -> bool:
    """Return whether a value is a message: a role and a content."""
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def conversation(messages: list[Message]) -> Parts:
    """Convert messages to the parts of a document.

    The last answer is plain text: the end of the document adds its <eos>.

    Raises:
        BadSample: no question is followed by an answer.
    """
    document: Parts = []
    context: Parts = []  # since the last answer
    asked = False
    complete = 0  # parts of the document up to its last answer
    for role, content in messages:
        if role != "assistant":
            asked = asked or role in ("user", "tool")
            context += [f"<|{role}|>\n", *content, "\n"]
        elif asked:
            document += [*as_context([*context, "<|assistant|>\n"]), *answer(content)]
            context, complete = [], len(document)
        # An answer to no question is left out.
    if not complete:
        raise BadSample("conversation without an answer to a question")
    if isinstance(document[-1], TurnText):
        document[-1] = str(document[-1])
    return document if document[-1] != "" else document[:-1]


def as_context(parts: Parts) -> Parts:
    """Join neighboring texts and mark texts and images as context."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] = ContextText(joined[-1] + part)
        else:
            joined.append(ContextText(part) if isinstance(part, str) else ContextImage(part))
    return [part for part in joined if part != ""]


def answer(content: list[str | ImageFile]) -> Parts:
    """Mark the last text of an answer as the end of a turn; images in it are generated."""
    if not content or not isinstance(content[-1], str):
        return [*content, TurnText("")]
    return [*content[:-1], TurnText(content[-1])]


# Layouts


def read_messages(
    record: Any,
    folder: Path,
    messages_key: str | None = None,
    role_key: str | None = None,
    content_key: str | None = None,
    image_key: str | None = None,
) -> list[Message]:
    """Read the messages of a record in any layout of `ChatFiles`.

    Args:
        record: the record.
        folder: folder that paths of images are relative to.
        messages_key: see `ChatFiles`.
        role_key: see `ChatFiles`.
        content_key: see `ChatFiles`.
        image_key: see `ChatFiles`.

    Raises:
        BadSample: the record is in none of the layouts.
    """
    turns, system, waiting = _turns(record, messages_key), None, None
    if isinstance(record, dict):
        system = record.get("system")
        waiting = _images(record, (image_key,) if image_key else IMAGES_KEYS, folder)
    roles = (role_key,) if role_key else ROLE_KEYS
    contents = (content_key,) if content_key else CONTENT_KEYS
    if turns and isinstance(turns[0], str):
        turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    else:
        turns = [_message(turn, roles, contents) for turn in turns]
    if isinstance(system, str) and system and turns[:1] and turns[0][0] != "system":
        turns = [("system", system), *turns]
    messages = [(role, _content(content, waiting, folder)) for role, content in turns]
    if waiting is not None and next(waiting, None) is not None:
        raise BadSample("conversation with a wrong number of <image> markers")
    return messages


def _turns(record: Any, messages_key: str | None) -> list:
    """Find the messages of a record: dicts, or texts of user and assistant in turn."""
    if isinstance(record, list):
        return record
    if not isinstance(record, dict):
        raise BadSample("line that is not a JSON object")
    keys = (messages_key,) if messages_key else (*MESSAGES_KEYS, "data")
    for key in keys:
        turns = first_present(record, (key,))
        if isinstance(turns, str) and turns[:1] == "[":  # JSON in a column of texts
            turns = parse_record(turns.encode("utf-8", "surrogatepass"))
        if isinstance(turns, list):
            return turns
    question = next((record[key] for key in QUESTION_KEYS if record.get(key)), None)
    reply = next((record[key] for key in ANSWER_KEYS if record.get(key)), None)
    if isinstance(question, list) and isinstance(reply, list) and not messages_key:
        return question + reply  # messages, as in TRL
    if isinstance(question, str) and isinstance(reply, str) and not messages_key:
        more = record.get("input")  # Alpaca: what the instruction is about
        return [f"{question}\n{more}" if isinstance(more, str) and more else question, reply]
    raise BadSample(missing("messages", record, keys, "messages_key"))


def _message(turn: Any, role_keys: tuple[str, ...], content_keys: tuple[str, ...]) -> tuple:
    """Return the role and the raw content of a message."""
    if not isinstance(turn, dict):
        raise BadSample("message without role and content")
    role = next((turn[key] for key in role_keys if turn.get(key) is not None), None)
    content = next((turn[key] for key in content_keys if turn.get(key) is not None), None)
    calls = turn.get("tool_calls")
    if calls and not content:
        content = json.dumps(calls, ensure_ascii=False)
    if role is None or content is None:
        raise BadSample(missing("role and content", turn, (*role_keys, *content_keys),
                                "role_key and content_key"))  # fmt: skip
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadSample(f"message of the unknown role {str(role)[:40]!r}")
    return ROLES[role.lower()], content


def _content(content: Any, images: WaitingImages, folder: Path) -> list[str | ImageFile]:
    """Replace the image markers of a message by the record's images, in order."""
    if isinstance(content, str) and images is None:
        return [content]
    if isinstance(content, str):
        first, *rest = IMAGE_MARKER.split(content)
        pieces = [first]
        for text in rest:
            pieces += [_next_image(images), text]
        return [piece for piece in pieces if piece != ""] or [""]
    if not isinstance(content, list):
        raise BadSample(f"message whose content is of type {type(content).__name__}")
    return [piece for part in content for piece in _content_part(part, images, folder)]


def _content_part(part: Any, images: WaitingImages, folder: Path) -> list[str | ImageFile]:
    """Read a part of a message's content: text, or an image that it names or that comes next."""
    if isinstance(part, str):
        return _content(part, images, folder)
    match part:
        case {"text": str() as text}:
            return [text]
        case {"image_url": {"url": value} | value}:
            file = as_image_file(value, folder)
        case {"type": "image"} | {"image": _} | {"path": _} | {"bytes": _}:
            value = next((part[k] for k in ("image", "path", "url") if part.get(k)), part)
            file = as_image_file(value, folder)
        case _:
            raise BadSample("message with a part that is neither text nor image")
    return [_next_image(images) if file is None else file]


def _next_image(images: WaitingImages) -> ImageFile:
    file = next(images or iter(()), None)
    if file is None:
        raise BadSample("conversation with a wrong number of <image> markers")
    return file


def _images(record: dict, keys: tuple[str, ...], folder: Path) -> WaitingImages:
    """List the images of a record; a conversation without image may have "None" or ""."""
    if not any(key in record for key in keys):
        return None
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    values = value if isinstance(value, list) else [value]
    files = [as_image_file(value, folder) for value in values]
    return iter([file for file in files if file is not None])
