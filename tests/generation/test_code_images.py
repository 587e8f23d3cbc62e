"""Images of discrete codes against full forward passes, which use no cache."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.generation import BOI, BOS, EOI, EOS, collect
from support.reference_generation import continue_document
from support.tiny import SIZES, TOKENIZER, document
from tf_lightning.batch import Document
from tf_lightning.errors import UserError
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import GenerationModel, GenerationPlan
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.generation.token_sampling import sample_tokens
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel

TEXT, CODES, SIDE = 20, 11, 2
GREEDY = {"code_temperature": 0.0}
DRAWN = {"code_temperature": 1.0, "code_top_k": 6, "code_top_p": 0.95}


def code_net(**sizes) -> TransfusionModel:
    """Build a net with random weights that never ends a text; larger logits vary more."""
    torch.manual_seed(0)
    net = TransfusionModel(
        TransformerConfig(TEXT, **SIZES | sizes), 1, 1, num_codes=CODES
    ).requires_grad_(False)
    net.transformer.output.weight *= 20
    net.transformer.output.weight[[EOS, BOI]] = 0
    return net


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (1, SIDE, SIDE), generator=generator)


PROMPTS = [
    document("3", 1),
    [picture(2)],
    [*document("2", 3), picture(4), *document("1", 5), picture(6)],
    [],
]
NAMES = ["text", "image", "mixed", "nothing"]
GUIDANCES = {
    "none": {},
    "guided": {"guidance_scale": 3.0},
    "editing": {"guidance_scale": 2.0, "image_guidance_scale": 1.5},
}


def ids_of(parts: Document) -> list[int]:
    """Return the ids of <bos> and the parts."""
    ids = [BOS]
    for part in parts:
        own = part.flatten().tolist()
        ids += own if part.ndim == 1 else [BOI, *(TEXT + code for code in own), EOI]
    return ids


def logits_by_hand(net: TransfusionModel, ids: list[int]) -> Tensor:
    """Return the logits after the ids by a full causal forward pass."""
    layout = SimpleNamespace(
        document_ids=torch.zeros(1, len(ids), dtype=torch.long),
        image_ids=torch.full((1, len(ids)), -1),
        copied=torch.empty(0),
    )
    x = net.transformer.tok_embeddings(torch.tensor([ids]))
    positions = torch.arange(len(ids)).unsqueeze(0)
    hidden = net.transformer(x, positions, DenseAttention(layout, True))
    return net.transformer.output(hidden[0, -1])


def image_by_hand(
    net: TransfusionModel, prompt: Document, generator: torch.Generator, how: GenerationPlan
) -> Tensor:
    """Sample N codes after <boi>, with a full forward pass for each guidance branch."""
    scale, image_scale = how.guidance.scale, how.guidance.image_scale
    images, codes = [part for part in prompt if part.ndim == 3], []
    for _ in range(SIDE**2):
        behind = [BOI, *(TEXT + code for code in codes)]
        read = lambda parts: logits_by_hand(net, ids_of(parts) + behind)[TEXT:]  # noqa: B023, E731
        cond, uncond = read(prompt), read([])
        if image_scale is not None:
            seen = read(images)
            guided = uncond + image_scale * (seen - uncond) + scale * (cond - seen)
        else:
            guided = (1 - scale) * uncond + scale * cond
        codes += sample_tokens(
            guided.unsqueeze(0),
            [generator],
            temperature=how.sampling.code_temperature,
            top_k=how.sampling.code_top_k,
            top_p=how.sampling.code_top_p,
        )
    return torch.tensor(codes).view(1, SIDE, SIDE)


def text_logits_by_hand(net: TransfusionModel, ids: list[int]) -> Tensor:
    logits = logits_by_hand(net, ids)[:TEXT]
    logits[EOI] = -torch.inf
    return logits


def plan(output_modality: str, **options) -> GenerationPlan:
    sampling = SamplingConfig(**{"guidance_scale": 1.0, "max_new_tokens": 6} | DRAWN | options)
    return GenerationPlan(output_modality, sampling, num_image_steps=SIDE**2)


def answer(
    net: TransfusionModel, prompts: list[Document], how: GenerationPlan, **options
) -> list[Document]:
    seeds = options.pop("seeds", range(1, len(prompts) + 1))
    model = GenerationModel(net, TOKENIZER, 1, (1, SIDE, SIDE))
    events = generate(model, prompts, list(seeds), how, **options)
    return collect(events, len(prompts))


def same(given: Document, other: Document) -> bool:
    return len(given) == len(other) and all(map(torch.equal, given, other))


@pytest.mark.parametrize("codes", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_an_image_equals_full_forward_passes_without_a_cache(guidance, codes):
    net, how = code_net(), plan("image", **guidance, **codes)
    drawn = [image for (image,) in answer(net, PROMPTS, how)]
    for number, (prompt, image) in enumerate(zip(PROMPTS, drawn, strict=True), 1):
        expected = image_by_hand(net, prompt, torch.Generator().manual_seed(number), how)
        assert torch.equal(image, expected)
    assert len({tuple(image.flatten().tolist()) for image in drawn}) > 1


@pytest.mark.parametrize("prompt", PROMPTS, ids=NAMES)
def test_a_caption_after_codes_is_the_chain_of_most_probable_tokens(prompt):
    net, ids = code_net(), ids_of(prompt)
    chain = []
    for _ in range(6):
        chain.append(text_logits_by_hand(net, ids + chain).argmax().item())
    ((text,),) = answer(net, [prompt], plan("text"))
    assert text.tolist() == chain


def talkative_net() -> TransfusionModel:
    """Build a net that generates text, an image, text again, and would begin another image."""
    net, chain = code_net(), []
    while len(chain) < 3:
        logits = text_logits_by_hand(net, ids_of([*PROMPTS[0], torch.tensor(chain).long()]))
        chain.append(logits.argmax().item())
    net.transformer.output.weight[BOI] = 1.01 * net.transformer.output.weight[chain[-1]]
    return net


def answered_by_hand(
    net: TransfusionModel, prompt: Document, seed: int, how: GenerationPlan
) -> Document:
    """Generate text until <boi>, an image, and text again, all by full forward passes."""
    generator = torch.Generator().manual_seed(seed)
    return continue_document(
        prompt,
        how,
        lambda parts: text_logits_by_hand(net, ids_of(parts)).argmax().item(),
        lambda parts: image_by_hand(net, parts, generator, how),
    )


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_text_and_images_in_turn_equal_full_forward_passes(guidance):
    net = talkative_net()
    how = plan("any", **guidance, max_images=2, max_new_tokens=10)
    given = answer(net, PROMPTS, how)
    for number, (prompt, parts) in enumerate(zip(PROMPTS, given, strict=True), 1):
        assert same(parts, answered_by_hand(net, prompt, number, how))
    kinds = {"".join("ti"[part.ndim == 3] for part in parts) for parts in given}
    assert any("ti" in kind for kind in kinds)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sequences_in_different_phases_do_not_influence_each_other(batch_size):
    net, prompts = talkative_net(), PROMPTS * 2
    how = plan("any", guidance_scale=2.0, max_images=2)
    enough = answer(net, prompts, how)
    waiting = answer(net, prompts, how, batch_size=batch_size)
    alone = [answer(net, [p], how, seeds=[n])[0] for n, p in enumerate(prompts, 1)]
    assert all(map(same, waiting, enough)) and all(map(same, alone, enough))


def test_every_image_is_complete_whatever_the_network_prefers():
    """The weights prefer <eoi>, <eos> and text inside images, and codes and <eoi> outside."""
    net = code_net()
    rows = net.transformer.output.weight
    rows[[EOI, EOS]] = 9 * rows[TEXT:].abs().max()
    drawn = answer(net, [document("2", n) for n in range(50)], plan("image", guidance_scale=3.0))
    for (image,) in drawn:
        assert image.shape == (1, SIDE, SIDE) and 0 <= image.min() <= image.max() < CODES
    rows[TEXT:] *= 50
    for parts in answer(net, PROMPTS, plan("text", temperature=2.0)):
        for part in parts:
            assert part.ndim == 1 and part.max() < EOI


def test_all_guidance_branches_share_a_forward_pass_and_nothing_is_read_twice(monkeypatch):
    net, shapes, read = code_net(), [], TransfusionModel.next_logits
    monkeypatch.setattr(
        TransfusionModel,
        "next_logits",
        lambda self, ids, *a: (shapes.append(ids.shape), read(self, ids, *a))[1],
    )
    answer(net, PROMPTS, plan("image", guidance_scale=3.0))
    assert shapes == [(8, 1)] * SIDE**2  # <boi>, then all codes but the last


def test_nan_logits_are_reported():
    net = code_net()
    net.transformer.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="for an image's code is not a number"):
        answer(net, PROMPTS[:1], plan("image"))
