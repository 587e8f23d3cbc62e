"""GenEval (Ghosh 2023): its prompts, its folder of samples, and its score.

A prompt is a dict as GenEval writes it: `tag` (task), `prompt`, `include` and perhaps `exclude`,
lists of {`class`, `count`, perhaps `color`, perhaps `position`: [relation, index in `include`]}.
A picture is right if it has at least `count` of everything to include, so coloured and so placed,
and fewer than `count` of everything to exclude. Who judges it is the caller's choice.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Composition(Metric):
    """Share of right pictures in each task, and the mean over the tasks that have pictures.

    Higher is better, from 0 to 1. GenEval's overall score is this mean, so a task of few prompts
    weighs as much as one of many.

    Args:
        name: the metric's name in logs.
        judge: who gives the verdicts, for the protocol.
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
        """Adds the verdict on one picture of a task.

        Raises:
            ValueError: no such task.
        """
        if tag not in TASKS:
            raise ValueError(f"no task {tag!r}; GenEval's are {', '.join(TASKS)}")
        self.asked[TASKS.index(tag)] += 1
        self.right[TASKS.index(tag)] += int(correct)

    def compute(self) -> dict[str, Tensor]:
        """Share of right pictures by task, and their mean as "overall"; float64 scalars."""
        if not self.asked.any():
            raise ValueError(f"{self.name} was given no picture")
        self.counts = {task: int(n) for task, n in zip(TASKS, self.asked, strict=True) if n}
        shares = {
            task: self.right[i].double() / self.asked[i]
            for i, task in enumerate(TASKS)
            if self.asked[i]
        }
        return shares | {"overall": torch.stack(list(shares.values())).mean()}

    @property
    def protocol(self) -> dict:
        """What the number depends on; pictures of each task are those of the last `compute`."""
        return {"metric": "geneval", "judge": self.judge, "num_pictures": self.counts}


def read_prompts(path: str | Path) -> list[dict]:
    """GenEval's prompts, one a line.

    Raises:
        ValueError: a line that is not a prompt of GenEval.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompt = json.loads(line)
            known = prompt["tag"] in TASKS and isinstance(prompt["prompt"], str)
            things = [*prompt["include"], *prompt.get("exclude", [])]
            known &= all(isinstance(t["class"], str) and t["count"] >= 1 for t in things)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise ValueError(
                f"line {number} of {path} is no prompt of GenEval: it needs a tag of "
                f"{', '.join(TASKS)}, prompt, and include with class and count"
            )
        prompts.append(prompt)
    return prompts


def write_samples(
    folder: str | Path, index: int, prompt: dict, pictures: Sequence[Image.Image]
) -> None:
    """Writes a prompt's pictures where GenEval's own script looks for them.

    `folder`/NNNNN/metadata.jsonl and `folder`/NNNNN/samples/0000.png, 0001.png, ...

    Args:
        folder: of all prompts.
        index: the prompt's place in the file of prompts.
        prompt: as `read_prompts` gives it.
        pictures: the official protocol has four.
    """
    place = Path(folder, f"{index:05d}")
    (place / "samples").mkdir(parents=True, exist_ok=True)
    write_whole(place / "metadata.jsonl", json.dumps(prompt).encode())
    for number, picture in enumerate(pictures):
        target = place / "samples" / f"{number:04d}.png"
        # GenEval's script takes names that begin with digits only, so it passes over this one.
        unfinished = target.with_name(f".{target.name}")
        picture.save(unfinished, format="PNG")
        os.replace(unfinished, target)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, all or nothing."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
