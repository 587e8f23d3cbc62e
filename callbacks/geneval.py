"""GenEval: its tasks on the shapes world, judged by the oracle, and the folder of its script."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from callbacks.metrics import SampleMetric
from callbacks.prompts import Prompt
from callbacks.sampling import Kind, SampleBatch
from evaluation.composition import TASKS, Composition, write_samples
from tf_lightning.errors import UserError
from tf_lightning.folders import check_writable
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.world import Meaning


class ShapesComposition(SampleMetric):
    """Share of generated images that the oracle of the shapes world finds right, by task.

    The values are `composition[<label>]/<task>` for GenEval's tasks, and `overall` for their mean.
    A prompt with one object has the tasks single_object (the shape) and colors. One with two
    objects has two_object (the shapes), color_attr (each shape with its color) and position (also
    the relation).

    Args:
        label: name of the protocol in brackets.
    """

    kind: Kind = "generated"

    def __init__(self, label: str = "shapes"):
        self.name = f"composition[{label}]"
        self.names = [f"{self.name}/{task}" for task in (*TASKS, "overall")]
        self.score = Composition(self.name, judge="the shapes world's oracle")

    def check(
        self, prompts: Sequence[Prompt], num_real: Callable[[], int], batch_size: int
    ) -> None:
        """Refuse prompts whose meaning in the shapes world is unknown."""
        if not all(isinstance(prompt.about, Meaning) for prompt in prompts):
            raise UserError(
                "ShapesComposition judges images of the shapes world alone; use the prompts "
                "callbacks.prompts.ShapesPrompts or remove this metric"
            )

    def to(self, device: torch.device) -> "ShapesComposition":
        """Move the sums to a device."""
        self.score.to(device)
        return self

    def update(self, batch: SampleBatch) -> None:
        """Judge generated images."""
        for prompt, image in zip(batch.prompts, batch.images, strict=True):
            for task, right in verdicts(prompt.about, image).items():
                self.score.update(task, right)

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return the share of each task and their mean, by name."""
        try:
            shares = self.score.compute()
        except ValueError as error:
            return {}, [str(error)]
        return {f"{self.name}/{task}": float(value) for task, value in shares.items()}, []

    def reset(self) -> None:
        """Remove all verdicts."""
        self.score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Protocol of each task, by name; it is the same for all."""
        tasks = [*self.score.counts, "overall"]
        return {f"{self.name}/{task}": self.score.protocol for task in tasks}


def verdicts(meaning: Meaning, image: Image.Image) -> dict[str, bool]:
    """Judge an image by each task of a prompt with this meaning."""
    reading = read(np.asarray(image.convert("RGB")))
    shapes = Counter(thing.shape for thing in reading.objects)
    kinds = Counter((thing.shape, thing.color) for thing in reading.objects)
    expected_shapes = Counter(shape for shape, _ in meaning.objects)
    has_shapes, has_kinds = expected_shapes <= shapes, Counter(meaning.objects) <= kinds
    if len(meaning.objects) == 1:
        return {"single_object": has_shapes, "colors": has_kinds}
    position = reading.meaning == meaning
    return {"two_object": has_shapes, "color_attr": has_kinds, "position": position}


class GenEvalFolder(SampleMetric):
    """Writes generated images in the layout of GenEval's own script; it computes no values.

    It needs the prompts of `callbacks.published_prompts.GenEvalPrompts` and writes
    `folder`/NNNNN/metadata.jsonl and `folder`/NNNNN/samples/NNNN.png.

    Args:
        folder: folder of all prompts.
    """

    kind: Kind = "generated"
    names: list[str] = []
    protocol: dict[str, dict] = {}

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def check(
        self, prompts: Sequence[Prompt], num_real: Callable[[], int], batch_size: int
    ) -> None:
        """Refuse other prompts than GenEval's, and batches that divide a prompt's images."""
        check_writable(self.folder)
        if not all(isinstance(prompt.about, tuple) and prompt.metadata for prompt in prompts):
            raise UserError(
                "GenEvalFolder needs the prompts callbacks.published_prompts.GenEvalPrompts"
            )
        copies = prompts[0].about[1]
        if batch_size % copies:
            raise UserError(
                f"batch_size={batch_size} divides the {copies} images of a prompt; give a multiple "
                f"of {copies}"
            )

    def to(self, device: torch.device) -> "GenEvalFolder":
        """Do nothing: there are no tensors."""
        return self

    def update(self, batch: SampleBatch) -> None:
        """Write generated images.

        Raises:
            ValueError: the images of a prompt are not all in this batch.
        """
        pairs = zip(batch.prompts, batch.images, strict=True)
        for (number, copies), group in groupby(pairs, key=lambda pair: pair[0].about):
            members = list(group)
            if len(members) != copies:
                raise ValueError(
                    f"the batch has {len(members)} of {copies} images of prompt {number}; give a "
                    f"batch_size that is a multiple of {copies}"
                )
            metadata = members[0][0].metadata
            write_samples(self.folder, number, metadata, [image for _, image in members])

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return no values."""
        return {}, []

    def reset(self) -> None:
        """Do nothing: written files stay."""
