"""What TensorBoard shows of the samples: pictures over their prompts, captions under pictures."""

import lightning as L
from torchvision.transforms.functional import pil_to_tensor

from callbacks.contact_sheet import Tile, contact_sheet
from callbacks.prompts import PromptSet
from callbacks.sampling import SampleBatch


def show(trainer: L.Trainer, prompts: PromptSet, sampled: SampleBatch, tag: str) -> None:
    """Logs `drawn/<tag>` of drawn pictures; `written/<tag>` and a table of written captions.

    Words that are known to be wrong are red.
    """
    writer, step = trainer.logger.experiment, trainer.global_step
    if sampled.captions is None:
        title, tiles = f"generated/{tag}", drawn_tiles(prompts, sampled)
    else:
        title, tiles = f"captioned/{tag}", written_tiles(prompts, sampled)
        writer.add_text(f"captions/{tag}", table(sampled), step)
    sheet = contact_sheet([(f"{title}, step {step}", tiles)], columns=2)
    writer.add_image(title, pil_to_tensor(sheet), step)


def drawn_tiles(prompts: PromptSet, sampled: SampleBatch) -> list[Tile]:
    """Each drawn picture over its prompt."""
    return [
        Tile(picture, prompt.text, prompts.judge(prompt, picture))
        for prompt, picture in zip(sampled.prompts, sampled.images, strict=True)
    ]


def written_tiles(prompts: PromptSet, sampled: SampleBatch) -> list[Tile]:
    """Each true picture over the caption written for it."""
    made = zip(sampled.prompts, sampled.images, sampled.captions, strict=True)
    return [
        Tile(picture, words, prompts.judge_words(prompt, words)) for prompt, picture, words in made
    ]


def table(sampled: SampleBatch) -> str:
    """Markdown: the captions that a picture has, and the one written for it."""
    rows = [
        f"| {'<br>'.join(prompt.references[:5])} | {words} |"
        for prompt, words in zip(sampled.prompts, sampled.captions, strict=True)
    ]
    return "\n".join(["| its captions | caption written |", "|---|---|", *rows])
