"""Text, and text with images in turn, against full forward passes, which use no cache."""

from types import SimpleNamespace

import pytest
from torch import Tensor

from support.generation import (
    BOI,
    EOS,
    GUIDANCES,
    PROMPT_NAMES,
    PROMPTS,
    assert_documents_close,
    collect,
    generate_documents,
    generate_tokens,
    generation_model,
    open_ended_net,
    plan,
)
from support.reference_generation import greedy_tokens, reference_document
from support.tiny import LATENT_SHAPE, PATCH_SIZE, TOKENIZER, document, tiny_net
from tf_lightning.errors import UserError
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import GenerationModel
from tf_lightning.model.transfusion import TransfusionModel

# ---------------------------------------------------------------- text


@pytest.mark.parametrize("prompt", PROMPTS, ids=PROMPT_NAMES)
def test_greedy_text_is_the_chain_of_most_probable_tokens(prompt):
    net = open_ended_net()
    expected = greedy_tokens(net, prompt, 6)
    assert generate_tokens(net, [prompt]) == [expected]
    assert len(set(expected)) > 1


def test_prompts_of_unequal_length_do_not_influence_each_other():
    net = open_ended_net()
    assert generate_tokens(net, PROMPTS) == [
        generate_tokens(net, [prompt])[0] for prompt in PROMPTS
    ]


@pytest.mark.parametrize("stop", [EOS, BOI])
def test_text_ends_before_the_stop_token_while_other_sequences_go_on(stop):
    net = open_ended_net()
    third = greedy_tokens(net, PROMPTS[0], 3)[-1]
    net.transformer.output.weight[stop] = 1.01 * net.transformer.output.weight[third]
    chains = [greedy_tokens(net, prompt, 6) for prompt in PROMPTS]
    expected = [chain[: chain.index(stop)] if stop in chain else chain for chain in chains]
    assert len(expected[0]) < 6 and {len(ids) for ids in expected} > {6}
    assert generate_tokens(net, PROMPTS) == expected


def test_sampled_text_depends_on_its_own_seed_and_not_on_the_batch():
    net = open_ended_net()
    how = plan("text", temperature=5.0, top_p=0.9)
    together = generate_documents(net, PROMPTS, how)
    for number, (prompt, same) in enumerate(zip(PROMPTS, together, strict=True), 1):
        assert_documents_close(generate_documents(net, [prompt], how, [number])[0], same)
    assert generate_documents(net, PROMPTS[:1], how, [9])[0][0].tolist() != together[0][0].tolist()


def test_a_complete_stop_string_ends_the_output():
    net = open_ended_net()
    chain = greedy_tokens(net, PROMPTS[0], 6)
    letters = SimpleNamespace(
        **vars(TOKENIZER), decode=lambda ids: "".join(chr(97 + i) for i in ids)
    )
    how = plan("text", stop=(letters.decode(chain[2:4]),))
    talker = GenerationModel(net, letters, PATCH_SIZE, LATENT_SHAPE)
    ((ids,),) = collect(generate(talker, PROMPTS[:1], [0], how), 1)
    assert ids.tolist() == chain[:4]


# ---------------------------------------------------------------- both


def talkative_net(**sizes) -> TransfusionModel:
    """Build a net that generates text, an image, text again, and would begin another image.

    <boi> is a little more probable than a token of its greedy chain.
    """
    net = open_ended_net(**sizes)
    third = greedy_tokens(net, PROMPTS[0], 3)[-1]
    net.transformer.output.weight[BOI] = 1.01 * net.transformer.output.weight[third]
    return net


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_text_and_images_in_turn_equal_full_forward_passes(guidance, causal):
    net = talkative_net()
    how = plan("any", **guidance, max_images=2, max_new_tokens=12)
    answers = generate_documents(net, PROMPTS, how, causal_images=causal)
    for number, (prompt, given) in enumerate(zip(PROMPTS, answers, strict=True), 1):
        assert_documents_close(given, reference_document(net, prompt, number, how, causal))
    kinds = {"".join("ti"[part.ndim == 3] for part in given) for given in answers}
    assert any("tit" in kind for kind in kinds) and len(kinds) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_smaller_batch_size_gives_the_same_outputs(batch_size):
    net, prompts = talkative_net(), PROMPTS * 2
    how = plan("any", "DDPMScheduler", guidance_scale=2.0, max_images=2)
    enough = generate_documents(net, prompts, how)
    for given, same in zip(
        generate_documents(net, prompts, how, batch_size=batch_size), enough, strict=True
    ):
        assert_documents_close(given, same)


def test_events_of_a_prompt_are_in_order_and_end_once():
    net = talkative_net()
    events = list(generate(generation_model(net), PROMPTS, [1, 2, 3, 4], plan("any")))
    for number in range(4):
        mine = [part for n, part in events if n == number]
        assert mine[-1] is None and None not in mine[:-1]
    images = [number for number, part in events if isinstance(part, Tensor)]
    assert len(images) == len(set(images)) > 0  # max_images = 1


def test_no_image_begins_that_would_exceed_the_rows_of_training():
    net, how = talkative_net(), plan("any", max_new_tokens=50)
    free = generate_documents(net, PROMPTS[:1], how)[0]
    before = len(free[0])
    assert [part.ndim for part in free[:2]] == [1, 3]
    # <bos>, prompt, text, <boi>, 4 patches, <eoi>, <eos>
    exact = 1 + 3 + before + 6 + 1
    fits, short = (
        generate_documents(net, PROMPTS[:1], how, max_length=n)[0] for n in (exact, exact - 1)
    )
    assert_documents_close(fits, free[:2])
    assert_documents_close(short, free[:1])


def test_text_ends_at_the_length_of_the_rows_of_training():
    net = open_ended_net()
    ((text,),) = generate_documents(net, PROMPTS[:1], plan("text"), max_length=8)
    assert text.tolist() == greedy_tokens(net, PROMPTS[0], 3)  # <bos>, 3, 3, <eos>


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("kind", "least"), [("image", 6), ("text", 1)])
def test_a_prompt_that_leaves_no_room_is_refused_with_the_limit(kind, least):
    prompt, how = document("9", 1), plan(kind)
    assert generate_documents(tiny_net(), [prompt], how, max_length=11 + least)
    told = f"the prompt takes 11 positions and its output at least {least}, but .* {10 + least};"
    with pytest.raises(UserError, match=told):
        generate_documents(tiny_net(), [prompt], how, max_length=10 + least)


@pytest.mark.parametrize("kind", ["image", "text", "any"])
def test_a_network_whose_output_is_nan_is_reported(kind):
    net = tiny_net()
    net.transformer.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"is not a number \(NaN or infinite\)"):
        generate_documents(net, PROMPTS[:1], plan(kind))


def test_zero_images_are_refused():
    with pytest.raises(
        UserError, match="max_images=0 must be at least 1; ask for text to get no image"
    ):
        plan("any", max_images=0)
