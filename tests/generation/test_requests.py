"""Events become documents, and outputs become lists of images and texts."""

import torch
from PIL import Image

from support.generation import collect
from support.tiny import LATENT_SHAPE
from tf_lightning.generation.requests import (
    GenerationOutput,
    GuidanceBranch,
    SequenceState,
    rows_by_branch,
    to_document,
)


def test_adjacent_tokens_are_joined_into_one_text():
    first, second = torch.randn(2, *LATENT_SHAPE)
    document = to_document([3, 4, first, second, 5])
    assert [part.tolist() for part in (document[0], document[3])] == [[3, 4], [5]]
    assert torch.equal(document[1], first) and torch.equal(document[2], second)
    assert to_document([]) == []


def test_events_of_several_prompts_are_separated():
    events = [(1, 7), (0, 3), (1, 8), (0, None), (1, None)]
    documents = collect(iter(events), 3)
    assert [[part.tolist() for part in d] for d in documents] == [[[3]], [[7, 8]], []]


def test_images_of_an_output_can_be_trained_on():
    with torch.inference_mode():
        image = torch.randn(LATENT_SHAPE)
    (kept,) = to_document([image])
    weight = torch.ones(1, requires_grad=True)
    (weight * kept).sum().backward()
    torch.testing.assert_close(weight.grad, image.sum().view(1))


def test_rows_are_grouped_by_guidance_branch():
    generator = torch.Generator()
    sequences = [
        SequenceState(
            n, [GuidanceBranch(n, True, True), GuidanceBranch(n + 2, False, False)], generator, 1
        )
        for n in range(2)
    ]
    assert [branch.row for branch in rows_by_branch(sequences)] == [0, 1, 2, 3]


def test_an_output_separates_its_images_from_its_texts():
    picture = Image.new("RGB", (4, 4))
    output = GenerationOutput([["a", picture, "b"], [picture], ["c"]], [0, 1, 2])
    assert output.images == [picture, picture]
    assert output.texts == ["a b", "", "c"]
