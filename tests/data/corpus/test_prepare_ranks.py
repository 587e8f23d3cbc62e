"""`prepare --data.encoded`: each shard once, the same files for any ranks, resumable."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.data
from PIL import Image
from torch.multiprocessing import ProcessExitedException

from support import ranks, runs
from support.files import write_lines
from support.prepare_runs import content, encodable, encode, encode_apart
from support.sources import ShardedNoise
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.cli.main import main
from tf_lightning.data.corpus import distributed
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder that one rank encoded, with flipped images."""
    return encode(tmp_path_factory.mktemp("encoded") / "one", "--data.hflip=true")


@pytest.mark.parametrize("world_size, workers", [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_ranks_and_workers_read_each_shard_once_and_in_order(
    tmp_path, monkeypatch, world_size, workers
):
    shards = ShardedNoise(22).shards("train")
    job = SimpleNamespace(shards=shards, split="train", shard_path=lambda n: tmp_path / str(n))
    (tmp_path / "1").mkdir()  # this shard is finished
    found: dict[int, list] = {}
    for rank in range(world_size):
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr(distributed, "get_worker_info", lambda info=info: info)
            monkeypatch.setattr(distributed, "DOCUMENTS_PER_PIECE", 3)
            for piece in distributed.ShardPieces([(job, n) for n in range(6)], rank, world_size):
                found.setdefault(piece.index, []).append(piece)
    assert sorted(found) == [0, 2, 3, 4, 5]
    for place, pieces in found.items():
        captions = [caption for piece in pieces for caption, _ in piece.documents]
        assert captions == [f"noise {n}" for n in range(4 * place, min(4 * place + 4, 22))]
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_the_moments_of_each_image_and_its_flipped_copy_are_stored(encoded):
    (path,) = encoded.glob("noise-train-*")
    stored = np.fromfile(path / "latents.bin", np.float16).reshape(14, 2, 2, 8, 8, 8)
    arrays = np.stack([np.asarray(ShardedNoise().image("train", n)) for n in range(14)])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
    for view, pixels in enumerate((images, images.flip(-1))):
        expected = load_autoencoder("shapes").moments(pixels).numpy()
        assert np.ptp(expected[:, 0]) > 1
        np.testing.assert_allclose(stored[:, view], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_stored_with_and_without_workers(workers, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (64, 160, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    line = {"file_name": "wide.png", "text": "noise"}
    file = write_lines(tmp_path / "metadata.jsonl", [line])

    def of_files(config: dict) -> None:
        encodable(config)
        options = {"paths": str(file), "val_fraction": 0.0, "image_size": 64}
        source = {"class_path": "tf_lightning.data.CaptionRows", "init_args": options}
        config["data"]["init_args"] |= {"sources": {"wide": source}, "num_workers": workers}

    config = str(runs.write_config(tmp_path, of_files))
    folder = tmp_path / "encoded"
    options = ["--data.crops=3", "--data.hflip=true", f"--data.encoded={folder}"]
    main(["prepare", "-c", config, *options])
    (path,) = folder.glob("wide-train-*")
    stored = np.fromfile(path / "latents.bin", np.float16).reshape(6, 2, 8, 8, 8)
    squares = np.stack([noise[:, x : x + 64] for x in (48, 0, 96)])
    images = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = load_autoencoder("shapes").moments(torch.cat([images, images.flip(-1)]))
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(SystemExit):
        main(["fit", "-c", config, "--data.hflip=true", f"--data.encoded={path.parent}"])
    assert "encoded with crops 3, but the data has 1" in capsys.readouterr().err


def test_training_does_not_read_the_source(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardedNoise, "documents", None)
    monkeypatch.setattr(ShardedNoise, "fingerprint", None)
    config = str(runs.write_config(tmp_path, encodable))
    main(["fit", "-c", config, f"--data.encoded={encoded}", "--data.hflip=true"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not (tmp_path / "data").exists()


def test_the_command_names_the_next_command_and_does_nothing_twice(encoded, capsys):
    before = {path: path.stat().st_mtime_ns for path in encoded.rglob("*.bin")}
    encode(encoded.parents[1], "--data.hflip=true")
    *_, where, command = capsys.readouterr().out.splitlines()
    assert where == f"The corpora are in {encoded}. Train on them with"
    assert command.startswith("  tf-lightning fit -c ")
    assert f" --data.encoded={encoded} " in command and "--data.hflip=true" in command
    assert {path: path.stat().st_mtime_ns for path in encoded.rglob("*.bin")} == before


def test_a_folder_of_other_settings_is_refused(encoded, capsys):
    before = content(encoded)
    with pytest.raises(SystemExit):
        encode(encoded.parents[1], "--data.hflip=false")
    assert "was encoded from other files or with other settings; delete" in capsys.readouterr().err
    assert content(encoded) == before


@pytest.mark.parametrize("option", ["--shard=0/2", "--processes=2"])
def test_options_of_the_cache_are_refused_for_an_encoded_folder(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        encode(tmp_path, option)
    assert "set the number of ranks with --trainer.devices" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_codes_are_stored_without_moments(tmp_path):
    given = ["--data.autoencoder=shapes_vq", "--data.row_length=128"]
    folder = encode(tmp_path, *given, "--model.num_codes=512", "--model.patch_size=1")
    (path,) = folder.glob("noise-train-*")
    codes = Corpus(path).document(3)[1]
    image = torch.from_numpy(np.array(ShardedNoise().image("train", 3))).permute(2, 0, 1)
    expected = load_autoencoder("shapes_vq").encode(image[None].float() / 127.5 - 1)[0]
    assert torch.equal(codes, expected)


def test_an_error_of_a_source_in_a_worker_is_reported_in_one_sentence(
    tmp_path, capsys, monkeypatch
):
    def documents(self, split):
        raise UserError("there is a hole in it; mend it")

    monkeypatch.setattr(ShardedNoise, "documents", documents)
    vocabulary = tmp_path / "a.model"
    train_tokenizer(iter(["noise 0 1 2 3 4 5 6 7 8 9"]), vocabulary, runs.VOCAB_SIZE)
    with pytest.raises(SystemExit):
        encode(tmp_path, f"--data.tokenizer={vocabulary}", "--data.num_workers=1")
    error = capsys.readouterr().err
    assert "tf-lightning: error: there is a hole in it; mend it\n" in error
    assert not list((tmp_path / "data" / "encoded").rglob("*.bin"))


@pytest.mark.slow
def test_two_ranks_with_workers_write_the_same_files_as_one_rank(encoded, tmp_path):
    more = ["--data.hflip=true", "--data.num_workers=2", "--trainer.devices=2"]
    ended = encode_apart(tmp_path / "two", *more)
    assert ended.returncode == 0, ended.stderr
    assert content(tmp_path / "two" / "data" / "encoded") == content(encoded)


@pytest.mark.slow
def test_a_killed_command_continues_and_keeps_finished_shards(encoded, tmp_path):
    more = [
        "--data.hflip=true",
        f"--data.tokenizer={encoded}/tokenizer.model",
    ]
    (tmp_path / "one").mkdir()
    folder = tmp_path / "one" / "data" / "encoded"
    config = str(runs.write_config(tmp_path / "one", encodable))
    command = ["prepare", "-c", config, f"--data.encoded={folder}", *more]
    with pytest.raises(ProcessExitedException) as ended:
        ranks.run_ranks(command, 1, KILL="train 13")
    assert ended.value.exit_code == -signal.SIGKILL
    (shards,) = folder.glob(".noise-train-*-shards")
    finished = {path.parent.name for path in shards.glob("[0-9]*/corpus.json")}
    assert {"000000", "000001"} <= finished and "000003" not in finished
    ranks.run_ranks(command, 1, KILL="train 2")  # documents of finished shards are not read again
    assert content(folder) == content(encoded)
