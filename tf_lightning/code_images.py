"""Images made of codes, token by token, and the grammar by which each is whole (Chameleon).

Behind <boi> come N codes and then <eoi>; nothing else stands inside, and no code outside.

Shapes: n sequences, N codes an image, V vocabulary, of which the last are codes.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from tf_lightning.decoding import choose
from tf_lightning.errors import UserError, not_a_number
from tf_lightning.reply import Reply
from tf_lightning.request import Settings, Speaker


def in_image(reply: Reply, boi_id: int) -> bool:
    """Whether the token that a sequence reads next is <boi> or a code."""
    return reply.token == boi_id or bool(reply.codes)


def text_logits(logits: Tensor, speaker: Speaker) -> Tensor:
    """Of logits (n, V) those of text; <eoi> is learnt behind codes alone, so it is none here."""
    logits = logits[:, : speaker.net.text_vocab_size]
    if speaker.net.num_codes:
        logits[:, speaker.tokenizer.eoi_id] = -torch.inf
    return logits


def next_codes(
    replies: Sequence[Reply], outputs: list[Tensor], speaker: Speaker, settings: Settings
) -> list[int | None]:
    """Each image's next code, drawn by guided logits; None where it is whole.

    Args:
        replies: sequences that have read <boi> or a code.
        outputs: their logits, (n, V) for each kind of branch.
        speaker: the network.
        settings: how codes are drawn.
    """
    parts = [logits[:, speaker.net.text_vocab_size :].float() for logits in outputs]
    logits = settings.guidance.combine(parts, speaker.net.num_codes).cpu()
    if not logits.isfinite().all():
        raise UserError(not_a_number("a picture's code"))
    goes_on = [len(reply.codes) < speaker.num_patches for reply in replies]
    if not any(goes_on):
        return [None] * len(replies)
    generators = [reply.generator for reply in compress(replies, goes_on)]
    chosen = iter(choose(logits[torch.tensor(goes_on)], settings.codes, generators))
    return [next(chosen) if more else None for more in goes_on]


def add_code(reply: Reply, code: int, speaker: Speaker) -> Tensor | None:
    """Write a code; the image (1, h, w) if it was the last."""
    reply.codes.append(code)
    reply.token = speaker.net.text_vocab_size + code
    whole = len(reply.codes) == speaker.num_patches
    return torch.tensor(reply.codes).view(speaker.latent_shape) if whole else None


def leave_image(reply: Reply, eoi_id: int) -> None:
    """<eoi> is next; rows that read no images forget the one that they helped to draw."""
    for branch in reply.branches:
        branch.length -= 0 if branch.reads_images else len(reply.codes) + 1  # <boi> too
    reply.codes, reply.text, reply.token = [], [], eoi_id
