"""Published prompt sets read small datasets in the layout of the originals."""

from pathlib import Path

import pytest
from PIL import Image

from callbacks.published_prompts import (
    CocoPrompts,
    GenEvalPrompts,
    ImageNetPrompts,
    KarpathyPrompts,
    open_image,
)
from support.evaluation_datasets import make_coco, make_imagenet
from tf_lightning.errors import UserError


@pytest.fixture
def coco(tmp_path) -> Path:
    return make_coco(tmp_path / "coco")


@pytest.fixture
def imagenet(tmp_path) -> Path:
    return make_imagenet(tmp_path / "imagenet")


def test_coco_draws_captions_without_replacement_with_their_images(coco):
    prompts = CocoPrompts(str(coco), count=6, image_size=16)
    asked = prompts.prompts(None)
    texts = [prompt.text for prompt in asked]
    assert len(set(texts)) == 6 and texts != sorted(texts)
    assert texts == [prompt.text for prompt in prompts.prompts(None)]
    assert texts != [p.text for p in CocoPrompts(str(coco), count=6, seed=1).prompts(None)]
    for prompt in asked:
        number = prompt.text.split()[1]
        assert prompt.references == (f"caption {number} 0", f"caption {number} 1")
        assert prompt.image().size == (16, 16) and prompt.image().mode == "RGB"


def test_coco_compares_with_all_images_or_with_those_of_the_captions(coco):
    everything = CocoPrompts(str(coco), count=6, image_size=16)
    matched = CocoPrompts(str(coco), count=6, real="matched", image_size=16)
    assert len(everything.real_images(None)) == 4
    assert len(matched.real_images(None)) == 6
    assert everything.facts["dataset"] != matched.facts["dataset"]
    assert everything.facts["resize"] == "centre crop, lanczos 16"


def test_karpathys_split_has_five_captions_per_image(coco):
    asked = KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco)).prompts(None)
    assert [prompt.references[0] for prompt in asked] == ["Raw 1 0.", "Raw 3 0."]
    assert {len(prompt.references) for prompt in asked} == {5}
    assert asked[0].image().size == (40, 20)
    few = KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco), "val", count=1)
    assert len(few.prompts(None)) == 1


def test_imagenet_prompts_name_each_class_by_its_first_name(imagenet):
    prompts = ImageNetPrompts(
        str(imagenet / "LOC_synset_mapping.txt"), str(imagenet / "ILSVRC"), per_class=2
    )
    texts = [prompt.text for prompt in prompts.prompts(None)]
    assert texts == [f"Please generate an image of {n}" for n in ("tench", "goldfish")] * 2
    assert [p().size for p in prompts.real_images(None)] == [(256, 256)] * 4


def test_geneval_has_553_prompts_four_times_each(data_dir):
    asked = GenEvalPrompts(str(data_dir / "geneval" / "evaluation_metadata.jsonl")).prompts(None)
    assert len(asked) == 4 * 553
    assert asked[0].text == asked[3].text == "a photo of a bench" != asked[4].text
    assert [prompt.about for prompt in asked[3:5]] == [(0, 4), (1, 4)]
    assert asked[0].metadata["tag"] == "single_object"


def test_images_are_center_cropped(tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    wide.save(tmp_path / "wide.png")
    assert open_image(tmp_path / "wide.png", 16).getcolors() == [(256, (0, 0, 255))]


def test_missing_parts_of_a_local_copy_are_named(coco, tmp_path):
    (coco / "annotations" / "captions_val2014.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="captions_val2014.json cannot be read"):
        CocoPrompts(str(coco)).prompts(None)
    with pytest.raises(UserError, match="no images in"):
        CocoPrompts(str(tmp_path / "nowhere")).real_images(None)
    with pytest.raises(UserError, match="is not JSON"):
        (tmp_path / "bad.json").write_text("{")
        KarpathyPrompts(str(tmp_path / "bad.json"), str(coco)).prompts(None)
    with pytest.raises(UserError, match="no image in the split 'restval'"):
        KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco), "restval").prompts(None)
    with pytest.raises(UserError, match="cannot be read as an image"):
        open_image(tmp_path / "bad.json", None)


def test_a_count_above_the_number_of_captions_is_refused(coco):
    with pytest.raises(UserError, match="has 8 captions"):
        CocoPrompts(str(coco), count=9).prompts(None)
