"""Answers on disk: NNNN.png and NNNN.json each, and sheet.html that shows them all.

A file appears whole or not at all, an answer's JSON last; so whatever is there can be kept.
"""

import hashlib
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tf_lightning.data.corpus import RawDocument

STYLE = "figure{display:inline-block;width:16em;vertical-align:top;margin:1em}img{width:16em}"


def digest(prompt: RawDocument) -> str:
    """Identifies a prompt's texts and pixels."""
    sha = hashlib.sha256()
    for part in prompt:
        sha.update(part.encode() if isinstance(part, str) else part.tobytes())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def is_written(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether an answer is there that was made in just this way."""
    try:
        found = json.loads((folder / f"{name}.json").read_text())
        pictures = [folder / value for kind, value in found.pop("parts") if kind == "image"]
    except (OSError, ValueError, KeyError):
        return False
    # As JSON has it: tuples are lists.
    return found == json.loads(json.dumps(record)) and all(map(Path.is_file, pictures))


def write_answer(folder: Path, name: str, record: dict[str, Any], answer: RawDocument) -> None:
    """Write an answer's pictures, then its JSON: how it was made, and its parts in order."""
    parts = []
    for part in answer:
        if isinstance(part, str):
            parts.append(["text", part])
            continue
        count = sum(kind == "image" for kind, _ in parts)
        file = folder / (f"{name}-{count}.png" if count else f"{name}.png")
        write_picture(file, part)
        parts.append(["image", file.name])
    write_text(folder / f"{name}.json", json.dumps({**record, "parts": parts}, indent=2) + "\n")


def write_sheet(folder: Path, names: list[str]) -> Path:
    """A page with these answers under their prompts; those not written are left out."""
    figures = "\n".join(figure for name in names for figure in _figure(folder, name))
    page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>\n{figures}\n"
    write_text(folder / "sheet.html", page)
    return folder / "sheet.html"


def _figure(folder: Path, name: str) -> Iterator[str]:
    file = folder / f"{name}.json"
    if not file.is_file():
        return
    record = json.loads(file.read_text())
    shown = "".join(
        f'<img src="{escape(value)}">' if kind == "image" else f"<p>{escape(value)}</p>"
        for kind, value in record["parts"]
    )
    words = " ".join(value if kind == "text" else f"[{value}]" for kind, value in record["prompt"])
    caption = f"{escape(words)} <small>seed {record['seed']}</small>"
    yield f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def write_text(file: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def write_picture(file: Path, picture: Image.Image) -> None:
    """Write a whole PNG or nothing."""
    partial = file.with_name(file.name + ".partial")
    picture.save(partial, format="PNG")
    partial.replace(file)
