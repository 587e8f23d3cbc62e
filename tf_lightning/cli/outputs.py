"""The work of `tf-lightning generate`: reads prompts, generates, writes outputs and a sheet.

Output NNNN is NNNN.png and NNNN.json; sheet.html shows all of a folder. A file appears whole or not
at all, and the JSON of an output is written last, so that finished outputs can be kept. No output
replaces another one: new outputs continue the numbers of the folder.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tf_lightning.checkpoint import find_checkpoint
from tf_lightning.cli.parser import flag
from tf_lightning.data.documents import BadSample, RawDocument
from tf_lightning.data.images import load_image
from tf_lightning.data.readers.interleaved import parse_parts
from tf_lightning.data.readers.json_records import parse_json, parse_record, read_records
from tf_lightning.errors import Interrupted, UserError
from tf_lightning.files import atomic_file
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationPlan
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.progress import counted

STYLE = "figure{display:inline-block;width:16em;vertical-align:top;margin:1em}img{width:16em}"

NOUNS = {"image": "image", "text": "text", "any": "output"}  # an output of each modality

Parts = list[tuple[str, str]]  # ("text", text) or ("image", file)


def generate_outputs(
    options: argparse.Namespace, sampling: SamplingConfig, given: Iterable[str]
) -> None:
    """Load the model, and write its outputs or, for a single text, print it.

    Args:
        options: parsed options of the command.
        sampling: sampling options of the command.
        given: names of the sampling options given on the command line.
    """
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    pipe = TransfusionPipeline.from_pretrained(
        options.checkpoint, options.device, dtype, options.weights, options.autoencoder
    )
    check_option_group(given, makes_codes=pipe.process is None)
    prompts = read_prompts(options.prompts) if options.prompts else [options.parts]
    last_kind = prompts[0][-1][0]
    modality = options.output_modality or ("image" if last_kind == "text" else "text")
    plan = pipe.plan(modality, sampling)
    documents = [[read_part(kind, value, pipe) for kind, value in parts] for parts in prompts]
    default = 4 if modality == "image" and not options.prompts else 1
    num_outputs = options.num_outputs or default
    if modality == "text" and len(prompts) * num_outputs == 1:
        for piece in pipe.stream(documents[0], seed=options.seed, sampling=sampling):
            print(piece, end="", flush=True)
        print()
        return
    made_by = {
        "output_modality": modality,
        "checkpoint": options.checkpoint,
        "checkpoint_modified": modified(options.checkpoint),
        "weights": pipe.checkpoint["weights"],
        "dtype": options.dtype,
        **sampling.used(modality, makes_codes=pipe.process is None),
    }
    records = describe(prompts, documents, num_outputs, options.seed, made_by)
    repeated = [document for document in documents for _ in range(num_outputs)]
    write_outputs(pipe, repeated, records, plan, options.out, options.batch_size)


def check_option_group(given: Iterable[str], makes_codes: bool) -> None:
    """Raise UserError for an option of codes with a model of latents, or the reverse."""
    other = "denoising" if makes_codes else "codes"
    group = {f.name: f.metadata["group"] for f in fields(SamplingConfig)}
    for name in given:
        if group[name] == other:
            kind = "are discrete codes" if makes_codes else "are denoised latents"
            raise UserError(
                f"{flag(name)} does not apply: this model's images {kind}; leave it out"
            )


def modified(checkpoint: str) -> str | None:
    """Return when a checkpoint was written; None for a name on the hub."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        return None
    path = path if (path / "net.json").is_file() else find_checkpoint(path)
    return datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")


def describe(
    prompts: list[Parts],
    documents: list[RawDocument],
    num_outputs: int,
    seed: int,
    made_by: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return the settings of each output; the outputs for a prompt follow each other."""
    return [
        {
            "prompt": parts,
            "prompt_digest": digest(document),
            "seed": seed + index * num_outputs + repeat,
            **made_by,
        }
        for index, (parts, document) in enumerate(zip(prompts, documents, strict=True))
        for repeat in range(num_outputs)
    ]


# ---------------------------------------------------------------- prompts


def read_prompts(file: Path) -> list[Parts]:
    """Read one prompt from each line: a text, or the parts of a document in a .jsonl file.

    A .json file is an array of such prompts.

    Raises:
        UserError: the file is not a text file, holds no prompts, or a line cannot be parsed.
    """
    try:
        # splitlines() would also split at characters that JSON allows in a text, such as U+2028.
        lines = [line for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file; give one prompt in each line") from error
    if not lines:
        raise UserError(f"{file} has no prompts; give one in each line")
    if file.suffix not in (".json", ".jsonl"):
        return [[("text", line)] for line in lines]
    try:
        records = read_records(file) if file.suffix == ".json" else map(parse_json, lines)
        records = list(map(parse_record, records))
        parsed = [[("text", r)] if isinstance(r, str) else parse_parts(r) for r in records]
        if not all(isinstance(value, str) for parts in parsed for _, value in parts):
            raise BadSample("part whose image is not a path")
    except BadSample as error:
        raise UserError(f"{file} has a {error}; see `tf-lightning generate --help`") from error
    if [] in parsed:
        raise UserError(f"{file} has a line without parts; give each line a text or an image")
    return [
        [(kind, str(file.parent / value) if kind == "image" else value) for kind, value in parts]
        for parts in parsed
    ]


def read_part(kind: str, value: str, pipe: TransfusionPipeline) -> str | Image.Image:
    """Return a text, or an image cropped and resized to the model's nearest size."""
    if kind == "text":
        return value
    if not pipe.has_images:
        raise UserError("this model was trained on text alone; leave --image out")
    try:
        return load_image(Path(value), pipe.image_sizes.trained)
    except BadSample as error:
        raise UserError(f"{value}: {error}; give a PNG or JPEG file") from error


def digest(prompt: RawDocument) -> str:
    """Return a hash of a prompt's texts and pixels."""
    sha = hashlib.sha256()
    for part in prompt:
        sha.update(part.encode() if isinstance(part, str) else part.tobytes())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------- outputs


def write_outputs(
    pipe: TransfusionPipeline,
    prompts: list[RawDocument],
    records: list[dict[str, Any]],
    plan: GenerationPlan,
    out: Path,
    batch_size: int,
) -> None:
    """Generate the outputs that are not there yet, and write each one when it is complete.

    Args:
        pipe: the model.
        prompts: the prompt of each output.
        records: how each output is made, with its seed.
        plan: the checked sampling options.
        out: folder of the outputs.
        batch_size: outputs that are generated together.
    """
    out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    written = written_outputs(out)
    names = number_outputs(out, records, written)
    missing = [i for i, name in enumerate(names) if name not in written]
    seeds, num_written = [records[i]["seed"] for i in missing], 0
    outputs = pipe.iterate([prompts[i] for i in missing], seeds, plan, batch_size, progress=True)
    try:
        for number, output in outputs:
            i = missing[number]
            write_output(out, names[i], records[i], output)
            num_written += 1
    except (KeyboardInterrupt, Interrupted):
        write_sheet(out)
        print(
            f"Kept {counted(num_written, 'output')} in {out}; the same command makes the rest.",
            file=sys.stderr,
        )
        raise
    sheet, num_kept = write_sheet(out), len(names) - len(missing)
    kept = f" ({num_kept} were there already)" if num_kept else ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    noun = NOUNS[records[0]["output_modality"]]
    print(
        f"Wrote {counted(num_written, noun)}{kept}: {main_file(out, names[0])}{more}; all outputs "
        f"are in {sheet}"
    )


def main_file(folder: Path, name: str) -> Path:
    """Return the first image of a written output, or its JSON if it has none."""
    parts = written_outputs(folder)[name]["parts"]
    return folder / next((value for kind, value in parts if kind == "image"), f"{name}.json")


def written_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the complete outputs of a folder: the content of each JSON by its name."""
    outputs = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            images = [folder / value for kind, value in found["parts"] if kind == "image"]
            complete = found["prompt"] and isinstance(found["seed"], int)
        except (OSError, ValueError, KeyError, TypeError):  # of another program
            continue
        if complete and all(map(Path.is_file, images)):
            outputs[file.stem] = found
    return outputs


def number_outputs(
    folder: Path, records: list[dict[str, Any]], written: dict[str, dict[str, Any]]
) -> list[str]:
    """Return the name of each output: an existing name if it was made in this way, else a new one.

    A new output is named by its seed, or by the next number if a file has that name.

    Args:
        folder: folder of the outputs.
        records: how each output is made.
        written: the complete outputs of the folder.
    """
    made = {}
    for name, record in written.items():
        made[as_key({key: value for key, value in record.items() if key != "parts"})] = name
    pattern = re.compile(r"(\d{4,})(?:-\d+)?\.(?:json|png)")
    numbers = (pattern.fullmatch(path.name) for path in folder.iterdir())
    taken = {int(number[1]) for number in numbers if number}
    names = []
    for record in records:
        name = made.get(as_key(record))
        if name is None:
            number = record["seed"] if record["seed"] not in taken else max(taken) + 1
            taken.add(number)
            name = f"{number:04d}"
        names.append(name)
    return names


def as_key(record: dict[str, Any]) -> str:
    """Return a record as JSON, where tuples are lists."""
    return json.dumps(record, sort_keys=True)


def write_output(folder: Path, name: str, record: dict[str, Any], output: RawDocument) -> None:
    """Write the images of an output, then its JSON: how it was made, and its parts in order."""
    parts = []
    for part in output:
        if isinstance(part, str):
            parts.append(["text", part])
            continue
        count = sum(kind == "image" for kind, _ in parts)
        file = folder / (f"{name}-{count}.png" if count else f"{name}.png")
        with atomic_file(file) as partial:
            part.save(partial, format="PNG")
        parts.append(["image", file.name])
    with atomic_file(folder / f"{name}.json") as partial:
        text = json.dumps({**record, "parts": parts}, indent=2) + "\n"
        partial.write_text(text, encoding="utf-8")


def write_sheet(folder: Path) -> Path:
    """Write a page that shows the outputs of a folder over their prompts, and return its path."""
    figures = "\n".join(map(_figure, written_outputs(folder).values()))
    page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>\n{figures}\n"
    with atomic_file(folder / "sheet.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return folder / "sheet.html"


def _figure(record: dict[str, Any]) -> str:
    """Return the HTML of an output."""
    shown = "".join(
        f'<img src="{escape(value)}">' if kind == "image" else f"<p>{escape(value)}</p>"
        for kind, value in record["parts"]
    )
    prompt = " ".join(value if kind == "text" else f"[{value}]" for kind, value in record["prompt"])
    caption = f"{escape(prompt)} <small>seed {record['seed']}</small>"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
