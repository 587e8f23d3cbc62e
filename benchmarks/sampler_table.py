"""How samplers, steps and guidance score on the embedded world's oracle; edits; <boi> unasked.

    python benchmarks/sampler_table.py runs/quickstart/checkpoints/last.ckpt
    python benchmarks/sampler_table.py CKPT --only edits --guidance 1 2 3

Three parts, each printed as a table for the README:
    samplers  256 prompts, half with one object, half with two of meanings that no training picture
              shows: the share whose picture says what the prompt says. The same prompts and first
              noises for every row. With --guidance G a column for each. SHIFT is `timestep_shift`.
    edits     128 held-out pictures and instructions: the share whose answer shows the asked edit,
              with the other object where it was; by the sampler of `generate` and by the paper's
    boi       128 held-out captions, and 128 pictures with instructions, answered with whatever the
              model samples: the share that it answers with exactly one picture, by its own <boi>
"""

import argparse
import sys
from itertools import product

import numpy as np
from PIL import Image

sys.path.insert(0, "")  # callbacks/ is found from the checkout

from callbacks.shapes_report import SEED_OFFSET, questions
from tf_lightning.diffusion.process import RectifiedFlow, process_from_hparams
from tf_lightning.generation.pipeline import TransfusionPipeline, load
from tf_lightning.shapes.grammar import draw_edit
from tf_lightning.shapes.oracle import carried_out, read
from tf_lightning.shapes.world import Scene, draw_scene, generator, render

Row = tuple[str, int] | tuple[str, int, float]  # sampler, steps, and their shift where it is not 1

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
    """Of SAMPLER:STEPS or SAMPLER:STEPS:SHIFT."""
    sampler, steps, *shift = argument.split(":")
    return sampler, int(steps), *map(float, shift)


def how(row: Row) -> dict:
    """What `generate` takes of a row."""
    return dict(zip(("sampler", "num_inference_steps", "timestep_shift"), row, strict=False))


def name(row: Row) -> str:
    """Of a row's sampler, and its shift."""
    return row[0] + "".join(f", shifted by {shift:g}" for shift in row[2:])


def sampler_table(
    model: TransfusionPipeline, rows: list[Row], count: int, scales: list[float], batch_size: int
) -> None:
    """One row a sampler and number of steps, one column a guidance scale."""
    asked = questions(count // 2, 1, 0) + questions(count - count // 2, 2, 0)
    columns = [f"guidance {scale:g}" for scale in scales]
    print(f"| sampler ({count} prompts) | steps | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(scales))
    for row in rows:
        shares = []
        for scale in scales:
            out = model.generate(
                [question.prompt for question in asked],
                guidance_scale=scale,
                batch_size=batch_size,
                **how(row),
            )
            right = [
                read(np.asarray(picture)).meaning == question.meaning
                for picture, question in zip(out.images, asked, strict=True)
            ]
            shares.append(f"{np.mean(right):.1%}")
        print(f"| {name(row)} | {row[1]} | " + " | ".join(shares) + " |", flush=True)


def draw_edits(count: int) -> list[tuple[Scene, str, Scene]]:
    """Held-out scenes, instructions, and the scenes that are asked for."""
    edits = []
    for index in range(count):
        rng = generator(SEED_OFFSET, index, "val")
        scene = draw_scene(rng, split="val")
        edits.append((scene, *draw_edit(scene, rng, split="val")))
    return edits


def edit_prompts(edits: list[tuple[Scene, str, Scene]]) -> list[list[Image.Image | str]]:
    """Picture and instruction of each edit."""
    return [[Image.fromarray(render(scene)), words] for scene, words, _ in edits]


def edit_table(
    model: TransfusionPipeline, rows: list[Row], count: int, scales: list[float], batch_size: int
) -> None:
    """One row a sampler and a guidance scale; with the picture's own scale beside it."""
    edits = draw_edits(count)
    print(f"| sampler ({count} held-out instructions) | guidance | carried out | meaning right |")
    print("|---|---|---|---|")
    pairs = [(scale, None) for scale in scales] + [(s, 1.5) for s in scales if s > 1.5]
    for row, (scale, image_scale) in product(rows, pairs):
        out = model.generate(
            edit_prompts(edits),
            guidance_scale=scale,
            image_guidance_scale=image_scale,
            batch_size=batch_size,
            **how(row),
        )
        pictures = [np.asarray(picture) for picture in out.images]
        done = [
            carried_out(picture, before, after)
            for picture, (before, _, after) in zip(pictures, edits, strict=True)
        ]
        meant = [
            read(picture).meaning == after.meaning
            for picture, (_, _, after) in zip(pictures, edits, strict=True)
        ]
        guided = f"{scale:g}" + (f", of the picture {image_scale:g}" if image_scale else "")
        shares = f"{np.mean(done):.1%} | {np.mean(meant):.1%}"
        print(f"| {name(row)}, {row[1]} steps | {guided} | {shares} |", flush=True)


def boi_table(model: TransfusionPipeline, count: int, batch_size: int) -> None:
    """How often the model begins a picture, and nothing else, where its documents do."""
    asked: dict[str, list] = {
        "caption": [question.prompt for question in questions(count, 2, 0)],
        "picture, instruction": edit_prompts(draw_edits(count)),
    }
    print(f"| prompt ({count} held-out) | answered with exactly one picture |")
    print("|---|---|")
    for name, prompts in asked.items():
        out = model.generate(
            prompts,
            answer="any",
            max_images=2,
            max_new_tokens=16,
            num_inference_steps=10,
            batch_size=batch_size,
        )
        one = [[type(part) for part in answer] == [Image.Image] for answer in out.documents]
        print(f"| {name} | {np.mean(one):.1%} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--only", choices=("samplers", "edits", "boi"), help="one of the tables")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument(
        "--rows", type=parse_row, nargs="+", metavar="SAMPLER:STEPS[:SHIFT]", help="of the tables"
    )
    parser.add_argument("--prompts", type=int, default=256, help="of samplers (default: 256)")
    parser.add_argument("--edits", type=int, default=128, help="and of boi (default: 128)")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    model = load(options.checkpoint)
    flow = isinstance(process_from_hparams(model.hparams), RectifiedFlow)
    if options.only in (None, "samplers"):
        rows = options.rows or (FLOW_ROWS if flow else NOISE_ROWS)
        sampler_table(model, rows, options.prompts, options.guidance, options.batch_size)
    if options.only in (None, "edits"):
        rows = options.rows or (FLOW_ROWS[:1] if flow else EDIT_ROWS)
        edit_table(model, rows, options.edits, options.guidance, options.batch_size)
    if options.only in (None, "boi"):
        boi_table(model, options.edits, options.batch_size)


if __name__ == "__main__":
    main()
