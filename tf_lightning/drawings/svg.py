"""SVG drawings with their titles and keywords, rasterized by resvg."""

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageOps

from tf_lightning.data.buckets import Size, nearest_size
from tf_lightning.data.documents import AnyText, BadSample, Skipped
from tf_lightning.data.images import to_rgb
from tf_lightning.data.readers.files import FileSource
from tf_lightning.drawings.safe_xml import parse_xml
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt

MAX_SVG_BYTES = 2_000_000
MAX_SECONDS = 30  # for one drawing
MAX_MEMORY = 2**31  # bytes, for the process that rasterizes one drawing
LINKS = {"image", "feImage"}  # elements that show another file
# Small drawings exist that take years or all memory, so resvg runs in a process of its own.
# Windows has no limits of memory. Fonts would make a drawing depend on the system.
RASTERIZE = """
import sys, resvg_py
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
except ImportError:
    pass
svg, side = sys.stdin.buffer.read().decode(), int(sys.argv[1])
png = resvg_py.svg_to_bytes(svg, width=side, height=side, dpi=96, skip_system_fonts=True)
sys.stdout.buffer.write(png)
"""


@dataclass(eq=False)
class SvgFiles(FileSource):
    """Documents [caption, image] from SVG files, such as those of openclipart.

    The caption is the drawing's title or its title with its keywords, drawn in each epoch. Both
    are read from the metadata that Inkscape and openclipart write (`dc:title`, `dc:subject`); a
    drawing without them is named by its element `title`. The background is white. A drawing that
    contains or links other images is skipped. Needs the package resvg-py.

    Args:
        paths: SVG files or globs to train on, such as '/usr/share/openclipart/svg/**/*.svg'.
        image_size: side of the square images in pixels; with the data's `max_aspect_ratio`, of a
            square that has about their area. A drawing of another shape is centered.

    Attributes:
        image_sizes: aspect-ratio buckets, as in `ImageFileSource`; empty: all images are square.
    """

    image_size: PositiveInt = 256
    image_sizes: ClassVar[tuple[Size, ...]] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if importlib.util.find_spec("resvg_py") is None:
            raise UserError(
                "SvgFiles needs resvg-py; install it with: pip install 'tf-lightning[svg]'"
            )

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """Yield the file itself; see `FileSource.samples`."""
        yield "", file

    def document(self, sample: Path) -> list[str | Image.Image | Skipped]:
        """See `FileSource.document`."""
        if sample.stat().st_size > MAX_SVG_BYTES:
            raise BadSample(f"SVG of more than {MAX_SVG_BYTES:,} bytes")
        root = parse_xml(sample.read_bytes())
        sizes = self.image_sizes or [(self.image_size, self.image_size)]
        return [svg_caption(root), rasterize(root, sizes)]


def svg_caption(root: ET.Element) -> str:
    """Return the title of a drawing, and the title with the keywords.

    Raises:
        BadSample: the drawing has no title.
    """
    work = ".//{*}Work/{*}"
    title = _words(root.findtext(f"{work}title")) or _words(root.findtext("{*}title"))
    if not title:
        raise BadSample("SVG without a title")
    keywords = [_words(item.text) for item in root.iterfind(f"{work}subject//{{*}}li")]
    listed = ", ".join(filter(None, keywords))
    return AnyText([f"{title}: {listed}", title] if listed else [title])


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def rasterize(root: ET.Element, sizes: Sequence[Size]) -> Image.Image:
    """Draw an SVG as an RGB image, centered on white.

    Args:
        root: the drawing.
        sizes: sizes (width, height) in pixels to choose from; the image has the one nearest to the
            drawing's aspect ratio.

    Raises:
        BadSample: the drawing links other files, is empty, takes too long, or is not valid.
    """
    links = LINKS & {str(element.tag).rpartition("}")[2] for element in root.iter()}
    if links:
        raise BadSample("SVG that contains or links an image")
    longest = max(map(max, sizes))
    command = [sys.executable, "-c", RASTERIZE, str(longest), str(MAX_MEMORY)]
    # resvg receives what was parsed here, so it sees no document type and nothing else.
    svg = ET.tostring(root, encoding="utf-8")
    try:
        drawn = subprocess.run(command, input=svg, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BadSample(f"SVG that takes more than {MAX_SECONDS} seconds to draw") from error
    if drawn.returncode:
        raise BadSample("SVG that does not render")
    image = to_rgb(Image.open(BytesIO(drawn.stdout), formats=["PNG"]))
    if all(low == 255 for low, _ in image.getextrema()):
        raise BadSample("SVG that shows nothing on white")
    size = nearest_size(image.size, sizes)
    return ImageOps.pad(image, size, Image.Resampling.BICUBIC, color="white")
