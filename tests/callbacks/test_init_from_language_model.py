"""A run starts from a language model: its text perplexity stays, and new parts are reported."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from callbacks.init_from import text_perplexities
from support import runs
from support.language_models import LLAMA3_ROPE, tiny, with_json, with_sentencepiece
from support.tiny import packed
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli.main import main
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.interop.export import export
from tf_lightning.interop.llama import open_language_model
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion

KINDS = {  # the source model and its tokenizer
    "llama": ("Llama", {"vocab_size": 300}, with_sentencepiece),
    "qwen2": ("Qwen2", {"vocab_size": 300, "tie_word_embeddings": True}, with_json),
    "qwen3": ("Qwen3", {"vocab_size": 300, "head_dim": 16}, with_json),
    "llama3": ("Llama", {"vocab_size": 300, "rope_parameters": LLAMA3_ROPE}, with_json),
}


def make_folder(folder, kind="llama"):
    name, sizes, with_tokenizer = KINDS[kind]
    tiny(name, **sizes).save_pretrained(folder)
    with_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "llama")


def sizes_of(folder, capsys) -> dict:
    """Run `tf-lightning model-config` and parse the YAML that it prints."""
    main(["model-config", str(folder)])
    return yaml.safe_load(capsys.readouterr().out)["transformer"]


def write_config(tmp_path, folder, sizes, change=lambda config: None):
    """Write a short run that starts from a folder."""

    def edit(config: dict) -> None:
        start = {"class_path": "callbacks.init_from.InitFrom"}
        start["init_args"] = {"checkpoint": str(folder)}
        config["trainer"]["callbacks"] = [*config["trainer"]["callbacks"][:1], start]
        config["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
        config["model"]["transformer"] = sizes
        config["model"]["lr"] = 0.0
        config["data"]["init_args"]["tokenizer"] = str(folder)
        change(config)

    return runs.write_config(tmp_path, edit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_its_weights_and_reports_new_tensors(kind, tmp_path, capsys, caplog):
    folder = make_folder(tmp_path / "source", kind)
    sizes = sizes_of(folder, capsys)

    def own(config: dict) -> None:
        config["model"]["transformer"]["modality_weights"] = "ffn"

    with caplog.at_level("INFO"):
        main(["fit", "-c", str(write_config(tmp_path, folder, sizes, own))])
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    language_model = open_language_model(folder)
    source = language_model.load(language_model.config.vocab_size)
    for name, theirs in source.items():
        for start in ("net", "ema"):
            ours = checkpoint["state_dict"][f"{start}.transformer.{name}"]
            assert torch.equal(ours[: len(theirs)], theirs), name
            assert len(ours) == len(theirs) + 2 * name.startswith(("tok_", "output"))
    ours = checkpoint["state_dict"]["net.transformer.image_layers.0.feed_forward.w1.weight"]
    assert torch.equal(ours, source["layers.0.feed_forward.w1.weight"])
    count = len(source)
    assert f"Loaded {count} of {count} tensors" in caplog.text
    assert (
        "missing: none; unexpected: none; new: 2 rows of the vocabulary, from <boi> on"
        in caplog.text
    )
    assert "transformer.image_layers (8 tensors), patch_coder (" in caplog.text
    assert "text tokens at step 0: " in caplog.text
    path = tmp_path / "run/checkpoints/last.ckpt"
    again = TransfusionPipeline.from_pretrained(path).model.net.transformer
    assert again.config.rope_scaling == open_language_model(folder).config.rope_scaling
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, checkpoint["state_dict"][f"ema.transformer.{name}"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_perplexity_is_that_of_the_source_model(kind, tmp_path):
    """Compares with `transformers` on the same ids, which has no <boi> and <eoi>."""
    folder = make_folder(tmp_path, kind)
    source = open_language_model(folder)
    module = Transfusion(source.extended_config, patch_size=2, latent_channels=3)
    module.configure_model()
    module.net.transformer.load_state_dict(source.load(module.config.vocab_size))
    module.net.double()
    tokenizer = Tokenizer(folder)
    text = torch.tensor(tokenizer.encode("a red circle is not above a blue lobster ."))
    batch = packed([[[text]]])
    batch.latents = batch.latents.double()
    batch.input_ids[0, 0], batch.labels[0, -2] = tokenizer.bos_id, tokenizer.eos_id
    theirs = tiny(KINDS[kind][0], **KINDS[kind][1]).double()
    ids = torch.tensor([tokenizer.bos_id, *text, tokenizer.eos_id])
    loss = torch.nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:])
    old, grown = text_perplexities(module, batch)
    assert old == pytest.approx(loss.exp().item(), rel=1e-6)
    assert grown == pytest.approx(loss.exp().item(), rel=1e-6)
    assert grown > old  # the new entries take a little probability


def test_the_new_entries_can_be_learned(tmp_path, folder):
    """Their logits start low and can rise."""
    source = open_language_model(folder)
    module = Transfusion(source.extended_config, patch_size=2, latent_channels=3)
    module.configure_model()
    transformer = module.net.transformer
    transformer.load_state_dict(source.load(302))
    hidden = torch.randn(32)
    optimizer = torch.optim.AdamW([transformer.output.weight], lr=1e-2)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(transformer.logits(hidden), torch.tensor(300))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.fixture
def fails(tmp_path, folder, capsys):
    """Start a run that must fail before data is prepared; return its one sentence."""
    sizes = sizes_of(folder, capsys)

    def command(change=lambda config: None) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", str(write_config(tmp_path, folder, sizes, change))])
        assert stop.value.code == 1 and not (tmp_path / "data").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tf-")]
        assert len(lines) == 1 and not (tmp_path / "run" / "config.yaml").exists()
        return lines[0]

    return command


def test_sizes_that_differ_are_named(fails, folder):
    line = fails(lambda config: config["model"]["transformer"].update(dim=64, ffn_dim=80))
    assert f"{folder} needs model.transformer to have dim=32 (not 64), ffn_dim=48 (not 80)" in line
    assert f"`tf-lightning model-config {folder}`" in line


def test_another_tokenizer_of_the_data_is_refused(fails, tmp_path, folder):
    line = fails(lambda config: config["data"]["init_args"].update(tokenizer=None))
    assert "the data would train its own tokenizer; give the data tokenizer: " in line
    other = make_folder(tmp_path / "other", "qwen2")
    line = fails(lambda config: config["data"]["init_args"].update(tokenizer=str(other)))
    assert f"the data uses the tokenizer {other}" in line


def test_a_tokenizer_of_another_vocabulary_is_refused(fails, folder):
    with_sentencepiece(folder, 320)
    assert "has 320 entries but its model has 300 embedding rows" in fails()


def test_a_checkpoint_of_another_architecture_is_refused(fails, folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"llama"', '"gpt2"'))
    assert "model_type='gpt2', which needs layer norms, learned positions" in fails()


def test_new_rows_that_take_probability_from_the_text_stop_the_run(
    tmp_path, folder, capsys, monkeypatch
):
    config = write_config(tmp_path, folder, sizes_of(folder, capsys))
    monkeypatch.setattr("tf_lightning.model.transformer.NEW_ENTRY_LOGIT", 0.0)
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config)])
    assert "the text perplexity at step 0 is " in capsys.readouterr().err


def test_a_run_starts_from_an_exported_network_as_from_its_checkpoint(run, tmp_path):
    export(read_checkpoint(run / "checkpoints/last.ckpt"), tmp_path / "out", None, {"net"})

    def change(config: dict) -> None:
        config["data"]["init_args"] |= {"tokenizer": None, "cache_dir": str(run.parent / "data")}

    sizes = runs.config(tmp_path)["model"]["transformer"]
    main(["fit", "-c", str(write_config(tmp_path, tmp_path / "out", sizes, change))])
    theirs = read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]
    ours = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs["ema." + name.partition(".")[2]])


def test_weights_that_are_not_finite_are_refused(fails, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"weights of {folder} are not finite, the first is norm.weight; download" in fails()


def test_missing_weights_are_refused(fails, folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in fails()


def test_a_resumed_run_does_not_need_the_folder(tmp_path, folder, capsys):
    tokenizer = tmp_path / "tokenizer.model"
    shutil.copy(folder / "tokenizer.model", tokenizer)

    def change(config: dict) -> None:
        config["data"]["init_args"]["tokenizer"] = str(tokenizer)

    config = str(write_config(tmp_path, folder, sizes_of(folder, capsys), change))
    main(["fit", "-c", config])
    shutil.rmtree(folder)
    main(["fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
