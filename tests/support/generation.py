"""Calls of the generation engine with a tiny network, and prompts and guidance for them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from support.tiny import LATENT_SHAPE, PATCH_SIZE, TOKENIZER, document, tiny_net
from tf_lightning.batch import Document
from tf_lightning.diffusion.process import DDPM
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import Event, GenerationModel, GenerationPlan, to_document
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transfusion import TransfusionModel

BOS, EOS, BOI, EOI = 1, 2, 18, 19
STEPS = 5
PROCESS = DDPM("v_prediction")  # epsilon of random weights makes latents of 30,000
PROMPTS = [document("3", 1), document("i", 2), document("2i1i3", 3), document("", 4)]
PROMPT_NAMES = ["text", "image", "mixed", "nothing"]
GUIDANCES = {
    "none": {},
    "guided": {"guidance_scale": 3.0},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
    "editing": {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
}


def open_ended_net(**sizes) -> TransfusionModel:
    """A network that never generates <eos> or <boi>, with large logits, so that texts are long."""
    net = tiny_net(**sizes)
    net.transformer.output.weight *= 20
    net.transformer.output.weight[[EOS, BOI]] = 0
    return net


def generation_model(net: TransfusionModel, **facts) -> GenerationModel:
    """The network with the tokenizer and shapes of `support.tiny`."""
    return GenerationModel(net, TOKENIZER, PATCH_SIZE, LATENT_SHAPE, **facts)


def plan(
    output_modality: str, sampler: str = "DDIMScheduler", scheduler=None, **options
) -> GenerationPlan:
    """The plan that the pipeline makes for these sampling options; without guidance by default."""
    defaults = {"guidance_scale": 1.0, "max_new_tokens": 6, "num_inference_steps": STEPS}
    sampling = SamplingConfig(**defaults | options)
    scheduler = scheduler or build_scheduler(PROCESS, sampler)
    return GenerationPlan(output_modality, sampling, scheduler, sampling.num_inference_steps)


def collect(events: Iterator[Event], count: int) -> list[Document]:
    """The generated documents of `count` prompts."""
    outputs: list[list[int | Tensor]] = [[] for _ in range(count)]
    for index, part in events:
        if part is not None:
            outputs[index].append(part)
    return [to_document(parts) for parts in outputs]


def generate_documents(
    net: TransfusionModel,
    prompts: list[Document],
    how: GenerationPlan,
    seeds: list[int] | None = None,
    **options,
) -> list[Document]:
    """The documents that continue the prompts; sample i uses seed i + 1 by default."""
    facts = {name: options.pop(name) for name in ("causal_images", "max_length") if name in options}
    seeds = seeds or list(range(1, len(prompts) + 1))
    return collect(
        generate(generation_model(net, **facts), prompts, seeds, how, **options), len(prompts)
    )


def generate_tokens(
    net: TransfusionModel, prompts: list[Document], how: GenerationPlan | None = None
) -> list[list[int]]:
    """The token ids that continue each prompt."""
    documents = generate_documents(net, prompts, how or plan("text"))
    return [[token for part in parts for token in part.tolist()] for parts in documents]


def generate_images(
    net: TransfusionModel, prompts: list[Document], how: GenerationPlan, *seeds, **options
) -> Tensor:
    """The image that continues each prompt, (B, C, h, w)."""
    documents = generate_documents(net, prompts, how, list(seeds), **options)
    return torch.stack([image for (image,) in documents])


def assert_documents_close(document: Document, other: Document) -> None:
    """Texts are equal and images are close (1e-4)."""
    assert [part.ndim for part in document] == [part.ndim for part in other]
    for part, same in zip(document, other, strict=True):
        torch.testing.assert_close(part, same, atol=1e-4, rtol=1e-4)
