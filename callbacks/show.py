"""What TensorBoard shows of the samples: pictures over their prompts, captions, text."""

from collections.abc import Sequence

import lightning as L
from torchvision.transforms.functional import pil_to_tensor

from callbacks.prompts import PromptSet
from callbacks.sampling import Sampled
from callbacks.sheet import Tile, contact_sheet


def show(
    trainer: L.Trainer, prompts: PromptSet, sampled: Sampled, texts: Sequence[str], tag: str
) -> None:
    """Logs `pictures/<tag>`, `captions/<tag>` and `text/<tag>`; words that are wrong are red."""
    writer, step = trainer.logger.experiment, trainer.global_step
    sections = []
    if sampled.drawn:
        sections.append(("Drawn from words", drawn_tiles(prompts, sampled)))
    if sampled.written:
        sections.append(("Words written for pictures", written_tiles(prompts, sampled)))
        rows = [
            f"| {i} | {prompt.references[0]} | {words} |"
            for i, (prompt, words) in enumerate(zip(sampled.prompts, sampled.written, strict=True))
        ]
        head = ["| picture | its caption | caption written |", "|---|---|---|"]
        writer.add_text(f"captions/{tag}", "\n".join([*head, *rows]), step)
    if sections:
        sheet = contact_sheet(sections, columns=4)
        writer.add_image(f"pictures/{tag}", pil_to_tensor(sheet), step)
    if texts:
        writer.add_text(f"text/{tag}", "\n\n".join(texts), step)


def drawn_tiles(prompts: PromptSet, sampled: Sampled) -> list[Tile]:
    """Each drawn picture over its prompt."""
    return [
        Tile(picture, prompt.text, prompts.judge(prompt, picture) is not False)
        for prompt, picture in zip(sampled.prompts, sampled.drawn, strict=True)
    ]


def written_tiles(prompts: PromptSet, sampled: Sampled) -> list[Tile]:
    """Each true picture over the caption written for it."""
    return [
        Tile(picture, words, prompts.judge_words(prompt, words) is not False)
        for prompt, picture, words in zip(
            sampled.prompts, sampled.true, sampled.written, strict=True
        )
    ]
