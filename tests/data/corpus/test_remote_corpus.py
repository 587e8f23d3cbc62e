"""Corpora in an object store: the same rows, whatever fails, in a cache of limited size."""

import multiprocessing
import shutil
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.curves import read_curves
from support.compare import same_batch
from support.http_server import http_server
from support.prepare_runs import encodable, encode
from support.runs import write_config
from support.s3_server import CREDENTIALS, s3_server, upload
from support.sources import GreyImages, RepeatedWord
from tf_lightning.cli.main import main
from tf_lightning.data import Corpus, Mixture, TrainingRows
from tf_lightning.data.corpus import folders, manifest
from tf_lightning.data.corpus.encoded import TOKENIZER_FILE
from tf_lightning.data.corpus.prepare import prepare
from tf_lightning.errors import UserError
from tf_lightning.remote import cache, requests

BLOCK = 2048
PIXELS = ["--data.autoencoder=pixels", "--model.latent_channels=3", "--model.patch_size=16"]


def build(encoded: str | Path, cache: Path, **changed) -> Mixture:
    """Text and images of pixels that are read from an encoded folder."""
    sources = {"words": RepeatedWord("red", 30), "pictures": GreyImages(num_documents=60)}
    arguments = {"autoencoder": "pixels", "patch_size": 4, "row_length": 64, "vocab_size": 300}
    arguments |= {"encoded": str(encoded), "cache_dir": str(cache), "batch_size": 3}
    return Mixture(sources, **(arguments | changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An encoded folder whose files have several blocks."""
    folder = tmp_path_factory.mktemp("made") / "encoded"
    data = build(folder, folder.parent / "cache")
    for job in data.plan_encoded():
        prepare(job)
    (folder / TOKENIZER_FILE).write_bytes(data.tokenizer.proto)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "BLOCK", BLOCK)
        manifest.write_manifest(folder)
    return folder


@pytest.fixture
def batches(folder, tmp_path) -> list:
    """The first batches of the folder on the disk."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = build(copy, tmp_path / "unused")
    data.setup()
    return list(islice(data.train_dataloader(), 12))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A process that has read nothing yet, and short pauses between its attempts."""
    monkeypatch.setenv("TF_LIGHTNING_CACHE", str(tmp_path / "remote"))
    monkeypatch.setattr(requests, "FIRST_DELAY", 0.001)
    folders.read_manifest.cache_clear()
    yield
    folders.read_manifest.cache_clear()


@pytest.fixture
def store(folder, tmp_path, empty_cache):
    """A server of a copy of the folder."""
    shutil.copytree(folder, tmp_path / "store" / "encoded")
    with http_server(tmp_path / "store") as store:
        store.folder = tmp_path / "store"
        yield store


@pytest.fixture
def opened(store, tmp_path):
    """A function that opens the folder at the server."""

    def open_data(**changed) -> Mixture:
        data = build(f"{store.url}/encoded", tmp_path / "cache", **changed)
        data.setup()
        return data

    return open_data


def cached_bytes(tmp_path: Path) -> int:
    """The bytes of all copies in the cache."""
    files = (path for path in (tmp_path / "remote" / "corpora").rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def copies(store) -> int:
    """How often the range that was asked for most often was asked for."""
    return max(Counter(store.requests).values())


def slowly(seconds: float):
    """Make each answer of a server take some time."""
    return lambda handler: time.sleep(seconds)


def url_of(store, name: str) -> str:
    """The URL of the training corpus of a source."""
    (path,) = (store.folder / "encoded").glob(f"{name}-train-*")
    return f"{store.url}/encoded/{path.name}"


def documents(corpus: Corpus) -> list:
    return [part for document in corpus for part in document]


def test_rows_are_those_of_the_disk_to_the_last_bit_and_each_block_is_sent_once(
    opened, store, batches, tmp_path
):
    data = opened()
    assert all(map(same_batch, data.train_dataloader(), batches))
    assert [path.name for path in (tmp_path / "remote" / "corpora").glob("*/*/tokens.bin.blocks")]
    assert copies(store) == 1
    sent = len(store.requests)
    folders.read_manifest.cache_clear()  # as in a new process
    again = opened()
    assert all(map(same_batch, again.train_dataloader(), batches))
    assert len(store.requests) == sent + 1  # manifest.json


def test_rows_from_s3_are_those_of_the_disk_with_its_usual_login(
    folder, batches, tmp_path, empty_cache, monkeypatch
):
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with s3_server():
        upload(folder, "bucket")
        data = build("s3://bucket", tmp_path / "cache")
        data.setup()
        assert all(map(same_batch, data.train_dataloader(), batches))
        with pytest.raises(UserError, match="there is no manifest.json in s3://bucket/other;"):
            build("s3://bucket/other", tmp_path / "cache").setup()
        for name in CREDENTIALS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match="s3://bucket/else/manifest.json needs credentials and"):
            build("s3://bucket/else", tmp_path / "cache").setup()


def test_workers_share_the_cache(opened, store, batches):
    rows = TrainingRows(opened(), num_rows=36)
    store.on_request = slowly(0.01)
    loader = DataLoader(rows, batch_size=3, num_workers=3, collate_fn=rows.collate)
    assert all(map(same_batch, loader, batches))
    assert copies(store) == 1


@pytest.mark.parametrize("fault", ["fail_share", "cut_share"])
def test_a_third_of_failing_requests_changes_nothing(opened, store, batches, fault):
    setattr(store, fault, 0.3)
    assert all(map(same_batch, opened().train_dataloader(), batches))
    assert len(store.requests) > 1.2 * len(set(store.requests))


def read_all(url: str) -> None:
    documents(Corpus(url))


def test_a_process_that_is_killed_in_a_download_leaves_nothing_wrong(store, folder):
    url = url_of(store, "pictures")
    expected = documents(Corpus(folder / Path(url).name))
    store.on_request = slowly(0.02)
    for answers in (3, 4, 6):
        before = len(store.requests)
        process = multiprocessing.get_context("fork").Process(target=read_all, args=(url,))
        process.start()
        while len(store.requests) < before + answers and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    store.on_request = None
    assert all(map(torch.equal, documents(Corpus(url)), expected))
    again = len(store.requests) - len(set(store.requests))
    assert again <= 3 * (folders.CONNECTIONS + 1)  # those that were under way, and manifest.json


def test_the_cache_stays_below_its_limit_and_the_rows_right(
    opened, store, batches, tmp_path, monkeypatch
):
    limit = 30_000
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", str(limit / 1e9))
    sizes = []
    data = opened()
    for batch, expected in zip(data.train_dataloader(), batches, strict=False):
        assert same_batch(batch, expected)
        sizes.append(cached_bytes(tmp_path))
    assert 0.5 * limit < max(sizes) <= limit
    assert copies(store) > 1  # something was removed and sent again


def test_a_file_larger_than_the_cache_is_refused(opened, monkeypatch):
    monkeypatch.setenv("TF_LIGHTNING_CACHE_GB", "1e-7")
    with pytest.raises(UserError, match="bytes, and the cache may hold 100; set TF_LIGHTNING"):
        opened()


def test_a_replaced_folder_is_read_anew(opened, store, folder, tmp_path):
    opened()
    other = build(tmp_path / "other", tmp_path / "else", row_length=48)
    for job in other.plan_encoded():
        prepare(job)
    (tmp_path / "other" / TOKENIZER_FILE).write_bytes(other.tokenizer.proto)
    manifest.write_manifest(tmp_path / "other")
    shutil.rmtree(store.folder / "encoded")
    shutil.copytree(tmp_path / "other", store.folder / "encoded")
    folders.read_manifest.cache_clear()
    data = opened(row_length=48)
    expected = documents(Corpus(next((tmp_path / "other").glob("words-train-*"))))
    assert all(map(torch.equal, documents(data.corpora["train"]["words"]), expected))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "parts.npy", "latents.bin"])
def test_a_damaged_file_is_refused(store, name):
    url = url_of(store, "pictures")
    damage(store.folder / url.removeprefix(store.url + "/") / name)
    sentence = f"block [0-9,]+ of {url}/{name} does not have the checksum that manifest.json lists"
    with pytest.raises(UserError, match=sentence) as error:
        documents(Corpus(url))
    assert "\n" not in str(error.value)


def test_a_damaged_copy_in_the_cache_is_refused(store):
    url = url_of(store, "words")
    documents(Corpus(url))
    (copy,) = cache.cache_folder().glob("corpora/*/*/tokens.bin.blocks/0/0")
    damage(copy)
    with pytest.raises(UserError, match="is damaged; delete the copies in .*corpora.* and run"):
        documents(Corpus(url))


@pytest.mark.parametrize(
    "status, sentence",
    [
        (404, "there is no manifest.json in http://127.*/encoded; upload a folder that"),
        (403, "access to http://127.*/encoded/manifest.json is refused with HTTP status 403"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(opened, store, status, sentence):
    store.status = status
    with pytest.raises(UserError, match=sentence):
        opened()


def test_a_missing_file_is_named(store):
    url = url_of(store, "words")
    (store.folder / url.removeprefix(store.url + "/") / "tokens.bin").unlink()
    with pytest.raises(UserError, match=f"{url}/tokens.bin is missing, but manifest.json lists it"):
        documents(Corpus(url))


def test_a_server_without_ranges_is_refused(store):
    store.ranges = False
    with pytest.raises(UserError, match="only sends whole files; use one that sends ranges"):
        documents(Corpus(url_of(store, "pictures")))


def test_a_login_in_the_url_is_refused_and_not_shown(store, tmp_path):
    url = store.url.replace("http://", "http://me:secret@")
    with pytest.raises(UserError, match="with a login or a query") as error:
        build(f"{url}/encoded", tmp_path)
    assert "secret" not in str(error.value)


def test_lazy_images_are_refused(store, tmp_path):
    (path,) = (store.folder / "encoded").glob("pictures-train-*")
    facts = (path / "corpus.json").read_text().replace('"in_place": false', '"in_place": true')
    (path / "corpus.json").write_text(facts)
    manifest.write_manifest(store.folder / "encoded")
    with pytest.raises(UserError, match="was prepared with lazy_images=true, which leaves the im"):
        Corpus(url_of(store, "pictures"))


def test_arrays_are_read_like_those_of_numpy(store):
    url = url_of(store, "pictures")
    there = folders.open_corpus_folder(url)
    here = folders.LocalFolder(store.folder / url.removeprefix(store.url + "/"))
    shape = (60, 1, 1, 3, 8, 8)
    found, expected = (f.array("latents.bin", np.float16, shape) for f in (there, here))
    assert len(found) == len(expected)
    for where in (0, 59, slice(3, 20), slice(0, 60)):
        assert np.array_equal(found[where], expected[where])


def losses(folder: Path, encoded: str | Path) -> dict:
    """Train on an encoded folder; return the losses of all steps."""
    config = write_config(folder, encodable)
    main(["fit", "-c", str(config), f"--data.encoded={encoded}", *PIXELS, "--trainer.max_steps=3"])
    return read_curves(folder / "run", ["train/loss*"])


def test_a_run_on_a_remote_folder_of_pixels_has_the_losses_of_the_disk(store, tmp_path):
    folder = encode(tmp_path / "store", *PIXELS)
    url = f"{store.url}/{folder.relative_to(store.folder)}"
    local, there = losses(tmp_path / "local", folder), losses(tmp_path / "there", url)
    assert len(local["train/loss"]) == 3
    assert there == local
    assert copies(store) == 1


def test_the_command_does_not_write_to_a_url(store, tmp_path, capsys):
    with pytest.raises(SystemExit):
        encode(tmp_path, *PIXELS, f"--data.encoded={store.url}/new")
    error = capsys.readouterr().err
    assert f"to a disk; give --data.encoded DIR, and copy DIR to {store.url}/new" in error


def test_a_folder_in_a_folder_keeps_both_names():
    folder = folders.RemoteFolder("s3://bucket/x").folder("a").folder("b")
    assert str(folder) == "s3://bucket/x/a/b"
