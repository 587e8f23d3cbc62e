"""Sources of files at URLs prepare the same corpora as those of local files."""

import filecmp
import json
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem

from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.gs_server import gs_server
from support.http_server import http_server
from support.hub import hub_server
from support.s3_server import s3_server, upload
from tf_lightning.data import (
    CaptionTars,
    ChatFiles,
    ClassFolders,
    EditFiles,
    InterleavedFiles,
    Mixture,
    TextFiles,
)
from tf_lightning.data.readers import globs
from tf_lightning.data.readers.captions import CaptionFolders, CaptionJson, CaptionRows
from tf_lightning.data.readers.globs import expand_braces
from tf_lightning.drawings.svg import SvgFiles
from tf_lightning.errors import UserError
from tf_lightning.remote import requests
from tf_lightning.remote.cache import cached_path

NAMES = "red", "lime", "blue", "white"
SIZE = {"image_size": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setattr(requests, "FIRST_DELAY", 0.001)
    return tmp_path / "downloads"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with a small data set for each source."""
    site = tmp_path_factory.mktemp("site")
    for folder in ("rows/images here", "coco", "beside", "classes/a", "classes/b", "edits"):
        (site / folder).mkdir(parents=True)
    for number in range(2):
        files = {f"{name}.jpg": encoded_image(name) for name in NAMES[number * 2 :]}
        texts = {f"{name}.txt": f"a {name} square".encode() for name in NAMES[number * 2 :]}
        write_tar(site / f"shard-{number:03d}.tar", files | texts)
    for name in NAMES:
        (site / "rows/images here" / f"{name}.png").write_bytes(encoded_image(name))
        (site / "coco" / f"{name}.png").write_bytes(encoded_image(name))
        (site / "beside" / f"{name}.png").write_bytes(encoded_image(name))
        (site / "beside" / f"{name}.txt").write_text(f"{name} beside")
        (site / "classes" / "ab"[name > "m"] / f"{name}.png").write_bytes(encoded_image(name))
    rows = [{"file_name": f"images here/{name}.png", "text": f"all {name}"} for name in NAMES]
    write_lines(site / "rows/metadata.jsonl", rows)
    write_lines(site / "lines.jsonl.gz", [{"text": f"{name} and {name}"} for name in NAMES])
    write_parquet(
        site / "table.parquet",
        [{"image": {"bytes": encoded_image(name)}, "text": name} for name in NAMES],
    )
    captions = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES)],
        "annotations": [{"image_id": i, "caption": f"so {name}"} for i, name in enumerate(NAMES)],
    }
    (site / "captions.json").write_text(json.dumps(captions))
    parts = [{"image": "coco/red.png"}, {"text": "then"}, {"image": "coco/blue.png"}]
    write_lines(site / "parts.jsonl", [{"parts": [*parts, {"text": name}]} for name in NAMES])
    turn = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    write_lines(site / "chat.jsonl", [{"messages": turn, "images": ["coco/red.png"]}] * 3)
    edit = {"source_img": "coco/red.png", "target_img": "coco/blue.png"}
    write_lines(site / "edits.jsonl", [edit | {"instruction": f"make it {n}"} for n in NAMES])
    return site


def sources(base: str) -> dict:
    """The sources of the site's files, below a local folder or a URL."""
    return {
        "tars": CaptionTars(f"{base}/shard-{{000..001}}.tar", **SIZE),
        "rows": CaptionRows([f"{base}/rows/metadata.jsonl", f"{base}/table.parquet"], **SIZE),
        "coco": CaptionJson(f"{base}/captions.json", images=f"{base}/coco", **SIZE),
        "beside": CaptionFolders([f"{base}/beside/{name}.png" for name in NAMES], **SIZE),
        "classes": ClassFolders([f"{base}/classes/{{a,b}}/*.png"], **SIZE),
        "text": TextFiles(f"{base}/lines.jsonl.gz"),
        "parts": InterleavedFiles(f"{base}/parts.jsonl", **SIZE),
        "chat": ChatFiles(f"{base}/chat.jsonl", **SIZE),
        "edits": EditFiles(f"{base}/edits.jsonl", **SIZE),
    }


def prepared(base: str, folder: Path, **options) -> dict[str, Path]:
    """The folders of the corpora by source and split."""
    sizes = {"patch_size": 4, "row_length": 64, "vocab_size": 300}
    data = Mixture(sources(base), autoencoder="pixels", cache_dir=str(folder), **sizes, **options)
    data.prepare_data()
    return {
        f"{name} {split}": corpus.path
        for split, corpora in data.corpora.items()
        for name, corpus in corpora.items()
    }


def assert_same_corpora(found: dict[str, Path], wanted: dict[str, Path]) -> None:
    """Check that corpora are the same byte for byte, but for where they come from."""
    assert found.keys() == wanted.keys()
    for name, path in wanted.items():
        files = {file.name for file in path.iterdir()} - {"corpus.json"}
        same, different, unreadable = filecmp.cmpfiles(found[name], path, files, shallow=False)
        assert (set(same), different, unreadable) == (files, [], []), name
        facts = [json.loads((p / "corpus.json").read_text()) for p in (found[name], path)]
        assert facts[0].pop("made_from") != facts[1].pop("made_from")
        assert facts[0] == facts[1], name


@pytest.fixture(scope="module")
def from_disk(site, tmp_path_factory) -> dict[str, Path]:
    return prepared(str(site), tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def server(site):
    with http_server(site) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(site):
    """The URL of a bucket with the site's files."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with s3_server():
        upload(site, "bucket")
        yield "s3://bucket"


@pytest.fixture
def hub(site, monkeypatch):
    """The URL of a private data set on the hub with the site's files."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub_server(site, token="hf_secret"):
        yield "hf://datasets/me/data"


@pytest.fixture
def google_bucket(site):
    """A server whose bucket gs://bucket has the site's files."""
    pytest.importorskip("gcsfs")
    with gs_server(site) as server:
        yield server


@pytest.mark.parametrize("scheme", ["http", "failing http", "s3", "gs", "hf"])
def test_corpora_from_urls_equal_those_from_the_disk(
    scheme, tmp_path, server, request, monkeypatch
):
    if scheme == "s3":
        url = request.getfixturevalue("bucket")
    elif scheme == "gs":
        request.getfixturevalue("google_bucket")
        url = "gs://bucket"
    elif scheme == "hf":
        url = request.getfixturevalue("hub")
    else:
        url = server.url
        monkeypatch.setattr(server, "fail_share", 0.3 * (scheme == "failing http"))
        monkeypatch.setattr(server, "cut_share", 0.1 * (scheme == "failing http"))
    wanted = request.getfixturevalue("from_disk")
    assert_same_corpora(prepared(url, tmp_path / "remote"), wanted)


def test_private_data_of_the_hub_needs_a_token_that_is_never_logged(
    hub, site, tmp_path, cache, monkeypatch, caplog
):
    caplog.set_level("DEBUG")
    text = TextFiles(f"{hub}/lines.jsonl.gz", val_fraction=0)
    assert len(list(text.documents("train"))) == len(NAMES)
    stored = "".join(f.read_text("latin-1") for f in cache.rglob("*") if f.is_file())
    assert "hf_secret" not in caplog.text + stored + text.fingerprint("train")
    for token in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        HfFileSystem.clear_instance_cache()
        with pytest.raises(UserError, match="data/lines.jsonl.gz is refused with HTTP status 401;"):
            TextFiles(f"{hub}/lines.jsonl.gz").files("train")


def test_a_bucket_of_google_that_refuses_access_is_one_sentence(google_bucket):
    google_bucket.status = 403
    with pytest.raises(UserError, match="access to gs://bucket/.* is refused; log in with `gcloud"):
        TextFiles("gs://bucket/lines.jsonl.gz").files("train")


def test_lazy_images_are_copied_out_of_the_cache(site, tmp_path, server, cache):
    data = Mixture(
        {"rows": sources(server.url)["rows"], "tars": sources(server.url)["tars"]},
        autoencoder="pixels", lazy_images=True, cache_dir=str(tmp_path / "lazy"),
        patch_size=4, row_length=64, vocab_size=300,
    )  # fmt: skip
    data.prepare_data()
    shutil.rmtree(cache)
    for corpus in data.corpora["train"].values():
        documents = [corpus[i] for i in range(len(corpus))]
        images = [part for document in documents for part in document if part.ndim == 3]
        assert [image.shape for image in images] == [(3, 8, 8)] * len(documents)


def test_a_replaced_image_or_text_file_makes_another_corpus(site, server, tmp_path):
    for kind in ("rows", "beside", "coco"):
        first, second = (sources(server.url)[kind] for _ in range(2))
        before = first.fingerprint("train"), getattr(first, "image_digest", str)("train")
        file = site / {"rows": "rows/images here", "beside": "beside", "coco": "coco"}[kind]
        file = next(file.glob("red.txt"), file / "red.png")
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"!")
        try:
            after = second.fingerprint("train"), getattr(second, "image_digest", str)("train")
        finally:
            file.write_bytes(content)
        assert before != after


def test_an_image_that_is_replaced_during_a_preparation_is_refused(site, server):
    source = sources(server.url)["rows"]
    source.image_digest("train")
    [shard] = source.shards("train")
    file = site / "rows/images here/red.png"
    content = file.read_bytes()
    file.write_bytes(encoded_image("black"))
    try:
        with pytest.raises(UserError, match="red.png was replaced while it was in use; run the"):
            list(shard.documents("train"))
    finally:
        file.write_bytes(content)


def test_missing_images_are_skipped_and_those_outside_of_a_bucket_never_read(site, server):
    path = site / "odd.jsonl"
    names = ["nothing.png", str(site / "coco/red.png"), "../../../../../../../etc/red.png"]
    rows = [{"file_name": name, "text": "a"} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = CaptionRows(f"{server.url}/odd.jsonl", **SIZE, val_fraction=0)
    reasons = [skipped.reason for skipped in source.documents("train")]
    outside = "image outside of the host or bucket of the file that names it"
    assert reasons == ["missing image", outside, outside]


def test_no_login_or_signature_is_in_a_fingerprint(site, server):
    url = server.url.replace("http://", "http://me:secret@")
    source = TextFiles(f"{url}/lines.jsonl.gz?X-Amz-Signature=secret", val_fraction=0)
    assert "secret" not in source.fingerprint("train") + source.fingerprint("val")
    assert len(list(source.documents("train"))) == len(NAMES)
    plain = TextFiles(f"{server.url}/lines.jsonl.gz", val_fraction=0)
    assert source.fingerprint("train") == plain.fingerprint("train")


def test_a_url_that_matches_no_file_is_one_sentence(server):
    for name in ("nothing.tar", "*.tar.gz"):
        with pytest.raises(UserError, match="no file matches http.*; check the URL$"):
            TextFiles(f"{server.url}/{name}").files("train")
    with pytest.raises(
        UserError, match=r"check the URL, or give a glob such as '.*/folder/\*.tar'"
    ):
        TextFiles(f"{server.url}/folder").files("train")
    with pytest.raises(UserError, match="is a folder of a web server; .*/folder/metadata.jsonl$"):
        TextFiles(f"{server.url}/folder/").files("train")
    with pytest.raises(UserError, match="no file matches .*shard-002.tar"):
        CaptionTars(f"{server.url}/shard-{{000..002}}.tar").files("train")


def test_a_file_named_as_a_folder_of_the_cache_is_refused(server):
    url = f"{server.url}/lines.jsonl.gz"
    cached_path(f"{url}/a").mkdir(parents=True)
    with pytest.raises(UserError, match="has a folder of the same name"):
        list(TextFiles(url, val_fraction=0).documents("train"))


def test_a_web_page_in_place_of_a_file_is_skipped_and_told(site, server):
    (site / "lost.jsonl").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    found = TextFiles(f"{server.url}/lost.jsonl", val_fraction=0).documents("train")
    [skipped] = found
    assert skipped.reason == (
        "web page in place of the file; check its URL, and name the files in a folder, such as "
        "FOLDER/metadata.jsonl"
    )


def test_a_remote_file_of_another_format_is_named_by_its_url(server):
    tars = CaptionTars(f"{server.url}/lines.jsonl.gz", val_fraction=0, **SIZE)
    with pytest.raises(UserError, match="^http://.*/lines.jsonl.gz is a JSON file; CaptionTars"):
        list(tars.documents("train"))


def test_images_that_a_remote_table_names_are_copied_ahead_with_one_request_each(site, server):
    source = sources(server.url)["rows"]
    source.paths, source.val_fraction = source.paths[:1], 0
    source.image_digest("train")
    server.requests.clear()
    first = threading.Event()

    def wait_for_another(handler):  # no answer before two images are asked for
        if handler.path.endswith(".png"):
            if sum(path.endswith(".png") for _, path, _ in server.requests) > 1:
                first.set()
            assert first.wait(20)

    server.on_request = wait_for_another
    try:
        documents = list(source.documents("train"))
    finally:
        server.on_request = None
    local = CaptionRows(f"{site}/rows/metadata.jsonl", val_fraction=0, **SIZE)
    for (text, image), (wanted, original) in zip(documents, local.documents("train"), strict=True):
        assert text == wanted and image.tobytes() == original.tobytes()
    methods = [method for method, path, _ in server.requests if path.endswith(".png")]
    assert methods == ["GET"] * len(NAMES)


def test_the_names_of_classes_are_read_from_a_url(site, server):
    (site / "names.txt").write_text("a first, other\nb second\n")
    folders = f"{server.url}/classes/{{a,b}}/*.png"
    source = ClassFolders([folders], names=f"{server.url}/names.txt", val_fraction=0, **SIZE)
    prompts = {str(prompt) for prompt, _ in source.documents("train")}
    assert prompts == {f"Please generate an image of {name}" for name in ("first", "second")}
    with pytest.raises(UserError, match="no file matches http.*nothing.txt; check the URL"):
        ClassFolders([folders], names=f"{server.url}/nothing.txt", **SIZE).fingerprint("train")


def test_svg_files_are_read_from_a_url(site, server):
    for name in NAMES:
        shape = f'<circle r="9" cx="9" cy="9" fill="{name}" stroke="black"/>'
        title = f"<title>a {name} disc</title>"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 18 18">{title}{shape}</svg>'
        (site / f"{name}.svg").write_text(svg)
    remote, local = (
        list(
            SvgFiles(f"{base}/{{{','.join(NAMES)}}}.svg", val_fraction=0, **SIZE).documents("train")
        )
        for base in (server.url, site)
    )
    assert [text for text, _ in remote] == [f"a {name} disc" for name in NAMES]
    for (_, image), (_, wanted) in zip(remote, local, strict=True):
        assert image.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "pattern, expanded",
    [
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{train,val}/{0..1}", ["train/0", "train/1", "val/0", "val/1"]),
        ("a{,b}", ["a", "ab"]),
        ("{a,b{1,2}}", ["a", "b1", "b2"]),
        ("{a}", ["{a}"]),
        ("{x..y}", ["{x..y}"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern, expanded):
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{0..99999999}", "{0..99}{0..99}", "{1..9}" * 4])
def test_braces_that_stand_for_too_many_files_are_refused(pattern, monkeypatch):
    monkeypatch.setattr(globs, "MAX_EXPANDED", 1000)
    with pytest.raises(UserError, match="more than 1,000 files; give a smaller range"):
        expand_braces(pattern)


def test_braces_also_expand_local_paths_unless_a_file_has_that_name(tmp_path):
    for name in ("a1", "a2", "b{1..2}"):
        (tmp_path / name).write_text("text")
    for pattern, names in (("a{1..2}", ["a1", "a2"]), ("b{1..2}", ["b{1..2}"])):
        found = TextFiles(f"{tmp_path}/{pattern}").files("train")
        assert [file.name for file in found] == names
    with pytest.raises(UserError, match="there is no file or folder '.*/a3'; check the path"):
        TextFiles(f"{tmp_path}/a{{1..3}}").files("train")
