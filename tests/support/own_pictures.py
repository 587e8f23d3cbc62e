"""A folder of pictures as people have them: many sizes and modes, captions in three layouts."""

import json
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw

SHAPES = ("disc", "square", "triangle")
COLORS = ("red", "green", "blue", "orange", "purple")
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "EXIF")
SIZES = ((64, 64), (90, 60), (60, 90), (200, 150), (320, 480))


def draw_picture(shape: str, color: str, mode: str, size: tuple[int, int]) -> Image.Image:
    """A shape in the middle of a white picture of a mode; gray where the mode has no colors."""
    width, height = size
    image = Image.new("RGB", size, "white")
    side = min(size) // 3
    x, y = width // 2, height // 2
    box = (x - side, y - side, x + side, y + side)
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, y - side), (x + side, y + side), (x - side, y + side)], fill=color)
    if mode == "EXIF":  # stored upside down, as by a camera that was held so
        return image.rotate(180)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "RGBA":
        image.putalpha(255)
    return image.convert(mode)


def write_own_pictures(folder: Path, count: int = 300) -> Path:
    """Write pictures into three folders: with a table, with texts, and with names as captions."""
    rows = []
    for number in range(count):
        shape, color = SHAPES[number // 3 % 3], COLORS[number // 9 % 5]
        mode, size = MODES[number % 8], SIZES[number % 7 % 5]
        gray = mode in ("L", "LA", "I;16")
        caption = f"a {'gray' if gray else color} {shape}"
        suffix = ".jpg" if mode in ("CMYK", "EXIF") else ".png"
        image = draw_picture(shape, color, mode, size)
        options = {}
        if mode == "EXIF":
            options["exif"] = Image.Exif()
            options["exif"][ExifTags.Base.Orientation] = 3
        part, name = number % 3, f"IMG_{number:04d}{suffix}"
        if part == 2:
            name = f"{caption.replace(' ', '_')}_{number:03d}{suffix}"
        file = folder / ("table", "texts", "names")[part] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, **options)
        if part == 0:
            rows.append({"file_name": name, "text": caption})
        elif part == 1:
            file.with_suffix(".txt").write_text(caption)
    (folder / "table" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
