"""Sentences of the shapes world: meanings of captions, probabilities of texts, and edits."""

import math
from collections import Counter
from itertools import product

import pytest

from support.shape_images import scene
from tf_lightning.shapes.grammar import (
    MAX_FACTS,
    caption,
    captions,
    draw_edit,
    draw_text,
    edits,
    facts,
    parse,
    statements,
    text_log_prob,
)
from tf_lightning.shapes.world import (
    COLORS,
    Meaning,
    draw_scene,
    generator,
    held_out,
    meanings,
)

MEANINGS = (*meanings(1), *meanings(2))
ORANGE_ABOVE_BLUE = Meaning((("circle", "orange"), ("square", "blue")), "above")


def all_texts():
    for meaning in MEANINGS:
        for statement, count in product(statements(meaning), range(1, MAX_FACTS + 1)):
            for stated in product(facts(meaning), repeat=count):
                yield " . ".join([f"imagine {statement}", *stated]) + " ."


def test_every_caption_of_every_meaning_is_parsed():
    assert all(parse(text) == m for m in MEANINGS for text in captions(m))


def test_no_two_meanings_share_a_caption():
    texts = [text for m in MEANINGS for text in captions(m)]
    assert len(set(texts)) == len(texts) == 18 * 4 + 612 * 6


def test_captions_are_the_expected_ones():
    assert captions(ORANGE_ABOVE_BLUE) == (
        "an orange circle above a blue square",
        "there is an orange circle above a blue square",
        "an orange circle is above a blue square",
        "a blue square below an orange circle",
        "there is a blue square below an orange circle",
        "a blue square is below an orange circle",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red",
        "a red circle above",
        "a red circle above a red circle",
        "imagine a red circle",
        "a red circle .",
    ],
)
def test_text_outside_the_grammar_has_no_meaning(text):
    assert parse(text) is None


def test_captions_are_lower_case_words_and_never_begin_like_a_text():
    for m in MEANINGS:
        for text in captions(m):
            assert text == " ".join(text.lower().split())
            assert text.replace(" ", "").isalpha()
            assert not text.startswith("imagine")


def test_every_caption_of_a_scene_is_drawn():
    found = {caption(scene(0, 0, 2), generator(1, i)) for i in range(200)}
    assert found == set(captions(scene(0, 0, 2).meaning))


def test_probabilities_of_all_texts_sum_to_one():
    probabilities = [math.exp(text_log_prob(text)) for text in all_texts()]
    assert len(probabilities) == 612 * 2 * (2 + 4 + 8) + 18 * (2 + 4 + 8)
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)


def test_all_texts_are_different():
    texts = list(all_texts())
    assert len(set(texts)) == len(texts)


def test_drawn_texts_have_the_frequency_of_their_probability():
    num = 5_000
    counts = Counter(draw_text(generator(0, i)) for i in range(num))
    assert all(text_log_prob(text) > -math.inf for text in counts)
    one = [text for text in all_texts() if text.startswith("imagine a red circle . ")]
    expected = num * sum(math.exp(text_log_prob(text)) for text in one)
    assert sum(counts[text] for text in one) == pytest.approx(expected, abs=5 * expected**0.5)
    log_probs = [text_log_prob(text) for text, n in counts.items() for _ in range(n)]
    entropy = -math.fsum(math.exp(p) * p for p in map(text_log_prob, all_texts()))
    assert -sum(log_probs) / num == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "imagine a red circle .",
        "imagine a red circle . the circle is blue .",
        "imagine a red circle . the circle is red",
        "a red circle . the circle is red .",
        "imagine a red circle" + " . the circle is red" * 4 + " .",
    ],
)
def test_other_texts_have_no_probability(text):
    assert text_log_prob(text) == -math.inf


def test_texts_state_held_out_meanings_too():
    stated = {draw_text(generator(0, i)).split(" . ")[0] for i in range(5000)}
    wanted = {f"imagine {s}" for m in meanings(2, "val") for s in statements(m)}
    assert len(stated & wanted) > 0.9 * len(wanted)


def test_edits_change_one_object_and_follow_the_rules():
    for index in range(500):
        rng = generator(0, index)
        before = draw_scene(rng)
        instruction, after = draw_edit(before, rng)
        kept = set(before.objects) & set(after.objects)
        assert len(kept) == len(before.objects) - 1
        assert len(after.objects) == len(before.objects) - instruction.startswith("remove")
        assert len(set(after.meaning.objects)) == len(after.objects)
        assert not held_out(after.meaning)


def test_edits_name_the_object_and_its_new_property():
    for index in range(300):
        before = scene(0, index)
        for instruction, after in edits(before):
            (old,) = set(before.objects) - set(after.objects)
            words = instruction.removeprefix("make the ").removeprefix("remove the ").split()
            if instruction.startswith("make"):
                *name, becomes = [word for word in words if word != "a"]
            else:
                name, becomes = words, None
            assert [t for t in before.objects if set(name) <= {t.shape, t.color}] == [old]
            for new in set(after.objects) - set(before.objects):
                assert {becomes} == {new.shape, new.color} - {old.shape, old.color}
                assert (new.x, new.y, new.radius) == (old.x, old.y, old.radius)


def test_the_short_name_is_used_only_if_it_identifies_one_object():
    for index in range(300):
        before = scene(0, index, 2)
        same_shape = before.objects[0].shape == before.objects[1].shape
        recolors = [words for words, _ in edits(before) if words.split()[-1] in COLORS]
        assert {len(words.split()) for words in recolors} == {5 if same_shape else 4}
