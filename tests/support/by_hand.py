"""Generation written out by hand, every step a full forward, nothing cached; and ours beside it."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from support.tiny import LATENT_SHAPE, PATCH_SIZE, TOKENIZER, document, tiny_net
from tf_lightning.batch import Document, num_patches
from tf_lightning.diffusion.process import DDPM
from tf_lightning.diffusion.sampler import build_scheduler
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import (
    Event,
    GenerationModel,
    GenerationPlan,
    to_document,
)
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transfusion import TransfusionModel

BOS, EOS, BOI, EOI = 1, 2, 18, 19
STEPS = 5
PROCESS = DDPM("v_prediction")  # epsilon of random weights makes latents of 30,000


def open_ended_net(**sizes) -> TransfusionModel:
    """A net that never writes <eos> or <boi>, so that chains are long; bigger logits vary more."""
    net = tiny_net(**sizes)
    net.transformer.output.weight *= 20
    net.transformer.output.weight[[EOS, BOI]] = 0
    return net


def hidden_states(
    net: TransfusionModel,
    parts: Document,
    times: dict[int, float] | None = None,
    causal: bool = False,
) -> Tensor:
    """Trunk outputs (T, D) of <bos> and the parts; part i is at noise level times[i], or clean.

    Laid out here part by part, under the dense mask: nothing of `pack` or of a cache is used.
    """
    vectors, image_ids = [], []

    def tokens(*ids: int) -> None:
        vectors.append(net.transformer.tok_embeddings(torch.tensor(ids, dtype=torch.long)))
        image_ids.extend([-1] * len(ids))

    tokens(BOS)
    for number, part in enumerate(parts):
        if part.ndim == 1:
            tokens(*part.tolist())
            continue
        tokens(BOI)
        t = torch.tensor([(times or {}).get(number, 0.0)])
        vectors.append(net.patch_coder.encode(part.unsqueeze(0), t)[0][0])
        image_ids += [number] * num_patches(part, PATCH_SIZE)
        tokens(EOI)
    x = torch.cat(vectors).unsqueeze(0)
    layout = SimpleNamespace(
        document_ids=torch.zeros(1, x.shape[1], dtype=torch.long),
        image_ids=torch.tensor([image_ids]),
        copied=torch.empty(0),
    )
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    return net.transformer(x, positions, DenseAttention(layout, causal))[0]


def next_token(net: TransfusionModel, parts: Document, causal: bool = False) -> int:
    """The most likely token, by a full forward."""
    return net.transformer.output(hidden_states(net, parts, causal=causal)[-1]).argmax().item()


def greedy_chain(net: TransfusionModel, prompt: Document, count: int) -> list[int]:
    """The most likely tokens, one full forward each."""
    ids: list[int] = []
    while len(ids) < count:
        ids.append(next_token(net, [*prompt, torch.tensor(ids, dtype=torch.long)]))
    return ids


def drawn_by_hand(
    net: TransfusionModel,
    prompt: Document,
    generator: torch.Generator,
    plan: GenerationPlan,
    causal: bool = False,
) -> Tensor:
    """The image after a prompt, each branch of each step as its own full forward."""
    guidance, scheduler = plan.guidance, build_scheduler(PROCESS, "DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    x_t = torch.randn(LATENT_SHAPE, generator=generator)

    def output(parts: Document, t: float) -> Tensor:
        hidden = hidden_states(net, [*parts, x_t], {len(parts): t}, causal)
        patches = hidden[-5:-1].unsqueeze(0)  # then <eoi>
        return net.patch_coder.decode(patches, LATENT_SHAPE[1:])

    images = [part for part in prompt if part.ndim == 3]
    for timestep in scheduler.timesteps:
        t = timestep.item() / 1000
        noise = cond = output(prompt, t)
        low, high = guidance.interval
        if guidance.image_scale is not None:
            seen, unseen = output(images, t), output([], t)
            noise = unseen + guidance.image_scale * (seen - unseen) + guidance.scale * (cond - seen)
        elif low <= t <= high:
            uncond = output([], t)
            noise = uncond + guidance.scale * (cond - uncond)
        x_t = scheduler.step(noise, timestep, x_t.unsqueeze(0)).prev_sample[0]
    return x_t


def answered_by_hand(
    net: TransfusionModel, prompt: Document, seed: int, plan: GenerationPlan, causal: bool = False
) -> Document:
    """The whole state machine with full forwards: text until <boi>, an image, text again."""
    generator = torch.Generator().manual_seed(seed)
    answer: Document = []
    count = images = 0
    while count < plan.sampling.max_new_tokens:
        token = next_token(net, [*prompt, *answer], causal)
        if token == BOI and images < plan.max_images:
            seen = [*prompt, *answer]
            answer.append(drawn_by_hand(net, seen, generator, plan, causal))
            images += 1
        elif token in (EOS, BOI):
            break
        else:
            text = [answer.pop()] if answer and answer[-1].ndim == 1 else []
            answer.append(torch.cat([*text, torch.tensor([token])]))
            count += 1
    return answer


def generation_model(net: TransfusionModel, **facts) -> GenerationModel:
    return GenerationModel(net, TOKENIZER, PATCH_SIZE, LATENT_SHAPE, **facts)


def plan(
    output_modality: str, sampler: str = "DDIMScheduler", scheduler=None, **options
) -> GenerationPlan:
    """What the pipeline would plan for these options; without guidance unless it is given."""
    defaults = {"guidance_scale": 1.0, "max_new_tokens": 6, "num_inference_steps": STEPS}
    sampling = SamplingConfig(**defaults | options)
    scheduler = scheduler or build_scheduler(PROCESS, sampler)
    return GenerationPlan(output_modality, sampling, scheduler, sampling.num_inference_steps)


def collect(events: Iterator[Event], count: int) -> list[Document]:
    """The outputs to `count` prompts as Documents."""
    outputs: list[list[int | Tensor]] = [[] for _ in range(count)]
    for index, part in events:
        if part is not None:
            outputs[index].append(part)
    return [to_document(parts) for parts in outputs]


def answer(
    net: TransfusionModel,
    prompts: list[Document],
    how: GenerationPlan,
    seeds: list[int] | None = None,
    **options,
) -> list[Document]:
    facts = {name: options.pop(name) for name in ("causal_images", "max_length") if name in options}
    seeds = seeds or list(range(1, len(prompts) + 1))
    return collect(
        generate(generation_model(net, **facts), prompts, seeds, how, **options), len(prompts)
    )


def write(
    net: TransfusionModel, prompts: list[Document], how: GenerationPlan | None = None
) -> list[list[int]]:
    """Text answers as ids."""
    answers = answer(net, prompts, how or plan("text"))
    return [[token for part in parts for token in part.tolist()] for parts in answers]


def draw(
    net: TransfusionModel, prompts: list[Document], how: GenerationPlan, *seeds, **options
) -> Tensor:
    """Image answers (n, C, h, w)."""
    answers = answer(net, prompts, how, list(seeds), **options)
    return torch.stack([image for (image,) in answers])


def assert_same(document: Document, other: Document) -> None:
    """Equal texts, and images to 1e-4."""
    assert [part.ndim for part in document] == [part.ndim for part in other]
    for part, same in zip(document, other, strict=True):
        torch.testing.assert_close(part, same, atol=1e-4, rtol=1e-4)


PROMPTS = [document("3", 1), document("i", 2), document("2i1i3", 3), document("", 4)]
NAMES = ["text", "image", "mixed", "nothing"]


GUIDANCES = {
    "none": {},
    "guided": {"guidance_scale": 3.0},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
    "editing": {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
}
