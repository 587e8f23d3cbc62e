"""Generation from a cache against full forwards written out by hand, which cache nothing."""

from types import SimpleNamespace

import pytest
import torch
from tiny import LATENT_SHAPE, PATCH_SIZE, TOKENIZER, document, packed, tiny_net
from torch import Tensor

from tf_lightning.attention import DenseAttention
from tf_lightning.batch import Document, num_patches
from tf_lightning.decoding import TextSampling
from tf_lightning.errors import UserError
from tf_lightning.generate import generate
from tf_lightning.guidance import Guidance
from tf_lightning.net import Net
from tf_lightning.reply import collect
from tf_lightning.request import Settings, Speaker
from tf_lightning.sampler import build_scheduler
from tf_lightning.transformer import TransformerConfig
from tf_lightning.unet import UNetConfig

BOS, EOS, BOI, EOI = 1, 2, 18, 19
STEPS, KIND = 5, "v_prediction"  # epsilon of random weights makes images of 30,000


def open_ended_net(**sizes) -> Net:
    """A net that never writes <eos> or <boi>, so that chains are long; bigger logits vary more."""
    net = tiny_net(**sizes)
    net.transformer.output.weight *= 20
    net.transformer.output.weight[[EOS, BOI]] = 0
    return net


def hidden_states(
    net: Net, parts: Document, times: dict[int, float] | None = None, causal: bool = False
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


def next_token(net: Net, parts: Document, causal: bool = False) -> int:
    """The most likely token, by a full forward."""
    return net.transformer.output(hidden_states(net, parts, causal=causal)[-1]).argmax().item()


def greedy_chain(net: Net, prompt: Document, count: int) -> list[int]:
    """The most likely tokens, one full forward each."""
    ids: list[int] = []
    while len(ids) < count:
        ids.append(next_token(net, [*prompt, torch.tensor(ids, dtype=torch.long)]))
    return ids


def drawn_by_hand(
    net: Net, prompt: Document, generator: torch.Generator, settings: Settings, causal: bool = False
) -> Tensor:
    """The image after a prompt, each branch of each step as its own full forward."""
    guidance, scheduler = settings.guidance, build_scheduler("DDIMScheduler", 1000, KIND)
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
    net: Net, prompt: Document, seed: int, settings: Settings, causal: bool = False
) -> Document:
    """The whole state machine with full forwards: text until <boi>, an image, text again."""
    generator = torch.Generator().manual_seed(seed)
    answer: Document = []
    count = images = 0
    while count < settings.text.max_new_tokens:
        token = next_token(net, [*prompt, *answer], causal)
        if token == BOI and images < settings.max_images:
            seen = [*prompt, *answer]
            answer.append(drawn_by_hand(net, seen, generator, settings, causal))
            images += 1
        elif token in (EOS, BOI):
            break
        else:
            text = [answer.pop()] if answer and answer[-1].ndim == 1 else []
            answer.append(torch.cat([*text, torch.tensor([token])]))
            count += 1
    return answer


def speaker(net: Net, **facts) -> Speaker:
    return Speaker(net, TOKENIZER, PATCH_SIZE, LATENT_SHAPE, **facts)


def settings(answer: str, sampler: str = "DDIMScheduler", **options) -> Settings:
    scheduler = build_scheduler(sampler, 1000, KIND)
    text = TextSampling(**{"max_new_tokens": 6} | options.pop("text", {}))
    options = {"text": text, "num_inference_steps": STEPS, "scheduler": scheduler} | options
    return Settings(answer, **options)


def answer(
    net: Net, prompts: list[Document], how: Settings, seeds: list[int] | None = None, **options
) -> list[Document]:
    facts = {name: options.pop(name) for name in ("causal_images", "max_length") if name in options}
    seeds = seeds or list(range(1, len(prompts) + 1))
    return collect(generate(speaker(net, **facts), prompts, seeds, how, **options), len(prompts))


def write(net: Net, prompts: list[Document], how: Settings | None = None) -> list[list[int]]:
    """Text answers as ids."""
    answers = answer(net, prompts, how or settings("text"))
    return [[token for part in parts for token in part.tolist()] for parts in answers]


def draw(net: Net, prompts: list[Document], how: Settings, *seeds, **options) -> Tensor:
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


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("prompt", PROMPTS, ids=NAMES)
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


def test_drawn_text_depends_on_its_own_seed_not_on_its_batch_mates():
    net = open_ended_net()
    how = settings("text", text={"temperature": 5.0, "top_p": 0.9})
    together = answer(net, PROMPTS, how)
    for number, (prompt, same) in enumerate(zip(PROMPTS, together, strict=True), 1):
        assert_same(answer(net, [prompt], how, [number])[0], same)
    assert answer(net, PROMPTS[:1], how, [9])[0][0].tolist() != together[0][0].tolist()


def test_a_stop_text_ends_the_answer_once_it_is_complete():
    net = open_ended_net()
    chain = greedy_chain(net, PROMPTS[0], 6)
    letters = SimpleNamespace(
        **vars(TOKENIZER), decode=lambda ids: "".join(chr(97 + i) for i in ids)
    )
    how = settings("text", text={"stop": (letters.decode(chain[2:4]),)})
    talker = Speaker(net, letters, PATCH_SIZE, LATENT_SHAPE)
    ((ids,),) = collect(generate(talker, PROMPTS[:1], [0], how), 1)
    assert ids.tolist() == chain[:4]


# ---------------------------------------------------------------- images


GUIDANCES = {
    "none": Guidance(),
    "guided": Guidance(3.0),
    "interval": Guidance(3.0, interval=(0.3, 0.7)),
    "editing": Guidance(3.0, image_scale=1.5),
}


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=NAMES)
def test_an_image_is_what_full_forwards_by_hand_draw(prompt, guidance):
    net, how = tiny_net(), settings("image", guidance=guidance)
    expected = drawn_by_hand(net, prompt, torch.Generator().manual_seed(3), how)
    torch.testing.assert_close(draw(net, [prompt], how, 3)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"])
def test_an_image_depends_on_its_own_seed_and_prompt_not_on_its_batch_mates(sampler):
    net, how = tiny_net(), settings("image", sampler, guidance=Guidance(2.0))
    together = draw(net, PROMPTS, how, 1, 2, 3, 4)
    alone = torch.cat([draw(net, [prompt], how, n) for n, prompt in enumerate(PROMPTS, 1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.isclose(draw(net, PROMPTS[:1], how, 9), together[0]).all()


def calls(net: Net, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """The latents and noise levels that the network is given from now on."""
    seen, denoise = [], net.denoise
    monkeypatch.setattr(
        net,
        "denoise",
        lambda latents, t, *rest: (seen.append((latents, t)), denoise(latents, t, *rest))[1],
    )
    return seen


def test_only_the_branches_that_guidance_needs_are_computed(monkeypatch):
    net = tiny_net()
    seen = calls(net, monkeypatch)
    draw(net, PROMPTS, settings("image"), 1, 2, 3, 4)
    draw(net, PROMPTS, settings("image", guidance=Guidance(2.0)), 1, 2, 3, 4)
    draw(net, PROMPTS, settings("image", guidance=Guidance(2.0, interval=(0.5, 1))), 1, 2, 3, 4)
    draw(net, PROMPTS, settings("image", guidance=Guidance(2.0, image_scale=1.0)), 1, 2, 3, 4)
    rows = [len(latents) for latents, _ in seen]
    assert rows == [4] * 5 + [8] * 5 + [8] * 3 + [4] * 2 + [12] * 5


def test_a_step_computes_the_positions_of_the_image_alone(monkeypatch):
    net, lengths = tiny_net(), []
    net.transformer.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[:-1].numel())
    )
    draw(net, [document("9i9", 1)], settings("image"), 1)
    prompt, begin, *steps = lengths
    assert prompt == 9 + 6 + 9 + 2 and begin == 1 and steps == [4] * STEPS


# ---------------------------------------------------------------- both


def talkative_net(**sizes) -> Net:
    """A net that writes some tokens, draws, writes again, and would draw once more.

    <boi> is as likely as a token of its chain, a little more.
    """
    net = open_ended_net(**sizes)
    third = greedy_chain(net, PROMPTS[0], 3)[-1]
    net.transformer.output.weight[BOI] = 1.01 * net.transformer.output.weight[third]
    return net


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_text_and_images_in_turn_are_those_of_full_forwards(guidance, causal):
    net = talkative_net()
    how = settings("any", guidance=guidance, max_images=2, text={"max_new_tokens": 12})
    answers = answer(net, PROMPTS, how, causal_images=causal)
    for number, (prompt, given) in enumerate(zip(PROMPTS, answers, strict=True), 1):
        assert_same(given, answered_by_hand(net, prompt, number, how, causal))
    kinds = {"".join("ti"[part.ndim == 3] for part in given) for given in answers}
    assert any("tit" in kind for kind in kinds) and len(kinds) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sequences_that_wait_for_room_are_answered_as_if_there_were_enough(batch_size):
    net, prompts = talkative_net(), PROMPTS * 2
    how = settings("any", "DDPMScheduler", guidance=Guidance(2.0), max_images=2)
    enough = answer(net, prompts, how)
    for given, same in zip(answer(net, prompts, how, batch_size=batch_size), enough, strict=True):
        assert_same(given, same)


def test_events_of_a_prompt_come_in_order_and_end_once():
    net = talkative_net()
    events = list(generate(speaker(net), PROMPTS, [1, 2, 3, 4], settings("any")))
    for number in range(4):
        mine = [part for n, part in events if n == number]
        assert mine[-1] is None and None not in mine[:-1]
    images = [number for number, part in events if isinstance(part, Tensor)]
    assert len(images) == len(set(images)) > 0  # max_images = 1


def test_another_image_is_not_begun_where_documents_were_never_that_long():
    net, how = talkative_net(), settings("any", text={"max_new_tokens": 50})
    free = answer(net, PROMPTS[:1], how)[0]
    before = len(free[0])
    assert [part.ndim for part in free[:2]] == [1, 3]
    # <bos>, prompt, text, <boi>, 4 patches, <eoi>, <eos>
    exact = 1 + 3 + before + 6 + 1
    fits, short = (answer(net, PROMPTS[:1], how, max_length=n)[0] for n in (exact, exact - 1))
    assert_same(fits, free[:2])
    assert_same(short, free[:1])


def test_text_ends_where_documents_were_never_longer():
    net = open_ended_net()
    ((text,),) = answer(net, PROMPTS[:1], settings("text"), max_length=8)
    assert text.tolist() == greedy_chain(net, PROMPTS[0], 3)  # <bos>, 3, 3, <eos>


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("kind", "least"), [("image", 6), ("text", 1)])
def test_a_prompt_that_leaves_no_room_is_refused_with_the_limit(kind, least):
    prompt, how = document("9", 1), settings(kind)
    assert answer(tiny_net(), [prompt], how, max_length=11 + least)
    told = f"the prompt takes 11 positions and its answer at least {least}, but .* {10 + least};"
    with pytest.raises(UserError, match=told):
        answer(tiny_net(), [prompt], how, max_length=10 + least)


@pytest.mark.parametrize("kind", ["image", "text", "any"])
def test_a_network_that_diverged_is_told_apart_from_a_bad_picture(kind):
    net = tiny_net()
    net.transformer.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"is not a number \(NaN or infinite\)"):
        answer(net, PROMPTS[:1], settings(kind))


def test_an_answer_without_images_is_asked_for_by_its_name():
    with pytest.raises(UserError, match="max_images=0 must be at least 1; answer='text' draws"):
        settings("any", max_images=0)
    with pytest.raises(UserError, match="answer='video' must be 'image', 'text' or 'any'"):
        settings("video")


def variant_net(image_weights: str = "shared", unet: UNetConfig | None = None, **other) -> Net:
    torch.manual_seed(0)
    config = TransformerConfig(20, 32, 2, 4, 2, ffn_dim=48, image_weights=image_weights)
    return Net(config, PATCH_SIZE, 3, unet=unet, **other).requires_grad_(False)


VARIANTS = {
    "feed-forward of their own": {"image_weights": "ffn"},
    "all of their own": {"image_weights": "all"},
    "U-Net": {"unet": UNetConfig((8, 16), 1, 8)},
    "learned sigma": {"learned_sigma": True},
    "all": {"image_weights": "all", "unet": UNetConfig((8, 16), 1, 8), "learned_sigma": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_network_draw_what_full_forwards_draw(options):
    net, prompt = variant_net(**options), document("2i1", 3)
    drawn = draw(net, [prompt], settings("image", guidance=Guidance(1.0)), 7)
    scheduler = build_scheduler("DDIMScheduler", 1000, KIND)
    scheduler.set_timesteps(STEPS)
    x_t = torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps:
        batch = packed([[[*prompt, x_t]]])
        t = torch.tensor([0.0, timestep.item() / 1000])
        _, output = net(batch, batch.latents, t, DenseAttention(batch))
        x_t = scheduler.step(output[1, :3], timestep, x_t).prev_sample
    torch.testing.assert_close(drawn.flatten(), x_t.flatten(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ddpm_draws_with_the_learned_variance_of_the_whole_prompt(scale):
    """Against diffusers' loop over full forwards, the variance guided by nothing (DiT)."""
    net, prompt = variant_net(learned_sigma=True), document("2i1", 3)
    scheduler = build_scheduler("DDPMScheduler", 1000, KIND, learned_sigma=True)
    how = settings("image", guidance=Guidance(scale), scheduler=scheduler)
    drawn = draw(net, [prompt], how, 7)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(LATENT_SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        outputs = []
        for parts in ([*prompt, x_t], [x_t]):
            batch = packed([[parts]])
            t = torch.zeros(batch.num_images)
            t[-1] = timestep.item() / 1000
            outputs.append(net(batch, batch.latents, t, DenseAttention(batch))[1][-1])
        cond, uncond = outputs
        guided = torch.cat([uncond[:3] + scale * (cond - uncond)[:3], cond[3:]]).unsqueeze(0)
        step = scheduler.step(guided, timestep, x_t.unsqueeze(0), generator=[generator])
        x_t = step.prev_sample[0]
    torch.testing.assert_close(drawn.flatten(), x_t.flatten(), atol=1e-3, rtol=1e-3)
