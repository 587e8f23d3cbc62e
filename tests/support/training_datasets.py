"""Small copies of public training datasets, with the files and keys of the published ones.

Each image has one color and its text names the color, so that a wrong pair is noticed.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from support.files import encoded_image, write_lines, write_parquet, write_tar

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "cyan": (0, 255, 255)}
COLORS |= {"magenta": (255, 0, 255), "yellow": (255, 255, 0), "orange": (255, 165, 0)}


def color_of(image: Image.Image) -> str | None:
    """The name of an image's color; None if it is not in COLORS."""
    pixel = np.asarray(image)[8, 8].astype(int)
    return next((k for k, rgb in COLORS.items() if np.abs(pixel - rgb).max() < 8), None)


def shown(document: list) -> list[str]:
    """A document with each image as "<color>"."""
    return [part if isinstance(part, str) else f"<{color_of(part)}>" for part in document]


def write_images(folder: Path, file_format: str = "PNG", name: str = "{}.png") -> Path:
    """Write one image of each color into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for color in COLORS:
        (folder / name.format(color)).write_bytes(encoded_image(color, file_format))
    return folder


def c4(folder: Path, texts: list[str]) -> Path:
    """C4: gzipped JSON lines."""
    when = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
    lines = [{"text": text, **when} for text in texts]
    return write_lines(folder / "c4-train.00000-of-01024.json.gz", lines)


def dolma(folder: Path, texts: list[str], packed: str = ".gz") -> Path:
    """Dolma: JSON lines, compressed as `packed` says (a suffix, or "")."""
    rest = {"source": "common-crawl", "added": "2023-04-11", "created": "2020", "metadata": {}}
    lines = [{"id": str(n), "text": text, **rest} for n, text in enumerate(texts)]
    return write_lines(folder / f"cc_en_head-0000.jsonl{packed}", lines)


def fineweb(folder: Path, texts: list[str]) -> Path:
    """FineWeb: Parquet."""
    rest = {"dump": "CC-MAIN-2013-20", "url": "http://a.b", "file_path": "s3://", "language": "en"}
    scores = {"language_score": 0.9, "token_count": 3, "score": 3.1, "int_score": 3}
    rows = [{"text": text, "id": str(n), **rest, **scores} for n, text in enumerate(texts)]
    return write_parquet(folder / "000_00000.parquet", rows)


def img2dataset(folder: Path) -> Path:
    """img2dataset's webdataset output: one tar, with images, captions and metadata."""
    files = {}
    for number, color in enumerate(COLORS):
        facts = {
            "url": "http://a.b",
            "caption": color,
            "key": f"{number:09d}",
            "status": "success",
        }
        files[f"{number:09d}.jpg"] = encoded_image(color, "JPEG")
        files[f"{number:09d}.txt"] = color.encode()
        files[f"{number:09d}.json"] = json.dumps(facts).encode()
    return write_tar(folder / "00000.tar", files)


def coco(folder: Path) -> tuple[Path, Path]:
    """COCO: the annotations file and the folder of images; two captions each, in another order."""
    name = "COCO_val2014_{:012d}.jpg"
    files = {color: name.format(42 + n) for n, color in enumerate(COLORS)}
    root = folder / "val2014"
    root.mkdir(parents=True)
    for color, file in files.items():
        (root / file).write_bytes(encoded_image(color, "JPEG"))
    images = [
        {"license": 5, "file_name": file, "height": 16, "width": 20, "id": 42 + n}
        for n, file in enumerate(files.values())
    ]
    notes = [
        {"image_id": 42 + n, "id": 100 * k + n, "caption": f"{color}\n"}
        for k in range(2)
        for n, color in enumerate(COLORS)
    ]
    content = {"info": {}, "images": images, "licenses": [], "annotations": notes}
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps(content))
    return file, root


def karpathy(folder: Path) -> Path:
    """Karpathy's splits of COCO: his file, beside the folder of images; the four splits in turn."""
    write_images(folder / "val2014", "JPEG", "{}.jpg")
    splits = ["train", "restval", "val", "test"]
    images = [
        {"filepath": "val2014", "sentids": [n], "filename": f"{color}.jpg", "imgid": n,
         "split": splits[n % 4], "cocoid": n,
         "sentences": [{"tokens": [], "raw": color, "imgid": n, "sentid": n}]}
        for n, color in enumerate(COLORS)
    ]  # fmt: skip
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return file


def bagel_captions(folder: Path) -> Path:
    """Captioned images as BAGEL stores them: Parquet, two captions for each image."""
    rows = [
        {"image": encoded_image(color), "captions": json.dumps({"a": color, "b": color + "!"})}
        for color in COLORS
    ]
    return write_parquet(folder / "t2i.parquet", rows)


def obelics_rows(images: dict[str, object]) -> list[dict]:
    """Rows of OBELICS: one document for each color, with its image between two texts."""
    return [
        {"images": [None, image, None], "texts": ["See:", None, color],
         "metadata": json.dumps([None, {"src": "u"}, None]), "general_metadata": "{}"}
        for color, image in images.items()
    ]  # fmt: skip


def obelics(folder: Path) -> tuple[Path, Path]:
    """OBELICS: Parquet with image URLs, and a folder of images named by the SHA-256 of the URL."""
    urls = {color: f"https://example.org/{color}.png?w=1" for color in COLORS}
    root = folder / "downloaded"
    root.mkdir()
    for color, url in urls.items():
        (root / hashlib.sha256(url.encode()).hexdigest()).write_bytes(encoded_image(color))
    return write_parquet(folder / "train-00000.parquet", obelics_rows(urls)), root


def mmc4(folder: Path) -> Path:
    """MMC4: one document for each color; its image belongs to the second of two sentences."""
    lines = [
        {"text_list": ["See:", color], "url": "u", "similarity_matrix": [[0.1, 0.3]],
         "image_info": [{"image_name": f"{color}.png", "raw_url": "u", "matched_sim": 0.3,
                         "face_detections": None, "matched_text_index": 1}],
         "could_have_url_duplicate": 0}
        for color in COLORS
    ]  # fmt: skip
    return write_lines(folder / "docs_no_face_shard_0_v3.jsonl", lines)


def mint(folder: Path) -> Path:
    """MINT-1T's PDFs: documents of two pages, with images of a color and the next color."""
    names, files = list(COLORS), {}
    for number, color in enumerate(names):
        two = [color, names[(number + 1) % len(names)]]
        pages, file = [Image.open(io.BytesIO(encoded_image(name))) for name in two], io.BytesIO()
        pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
        record = {
            "images": ["page_0_image_3", None, "page_1_image_8", None],
            "texts": [None, two[0], None, two[1]], "language_id_whole_page_fasttext": {"en": 0.9},
            "image_metadata": [{"height": 16, "width": 20, "page": p, "sha256": "0", "xref": x}
                               for p, x in ((0, 3), (1, 8))],
            "bff_contained_ngram_count_before_dedupe": 0,
        }  # fmt: skip
        files |= {f"{number:032x}.json": json.dumps(record).encode()}
        files |= {f"{number:032x}.tiff": file.getvalue()}
    return write_tar(folder / "CC-MAIN-20230527223515-00000.tar", files)
