"""`tf-lightning generate`: a picture from words, words from a picture."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from PIL import Image

from tf_lightning.data.corpus import BadSample
from tf_lightning.data.images import load_picture
from tf_lightning.errors import UserError
from tf_lightning.model import Model, RawDocument, load
from tf_lightning.sampler import SAMPLERS

EPILOG = """\
examples:
  tf-lightning generate last.ckpt "a red circle above a blue square" -o out
  tf-lightning generate last.ckpt --image in.png                     what does it show?
  tf-lightning generate last.ckpt --image in.png "make the circle green" -o out
Text and --image parts form one prompt, in the order given. A prompt that ends in text is answered
with a picture, one that ends in a picture with words; --answer says otherwise.
"""


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
    add("checkpoint", metavar="CKPT", help="a file that `tf-lightning fit` wrote")
    part = {"dest": "parts", "action": "append", "default": []}
    add(
        "--text",
        **part,
        type=text_part,
        metavar="TEXT",
        help="text of the prompt; --text may be left out",
    )
    add("--image", **part, type=image_part, metavar="FILE", help="picture of the prompt")
    add("-o", "--out", type=Path, default=Path("out"), help="folder for pictures (default: out)")
    add("-n", "--num-images", type=positive, default=4, help="pictures to draw (default: 4)")
    add("--answer", choices=("image", "text"), help="what to generate (default: the other kind)")
    add("--guidance-scale", type=float, default=3.0, help="1 = off (default: 3)")
    add("--steps", type=int, default=50, help="denoising steps, 1 to 1000 (default: 50)")
    add("--sampler", choices=SAMPLERS, default="DDIMScheduler", help="(default: DDIMScheduler)")
    add("--max-new-tokens", type=positive, default=64, help="longest text (default: 64)")
    add(
        "--temperature",
        type=not_negative,
        default=0.0,
        help="of text; 0 = most probable (default: 0)",
    )
    add("--seed", type=int, default=0, help="of the first picture, or of the text (default: 0)")
    return parser


def run_generate(args: list[str]) -> None:
    """Parse, load, generate, write."""
    options = build_parser().parse_args(name_texts(args))
    parts = options.parts
    if not parts:
        raise UserError("there is no prompt; give text, or --image FILE, after the checkpoint")
    model = load(options.checkpoint)
    prompt = [read_part(kind, value, model) for kind, value in parts]
    ends_in_text = parts[-1][0] == "text"
    if (options.answer or ("image" if ends_in_text else "text")) == "image":
        draw(model, prompt, parts, options)
    else:
        (text,) = model.write(
            [prompt],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        print(text)


def read_part(kind: str, value: str, model: Model) -> str | Image.Image:
    """Text as it is; a picture cropped and resized to what the model reads."""
    if kind == "text":
        return value
    if model.autoencoder is None:
        raise UserError("this model was trained on text alone; leave --image out")
    try:
        return load_picture(Path(value), model.image_size)
    except BadSample as error:
        raise UserError(f"{value}: {error}; give a PNG or JPEG file") from error


def draw(model: Model, prompt: RawDocument, parts: list, options: argparse.Namespace) -> None:
    """Draw the pictures and write them, with a JSON file that says how they were made."""
    seeds = [options.seed + i for i in range(options.num_images)]
    how = {
        "guidance_scale": options.guidance_scale,
        "num_inference_steps": options.steps,
        "sampler": options.sampler,
    }
    options.out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    pictures = model.draw([prompt] * len(seeds), seeds=seeds, progress=True, **how)
    for seed, picture in zip(seeds, pictures, strict=True):
        path = options.out / f"{seed:04d}.png"
        picture.save(path)
        record = {"prompt": parts, "seed": seed, "checkpoint": options.checkpoint, **how}
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"Wrote {len(seeds)} pictures to {options.out}: {options.out}/{seeds[0]:04d}.png ...")
