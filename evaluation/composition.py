"""GenEval (Ghosh 2023): its prompts, its folder of samples, and its score.

A prompt is a dict in GenEval's own format: `tag` (the task), `prompt`, `include` and optionally
`exclude`, which are lists of {`class`, `count`, optionally `color`, optionally `position`:
[relation, index into `include`]}. An image is right if it shows at least `count` objects of every
class to include, with the given color and position, and fewer than `count` of every class to
exclude. The caller judges the images.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from evaluation.files import atomic_file

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Composition(Metric):
    """Share of right images in each task, and the mean over the tasks that have images.

    Higher is better, from 0 to 1. The mean over tasks is GenEval's overall score, so a task with
    few prompts weighs as much as one with many.

    Args:
        name: name of the metric in logs.
        judge: description of the judge, recorded in the protocol.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, name: str = "geneval", judge: str = ""):
        super().__init__()
        self.name, self.judge = name, judge
        self.add_state("right", torch.zeros(len(TASKS), dtype=torch.long), "sum")
        self.add_state("asked", torch.zeros(len(TASKS), dtype=torch.long), "sum")
        self.counts: dict[str, int] = {}

    def update(self, tag: str, correct: bool) -> None:
        """Add the verdict on one image of a task.

        Raises:
            ValueError: the task is unknown.
        """
        if tag not in TASKS:
            raise ValueError(f"unknown task {tag!r}; GenEval's tasks are {', '.join(TASKS)}")
        self.asked[TASKS.index(tag)] += 1
        self.right[TASKS.index(tag)] += int(correct)

    def compute(self) -> dict[str, Tensor]:
        """Return the share of right images by task and their mean as "overall", float64 scalars.

        Raises:
            ValueError: no image was added.
        """
        if not self.asked.any():
            raise ValueError(f"{self.name} was given no image; give it at least one")
        self.counts = {task: int(n) for task, n in zip(TASKS, self.asked, strict=True) if n}
        shares = {
            task: self.right[i].double() / self.asked[i]
            for i, task in enumerate(TASKS)
            if self.asked[i]
        }
        return shares | {"overall": torch.stack(list(shares.values())).mean()}

    @property
    def protocol(self) -> dict:
        """Settings of the metric, and the number of images of each task at the last `compute`."""
        return {"metric": "geneval", "judge": self.judge, "num_images": self.counts}


def read_prompts(path: str | Path) -> list[dict]:
    """Read GenEval's prompts, one JSON object a line.

    Raises:
        ValueError: a line is not a prompt of GenEval.
    """
    prompts = []
    lines = Path(path).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)
            valid = prompt["tag"] in TASKS and isinstance(prompt["prompt"], str)
            objects = [*prompt["include"], *prompt.get("exclude", [])]
            valid &= all(isinstance(o["class"], str) and o["count"] >= 1 for o in objects)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(
                f"line {number} of {path} is not a prompt of GenEval; it needs a tag "
                f"({', '.join(TASKS)}), a prompt, and include with class and count"
            )
        prompts.append(prompt)
    return prompts


def write_samples(
    folder: str | Path, index: int, prompt: dict, images: Sequence[Image.Image]
) -> None:
    """Write the images of a prompt to the paths that GenEval's own script reads.

    The paths are `folder`/NNNNN/metadata.jsonl and `folder`/NNNNN/samples/0000.png, 0001.png, ...

    Args:
        folder: folder of all prompts.
        index: index of the prompt in the file of prompts.
        prompt: a prompt from `read_prompts`.
        images: images of the prompt; the official protocol has four.
    """
    prompt_folder = Path(folder, f"{index:05d}")
    (prompt_folder / "samples").mkdir(parents=True, exist_ok=True)
    with atomic_file(prompt_folder / "metadata.jsonl") as file:
        file.write_bytes(json.dumps(prompt).encode())
    for number, image in enumerate(images):
        with atomic_file(prompt_folder / "samples" / f"{number:04d}.png") as file:
            image.save(file, format="PNG")
