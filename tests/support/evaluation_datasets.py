"""Small copies of public evaluation datasets, with the folders and files of the published ones."""

import json
from pathlib import Path

from PIL import Image

CLASSES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


def write_image(path: Path, size: tuple[int, int] = (40, 20), color: str = "red") -> None:
    """Write an image of one color; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def make_coco(root: Path) -> Path:
    """COCO and Karpathy's splits: four images with two captions each; one is greyscale."""
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (42, 73, 74, 133)]
    for name in names:
        write_image(root / "val2014" / name)
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
    (root / "dataset_coco.json").write_text(json.dumps(karpathy(names)))
    return root


def karpathy(names: list[str]) -> dict:
    """Karpathy's file: five sentences for each image; every other image is in the test split."""
    sentences = [[{"raw": f"Raw {i} {j}.", "tokens": []} for j in range(5)] for i in range(4)]
    images = [
        {
            **{"filepath": "val2014", "filename": name, "sentences": sentences[i], "imgid": i},
            "split": "test" if i % 2 else "val",
        }
        for i, name in enumerate(names)
    ]
    return {"images": images, "dataset": "coco"}


def make_imagenet(root: Path) -> Path:
    """ImageNet as in Kaggle's archive: two classes of two images."""
    for synset in CLASSES:
        for number in range(2):
            path = f"ILSVRC/Data/CLS-LOC/train/{synset}/{synset}_{number}.JPEG"
            write_image(root / path)
    lines = "".join(f"{synset} {names}\n" for synset, names in CLASSES.items())
    (root / "LOC_synset_mapping.txt").write_text(lines)
    return root


def make_geneval(root: Path) -> Path:
    """GenEval: two prompts in evaluation_metadata.jsonl."""
    root.mkdir(parents=True)
    lines = [
        {
            "tag": "single_object",
            "include": [{"class": "bench", "count": 1}],
            "prompt": "a photo of a bench",
        },
        {
            "tag": "colors",
            "include": [{"class": "car", "count": 1, "color": "red"}],
            "prompt": "a photo of a red car",
        },
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "evaluation_metadata.jsonl").write_text(text)
    return root
