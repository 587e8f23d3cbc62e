"""Generation against full forwards written out by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import LATENT_SHAPE, PATCH_SIZE, TOKENIZER, document, tiny_net
from torch import Tensor

from tf_lightning.attention import DenseAttention
from tf_lightning.batch import Document
from tf_lightning.generate import choose, generate_images, generate_text, without_text
from tf_lightning.net import Net
from tf_lightning.sampler import build_scheduler

BOS, EOS, BOI, EOI = 1, 2, 18, 19


def open_ended_net() -> Net:
    """A net that never writes <eos> or <boi>, so that chains are long; bigger logits vary more."""
    net = tiny_net()
    net.transformer.output.weight *= 20
    net.transformer.output.weight[[EOS, BOI]] = 0
    return net


def hidden_states(net: Net, prompt: Document, latents: list[Tensor], times: list[float]) -> Tensor:
    """Trunk outputs (T, D) of <bos> and the prompt, its images at given latents and noise levels.

    Laid out here part by part, under the dense mask: nothing of `pack` is used.
    """
    vectors, image_ids, image = [], [], 0

    def tokens(*ids: int) -> None:
        vectors.append(net.transformer.tok_embeddings(torch.tensor(ids, dtype=torch.long)))
        image_ids.extend([-1] * len(ids))

    tokens(BOS)
    for part in prompt:
        if part.ndim == 1:
            tokens(*part.tolist())
            continue
        tokens(BOI)
        t = torch.tensor([times[image]])
        vectors.append(net.patch_coder.encode(latents[image].unsqueeze(0), t)[0][0])
        image_ids += [image] * 4
        image += 1
        tokens(EOI)
    x = torch.cat(vectors).unsqueeze(0)
    layout = SimpleNamespace(
        document_ids=torch.zeros(1, x.shape[1], dtype=torch.long),
        image_ids=torch.tensor([image_ids]),
    )
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    return net.transformer(x, positions, DenseAttention(layout))[0]


def clean_images(prompt: Document) -> tuple[list[Tensor], list[float]]:
    """The prompt's images and their noise levels: none."""
    images = [part for part in prompt if part.ndim == 3]
    return images, [0.0] * len(images)


def greedy_chain(net: Net, prompt: Document, count: int) -> list[int]:
    """The most likely token, one full forward each."""
    ids: list[int] = []
    while len(ids) < count:
        parts = [*prompt, torch.tensor(ids, dtype=torch.long)]
        hidden = hidden_states(net, parts, *clean_images(prompt))
        ids.append(net.transformer.output(hidden[-1]).argmax().item())
    return ids


def write(net: Net, prompts: list[Document], **options) -> list[list[int]]:
    options = {"max_new_tokens": 6} | options
    return generate_text(net, prompts, tokenizer=TOKENIZER, patch_size=PATCH_SIZE, **options)


PROMPTS = [document("3", 1), document("i", 2), document("2i1", 3), document("", 4)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "image", "mixed", "nothing"])
def test_greedy_text_is_the_chain_of_most_likely_tokens(prompt):
    net = open_ended_net()
    expected = greedy_chain(net, prompt, 6)
    assert write(net, [prompt]) == [expected]
    assert len(set(expected)) > 1


def test_prompts_of_unequal_length_in_one_batch_are_answered_as_if_alone():
    net = open_ended_net()
    assert write(net, PROMPTS) == [write(net, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("stop", [EOS, BOI])
def test_text_ends_before_the_stop_token_while_others_go_on(stop):
    net = open_ended_net()
    third = greedy_chain(net, PROMPTS[0], 3)[-1]
    net.transformer.output.weight[stop] = 1.01 * net.transformer.output.weight[third]
    chains = [greedy_chain(net, prompt, 6) for prompt in PROMPTS]
    expected = [chain[: chain.index(stop)] if stop in chain else chain for chain in chains]
    assert len(expected[0]) < 6 and {len(ids) for ids in expected} > {6}
    assert write(net, PROMPTS) == expected


def test_drawn_tokens_follow_the_tempered_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(choose(logits.repeat(20_000, 1), 0.7, generator))
    weights = (logits[0] / 0.7).exp()
    torch.testing.assert_close(
        drawn.bincount() / 20_000, weights / weights.sum(), atol=0.015, rtol=0
    )
    assert choose(logits, 0, generator) == [1]


def draw(net: Net, prompts: list[Document], seeds: list[int], **options) -> Tensor:
    options = {"guidance_scale": 1.0, "sampler": "DDIMScheduler"} | options
    return generate_images(
        net,
        prompts,
        build_scheduler(options.pop("sampler"), 1000, "epsilon"),
        tokenizer=TOKENIZER,
        patch_size=PATCH_SIZE,
        latent_shape=LATENT_SHAPE,
        num_inference_steps=5,
        seeds=seeds,
        **options,
    )


def drawn_by_hand(net: Net, prompt: Document, seed: int, guidance_scale: float) -> Tensor:
    """DDIM with each branch as its own full forward."""
    scheduler = build_scheduler("DDIMScheduler", 1000, "epsilon")
    scheduler.set_timesteps(5)
    x_t = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))

    def output(parts: Document, t: float) -> Tensor:
        images, times = clean_images(parts)
        hidden = hidden_states(net, [*parts, x_t], [*images, x_t], [*times, t])
        patches = hidden[-5:-1].unsqueeze(0)  # then <eoi>
        return net.patch_coder.decode(patches, LATENT_SHAPE[1:])

    for timestep in scheduler.timesteps:
        t = timestep.item() / 1000
        cond, uncond = output(prompt, t), output(without_text(prompt), t)
        noise = uncond + guidance_scale * (cond - uncond)
        x_t = scheduler.step(noise, timestep, x_t.unsqueeze(0)).prev_sample[0]
    return x_t


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "image", "mixed", "nothing"])
def test_an_image_is_what_full_forwards_by_hand_draw(prompt, guidance_scale):
    net = tiny_net()
    expected = drawn_by_hand(net, prompt, 3, guidance_scale)
    drawn = draw(net, [prompt], [3], guidance_scale=guidance_scale)[0]
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


def test_without_guidance_the_unconditional_branch_is_not_computed():
    net, rows = tiny_net(), []
    net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0].input_ids)))
    draw(net, PROMPTS, [1, 2, 3, 4])
    draw(net, PROMPTS, [1, 2, 3, 4], guidance_scale=2.0)
    assert rows == [4] * 5 + [8] * 5


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DDPMScheduler"])
def test_an_image_depends_on_its_own_seed_and_prompt_not_on_its_batch_mates(sampler):
    net, options = tiny_net(), {"guidance_scale": 2.0, "sampler": sampler}
    together = draw(net, PROMPTS, [1, 2, 3, 4], **options)
    alone = torch.cat(
        [draw(net, [prompt], [seed], **options) for seed, prompt in enumerate(PROMPTS, 1)]
    )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.isclose(draw(net, PROMPTS[:1], [9], **options), together[0]).all()


def test_images_of_the_prompt_stay_clean_while_the_last_is_denoised():
    net, seen = tiny_net(), []
    net.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[2])))
    prompt = document("i2i", 5)
    draw(net, [prompt], [1], guidance_scale=2.0)
    for latents, t in seen:
        first, second, drawn = latents.unflatten(0, (2, 3)).unbind(1)  # both branches
        assert torch.equal(first, prompt[0].expand_as(first))
        assert torch.equal(second, prompt[2].expand_as(second))
        assert torch.equal(drawn[0], drawn[1])
        assert t.view(2, 3)[:, :2].eq(0).all()
    levels = torch.stack([t.view(2, 3)[:, 2] for _, t in seen])
    torch.testing.assert_close(levels[:, 0], torch.tensor([0.999, 0.799, 0.599, 0.399, 0.199]))


def test_the_unconditional_branch_keeps_the_images_of_the_prompt():
    text, image = document("2i", 1)
    assert without_text([text, image, text]) == [image]
