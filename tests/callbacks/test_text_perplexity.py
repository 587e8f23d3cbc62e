"""Perplexity and bits per byte equal a computation by hand, document by document."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from callbacks.text_perplexity import TextPerplexity
from support import ranks, runs
from tf_lightning.batch import pack
from tf_lightning.data import Mixture
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.model.attention import build_attention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.module import Transfusion


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Mixture:
    data = Mixture(
        {"captions": ShapesCaptions(30, 7), "text": ShapesTexts(30, 7)},
        **{"autoencoder": "pixels", "vocab_size": runs.VOCAB_SIZE, "patch_size": runs.PATCH_SIZE},
        **{"row_length": 256, "batch_size": 2, "cache_dir": str(tmp_path_factory.mktemp("data"))},
    )
    data.setup()
    return data


@pytest.fixture(scope="module")
def module(data) -> Transfusion:
    torch.manual_seed(0)
    config = TransformerConfig(runs.VOCAB_SIZE, dim=32, num_layers=2, num_heads=2, ffn_dim=48)
    module = Transfusion(config, runs.PATCH_SIZE, latent_channels=3)
    module.configure_model()
    for part in (module.net.transformer.output, module.ema.transformer.output):
        torch.nn.init.normal_(part.weight, std=0.5)
    return module


def validated(module: Transfusion, data: Mixture, folder) -> tuple[dict[str, float], dict]:
    """Logged values of a validation, and the protocols of its records."""
    callback = TextPerplexity()
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "callbacks": [callback]},
    )
    trainer.validate(module, data, verbose=False)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return logged, {record.name: record.protocol for record in callback.records}


@torch.no_grad()
def nll_of(net: TransfusionModel, text: Tensor, data: Mixture) -> Tensor:
    """-log p of every token of a document except the first, and of its end."""
    ids = torch.cat([torch.tensor([1]), text, torch.tensor([2])])
    assert (data.tokenizer.bos_id, data.tokenizer.eos_id) == (1, 2)
    options = {"tokenizer": data.tokenizer, "row_length": len(ids)}
    batch = pack([[[text]]], [0], patch_size=runs.PATCH_SIZE, **options)
    x = net.transformer.tok_embeddings(ids).unsqueeze(0)
    hidden = net.transformer(x, batch.positions, build_attention(batch))
    log_probs = net.transformer.output(hidden[0]).double().log_softmax(-1)
    return -log_probs[torch.arange(1, len(ids) - 1), ids[2:]]


def test_text_scores_equal_those_of_single_documents(module, data, tmp_path):
    logged, protocols = validated(module, data, tmp_path)
    documents = [part for i in range(7) for part in data.corpora["val"]["text"].document(i)]
    nll = torch.cat([nll_of(module.ema, text, data) for text in documents])
    texts = [data.tokenizer.decode(text.tolist()) for text in documents]
    firsts = [data.tokenizer.decode(text[:1].tolist()) for text in documents]
    num_bytes = sum(len(t.encode()) for t in texts) - sum(len(t.encode()) for t in firsts)
    assert logged["val/text/perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    bits = nll.sum().item() / math.log(2) / num_bytes
    assert logged["val/text/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    protocol = protocols["val/text/bits_per_byte"]
    assert (protocol["num_tokens"], protocol["num_bytes"]) == (len(nll), num_bytes)
    raw = torch.cat([nll_of(module.net, text, data) for text in documents])
    assert abs(raw.mean() - nll.mean()) > 1e-3 * nll.mean()  # the EMA weights were evaluated


def test_boi_and_eos_count_as_tokens_without_bytes(module, data, tmp_path):
    _, protocols = validated(module, data, tmp_path)
    num_tokens = num_bytes = 0
    for index in range(7):
        first, second = data.corpora["val"]["captions"].document(index)
        text = (first if first.ndim == 1 else second).tolist()
        assert first.ndim == 1  # words, <boi>, image, <eos>; the first word is not counted
        num_tokens += len(text) - 1 + 2
        whole, begun = data.tokenizer.decode(text), data.tokenizer.decode(text[:1])
        num_bytes += len(whole.encode()) - len(begun.encode())
    protocol = protocols["val/captions/perplexity"]
    assert (protocol["num_tokens"], protocol["num_bytes"]) == (num_tokens, num_bytes)


def counted(document: list, data: Mixture) -> tuple[int, int]:
    """Counted tokens and bytes of a batch of one document."""
    options = {"tokenizer": data.tokenizer, "row_length": 128, "patch_size": runs.PATCH_SIZE}
    batch = pack([[document]], [0], **options)
    trainer = SimpleNamespace(datamodule=data)
    callback = TextPerplexity()
    callback.on_validation_epoch_start(trainer, SimpleNamespace(device="cpu"))
    nll = torch.ones(len(batch.target_index))
    callback.on_validation_batch_end(trainer, None, {"nll": nll}, batch, 0)
    metric = callback.metrics["captions"]
    return int(metric.num_tokens), int(metric.num_bytes)


def test_counts_of_documents_with_several_parts(data):
    image = torch.zeros(3, 64, 64)
    words = torch.tensor(data.tokenizer.encode("a red circle"))
    spaced = torch.tensor(data.tokenizer.encode(" é\n"))
    first = len(data.tokenizer.decode(words[:1].tolist()))
    # <boi> is first and is not counted; all words and <eos> are
    assert counted([image, words], data) == (len(words) + 1, len("a red circle"))
    assert counted([image, spaced], data) == (len(spaced) + 1, len(" é\n".encode()))
    # the first word is not counted; <boi>, the whole second text and <eos> are
    tokens, num_bytes = 2 * len(words) + 1, 2 * len("a red circle") - first
    assert counted([words, image, words], data) == (tokens, num_bytes)
    assert counted([image], data) == (0, 0)


def test_a_source_without_text_has_no_values(module, data, tmp_path, monkeypatch):
    whole = Corpus.document

    def without_captions(corpus: Corpus, index: int, *how) -> list[Tensor]:
        parts = whole(corpus, index, *how)
        return [part for part in parts if part.ndim == 3 or corpus.image_shape is None]

    monkeypatch.setattr(Corpus, "document", without_captions)
    logged, _ = validated(module, data, tmp_path)
    assert "val/captions/loss_diffusion" in logged and "val/text/perplexity" in logged
    assert not {"val/captions/perplexity", "val/captions/bits_per_byte"} & logged.keys()
    assert "val/captions/loss_lm" not in logged


@pytest.mark.slow
def test_two_processes_log_the_values_of_one_and_the_checkpoint_has_no_metric(run, tmp_path):
    """Uses batches of one row, so that two ranks have the batches of one process."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.pop("ckpt_path", None)
    text = {"class_path": "callbacks.text_perplexity.TextPerplexity"}
    config["trainer"]["callbacks"] = [text]
    config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    config["data"]["init_args"]["batch_size"] = 1
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        config["trainer"]["logger"]["init_args"] = {"save_dir": str(folder), "name": "run"}
        config["trainer"] |= {"devices": devices, "strategy": "ddp" if devices == 2 else "auto"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = ["validate", "-c", str(folder / "config.yaml")]
        ranks.run_ranks([*command, "--ckpt_path", str(run / "checkpoints/last.ckpt")], devices)
        names, values = next(folder.rglob("metrics.csv")).read_text().splitlines()
        found.append(dict(zip(names.split(","), values.split(","), strict=True)))
    alone, together = ({k: float(v) for k, v in row.items() if v} for row in found)
    assert "val/captions/bits_per_byte" in alone
    assert together == pytest.approx(alone, rel=1e-9)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert not any("Perplexity" in name for name in checkpoint["callbacks"])
