"""GenEval: the score by hand, the published prompts, and the folder that its script reads."""

import json
import re

import pytest
from PIL import Image

from evaluation.composition import TASKS, Composition, read_prompts, write_samples

COUNTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
PROMPT = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cow", "count": 1, "position": ["right of", 0]},
    ],
    "prompt": "a photo of a cow right of a dog",
}


def test_the_overall_score_is_the_mean_over_tasks_and_not_over_images():
    metric = Composition(judge="oracle")
    for tag, right, asked in (("colors", 1, 4), ("two_object", 1, 2), ("counting", 10, 10)):
        for i in range(asked):
            metric.update(tag, i < right)
    scores = {task: value.item() for task, value in metric.compute().items()}
    overall = pytest.approx((1 / 4 + 1 / 2 + 1) / 3, rel=1e-12)
    assert scores == {"colors": 0.25, "two_object": 0.5, "counting": 1.0, "overall": overall}
    assert metric.protocol == {
        **{"metric": "geneval", "judge": "oracle"},
        "num_images": {"two_object": 2, "counting": 10, "colors": 4},
    }


def test_an_unknown_task_and_a_score_without_images_are_refused():
    with pytest.raises(ValueError, match="unknown task 'color'; GenEval's tasks are single_object"):
        Composition().update("color", True)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="^geneval was given no image"):
        Composition().compute()


def test_the_published_prompts_are_read_unchanged(data_dir):
    path = data_dir / "geneval" / "evaluation_metadata.jsonl"
    prompts = read_prompts(path)
    assert len(prompts) == 553
    assert {task: sum(p["tag"] == task for p in prompts) for task in TASKS} == COUNTS
    lines = path.read_text().splitlines()
    assert [json.dumps(prompt) for prompt in prompts] == lines


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(PROMPT) + "\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == [PROMPT]


BROKEN = {
    "no JSON": "{",
    "another tag": json.dumps(PROMPT | {"tag": "color"}),
    "no prompt": json.dumps({key: PROMPT[key] for key in ("tag", "include")}),
    "a prompt that is not text": json.dumps(PROMPT | {"prompt": 3}),
    "an object without count": json.dumps(PROMPT | {"include": [{"class": "dog"}]}),
    "a count of zero": json.dumps(PROMPT | {"exclude": [{"class": "dog", "count": 0}]}),
    "a list": "[]",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_line_that_is_not_a_prompt_is_named(fault, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(PROMPT) + "\n" + BROKEN[fault] + "\n")
    with pytest.raises(ValueError, match="^line 2 of .*prompts.jsonl is not a prompt of GenEval"):
        read_prompts(file)


def test_the_official_script_can_read_the_folder(tmp_path):
    """Reads the folder as evaluate_images.py of GenEval does: loops over names, json.load."""
    images = [Image.new("RGB", (8, 8), (i * 60, 0, 0)) for i in range(4)]
    for index in (0, 552):
        write_samples(tmp_path, index, PROMPT, images)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["00000", "00552"]
    for folder in tmp_path.iterdir():
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == PROMPT
        names = sorted(file.name for file in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert all(re.match(r"\d+\.png", name) for name in names)
        for name, image in zip(names, images, strict=True):
            assert Image.open(folder / "samples" / name).tobytes() == image.tobytes()
