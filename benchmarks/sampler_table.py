"""Score samplers, steps and guidance with the oracle of the shapes world; also edits and <boi>.

    python benchmarks/sampler_table.py runs/quickstart/checkpoints/last.ckpt
    python benchmarks/sampler_table.py CKPT --only edits --guidance 1 2 3

Three Markdown tables are printed:
    samplers  share of 256 prompts whose image shows what the prompt says. Half of the prompts have
              one object, half have two objects in a combination that no training image shows. All
              rows have the same prompts and the same initial noise; each --guidance is a column.
    edits     share of 128 held-out images with instructions whose output shows the edit, with the
              other object unchanged, for the default sampler and for the paper's.
    boi       share of 128 held-out captions, and of 128 images with instructions, that the model
              answers with exactly one image when it decides freely between text and images.
"""

import argparse
from itertools import product

import numpy as np
from PIL import Image

from callbacks.shapes_report import SEED_OFFSET, questions
from tf_lightning.diffusion.process import RectifiedFlow
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.shapes.grammar import draw_edit
from tf_lightning.shapes.oracle import carried_out, read
from tf_lightning.shapes.world import Scene, draw_scene, generator, render

Row = tuple[str, int] | tuple[str, int, float]  # sampler, steps, timestep_shift

NOISE_ROWS: list[Row] = [
    ("DDPMScheduler", 250),
    ("DDPMScheduler", 100),
    ("DDIMScheduler", 250),
    ("DDIMScheduler", 50),
    ("DDIMScheduler", 25),
    ("DPMSolverMultistepScheduler-SDE", 25),
    ("DPMSolverMultistepScheduler-SDE", 25, 2.5),
    ("DPMSolverMultistepScheduler", 25),
    ("DPMSolverMultistepScheduler", 10),
    ("UniPCMultistepScheduler", 25),
    ("UniPCMultistepScheduler", 10),
]
FLOW_ROWS: list[Row] = [
    ("FlowMatchEulerDiscreteScheduler", 50),
    ("FlowMatchEulerDiscreteScheduler", 25),
    ("FlowMatchHeunDiscreteScheduler", 13),  # 25 evaluations
]


EDIT_ROWS: list[Row] = [("DDIMScheduler", 50), ("DDPMScheduler", 250)]


def parse_row(argument: str) -> Row:
    """Parse SAMPLER:STEPS or SAMPLER:STEPS:SHIFT, with SHIFT = `timestep_shift`."""
    sampler, steps, *shift = argument.split(":")
    return sampler, int(steps), *map(float, shift)


def how(row: Row) -> dict:
    """Sampling options of a row."""
    return dict(zip(("sampler", "num_inference_steps", "timestep_shift"), row, strict=False))


def name(row: Row) -> str:
    """Sampler of a row, with its shift."""
    return row[0] + "".join(f", shifted by {shift:g}" for shift in row[2:])


def sampler_table(
    pipe: TransfusionPipeline, rows: list[Row], count: int, scales: list[float], batch_size: int
) -> None:
    """Print the share of right images, by sampler and steps (rows) and guidance scale (columns)."""
    asked = questions(count // 2, 1, 0) + questions(count - count // 2, 2, 0)
    columns = [f"guidance {scale:g}" for scale in scales]
    print(f"| sampler ({count} prompts) | steps | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(scales))
    for row in rows:
        shares = []
        for scale in scales:
            out = pipe(
                [question.prompt for question in asked],
                guidance_scale=scale,
                batch_size=batch_size,
                **how(row),
            )
            right = [
                read(np.asarray(image)).meaning == question.meaning
                for image, question in zip(out.images, asked, strict=True)
            ]
            shares.append(f"{np.mean(right):.1%}")
        print(f"| {name(row)} | {row[1]} | " + " | ".join(shares) + " |", flush=True)


def draw_edits(count: int) -> list[tuple[Scene, str, Scene]]:
    """Held-out edits: scene before, instruction, scene after."""
    edits = []
    for index in range(count):
        rng = generator(SEED_OFFSET, index, "val")
        scene = draw_scene(rng, split="val")
        edits.append((scene, *draw_edit(scene, rng, split="val")))
    return edits


def edit_prompts(edits: list[tuple[Scene, str, Scene]]) -> list[list[Image.Image | str]]:
    """Prompts of image and instruction."""
    return [[Image.fromarray(render(scene)), words] for scene, words, _ in edits]


def edit_table(
    pipe: TransfusionPipeline, rows: list[Row], count: int, scales: list[float], batch_size: int
) -> None:
    """Print the shares of correct edits, by sampler and guidance scales."""
    edits = draw_edits(count)
    print(f"| sampler ({count} held-out instructions) | guidance | carried out | meaning right |")
    print("|---|---|---|---|")
    pairs = [(scale, None) for scale in scales] + [(s, 1.5) for s in scales if s > 1.5]
    for row, (scale, image_scale) in product(rows, pairs):
        out = pipe(
            edit_prompts(edits),
            guidance_scale=scale,
            image_guidance_scale=image_scale,
            batch_size=batch_size,
            **how(row),
        )
        images = [np.asarray(image) for image in out.images]
        done = [
            carried_out(image, before, after)
            for image, (before, _, after) in zip(images, edits, strict=True)
        ]
        meant = [
            read(image).meaning == after.meaning
            for image, (_, _, after) in zip(images, edits, strict=True)
        ]
        guided = f"{scale:g}" + (f", of the image {image_scale:g}" if image_scale else "")
        shares = f"{np.mean(done):.1%} | {np.mean(meant):.1%}"
        print(f"| {name(row)}, {row[1]} steps | {guided} | {shares} |", flush=True)


def boi_table(pipe: TransfusionPipeline, count: int, batch_size: int) -> None:
    """Print how often the model answers with one image when it may answer with anything."""
    asked: dict[str, list] = {
        "caption": [question.prompt for question in questions(count, 2, 0)],
        "image, instruction": edit_prompts(draw_edits(count)),
    }
    print(f"| prompt ({count} held-out) | answered with exactly one image |")
    print("|---|---|")
    for name, prompts in asked.items():
        out = pipe(
            prompts,
            output_modality="any",
            max_images=2,
            max_new_tokens=16,
            num_inference_steps=10,
            batch_size=batch_size,
        )
        one = [[type(part) for part in answer] == [Image.Image] for answer in out.parts]
        print(f"| {name} | {np.mean(one):.1%} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint of a run on the shapes world")
    parser.add_argument("--only", choices=("samplers", "edits", "boi"), help="print one table only")
    scales = "guidance scales (default: 1 3 5)"
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0], metavar="SCALE", help=scales
    )
    parser.add_argument(
        "--rows",
        type=parse_row,
        nargs="+",
        metavar="SAMPLER:STEPS[:SHIFT]",
        help="rows of the tables",
    )
    parser.add_argument(
        "--prompts", type=int, default=256, help="prompts of `samplers` (default: 256)"
    )
    parser.add_argument(
        "--edits", type=int, default=128, help="prompts of `edits` and `boi` (default: 128)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    options = parser.parse_args()
    pipe = TransfusionPipeline.from_pretrained(options.checkpoint)
    flow = isinstance(pipe.process, RectifiedFlow)
    if options.only in (None, "samplers"):
        rows = options.rows or (FLOW_ROWS if flow else NOISE_ROWS)
        sampler_table(pipe, rows, options.prompts, options.guidance, options.batch_size)
    if options.only in (None, "edits"):
        rows = options.rows or (FLOW_ROWS[:1] if flow else EDIT_ROWS)
        edit_table(pipe, rows, options.edits, options.guidance, options.batch_size)
    if options.only in (None, "boi"):
        boi_table(pipe, options.edits, options.batch_size)


if __name__ == "__main__":
    main()
