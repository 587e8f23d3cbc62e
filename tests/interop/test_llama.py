"""The files of a language model: shards, tensor names, shapes, and the checks before a run."""

import json
from dataclasses import asdict

import pytest
import torch

from support.language_models import edit_json, tiny
from tf_lightning.errors import UserError
from tf_lightning.interop.llama import (
    LanguageModel,
    extend_rows,
    open_language_model,
    state_dict_from_hf,
    state_dict_to_hf,
)
from tf_lightning.model.transformer import TransformerConfig


def load_all(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of a language model with its own vocabulary."""
    return model.load(model.config.vocab_size)


def test_a_document_longer_than_the_window_has_other_logits():
    theirs = tiny("Mistral", sliding_window=4)
    ids = torch.randint(50, (1, 9))
    wide = tiny("Mistral", sliding_window=9)(ids).logits
    narrow = theirs(ids).logits
    torch.testing.assert_close(narrow[:, :4], wide[:, :4], atol=1e-5, rtol=1e-5)
    assert (narrow - wide).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "sizes", "window"),
    [
        ("Mistral", {"sliding_window": 16}, 16),
        ("Mistral", {"sliding_window": None}, None),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8}, 8),
        ("Qwen2", {"sliding_window": 8}, None),
        ("Llama", {}, None),
    ],
)
def test_the_sliding_window_is_read_from_the_config(tmp_path, kind, sizes, window):
    tiny(kind, **sizes).save_pretrained(tmp_path)
    assert open_language_model(tmp_path).window == window


def test_a_sharded_llama_loads_like_a_single_file(tmp_path):
    llama = tiny()
    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = open_language_model(tmp_path / "one"), open_language_model(tmp_path / "many")
    assert one.config == many.config
    weights, others = load_all(one), load_all(many)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_weights_are_only_renamed():
    names = {
        "model.layers.0.self_attn.q_proj.weight": "layers.0.attention.wq.weight",
        "model.layers.11.mlp.down_proj.weight": "layers.11.feed_forward.w2.weight",
        "model.layers.3.post_attention_layernorm.weight": "layers.3.ffn_norm.weight",
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    weights = {name: torch.randn(2) for name in names}
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(2)}
    renamed = state_dict_from_hf(weights | constant)
    assert {ours: weights[theirs] for theirs, ours in names.items()} == renamed
    assert state_dict_to_hf(renamed) == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "holds 21 of the 30 tensors .*: missing 9 .layers.2.attention"),
        ({"num_hidden_layers": 1}, "unexpected 9 .layers.1.attention.wk.weight, .*, ..."),
        ({"intermediate_size": 64}, "of another shape 6 .layers.0.feed_forward.w1.weight"),
        (
            {"model_type": "qwen2", "architectures": None},
            "missing 6 .layers.0.attention.wk.bias, ",
        ),
        ({"head_dim": 16}, "of another shape 8 .layers.0.attention.wk.weight"),
    ],
)
def test_weights_that_do_not_match_the_config_are_refused(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(UserError, match=message):
        open_language_model(tmp_path)


def test_a_missing_shard_is_reported_before_any_weight_is_read(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    monkeypatch.setattr("tf_lightning.interop.llama.load_file", None)
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        open_language_model(tmp_path)


def test_a_shard_without_the_tensors_of_its_index_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=f"{second.name} lacks .* tensors that its index names"):
        open_language_model(tmp_path)


@pytest.mark.parametrize("file", [5, "../model.safetensors", ""])
def test_an_index_names_only_files_beside_it(tmp_path, file):
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    edit_json(index, {"weight_map": json.loads(index.read_text())["weight_map"] | {"a": file}})
    with pytest.raises(UserError, match="which is not a file beside it; download it again"):
        open_language_model(tmp_path)


def test_new_rows_are_the_mean_row():
    weight = torch.randn(5, 3)
    extended = extend_rows(weight, 7)
    assert torch.equal(extended[:5], weight)
    torch.testing.assert_close(extended[5:], weight.mean(0).expand(2, 3))


def test_a_hub_name_is_refused_offline_unless_it_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no folder owner/tiny, and the hub does not provide"):
        open_language_model("owner/tiny")
    copy = tmp_path / "models--owner--tiny"
    tiny().save_pretrained(copy / "snapshots" / "abc")
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("abc")
    assert open_language_model("owner/tiny").config.dim == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 64, "num_layers": 4}, r"dim=32 \(not 64\), num_layers=2 \(not 4\); give --model"),
        ({"vocab_size": 51}, r"vocab_size=52 \(not 51\)"),
        ({"pretrained_vocab_size": None}, r"pretrained_vocab_size=50 \(not None\)"),
        ({"num_kv_heads": None}, r"num_kv_heads=2 \(not 4\)"),
        ({"qk_norm": True}, r"qk_norm=False \(not True\)"),
        ({"head_dim": 16}, r"head_dim=None \(not 16\)"),
    ],
)
def test_each_different_size_is_named(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    model = open_language_model(tmp_path)
    model.check(model.extended_config)
    model.check(TransformerConfig(**asdict(model.extended_config) | {"modality_weights": "all"}))
    with pytest.raises(UserError, match=message):
        model.check(TransformerConfig(**asdict(model.extended_config) | change))


def test_rows_longer_than_the_window_are_refused(tmp_path):
    tiny("Mistral", sliding_window=16).save_pretrained(tmp_path)
    model = open_language_model(tmp_path)
    model.check(model.extended_config, row_length=16)
    with pytest.raises(UserError, match="rows of 17 tokens are longer than .* 16"):
        model.check(model.extended_config, row_length=17)


def test_configs_from_before_transformers_5_are_read(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 123.0, "rope_scaling": None}))
    assert open_language_model(tmp_path).config.rope_theta == 123.0


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no config.json in .*nowhere"):
        open_language_model(tmp_path / "nowhere")


def test_missing_weights_are_named(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        open_language_model(tmp_path)


def test_joined_matrices_of_other_sizes_are_reported_under_their_name(tmp_path):
    tiny("Phi3", pad_token_id=None).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"intermediate_size": 50})
    with pytest.raises(UserError, match="unexpected 2 .layers.0.mlp.gate_up_proj.weight"):
        open_language_model(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only as pytorch_model.bin, a pickle, .*save_pretrained"):
        open_language_model(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="download it again"):
        open_language_model(tmp_path)
