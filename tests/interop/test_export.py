"""Export: the network round-trips, and `transformers` loads the text side as a Llama."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.language_models import LLAMA3_ROPE, our_logits, tiny, with_json, with_sentencepiece
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.interop.export import check_exportable, export, read_weights
from tf_lightning.interop.llama import open_language_model
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion


def checkpoint_of(folder, **options) -> dict:
    """The checkpoint of a run that starts from a folder's language model, with random weights."""
    source = open_language_model(folder)
    config = source.extended_config
    for name, value in options.items():
        setattr(config, name, value)
    module = Transfusion(config, patch_size=2, latent_channels=3, ema_decay=0.9)
    module.configure_model()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    proto = bytearray(Tokenizer(folder).proto)
    return {
        "state_dict": {name: w.detach() for name, w in module.state_dict().items()},
        "hyper_parameters": dict(module.hparams),
        "tokenizer": torch.frombuffer(proto, dtype=torch.uint8),
        "image_codec": {"autoencoder": "pixels", "latent_shape": [3, 4, 4]},
        "row_length": 64,
        "global_step": 7,
    }


def trained(checkpoint: dict, start: str = "net") -> Transformer:
    config = TransformerConfig(**checkpoint["hyper_parameters"]["transformer"])
    transformer = Transformer(config).requires_grad_(False)
    start = f"{start}.transformer."
    weights = checkpoint["state_dict"]
    names = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
    transformer.load_state_dict({n: w for n, w in names.items() if "image_layers" not in n})
    return transformer


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("kind", "sizes", "with_tokenizer"),
    [
        ("Llama", {}, with_sentencepiece),
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, with_json),
        ("Mistral", {"sliding_window": 64}, with_sentencepiece),
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, with_json),
        ("Qwen3", {"head_dim": 16}, with_json),
        ("Qwen3", {"head_dim": 8}, with_sentencepiece),  # as the quickstart
        ("Olmo2", {"tie_word_embeddings": True}, with_json),
    ],
)
def test_transformers_loads_the_text_side_with_the_same_logits(
    tmp_path, kind, sizes, with_tokenizer, weights
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "source"
    tiny(kind, vocab_size=300, **sizes).save_pretrained(source)
    with_tokenizer(source)
    checkpoint = checkpoint_of(source)
    assert export(checkpoint, tmp_path / "out", weights, {"net", "text"}) == weights
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "text")
    tokenizer = Tokenizer(source)
    text = "a red circle is not above a blue lobster ."
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    transformer = trained(checkpoint, "net" if weights == "raw" else "ema")
    logits = theirs.double()(ids).logits  # in float64, so that rounding does not matter
    assert logits.std() > 1
    ours = our_logits(transformer.double(), ids)[..., :300]
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "text")
    assert their_tokenizer.encode(text, add_special_tokens=False) == ids[0, 1:].tolist()
    assert their_tokenizer.eos_token_id == tokenizer.eos_id


def test_loaded_weights_are_exported_unchanged(tmp_path):
    source = tmp_path / "source"
    tiny(vocab_size=300).save_pretrained(source)
    with_sentencepiece(source)
    checkpoint = checkpoint_of(source)
    model = open_language_model(source)
    for name, weight in model.load(302).items():
        checkpoint["state_dict"][f"net.transformer.{name}"] = weight
    export(checkpoint, tmp_path / "out", "raw", {"text"})
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "text" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_language_model(tmp_path / "out" / "text").config == model.config
    assert Tokenizer(tmp_path / "out" / "text").proto == Tokenizer(source).proto


def test_image_weights_are_not_in_the_text_side(tmp_path):
    source = tmp_path / "source"
    tiny(vocab_size=300).save_pretrained(source)
    with_sentencepiece(source)
    checkpoint = checkpoint_of(source, modality_weights="all")
    export(checkpoint, tmp_path / "out", "raw", {"text"})
    exported = open_language_model(tmp_path / "out" / "text")
    weights = exported.load(exported.config.vocab_size)
    name = "layers.1.attention.wq.weight"
    assert torch.equal(weights[name], checkpoint["state_dict"][f"net.transformer.{name}"])
    assert exported.config.modality_weights == "shared"


def test_a_run_is_exported_and_generates_from_the_folder(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    main(["export", str(checkpoint), "-o", str(tmp_path / "out")])
    assert "Wrote the ema weights of step 6" in capsys.readouterr().out
    pipes = map(TransfusionPipeline.from_pretrained, (checkpoint, tmp_path / "out"))
    how = {"seed": 3, "num_inference_steps": 2, "progress": False}
    first, second = (pipe("a red circle", **how).images[0] for pipe in pipes)
    assert first.tobytes() == second.tobytes()
    # Replaces the first export.
    main(["export", str(checkpoint), "-o", str(tmp_path / "out"), "--only", "net"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("net.json", "net.safetensors", "tokenizer.bin"),
    ]


def test_an_exported_text_side_starts_a_run(run, tmp_path):
    """Export our own text side as a Llama and load it."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    export(checkpoint, tmp_path / "out", "raw", {"text"})
    source = open_language_model(tmp_path / "out" / "text")
    assert source.extended_config.vocab_size == 300
    name = "net.transformer.layers.0.attention.wq.weight"
    loaded = source.load(300)["layers.0.attention.wq.weight"]
    assert torch.equal(loaded, checkpoint["state_dict"][name])
    assert Tokenizer(tmp_path / "out" / "text").proto == bytes(checkpoint["tokenizer"].numpy())


@pytest.fixture
def with_layer_norm(tmp_path) -> dict:
    source = tmp_path / "source"
    tiny(vocab_size=300).save_pretrained(source)
    with_sentencepiece(source)
    return checkpoint_of(source, qk_norm="layer")


def test_options_that_no_family_has_are_refused_except_with_only_net(with_layer_norm, tmp_path):
    with pytest.raises(UserError, match="no supported family .* has qk_norm='layer'; .* --only"):
        export(with_layer_norm, tmp_path / "out", None, {"net", "text"})
    with pytest.raises(UserError, match="has attention_bias=True with qk_norm=True; .* --only net"):
        check_exportable(TransformerConfig(qk_norm=True, attention_bias=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert export(with_layer_norm, tmp_path / "out", None, {"net"}) == "ema"
    again = read_weights(tmp_path / "out")["state_dict"]
    for name, weight in again.items():
        assert torch.equal(weight, with_layer_norm["state_dict"][name.replace("net.", "ema.", 1)])


def test_other_files_are_not_replaced_and_a_failed_export_changes_nothing(
    with_layer_norm, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="holds other files; give a new folder"):
        export(with_layer_norm, tmp_path, None, {"net"})
    export(with_layer_norm, tmp_path / "out", "raw", {"net"})
    before = (tmp_path / "out" / "net.safetensors").read_bytes()
    monkeypatch.setattr("tf_lightning.interop.export.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(with_layer_norm, tmp_path / "out", "ema", {"net"})
    assert (tmp_path / "out" / "net.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_missing_ema_weights_and_a_damaged_folder_are_refused(with_layer_norm, tmp_path):
    raw = {n: w for n, w in with_layer_norm["state_dict"].items() if n.startswith("net.")}
    checkpoint = with_layer_norm | {"state_dict": raw}
    with pytest.raises(UserError, match="has no EMA weights; give --weights raw"):
        export(checkpoint, tmp_path / "out", "ema", {"net"})
    assert export(checkpoint, tmp_path / "out", None, {"net"}) == "raw"
    (tmp_path / "out" / "net.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read .*; export it again"):
        read_weights(tmp_path / "out")


def test_every_changed_byte_of_exported_weights_is_refused(with_layer_norm, tmp_path):
    folder = tmp_path / "out"
    export(with_layer_norm, folder, "raw", {"net"})
    assert "crc32" not in read_weights(folder)
    for file in (folder / "net.safetensors", folder / "tokenizer.bin"):
        whole = file.read_bytes()
        for place in range(0, len(whole), len(whole) // 50):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match="export it again"):
                read_weights(folder)
        for length in (0, 7, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(UserError, match="export it again"):
                read_weights(folder)
        file.write_bytes(whole)
    facts = json.loads((folder / "net.json").read_text())
    del facts["crc32"]  # as older versions wrote it
    (folder / "net.json").write_text(json.dumps(facts))
    assert read_weights(folder)["global_step"] == with_layer_norm["global_step"]


@pytest.mark.parametrize("args", [[], ["x.ckpt"], ["x.ckpt", "-o", "out", "--weights", "best"]])
def test_arguments_that_do_not_parse_are_one_line(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", *args])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[0].startswith("tf-lightning: error: ") and len(lines) == 2
