"""Conversations with or without images, from JSON and parquet.

All of them become the same document, whatever layout they are stored in:

    <|system|> text <|user|> question <|assistant|> answer <eos> <|user|> question ...

Only answers are targets of the LM loss, each with its <eos>, and of them only those that the record
does not mask. Everything else is `ContextText`, and the images in it are read but never generated.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tf_lightning.data.documents import BadSample, ContextText, ContextTurn, TurnText
from tf_lightning.data.readers.formats import file_format, refuse
from tf_lightning.data.readers.image_files import ContextImage, ImagePathSource, as_image_file
from tf_lightning.data.readers.json_records import parse_object, parse_record, read_records
from tf_lightning.data.readers.tables import first_present, missing, read_parquet
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt

MESSAGES_KEYS = ("messages", "conversations", "conversation")
IMAGES_KEYS = ("image", "images")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
SYSTEM_KEYS, TOOLS_KEYS = ("system", "system_prompt"), ("tools", "functions")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
# Keys that exclude a message from the loss: OpenAI's weight, axolotl's train, ms-swift's loss.
LOSS_KEYS = ("weight", "train", "training", "loss")
PARTIAL_LOSS_KEYS = ("train_detail", "training_detail")  # of axolotl: a loss for parts of a text
OTHER_MEDIA_KEYS = ("video", "videos", "audio", "audios")
# Records of one question and one answer: Alpaca, and the layouts of fine-tuning services.
QUESTION_KEYS, ANSWER_KEYS = ("instruction", "prompt", "question", "query"), (
    "output", "completion", "response", "answer",
)  # fmt: skip
COLUMNS = (
    *MESSAGES_KEYS, "data", *IMAGES_KEYS, *OTHER_MEDIA_KEYS, *QUESTION_KEYS, "input", "history",
    *SYSTEM_KEYS, *TOOLS_KEYS, *ANSWER_KEYS,
)  # fmt: skip
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
IMAGE_MARKER = re.compile(r"\n?<image>\n?")
MEDIA_MARKER = re.compile(r"<(image|video|audio)(?:[ _]?\d+)?>")

ImageFile = bytes | Path
Message = tuple[str, list[str | ImageFile], bool]  # role, content, whether an answer is learned
Parts = list[str | ImageFile | ContextImage]
# The images that no marker has named yet; None if the record names no images.
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
    - {"instruction", "input", "output"}, as in Alpaca, with earlier turns in "history";
    - {"prompt", "completion"}, each a text or both lists of messages, as in TRL;
    - the list of messages itself.

    System and tool messages are context, and so are a record's "tools" and the answers that it
    masks with `weight: 0` (OpenAI), `train: false` (axolotl) or `loss: false` (ms-swift). Tool
    calls and `reasoning_content` are learned as part of their answer, the latter in <think> tags
    before it. Messages after the last learned answer, and answers before the first question, are
    left out.
    A conversation with videos or audio, or with "<image>" in a text but no images, is skipped.

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
        BadSample: no question is followed by an answer that is learned.
    """
    document: Parts = []  # up to the last answer that is learned
    context: Parts = []  # after it
    asked = masked = False
    for role, content, learned in messages:
        if role != "assistant":
            asked = asked or role in ("user", "tool")
            context += [f"<|{role}|>\n", *content, "\n"]
        elif asked and learned:
            document += [*as_context([*context, "<|assistant|>\n"]), *answer(content)]
            context = []
        elif asked:
            context += ["<|assistant|>\n", *answer(content)]
            masked = True
        # An answer to no question is left out.
    if not document:
        fault = "whose answers are all masked" if masked else "without an answer to a question"
        raise BadSample(f"conversation {fault}")
    if isinstance(document[-1], TurnText):
        document[-1] = str(document[-1])
    return document if document[-1] != "" else document[:-1]


def as_context(parts: Parts) -> Parts:
    """Join neighboring texts, except answers, and mark texts and images as context."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, TurnText):
            joined.append(ContextTurn(part))
        elif not isinstance(part, str):
            joined.append(ContextImage(part))
        elif joined and type(joined[-1]) is ContextText:
            joined[-1] = ContextText(joined[-1] + part)
        else:
            joined.append(ContextText(part))
    return [part for part in joined if part != "" or isinstance(part, ContextTurn)]


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
    turns, waiting, context = _turns(record, messages_key), None, []
    roles = (role_key,) if role_key else ROLE_KEYS
    contents = (content_key,) if content_key else CONTENT_KEYS
    if turns and isinstance(turns[0], str):
        turns = [(("user", "assistant")[i % 2], text, True) for i, text in enumerate(turns)]
    else:
        turns = [_message(turn, roles, contents) for turn in turns]
    if isinstance(record, dict):
        waiting = _images(record, (image_key,) if image_key else IMAGES_KEYS, folder)
        context = _record_context(record, has_system=turns[:1] and turns[0][0] == "system")
    messages = [
        (role, _content(content, waiting, folder), learned)
        for role, content, learned in [*context, *turns]
    ]
    if waiting is not None and next(waiting, None) is not None:
        raise BadSample("conversation with a wrong number of <image> markers")
    return messages


def _record_context(record: dict, has_system: bool) -> list[tuple]:
    """Return the messages of a record's system prompt and tools, which precede the others."""
    media = [key for key in OTHER_MEDIA_KEYS if record.get(key)]
    if media:
        raise BadSample(f"conversation with {media[0]}, which is not read")
    system = first_present(record, SYSTEM_KEYS)
    texts = [system] if isinstance(system, str) and not has_system else []
    texts += [_as_json(record[key]) for key in TOOLS_KEYS if record.get(key)]
    return [("system", text, True) for text in texts if text]


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _turns(record: Any, messages_key: str | None) -> list:
    """Find the messages of a record: dicts, or texts of user and assistant in turn."""
    if isinstance(record, list):
        return record
    record = parse_object(record)
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
        asked = f"{question}\n{more}" if isinstance(more, str) and more else question
        return [*_history(record), asked, reply]
    raise BadSample(missing("messages", record, keys, "messages_key"))


def _history(record: dict) -> list[str]:
    """Return the turns before the question of a record in Alpaca's layout, which are pairs."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or any(
        not isinstance(pair, list) or list(map(type, pair)) != [str, str] for pair in pairs
    ):
        raise BadSample("history that is not a list of pairs of question and answer")
    return [text for pair in pairs for text in pair]


def _message(turn: Any, role_keys: tuple[str, ...], content_keys: tuple[str, ...]) -> tuple:
    """Return the role of a message, its raw content, and whether it is learned as an answer."""
    if not isinstance(turn, dict):
        raise BadSample("message without role and content")
    role = next((turn[key] for key in role_keys if turn.get(key) is not None), None)
    content = next((turn[key] for key in content_keys if turn.get(key) is not None), None)
    calls = first_present(turn, CALL_KEYS)
    if calls:
        content = _wrap("", content, ("\n" if content else "") + _as_json(calls))
    if role is None or content is None:
        raise BadSample(missing("role and content", turn, (*role_keys, *content_keys),
                                "role_key and content_key"))  # fmt: skip
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadSample(f"message of the unknown role {str(role)[:40]!r}")
    role, reasoning = ROLES[role.lower()], first_present(turn, REASONING_KEYS)
    if role == "assistant" and isinstance(reasoning, str) and reasoning:
        content = _wrap(f"<think>\n{reasoning}\n</think>\n\n", content, "")
    return role, content, _is_learned(turn, role)


def _wrap(before: str, content: Any, after: str) -> Any:
    """Put texts around the content of a message: a text, a list of parts, or None."""
    if isinstance(content, list):
        return [before, *content, after]
    return f"{before}{content or ''}{after}" if isinstance(content, str | None) else content


def _is_learned(turn: dict, role: str) -> bool:
    """Return whether an answer is a target of the loss; messages of other roles never are."""
    said = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
    unknown = [key for key, value in said.items() if value not in (0, 1)]
    unknown += [key for key in PARTIAL_LOSS_KEYS if turn.get(key)]
    if unknown:
        value = str(turn[unknown[0]])[:40]
        raise BadSample(f"message with {unknown[0]}: {value}; only 0, 1, false and true are read")
    if role != "assistant" and any(said.values()):
        raise BadSample(f"message of a {role} that is to be learned; only answers are")
    return all(said.values())


def _content(content: Any, images: WaitingImages, folder: Path) -> list[str | ImageFile]:
    """Replace the image markers of a message by the record's images, in order."""
    if isinstance(content, str):
        _check_media(content, images)
        first, *rest = IMAGE_MARKER.split(content)
        pieces = [first]
        for text in rest:
            pieces += [_next_image(images), text]
        return [piece for piece in pieces if piece != ""] or [""]
    if not isinstance(content, list):
        raise BadSample(f"message whose content is of type {type(content).__name__}")
    pieces = [piece for part in content for piece in _content_part(part, images, folder)]
    return [piece for piece in pieces if piece != ""] or [""]


def _check_media(text: str, images: WaitingImages) -> None:
    """Raise BadSample if a text has the marker of an image or video that is not there."""
    for marker in MEDIA_MARKER.finditer(text):
        if marker[1] != "image":
            raise BadSample(f"conversation with <{marker[1]}>, which is not read")
        if images is None:
            raise BadSample("conversation with <image> but no image; name its key with image_key")


def _content_part(part: Any, images: WaitingImages, folder: Path) -> list[str | ImageFile]:
    """Read a part of a message's content: text, or an image that it names or that comes next."""
    if isinstance(part, str):
        return _content(part, images, folder)
    match part:
        case {"text": str() as text}:
            _check_media(text, images)
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
