"""Sentences of the shapes world: captions, instructions, and texts of known probability.

All sentences are lower case with single spaces between words. A text begins with "imagine"; a
caption never does.
"""

import math
from functools import cache

import numpy as np

from tf_lightning.shapes.world import (
    COLORS,
    SHAPES,
    Meaning,
    Object,
    Scene,
    Split,
    held_out,
    meanings,
)

INVERSE = {"above": "below", "left of": "right of"}
TEXTS_WITH_TWO_OBJECTS = 0.75
MAX_FACTS = 3

Kind = tuple[str, str]  # (shape, color)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Draw one of the captions of a scene, all equally probable."""
    choices = captions(scene.meaning)
    return choices[rng.integers(len(choices))]


def captions(meaning: Meaning) -> tuple[str, ...]:
    """Return all captions of a meaning: 4 for one object, 6 for two."""
    if meaning.relation is None:
        (kind,) = meaning.objects
        noun = _indefinite(kind)
        return noun, f"there is {noun}", f"this is {noun}", f"one {_words(kind)}"
    return tuple(
        f"{opening}{_indefinite(subject)} {verb}{relation} {_indefinite(other)}"
        for subject, relation, other in _directions(meaning)
        for opening, verb in (("", ""), ("there is ", ""), ("", "is "))
    )


def parse(caption: str) -> Meaning | None:
    """Return the meaning of a caption of this grammar; None for any other text."""
    return _meanings_of_captions().get(caption)


@cache
def _meanings_of_captions() -> dict[str, Meaning]:
    return {
        text: m for num_objects in (1, 2) for m in meanings(num_objects) for text in captions(m)
    }


def draw_edit(
    scene: Scene, rng: np.random.Generator, *, split: Split = "train"
) -> tuple[str, Scene]:
    """Draw an editing instruction for a scene; return it with the edited scene.

    Only the named object changes. Edits that lead to two equal objects, or to a held-out meaning in
    the split "train", are never drawn.
    """
    choices = [
        (instruction, edited)
        for instruction, edited in edits(scene)
        if len({(thing.shape, thing.color) for thing in edited.objects}) == len(edited.objects)
        and (split == "val" or not held_out(edited.meaning))
    ]
    return choices[rng.integers(len(choices))]


def edits(scene: Scene) -> list[tuple[str, Scene]]:
    """Return all instructions for a scene with their results, also those with two equal objects."""
    found = []
    for i, thing in enumerate(scene.objects):
        before, after = scene.objects[:i], scene.objects[i + 1 :]
        full = _words((thing.shape, thing.color))
        alone = all(other.shape != thing.shape for other in before + after)
        short = thing.shape if alone else full
        outcomes = [
            (f"make the {short} {color}", (_changed(thing, thing.shape, color),))
            for color in COLORS
            if color != thing.color
        ]
        outcomes += [
            (f"make the {full} a {shape}", (_changed(thing, shape, thing.color),))
            for shape in SHAPES
            if shape != thing.shape
        ]
        if before or after:
            outcomes.append((f"remove the {full}", ()))
        found += [(words, Scene(before + outcome + after)) for words, outcome in outcomes]
    return found


def draw_text(rng: np.random.Generator) -> str:
    """Draw a text: "imagine" with a statement, then 1 to 3 facts that follow from it."""
    num_objects = 1 + int(rng.random() < TEXTS_WITH_TWO_OBJECTS)
    choices = meanings(num_objects)
    meaning = choices[rng.integers(len(choices))]
    openings = statements(meaning)
    known = facts(meaning)
    sentences = [f"imagine {openings[rng.integers(len(openings))]}"]
    sentences += [known[i] for i in rng.integers(len(known), size=rng.integers(1, MAX_FACTS + 1))]
    return " . ".join(sentences) + " ."


def text_log_prob(document: str) -> float:
    """Natural logarithm of the probability that `draw_text` returns exactly this document.

    It is -inf for a document that `draw_text` cannot return.
    """
    if not document.endswith(" ."):
        return -math.inf
    statement, *stated = document.removesuffix(" .").split(" . ")
    meaning, log_prob = _statements_with_log_probs().get(statement, (None, -math.inf))
    if meaning is None or not 1 <= len(stated) <= MAX_FACTS:
        return -math.inf
    known = facts(meaning)
    if not all(fact in known for fact in stated):
        return -math.inf
    return log_prob - math.log(MAX_FACTS) - len(stated) * math.log(len(known))


def statements(meaning: Meaning) -> tuple[str, ...]:
    """Return the equally probable statements of a meaning in a text."""
    if meaning.relation is None:
        return (_indefinite(meaning.objects[0]),)
    return tuple(
        f"{_indefinite(subject)} {relation} {_indefinite(other)}"
        for subject, relation, other in _directions(meaning)
    )


def facts(meaning: Meaning) -> tuple[str, str]:
    """Return the two equally probable facts that follow from a meaning."""
    if meaning.relation is None:
        ((shape, color),) = meaning.objects
        return f"the {shape} is {color}", f"the {color} thing is a {shape}"
    forth, back = (
        f"the {_words(subject)} is {relation} the {_words(other)}"
        for subject, relation, other in _directions(meaning)
    )
    return forth, back


@cache
def _statements_with_log_probs() -> dict[str, tuple[Meaning, float]]:
    share = {1: 1 - TEXTS_WITH_TWO_OBJECTS, 2: TEXTS_WITH_TWO_OBJECTS}
    return {
        f"imagine {statement}": (
            meaning,
            math.log(share[n] / len(meanings(n)) / len(statements(meaning))),
        )
        for n in share
        for meaning in meanings(n)
        for statement in statements(meaning)
    }


def _directions(meaning: Meaning) -> tuple[tuple[Kind, str, Kind], tuple[Kind, str, Kind]]:
    first, second = meaning.objects
    return (first, meaning.relation, second), (second, INVERSE[meaning.relation], first)


def _words(kind: Kind) -> str:
    shape, color = kind
    return f"{color} {shape}"


def _indefinite(kind: Kind) -> str:
    words = _words(kind)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _changed(thing: Object, shape: str, color: str) -> Object:
    return Object(shape, color, thing.x, thing.y, thing.radius)
