"""Composition on the embedded world by its oracle, in GenEval's tasks; GenEval's folder for it."""

from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from callbacks.metrics import SampleMetric
from callbacks.sampling import Kind, SampleBatch
from evaluation.composition import Composition, write_samples
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.world import Meaning


class ShapesComposition(SampleMetric):
    """What the embedded world's oracle finds right in drawn pictures, task by task.

    `composition[<label>]/<task>` for GenEval's tasks and `overall`, their mean. A picture of one
    object answers single_object (the shape) and colors; one of two answers two_object (the shapes),
    color_attr (each with its colour) and position (all that and the relation).

    Args:
        label: names the protocol in the brackets.
    """

    kind: Kind = "generated"

    def __init__(self, label: str = "shapes"):
        self.name = f"composition[{label}]"
        self.score = Composition(self.name, judge="the embedded world's oracle")

    def to(self, device: torch.device) -> "ShapesComposition":
        """Move the sums."""
        self.score.to(device)
        return self

    def update(self, sampled: SampleBatch) -> None:
        """Judge drawn pictures."""
        for prompt, drawn in zip(sampled.prompts, sampled.images, strict=True):
            for task, right in verdicts(prompt.about, drawn).items():
                self.score.update(task, right)

    def compute(self) -> dict[str, float]:
        """A number a task, and the overall one."""
        return {f"{self.name}/{task}": float(v) for task, v in self.score.compute().items()}

    def reset(self) -> None:
        """Forget the verdicts."""
        self.score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """The same for every task."""
        tasks = [*self.score.counts, "overall"]
        return {f"{self.name}/{task}": self.score.protocol for task in tasks}


def verdicts(asked: Meaning, picture: Image.Image) -> dict[str, bool]:
    """Each task that a prompt of this meaning sets, and whether the picture solves it."""
    reading = read(np.asarray(picture.convert("RGB")))
    shapes = Counter(thing.shape for thing in reading.objects)
    kinds = Counter((thing.shape, thing.colour) for thing in reading.objects)
    wanted = Counter(shape for shape, _ in asked.objects)
    has_shapes, has_kinds = wanted <= shapes, Counter(asked.objects) <= kinds
    if len(asked.objects) == 1:
        return {"single_object": has_shapes, "colors": has_kinds}
    return {"two_object": has_shapes, "color_attr": has_kinds, "position": reading.meaning == asked}


class GenEvalFolder(SampleMetric):
    """Writes drawn pictures where GenEval's own script looks for them; measures nothing itself.

    For `callbacks.published_prompts.GenEvalPrompts`. `folder`/NNNNN/metadata.jsonl and samples/NNNN.png.

    Args:
        folder: of all prompts.
    """

    kind: Kind = "generated"
    protocol: dict[str, dict] = {}

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def to(self, device: torch.device) -> "GenEvalFolder":
        """Nothing to move."""
        return self

    def update(self, sampled: SampleBatch) -> None:
        """Write pictures; a prompt's have to be in one batch.

        Raises:
            ValueError: they are not.
        """
        pairs = zip(sampled.prompts, sampled.images, strict=True)
        for (number, copies), group in groupby(pairs, key=lambda pair: pair[0].about):
            together = list(group)
            if len(together) != copies:
                raise ValueError(
                    f"prompt {number} has {len(together)} of its {copies} pictures in a batch; "
                    f"give a batch_size that is a multiple of {copies}"
                )
            metadata = together[0][0].metadata
            write_samples(self.folder, number, metadata, [picture for _, picture in together])

    def compute(self) -> dict[str, float]:
        """No number."""
        return {}

    def reset(self) -> None:
        """Nothing to forget."""
