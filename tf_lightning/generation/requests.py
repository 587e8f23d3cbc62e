"""Data structures of generation: model, plan, output and sequence state.

Shapes: N positions of an image (patches and time token, or codes), latents C x h x w.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tf_lightning.batch import Batch, Document, document_length, is_image, pack
from tf_lightning.diffusion.guidance import Guidance
from tf_lightning.diffusion.sampler import DenoisingState
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import OutputModality, SamplingConfig
from tf_lightning.model.transfusion import TransfusionModel

# Index of the prompt with a text token, an image (C, h, w), or None at the end of its output.
Event = tuple[int, int | Tensor | None]

# Text, images, and parts that are token ids or latents already, in any order.
RawDocument = list[str | Image.Image | Tensor]
Prompt = str | Image.Image | RawDocument

LatentShape = tuple[int, int, int]
"""(C, h, w) of an image's latents or codes."""


@dataclass(frozen=True)
class GenerationOutput:
    """Outputs of `TransfusionPipeline`, in the order of the prompts.

    Attributes:
        parts: the text and images of each output, in the order in which they were generated.
        seeds: the seed of each output.
    """

    parts: list[RawDocument]
    seeds: list[int]

    @property
    def images(self) -> list[Image.Image]:
        """The images of all outputs."""
        return [p for output in self.parts for p in output if isinstance(p, Image.Image)]

    @property
    def texts(self) -> list[str]:
        """The text of each output, without its images."""
        return [" ".join(p for p in output if isinstance(p, str)) for output in self.parts]


@dataclass(frozen=True)
class GenerationPlan:
    """A SamplingConfig that was checked against a model, and the scheduler made for it."""

    output_modality: OutputModality
    """Exactly one image ("image"), no images ("text"), or the model decides ("any")."""
    sampling: SamplingConfig
    scheduler: Any = None
    """diffusers scheduler with its timesteps set; None for text and for images of codes."""
    num_image_steps: int = 0
    """Network evaluations of an image: denoising steps, or codes."""
    latent_shape: LatentShape | None = None
    """(C, h, w) of generated images; None: see `GenerationModel.output_shape`."""

    @property
    def max_images(self) -> int:
        """Maximum number of images of an output."""
        return {"image": 1, "text": 0, "any": self.sampling.max_images}[self.output_modality]

    @property
    def max_text_tokens(self) -> int:
        """Maximum number of text tokens of an output."""
        return 0 if self.output_modality == "image" else self.sampling.max_new_tokens

    @property
    def max_steps(self) -> int:
        """Maximum number of network evaluations of an output, for its share of the progress bar."""
        return self.max_text_tokens + self.max_images * self.num_image_steps

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance of the images."""
        sampling = self.sampling
        return Guidance(
            sampling.guidance_scale,
            sampling.image_guidance_scale,
            sampling.guidance_interval,
            sampling.guidance_rescale,
        )

    @property
    def branches(self) -> list[tuple[bool, bool]]:
        """Whether each guidance branch of a sequence reads (text, images); the first reads all."""
        return self.guidance.branches if self.max_images else [(True, True)]


@dataclass(frozen=True)
class GenerationModel:
    """A network with everything that generation must know about it."""

    net: TransfusionModel
    tokenizer: Any
    """Needs bos_id, eos_id, boi_id and eoi_id; vocab_size for codes; decode for stop strings."""
    patch_size: int
    latent_shape: LatentShape | None = None
    """(C, h, w) that images have by default; None for a model of text alone."""
    other_shapes: tuple[LatentShape, ...] = ()
    """Further (C, h, w) that the model was trained on."""
    causal_images: bool = False
    """Whether patches see only earlier patches of their image, as in training."""
    max_length: int | None = None
    """Positions of the longest row in training; None if unknown."""

    @property
    def causal(self) -> bool:
        """Whether the positions of an image see only earlier ones; codes always do."""
        return self.causal_images or self.net.num_codes > 0

    def num_patches(self, shape: LatentShape | None) -> int:
        """Count the positions N of an image of this shape; 0 for a model of text alone."""
        if shape is None:
            return 0
        _, height, width = shape
        return (height // self.patch_size) * (width // self.patch_size) + self.net.time_token

    def output_shape(self, prompt: Document, plan: GenerationPlan) -> LatentShape | None:
        """Return the (C, h, w) of the images that are generated after a prompt.

        It is the requested shape, else the shape of the prompt's last image, else the model's.
        """
        shapes = [tuple(part.shape) for part in prompt if is_image(part)]
        if plan.latent_shape or self.net.num_codes or not shapes:
            return plan.latent_shape or self.latent_shape
        return shapes[-1]

    def autocast(self) -> AbstractContextManager:
        """Return the context for the network: autocast where its weights are in half precision."""
        weight = next(self.net.parameters())
        if weight.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(weight.device.type, weight.dtype)

    def capacity(self, prompt: Document, plan: GenerationPlan) -> int:
        """Return the number of positions of a prompt with its longest output.

        Raises:
            UserError: the prompt leaves no room for the shortest output.
        """
        length = document_length(prompt, self.patch_size, self.net.time_token)
        image = self.num_patches(self.output_shape(prompt, plan)) + 2  # <boi>, <eoi>
        least = image if plan.output_modality == "image" else 1
        if self.max_length is not None and length + least > self.max_length:
            raise UserError(
                f"the prompt takes {length} positions and its output at least {least}, but this "
                f"model was trained on rows of {self.max_length}; shorten the prompt"
            )
        return length + plan.max_text_tokens + plan.max_images * image


@dataclass
class GuidanceBranch:
    """A cache row that holds a sequence, with or without the text and images of its prompt."""

    row: int
    reads_text: bool
    reads_images: bool
    length: int = 0


@dataclass
class SequenceState:
    """A sequence that is being generated."""

    index: int  # index of the prompt
    branches: list[GuidanceBranch]  # the first reads everything
    generator: torch.Generator
    steps_left: int  # progress-bar steps not yet counted
    latent_shape: LatentShape | None = None  # of its images
    token: int | None = None  # the token that the network reads next
    text: list[int] = field(default_factory=list)  # tokens since the last image
    codes: list[int] = field(default_factory=list)  # codes of the unfinished image
    num_text_tokens: int = 0
    num_images: int = 0


@dataclass
class DenoisingBatch:
    """Sequences whose images have one shape and are denoised together from the same time on."""

    sequences: list[SequenceState]
    state: DenoisingState

    @property
    def latent_shape(self) -> LatentShape:
        """(C, h, w) of the images."""
        return self.sequences[0].latent_shape


def rows_by_branch(sequences: Sequence[SequenceState]) -> list[GuidanceBranch]:
    """Return the cache rows of sequences grouped by guidance branch."""
    return [row for rows in zip(*(s.branches for s in sequences), strict=True) for row in rows]


def to_document(parts: list[int | Tensor]) -> Document:
    """Join generated tokens that follow each other into texts; images stay as they are.

    Images are copied out of inference mode, so that they can be used in training.
    """
    document: Document = []
    for is_token, group in groupby(parts, key=lambda part: isinstance(part, int)):
        members = list(group)
        document += [torch.tensor(members)] if is_token else [image.clone() for image in members]
    return document


def pack_prompts(
    documents: Sequence[Document], tokenizer, patch_size: int, device, time_token: bool = False
) -> Batch:
    """Pack one document into each row; the images of prompts are clean (t = 0)."""
    batch = pack(
        [[document] for document in documents],
        list(range(len(documents))),
        tokenizer=tokenizer,
        row_length=max(document_length(d, patch_size, time_token) for d in documents),
        patch_size=patch_size,
        time_token=time_token,
    ).to(device)
    return replace(batch, t=torch.zeros_like(batch.t))
