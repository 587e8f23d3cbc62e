"""`tf-lightning generate`: images from text, text from images, or both in turn.

This file only declares the options, so that `--help` answers without importing torch; the work is
in cli/outputs.py.
"""

import argparse
import os
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import parse_from_object

from tf_lightning.cli.parser import Parser, flag, path_type, positive_int, seed
from tf_lightning.errors import UserError
from tf_lightning.folders import check_writable
from tf_lightning.generation.sampling import GROUPS, OUTPUT_MODALITIES, SamplingConfig

EPILOG = """\
examples:
  tf-lightning generate last.ckpt "a red circle above a blue square" -o out
  tf-lightning generate last.ckpt "a red circle" --size 320x192 -o out  320 wide, 192 high
  tf-lightning generate last.ckpt --image in.png                     caption an image
  tf-lightning generate last.ckpt --image in.png "make the circle green" -o out
  tf-lightning generate last.ckpt --prompts prompts.txt -n 1 -o out  one prompt in each line
  tf-lightning generate last.ckpt "a red" --output-modality any -o out
  tf-lightning generate runs/quickstart "" -o out                    no prompt

Text and --image parts form one prompt, in the order given. A prompt that ends in text is answered
with an image, and one that ends in an image with text; --output-modality chooses otherwise. Images
are cropped and resized to the nearest size that the model was trained on. An edited image keeps
the size of its input. The empty text "" asks for an output without a prompt. CKPT may be the
folder of a run, whose last checkpoint is used. A line of a .jsonl file of prompts holds the parts
of one prompt in order:
  {"parts": [{"image": "a.png"}, {"text": "make it red"}]}
Outputs that were written before with the same options are kept.
"""


def text_part(text: str) -> tuple[str, str]:
    """Return a part of the prompt with its kind; its bytes are UTF-8 in every locale."""
    try:
        return "text", os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not text in UTF-8") from error


def image_part(file: str) -> tuple[str, str]:
    """Return a part of the prompt with its kind."""
    return "image", name_type(file)


def name_type(text: str) -> str:
    """Return a name that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; leave the option out")
    return text


def name_texts(args: list[str]) -> list[str]:
    """Write --text before each bare word except the first, which is the checkpoint.

    argparse keeps the order of options, but not the order of bare words among them.
    """
    named, words, num_bare = [], iter(args), 0
    for word in words:
        if word.startswith("-"):
            named.append(word)
            has_value = "=" in word if word.startswith("--") else len(word) > 2
            if not has_value and word not in ("-h", "--help"):
                named.extend([value for value in [next(words, None)] if value is not None])
        else:
            named.append(f"--text={word}" if num_bare else word)
            num_bare += 1
    return named


def interval(text: str) -> tuple[float, float]:
    """Parse two numbers that are separated by a comma."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers such as 0.2,0.8") from error
    return low, high


VALUE_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    float | None: {"type": float, "metavar": "X"},
    str | None: {"type": name_type, "metavar": "NAME"},
    tuple[float, float]: {"type": interval, "metavar": "LOW,HIGH"},
    tuple[str, ...]: {"action": "append", "metavar": "TEXT"},
}


class SizeAction(argparse.Action):
    """Sets width and height from a text such as 320x192."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Set both attributes of the namespace."""
        namespace.width, namespace.height = values


def size_type(text: str) -> tuple[int, int]:
    """Parse width x height in pixels."""
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a width and a height in pixels, such as 320x192"
        )
    return int(found[1]), int(found[2])


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of SamplingConfig; an option not given has no attribute."""
    types = get_type_hints(SamplingConfig)  # without their ranges, which SamplingConfig checks
    helps = {p.arg_name: p.description for p in parse_from_object(SamplingConfig).params}
    for group, title in GROUPS.items():
        arguments = parser.add_argument_group(title)
        for option in fields(SamplingConfig):
            if option.metadata["group"] == group:
                arguments.add_argument(
                    flag(option.name),
                    default=argparse.SUPPRESS,
                    help=option_help(option, helps[option.name]),
                    **VALUE_TYPES[types[option.name]],
                )
        if group == "size":
            arguments.add_argument(
                "--size", action=SizeAction, type=size_type, default=argparse.SUPPRESS,
                metavar="WIDTHxHEIGHT", help="both at once, such as 320x192: 320 wide, 192 high",
            )  # fmt: skip


def option_help(option: Field, description: str) -> str:
    """Return one line of help with the default, as argparse formats it."""
    text = " ".join(description.split()).replace("%", "%%")
    if option.default in (None, ()):
        return text
    shown = option.default
    if isinstance(shown, tuple):
        shown = ",".join(map(str, shown))  # as it is typed
    return f"{text} (default: {shown})"


def build_parser() -> Parser:
    """Declare the options of the command."""
    parser = Parser(
        "generate",
        "Generate images and text from a prompt of text and images.",
        EPILOG,
        usage="tf-lightning generate CKPT [TEXT | --image FILE] ... [options]",
    )
    add_prompt_options(parser)
    add_output_options(parser)
    add_sampling_options(parser)
    return parser


def add_prompt_options(parser: Parser) -> None:
    """Add the checkpoint and the parts of the prompt."""
    add = parser.add_argument
    add("checkpoint", type=name_type, metavar="CKPT",
        help="a checkpoint or the folder of a run, a folder of `export`, or its name on the hub",
    )  # fmt: skip
    part = {"dest": "parts", "action": "append", "default": []}
    add("--text", **part, type=text_part, metavar="TEXT",
        help="text of the prompt; --text may be left out")  # fmt: skip
    add("--image", **part, type=image_part, metavar="FILE", help="image of the prompt")
    add("--prompts", type=path_type, metavar="FILE",
        help="many prompts: one text in each line, or the parts of one in each .jsonl line",
    )  # fmt: skip


def add_output_options(parser: Parser) -> None:
    """Add the options of the outputs, their folder and the model."""
    add = parser.add_argument
    add("-o", "--out", type=path_type, default=Path("out"), metavar="FOLDER",
        help="folder of the outputs (default: out)")  # fmt: skip
    add("-n", "--num-outputs", type=positive_int, metavar="N",
        help="outputs of each prompt (default: 4 images of a single prompt, else 1)")  # fmt: skip
    add("--output-modality", choices=OUTPUT_MODALITIES,
        help="image: exactly one image; text: no images; any: what the model decides (default: "
        "image after text, text after an image)",
    )  # fmt: skip
    add("--seed", type=seed, default=0, metavar="N", help="output i uses seed + i (default: 0)")
    add("--autoencoder", type=name_type, metavar="NAME",
        help="the model's autoencoder: folder, file or hub name (default: that of the checkpoint)",
    )  # fmt: skip
    add("--batch-size", type=positive_int, default=16, metavar="N",
        help="outputs that are generated together (default: 16)")  # fmt: skip
    add("--weights", choices=("ema", "raw"),
        help="weights of the checkpoint (default: the EMA weights, if there are any)")  # fmt: skip
    add(
        "--device",
        type=name_type,
        metavar="NAME",
        help="such as cpu or cuda:1 (default: a GPU, if there is one)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="number format of the weights and of the computation (default: float32)")  # fmt: skip


def run_generate(args: list[str]) -> None:
    """Parse the options, then load the model, generate and write.

    Raises:
        UserError: there is no prompt, or two kinds of prompts, or an option does not fit.
    """
    options = build_parser().parse_args(name_texts(args))
    check_order(options)
    if options.parts and options.prompts:
        raise UserError("both a prompt and --prompts are given; leave one out")
    if not options.parts and not options.prompts:
        raise UserError(
            f"there is no prompt after the checkpoint {options.checkpoint!r}; give text, --image "
            "FILE or --prompts FILE"
        )
    makes_text = bool(options.parts) and options.parts[-1][0] == "image"
    if (options.output_modality or ("text" if makes_text else "image")) != "text":
        check_writable(options.out)  # a single text is printed
    given = {f.name: vars(options)[f.name] for f in fields(SamplingConfig) if f.name in options}
    sampling = SamplingConfig(**given)
    from tf_lightning.cli.outputs import generate_outputs  # imports torch

    generate_outputs(options, sampling, given)


def check_order(options: argparse.Namespace) -> None:
    """Raise UserError if the first word is a prompt and a later one is the checkpoint."""
    if os.path.exists(options.checkpoint):
        return
    for kind, text in options.parts:
        is_checkpoint = text.endswith(".ckpt") or os.path.isdir(text)
        if kind == "text" and is_checkpoint and os.path.exists(text):
            raise UserError(
                f"the checkpoint comes before the prompt: tf-lightning generate {text} "
                f'"{options.checkpoint}"'
            )
