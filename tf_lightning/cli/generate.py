"""`tf-lightning generate`: a picture from words, words from a picture, or both in turn.

Answers on disk: NNNN.png and NNNN.json each, and sheet.html that shows them all.

A file appears whole or not at all, an answer's JSON last; so whatever is there can be kept.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from tf_lightning.data.documents import BadSample, RawDocument
from tf_lightning.data.images import load_image
from tf_lightning.data.readers.formats import parse_json
from tf_lightning.data.readers.interleaved import parse_parts
from tf_lightning.diffusion.sampler import SAMPLERS
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline, load
from tf_lightning.generation.requests import Settings

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


EPILOG = """\
examples:
  tf-lightning generate last.ckpt "a red circle above a blue square" -o out
  tf-lightning generate last.ckpt --image in.png                     what does it show?
  tf-lightning generate last.ckpt --image in.png "make the circle green" -o out
  tf-lightning generate last.ckpt --prompts prompts.txt -n 1 -o out  a prompt a line
  tf-lightning generate last.ckpt "a red" --answer any -o out        what the model wants to say
Text and --image parts form one prompt, in the order given. A prompt that ends in text is answered
with a picture, one that ends in a picture with words; --answer says otherwise. Pictures enter
clean: the model reads them as they are. A line of a .jsonl file of prompts has parts in order:
  {"parts": [{"image": "a.png"}, {"text": "make it red"}]}
Answers that are written already, with the same settings, are not made again.
"""

Parts = list[tuple[str, str]]  # kind and value


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line instead of printing the whole usage first."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        print(f"tf-lightning: error: {message}", file=sys.stderr)
        print("`tf-lightning generate --help` lists the options.", file=sys.stderr)
        raise SystemExit(2)


def text_part(text: str) -> tuple[str, str]:
    """A part of the prompt, with its kind."""
    return "text", text


def image_part(file: str) -> tuple[str, str]:
    """A part of the prompt, with its kind."""
    return "image", file


def name_texts(args: list[str]) -> list[str]:
    """Write --text before each word that stands alone, except the checkpoint, which is the first.

    argparse tells the order of options, but not of words among them.
    """
    named, words, alone = [], iter(args), 0
    for word in words:
        if word.startswith("-"):
            named.append(word)
            has_value = "=" in word if word.startswith("--") else len(word) > 2
            if not has_value and word not in ("-h", "--help"):
                named.extend([value for value in [next(words, None)] if value is not None])
        else:
            named.append(f"--text={word}" if alone else word)
            alone += 1
    return named


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def not_negative(text: str) -> float:
    """A number of at least 0."""
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def interval(text: str) -> tuple[float, float]:
    """Two numbers, parted by a comma."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers such as 0.2,0.8") from error
    return low, high


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = Parser(
        "tf-lightning generate",
        usage="tf-lightning generate CKPT [TEXT | --image FILE] ... [options]",
        description="Continue a prompt of text and pictures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a file that `fit` wrote, or a folder of `export`")
    part = {"dest": "parts", "action": "append", "default": []}
    add(
        "--text",
        **part,
        type=text_part,
        metavar="TEXT",
        help="text of the prompt; --text may be left out",
    )
    add("--image", **part, type=image_part, metavar="FILE", help="picture of the prompt")
    add("--prompts", type=Path, metavar="FILE", help="many: a text a line, or parts in a .jsonl")
    add("-o", "--out", type=Path, default=Path("out"), help="folder for answers (default: out)")
    add("-n", "--num-images", type=positive, help="answers to a prompt (default: 4, of text 1)")
    add("--answer", choices=("image", "text", "any"), help="what to generate (default: see below)")
    add("--max-images", type=positive, default=1, help="in an answer of any kind (default: 1)")
    add("--seed", type=int, default=0, help="of the first answer; others follow (default: 0)")
    add("--batch-size", type=positive, default=16, help="answers at once (default: 16)")
    pictures = parser.add_argument_group("pictures").add_argument
    pictures("--guidance-scale", type=float, default=3.0, help="1 = off (default: 3)")
    pictures("--image-guidance-scale", type=float, help="for --image parts (default: the same)")
    pictures("--guidance-interval", type=interval, default=(0.0, 1.0), metavar="LOW,HIGH",
             help="noise levels at which guidance acts (default: 0,1)")  # fmt: skip
    pictures("--guidance-rescale", type=float, default=0.0, help="against overexposure, 0 to 1")
    pictures("--steps", type=int, help="denoising steps, 1 to 1000 (default: 50)")
    pictures("--sampler", choices=SAMPLERS, help="(default: DDIM; Euler where the model is a flow)")
    shift = "more steps near noise if over 1; not of DDIM and UniPC (default: 1)"
    pictures("--timestep-shift", type=float, default=1.0, help=shift)
    codes = parser.add_argument_group("pictures of a model of codes (Chameleon)").add_argument
    codes("--code-temperature", type=not_negative, help="0 = most probable (default: 1)")
    codes("--code-top-k", type=positive, help="draw from this many codes")
    codes("--code-top-p", type=float, help="draw from the likeliest with this share")
    texts = parser.add_argument_group("text").add_argument
    texts("--max-new-tokens", type=positive, default=64, help="longest text (default: 64)")
    texts("--temperature", type=not_negative, default=0.0, help="0 = most probable (default: 0)")
    texts("--top-k", type=positive, help="draw from this many tokens")
    texts("--top-p", type=float, default=1.0, help="draw from the likeliest with this share")
    texts("--min-p", type=float, default=0.0, help="draw from those this likely beside the first")
    texts("--stop", action="append", default=[], metavar="TEXT", help="ends the text")
    return parser


def run_generate(args: list[str]) -> None:
    """Parse, load, generate, write."""
    options = build_parser().parse_args(name_texts(args))
    if options.parts and options.prompts:
        raise UserError("there are two kinds of prompts; leave out --prompts, or the others")
    if not options.parts and not options.prompts:
        raise UserError("there is no prompt; give text, --image FILE or --prompts FILE")
    model = load(options.checkpoint)
    prompts = read_prompts(options.prompts) if options.prompts else [options.parts]
    last_kind = prompts[0][-1][0]
    options.answer = options.answer or ("image" if last_kind == "text" else "text")
    how = settings_of(options, bool(model.net.num_codes))
    settings = model.settings(options.answer, **how)
    documents = [[read_part(kind, value, model) for kind, value in parts] for parts in prompts]
    several = 4 if options.answer == "image" and not options.prompts else 1
    options.num_images = options.num_images or several
    if options.answer == "text" and len(prompts) * options.num_images == 1:
        for piece in model.stream(documents[0], answer="text", seed=options.seed, **how):
            print(piece, end="", flush=True)
        print()
    else:
        write_answers(
            model, documents, describe(prompts, documents, how, options), settings, options
        )


def describe(
    prompts: list[Parts],
    documents: list[RawDocument],
    how: dict[str, Any],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """How each answer is made; the answers to a prompt follow each other."""
    modified = datetime.fromtimestamp(Path(options.checkpoint).stat().st_mtime)
    shared = {
        "answer": options.answer,
        "checkpoint": options.checkpoint,
        "checkpoint_modified": modified.isoformat(timespec="seconds"),
        **how,
    }
    count = options.num_images
    return [
        {
            "prompt": parts,
            "prompt_digest": digest(document),
            "seed": options.seed + number * count + repeat,
            **shared,
        }
        for number, (parts, document) in enumerate(zip(prompts, documents, strict=True))
        for repeat in range(count)
    ]


def settings_of(options: argparse.Namespace, codes: bool = False) -> dict[str, Any]:
    """The options that matter for an answer, as `TransfusionPipeline.settings` names them.

    Args:
        options: parsed.
        codes: whether the model's pictures are codes.
    """
    pictures = {
        "guidance_scale": options.guidance_scale,
        "image_guidance_scale": options.image_guidance_scale,
        "guidance_interval": options.guidance_interval,
        "guidance_rescale": options.guidance_rescale,
        "sampler": options.sampler,
        "timestep_shift": options.timestep_shift,
    }
    own = {"code_temperature": 1.0, "code_top_k": None, "code_top_p": 1.0}
    given = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    if codes:
        if options.steps is not None:
            raise UserError(f"--steps {options.steps} denoise and this model draws codes; omit it")
        pictures |= own | given
    else:
        if given:
            raise UserError("--code-... options are of a model of codes; this one denoises")
        pictures["num_inference_steps"] = 50 if options.steps is None else options.steps
    texts = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "stop": tuple(options.stop),
    }
    both = {**pictures, **texts, "max_images": options.max_images}
    return {"image": pictures, "text": texts, "any": both}[options.answer]


def read_prompts(file: Path) -> list[Parts]:
    """The prompts of a file: a text a line, or in a .jsonl file the parts of a document a line."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file; give one prompt a line") from error
    if not lines:
        raise UserError(f"{file} has no prompts; give one a line")
    if file.suffix != ".jsonl":
        return [[("text", line)] for line in lines]
    try:
        parsed = [parse_parts(parse_json(line)) for line in lines]
    except BadSample as error:
        raise UserError(f"{file} has a {error}; see `tf-lightning generate --help`") from error
    if [] in parsed:
        raise UserError(f"{file} has a line without parts; give each a text or an image")
    return [[(kind, place(kind, value, file.parent)) for kind, value in parts] for parts in parsed]


def place(kind: str, value: str, folder: Path) -> str:
    """A text as it is; a picture's file found from `folder`."""
    return str(folder / value) if kind == "image" else value


def read_part(kind: str, value: str, model: TransfusionPipeline) -> str | Image.Image:
    """Text as it is; a picture cropped and resized to what the model reads."""
    if kind == "text":
        return value
    if model.autoencoder is None:
        raise UserError("this model was trained on text alone; leave --image out")
    try:
        return load_image(Path(value), model.image_size)
    except BadSample as error:
        raise UserError(f"{value}: {error}; give a PNG or JPEG file") from error


def write_answers(
    model: TransfusionPipeline,
    prompts: list[RawDocument],
    records: list[dict[str, Any]],
    settings: Settings,
    options: argparse.Namespace,
) -> None:
    """Generate what is not there yet; each answer is written when it is whole."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    names = [f"{record['seed']:04d}" for record in records]
    missing = [n for n, name in enumerate(names) if not is_written(out, name, records[n])]
    repeated = [prompts[n // options.num_images] for n in missing]
    seeds, done = [records[n]["seed"] for n in missing], 0
    try:
        for number, answer in model.answer_each(
            repeated, seeds, settings, options.batch_size, progress=True
        ):
            n = missing[number]
            write_answer(out, names[n], records[n], answer)
            done += 1
    except KeyboardInterrupt:
        write_sheet(out, names)
        print(f"Kept {done} answers in {out}; the same command makes the rest.", file=sys.stderr)
        raise
    sheet = write_sheet(out, names)
    kept = f" ({len(names) - len(missing)} were there already)" if len(names) > done else ""
    print(f"Wrote {done} answers to {out}{kept}: {names[0]}.json ... Look at {sheet}")
