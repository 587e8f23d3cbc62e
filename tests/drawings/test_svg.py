"""SVG files become captioned images; what is unsafe or does not render is counted."""

import importlib.util
from collections import Counter

import numpy as np
import pytest

from tf_lightning.data.documents import Skipped
from tf_lightning.data.mixture import with_buckets
from tf_lightning.drawings import svg
from tf_lightning.drawings.svg import SvgFiles
from tf_lightning.errors import UserError

NAMESPACES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"'
)
TALL = 'viewBox="0 0 100 250"'
RED = '<rect width="200" height="100" fill="red"/>'
OPENCLIPART = """
<metadata><rdf:RDF><cc:Work rdf:about="">
  <dc:title>A red
    box</dc:title>
  <dc:creator><cc:Agent><dc:title>The Artist</dc:title></cc:Agent></dc:creator>
  <dc:subject><rdf:Bag>
    <rdf:li>box</rdf:li><rdf:li/><rdf:li>red thing</rdf:li>
  </rdf:Bag></dc:subject>
</cc:Work></rdf:RDF></metadata>
"""


def drawing(body: str, head: str = "", size: str = 'viewBox="0 0 200 100"') -> str:
    return f"{head}<svg {NAMESPACES} {size}>{body}</svg>"


def titled(body: str, head: str = "") -> str:
    return drawing(f"<title>a drawing</title>{body}", head)


@pytest.fixture
def read(tmp_path):
    """A function that writes files and reads the documents of them."""

    def documents(*contents: str) -> list:
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.svg").write_text(content)
        return list(SvgFiles(f"{tmp_path}/*.svg", val_fraction=0, image_size=40).documents("train"))

    return documents


def test_a_drawing_is_centered_on_white_and_has_its_title_and_keywords(read):
    ((text, image),) = read(drawing(OPENCLIPART + RED))
    assert text.texts == ("A red box: box, red thing", "A red box")
    expected = np.full((40, 40, 3), 255, np.uint8)
    expected[10:30] = (255, 0, 0)
    assert np.array_equal(np.asarray(image), expected)


def test_with_buckets_a_drawing_fills_the_nearest_size(tmp_path):
    (tmp_path / "wide.svg").write_text(titled(RED))
    (tmp_path / "tall.svg").write_text(
        drawing(f"<title>a</title>{RED}<rect width='100' height='250'/>", size=TALL)
    )
    source = SvgFiles(f"{tmp_path}/*.svg", val_fraction=0, image_size=40)
    source = with_buckets(source, 4, 3.0)
    (_, tall), (_, wide) = source.documents("train")
    assert wide.size == (56, 28) and np.all(np.asarray(wide) == (255, 0, 0))
    assert tall.size == (24, 64)
    rows = (np.asarray(tall)[:, 12] < 128).all(-1).nonzero()[0]  # black, in the middle
    assert abs(rows.mean() - 31.5) <= 0.5 and 58 <= len(rows) <= 60


def test_a_drawing_without_metadata_is_named_by_its_title(read):
    ((text, _),) = read(drawing(f"<title>a  box</title>{RED}"))
    assert text == "a box" and not hasattr(text, "texts")


def test_sizes_in_points_and_characters_of_any_encoding_are_read(tmp_path):
    head = '<?xml version="1.0" encoding="ISO-8859-1"?>'
    content = drawing(f"<title>caf\u00e9</title>{RED}", head, 'width="150pt" height="75pt"')
    (tmp_path / "a.svg").write_bytes(content.encode("latin-1"))
    source = SvgFiles(str(tmp_path / "a.svg"), val_fraction=0, image_size=40)
    ((text, image),) = source.documents("train")
    assert text == "caf\u00e9" and image.getpixel((20, 20)) == (255, 0, 0)


def use_bomb() -> str:
    """Ten times ten times ... ten uses of a square."""
    groups = "".join(
        f'<g id="a{n}">{f"<use xlink:href={chr(34)}#a{n - 1}{chr(34)}/>" * 10}</g>'
        for n in range(1, 12)
    )
    return titled(f'<g id="a0">{RED}</g>{groups}<use xlink:href="#a11"/>')


LAUGHS = '<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
PATTERN = (
    '<pattern id="p" width="1e6" height="1e6" patternUnits="userSpaceOnUse">'
    f'{RED}</pattern><rect fill="url(#p)" width="200" height="100"/>'
)
UNUSABLE = {
    titled('<image xlink:href="0.svg" width="9" height="9"/>'): "contains or links an image",
    titled('<filter id="f"><feImage href="a.png"/></filter>'): "contains or links an image",
    titled("<title>&b;</title>", LAUGHS): "declares entities",
    titled("<title>&a;</title>", OUTSIDE): "declares entities",
    titled(PATTERN): "does not render",
    use_bomb(): "does not render",
    titled("<g>" * 5_000 + RED + "</g>" * 5_000): "RecursionError",
    titled('<rect width="9" height="9" fill="white"/>'): "shows nothing on white",
    drawing(RED): "without a title",
    titled(f"<!-- {'-' * 3} {RED}"): "not well-formed",
    "": "not well-formed",
    "<html><title>a page</title></html>": "does not render",
}


def test_unusable_drawings_are_skipped_with_their_reasons(read, monkeypatch):
    monkeypatch.setattr(svg, "MAX_SECONDS", 300)  # also on a machine with other work
    documents = read(*UNUSABLE, titled(RED))
    assert len(documents) == len(UNUSABLE) + 1
    reasons = Counter(d.reason for d in documents if isinstance(d, Skipped))
    assert reasons.total() == len(UNUSABLE)
    for wanted, count in Counter(UNUSABLE.values()).items():
        assert sum(n for reason, n in reasons.items() if wanted in reason) == count, wanted


def test_large_and_slow_drawings_are_skipped(read, monkeypatch):
    monkeypatch.setattr(svg, "MAX_SVG_BYTES", 100)
    assert read(titled(RED)) == [Skipped("SVG of more than 100 bytes")]
    monkeypatch.setattr(svg, "MAX_SVG_BYTES", 10_000)
    monkeypatch.setattr(svg, "MAX_SECONDS", 0.001)
    assert read(titled(RED)) == [Skipped("SVG that takes more than 0.001 seconds to draw")]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs resvg-py; install it with: pip install"):
        SvgFiles("*.svg")
