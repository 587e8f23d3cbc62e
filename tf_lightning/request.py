"""What is asked of a model, and what must be known of it to answer.

Shapes: N patches an image, C x h x w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tf_lightning.batch import Batch, Document, document_length, pack
from tf_lightning.decoding import TextSampling
from tf_lightning.errors import UserError
from tf_lightning.guidance import Guidance
from tf_lightning.net import Net

Answer = Literal["image", "text", "any"]


@dataclass(frozen=True)
class Settings:
    """What to answer, and how."""

    answer: Answer = "any"
    """"image": one, now; "text": up to <eos> or <boi>; "any": what the model samples."""
    text: TextSampling = field(default_factory=TextSampling)
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: Any = None
    """Of the images, from `sampler.build_scheduler`."""
    num_inference_steps: int = 50
    codes: TextSampling = field(default_factory=lambda: TextSampling(temperature=1.0))
    """Which codes are drawn, where images are made of them; of its fields those of one token."""
    max_images: int = 1
    """Images in an answer of any kind, at most; the <boi> after them ends it."""

    def __post_init__(self) -> None:
        if self.answer not in ("image", "text", "any"):
            raise UserError(f"answer={self.answer!r} must be 'image', 'text' or 'any'")
        if self.max_images < 1:
            raise UserError(
                f"max_images={self.max_images} must be at least 1; answer='text' draws none"
            )

    @property
    def num_images(self) -> int:
        """Most images of an answer."""
        return {"image": 1, "text": 0, "any": self.max_images}[self.answer]

    @property
    def num_tokens(self) -> int:
        """Most text tokens of an answer."""
        return 0 if self.answer == "image" else self.text.max_new_tokens

    @property
    def num_turns(self) -> int:
        """Most tokens and denoising steps of an answer."""
        return self.num_tokens + self.num_images * self.num_inference_steps

    @property
    def branches(self) -> list[tuple[bool, bool]]:
        """Which (text, images) each row of a sequence reads; the first reads everything."""
        return self.guidance.branches if self.num_images else [(True, True)]


@dataclass(frozen=True)
class Speaker:
    """A network and what must be known of it to generate."""

    net: Net
    tokenizer: Any
    """Has bos_id, eos_id, boi_id, eoi_id; vocab_size of codes; decode, where texts stop answers."""
    patch_size: int
    latent_shape: tuple[int, int, int] | None = None
    """(C, h, w) of its images; None: it has none."""
    causal_images: bool = False
    """As trained; codes always are."""
    max_length: int | None = None
    """Positions of the longest document it was trained on; None: unknown."""

    @property
    def causal(self) -> bool:
        """Whether a patch sees only the earlier ones of its image, as a code does."""
        return self.causal_images or self.net.num_codes > 0

    @property
    def num_patches(self) -> int:
        """N, patches (the time token counted) or codes; 0 without images."""
        if self.latent_shape is None:
            return 0
        _, height, width = self.latent_shape
        return (height // self.patch_size) * (width // self.patch_size) + self.net.time_token

    def capacity(self, prompt: Document, settings: Settings) -> int:
        """Positions of a prompt and the longest answer to it.

        Raises:
            UserError: the model's documents are too short for the prompt and the least answer.
        """
        length = document_length(prompt, self.patch_size, self.net.time_token)
        image = self.num_patches + 2  # <boi>, <eoi>
        least = image if settings.answer == "image" else 1
        if self.max_length is not None and length + least > self.max_length:
            raise UserError(
                f"the prompt takes {length} positions and its answer at least {least}, but this "
                f"model was trained on {self.max_length}; shorten the prompt"
            )
        return length + settings.num_tokens + settings.num_images * image


def pack_prompts(
    documents: Sequence[Document], tokenizer, patch_size: int, device, time_token: bool = False
) -> Batch:
    """One document a row; conditioning images stay clean (t = 0)."""
    batch = pack(
        [[document] for document in documents],
        list(range(len(documents))),
        tokenizer=tokenizer,
        row_length=max(document_length(d, patch_size, time_token) for d in documents),
        patch_size=patch_size,
        time_token=time_token,
    ).to(device)
    return replace(batch, t=torch.zeros_like(batch.t))
