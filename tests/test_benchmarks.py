"""Published protocols read miniature copies of their datasets, laid out as the real ones."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from callbacks.benchmarks import (
    CocoPrompts,
    GenEvalPrompts,
    ImageNetPrompts,
    KarpathyPrompts,
    open_picture,
)
from tf_lightning.cli import main
from tf_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def picture(path, size=(40, 20), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def coco(tmp_path):
    """Four pictures with two captions each, as COCO's archives unpack; one is grey."""
    root = tmp_path / "coco"
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (42, 73, 74, 133)]
    for name in names:
        picture(root / "val2014" / name)
    Image.new("L", (30, 30)).save(root / "val2014" / names[2])
    images = [{"id": i, "file_name": name, "height": 20} for i, name in enumerate(names)]
    notes = [
        {"image_id": i, "id": 10 * i + j, "caption": f"caption {i} {j}\n"}
        for i in range(4)
        for j in range(2)
    ]
    (root / "annotations").mkdir()
    content = {"info": {}, "images": images, "annotations": notes, "licenses": []}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    sentences = [[{"raw": f"Raw {i} {j}.", "tokens": []} for j in range(5)] for i in range(4)]
    karpathy = [
        {
            **{"filepath": "val2014", "filename": name, "sentences": sentences[i], "imgid": i},
            "split": "test" if i % 2 else "val",
        }
        for i, name in enumerate(names)
    ]
    (root / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    return root


def test_coco_draws_captions_without_repetition_and_keeps_their_pictures(coco):
    prompts = CocoPrompts(str(coco), count=6, image_size=16)
    asked = prompts.prompts(None)
    texts = [prompt.text for prompt in asked]
    assert len(set(texts)) == 6 and texts != sorted(texts)
    assert texts == [prompt.text for prompt in prompts.prompts(None)]
    assert texts != [p.text for p in CocoPrompts(str(coco), count=6, seed=1).prompts(None)]
    for prompt in asked:
        number = prompt.text.split()[1]
        assert prompt.references == (f"caption {number} 0", f"caption {number} 1")
        assert prompt.picture().size == (16, 16) and prompt.picture().mode == "RGB"


def test_coco_compares_with_all_pictures_or_with_those_of_the_captions(coco):
    everything = CocoPrompts(str(coco), count=6, image_size=16)
    matched = CocoPrompts(str(coco), count=6, real="matched", image_size=16)
    assert len(everything.real_pictures(None)) == 4
    assert len(matched.real_pictures(None)) == 6
    assert everything.facts["dataset"] != matched.facts["dataset"]
    assert everything.facts["resize"] == "centre crop, lanczos 16"


def test_karpathys_split_has_five_captions_a_picture(coco):
    asked = KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco)).prompts(None)
    assert [prompt.references[0] for prompt in asked] == ["Raw 1 0.", "Raw 3 0."]
    assert {len(prompt.references) for prompt in asked} == {5}
    assert asked[0].picture().size == (40, 20)
    few = KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco), "val", count=1)
    assert len(few.prompts(None)) == 1


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    for synset in ("n01440764", "n01443537"):
        for number in range(2):
            picture(root / "train" / synset / f"{synset}_{number}.JPEG")
    lines = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
    (root / "LOC_synset_mapping.txt").write_text(lines)
    return root


def test_imagenets_classes_are_asked_for_in_turn_by_their_first_name(imagenet):
    prompts = ImageNetPrompts(
        str(imagenet / "LOC_synset_mapping.txt"), str(imagenet / "train"), per_class=2
    )
    texts = [prompt.text for prompt in prompts.prompts(None)]
    assert texts == [f"Please generate an image of {n}" for n in ("tench", "goldfish")] * 2
    assert [p().size for p in prompts.real_pictures(None)] == [(256, 256)] * 4


def test_genevals_prompts_are_the_553_four_times_each(data_dir):
    asked = GenEvalPrompts(str(data_dir / "geneval" / "evaluation_metadata.jsonl")).prompts(None)
    assert len(asked) == 4 * 553
    assert asked[0].text == asked[3].text == "a photo of a bench" != asked[4].text
    assert [prompt.about for prompt in asked[3:5]] == [(0, 4), (1, 4)]
    assert asked[0].metadata["tag"] == "single_object"


def test_the_middle_of_a_picture_is_kept(tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    wide.save(tmp_path / "wide.png")
    assert open_picture(tmp_path / "wide.png", 16).getcolors() == [(256, (0, 0, 255))]


def test_what_is_missing_in_a_local_copy_is_named(coco, tmp_path):
    (coco / "annotations" / "captions_val2014.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="captions_val2014.json cannot be read"):
        CocoPrompts(str(coco)).prompts(None)
    with pytest.raises(UserError, match="no pictures in"):
        CocoPrompts(str(tmp_path / "nowhere")).real_pictures(None)
    with pytest.raises(UserError, match="is not JSON"):
        (tmp_path / "bad.json").write_text("{")
        KarpathyPrompts(str(tmp_path / "bad.json"), str(coco)).prompts(None)
    with pytest.raises(UserError, match="no picture in its split 'restval'"):
        KarpathyPrompts(str(coco / "dataset_coco.json"), str(coco), "restval").prompts(None)
    with pytest.raises(UserError, match="is no readable picture"):
        open_picture(tmp_path / "bad.json", None)


def test_more_captions_than_there_are_cannot_be_drawn(coco):
    with pytest.raises(UserError, match="has 8 captions"):
        CocoPrompts(str(coco), count=9).prompts(None)


PROTOCOLS = {  # configuration: its prompts and measures on the miniature copies
    "karpathy": (
        {"annotations": "coco/dataset_coco.json", "images": "coco"},
        {"class_path": "callbacks.measures.CaptionScores", "init_args": {"label": "mini"}},
        {"val/cider[mini]", "val/bleu4[mini]"},
    ),
    "coco30k-matched": (
        {"root": "coco", "count": 6, "image_size": 32},
        {"class_path": "callbacks.measures.PictureScores", "init_args": {"label": "mini"}},
        {"val/fid[mini]"},
    ),
    "imagenet50k": (
        {"synsets": "imagenet/LOC_synset_mapping.txt", "images": "imagenet/train", "per_class": 2},
        {"class_path": "callbacks.measures.PictureScores", "init_args": {"label": "mini"}},
        {"val/fid[mini]"},
    ),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocols_configuration_measures_a_miniature_copy(name, run, coco, imagenet, tmp_path):
    arguments, measure, names = PROTOCOLS[name]
    config = yaml.safe_load((ROOT / "configs" / "eval" / f"{name}.yaml").read_text())
    callback = config["trainer"]["callbacks"][-1]["init_args"]
    callback["prompts"]["init_args"] |= {
        key: str(tmp_path / value) if isinstance(value, str) else value
        for key, value in arguments.items()
    }
    callback |= {"measures": [measure], "num_inference_steps": 2, "max_new_tokens": 4}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    config["trainer"]["enable_progress_bar"] = True
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    files = ["-c", str(run / "config.yaml"), "-c", str(tmp_path / "eval.yaml")]
    main(["validate", *files, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    file = tmp_path / name / "version_0" / "validate" / "metrics.json"
    assert names <= {number["name"] for number in json.loads(file.read_text())["numbers"]}
