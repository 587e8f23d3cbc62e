"""The Llama family: each supported family has Hugging Face's logits, the others are refused."""

import json

import pytest
import torch

from support.language_models import LLAMA3_ROPE, edit_json, our_logits, tiny
from support.tiny import document, packed
from tf_lightning.errors import UserError
from tf_lightning.interop.families import (
    FAMILIES,
    MISSING_FEATURES,
    config_from_hf,
    config_to_hf,
    model_type_of,
    sliding_window,
)
from tf_lightning.interop.llama import open_language_model, state_dict_to_hf
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.training.module import Transfusion

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
MODELS = {
    "Llama 1, as many key/value heads": ("Llama", {"num_key_value_heads": 4}),
    "Llama 2": ("Llama", {}),
    "Llama 3, rotary base": ("Llama", {"rope_parameters": {"rope_theta": 777.0}}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "Llama 3.2": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Llama, longer by linear scaling": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "Llama, head dim": ("Llama", {"head_dim": 16}),
    "Mistral 0.1, window": ("Mistral", {"sliding_window": 16}),
    "Mistral 0.3": ("Mistral", {"sliding_window": None}),
    "Mistral-Nemo, head dim": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "Mistral, tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, head dim": ("Qwen2", {"head_dim": 16}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Qwen3, other constants": (
        "Qwen3",
        {"head_dim": 16, "rms_norm_eps": 0.05, "rope_parameters": {"rope_theta": 77.0}},
    ),
    "Qwen3, tied": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 2, tied": ("Olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": None}),
    "SmolLM3, every second layer": (
        "SmolLM3",
        {"no_rope_layers": [1, 0], "pad_token_id": None, "tie_word_embeddings": True},
    ),
    "Phi-3": ("Phi3", {"pad_token_id": None}),
    "Phi-3, tied": ("Phi3", {"pad_token_id": None, "tie_word_embeddings": True}),
}


def loaded(folder) -> Transformer:
    """Our Transformer with the weights of a folder."""
    model = open_language_model(folder)
    transformer = Transformer(model.config).requires_grad_(False)
    transformer.load_state_dict(model.load(model.config.vocab_size))
    return transformer


def assert_same_logits(transformer: Transformer, theirs) -> None:
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = theirs.double()(ids).logits  # in float64, so that rounding does not matter
    assert logits.std() > 1  # so that 1e-5 is a strict tolerance
    ours = our_logits(transformer.double(), ids)[..., : logits.shape[-1]]  # without <boi>, <eoi>
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize(("kind", "sizes"), MODELS.values(), ids=MODELS)
def test_a_loaded_model_has_hugging_faces_logits(tmp_path, kind, sizes, shard):
    theirs = tiny(kind, **sizes)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    assert_same_logits(loaded(tmp_path), theirs)


@pytest.mark.parametrize(("kind", "sizes"), MODELS.values(), ids=MODELS)
def test_a_trained_model_is_written_with_the_same_logits(tmp_path, kind, sizes):
    """A step on text and images, then `transformers` reads our weights and config.json."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    tiny(kind, **sizes).save_pretrained(tmp_path / "source")
    source = open_language_model(tmp_path / "source")
    module = Transfusion(source.extended_config, patch_size=2, latent_channels=3, lr=0.1)
    module.configure_model()
    transformer = module.net.transformer
    transformer.load_state_dict(source.load(52))
    before = {name: weight.clone() for name, weight in transformer.named_parameters()}
    step(module)
    changed = {n for n, w in transformer.named_parameters() if not torch.equal(w, before[n])}
    assert changed == before.keys()
    weights = {n: w.detach()[:50] if "emb" in n or "out" in n else w.detach()
               for n, w in transformer.state_dict().items()}  # fmt: skip
    if source.config.tie_embeddings:
        del weights["output.weight"]
    renamed = state_dict_to_hf(weights, model_type_of(source.config))
    out = tmp_path / "out"
    out.mkdir()
    save_file({n: w.contiguous() for n, w in renamed.items()}, out / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (out / "config.json").write_text(json.dumps(config_to_hf(source.config, 50, 64)))
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = loaded(out)
    for name, weight in weights.items():
        assert torch.equal(again.state_dict()[name], weight)
    assert_same_logits(transformer.requires_grad_(False), theirs.requires_grad_(False))


def step(module: Transfusion) -> None:
    """One step of SGD on both losses."""
    batch = packed([[document("7i2"), document("i5", 1)]])
    module.requires_grad_(True)
    logits, output = module.net(batch, batch.latents, batch.t, attention(batch))
    (logits.square().mean() + (output - 1).square().mean()).backward()
    torch.optim.SGD(module.net.transformer.parameters(), lr=0.1).step()


def attention(batch):
    from tf_lightning.model.attention import VarlenAttention

    return VarlenAttention(batch)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


def hf_config(kind: str = "Llama", **change) -> dict:
    """The config.json of a tiny model, with changes."""
    return tiny(kind).config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]} | change


@pytest.mark.parametrize("model_type", MISSING_FEATURES)
def test_other_families_are_refused_with_the_feature_they_need(model_type):
    with pytest.raises(UserError) as error:
        config_from_hf({"model_type": model_type})
    message = str(error.value)
    assert f"model_type='{model_type}', which needs {MISSING_FEATURES[model_type]}" in message
    assert "only 'llama', 'mistral', 'qwen2', 'qwen3', 'olmo2', 'smollm3', 'phi3' are" in message


def test_an_unknown_family_is_refused_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"model_type": "llama9"})
    with pytest.raises(UserError, match="model_type='llama9' but only 'llama', 'mistral', "):
        open_language_model(tmp_path)


CHANGES = [
    ({"hidden_act": "gelu"}, "hidden_act='gelu' but only 'silu' is supported"),
    ({"attention_bias": True}, "attention_bias=True but only False is supported"),
    ({"mlp_bias": True}, "mlp_bias=True but only False"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 but only 1.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 but"),
    ({"logits_scaling": 8.0}, "logits_scaling=8.0 but only 1.0"),
    ({"logit_scale": 0.1}, "logit_scale=0.1 but only 1.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 but"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 but only None"),
    ({"num_local_experts": 8}, "num_local_experts=8 but only 0"),
    ({"is_causal": False}, "is_causal=False but only True"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "with 'linear_attention' but"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers with model_type='llama' but only 'smollm3'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config but only unquantized"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "but only LlamaForCausalLM is"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor, high_freq"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' but only"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic'"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters that differ between layers"),
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    ({"num_attention_heads": 0}, "config.json lacks num_attention_heads"),
    ({"architectures": "LlamaForCausalLM"}, "has architectures='LlamaForC.* of type list"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers=1000000.*, more than any language model"),
    ({"vocab_size": 10**9}, "vocab_size=1000000000, more than any language model"),
    ({"architectures": [1]}, r"architectures=\[1\] but only LlamaForCausalLM"),
    ({"rope_parameters": [1]}, r"has rope_parameters=\[1\] but needs a value of type dict"),
    ({"rope_theta": "1e4"}, r"has rope_theta='1e4' but needs a value of type int \| float"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_options_that_change_the_function_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(hf_config(**change))
    config_from_hf(hf_config(**dict.fromkeys(change.keys() - {*REQUIRED})))


REQUIRED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)  # null is accepted for every other option


@pytest.mark.parametrize("layers", [[0, 1, 1], [1, 0, 0], [1, 0, 1, 1, 0]])
def test_layers_without_positions_at_other_intervals_are_refused(layers):
    config = {"model_type": "smollm3", **SIZES, "num_hidden_layers": len(layers)}
    config["no_rope_layers"] = layers
    with pytest.raises(UserError, match=r"no_rope_layers=\[.*only one layer .* in every n"):
        config_from_hf(config)


def test_a_short_config_has_the_defaults_of_its_class():
    """Each value of `Family.defaults` is that of the class in `transformers`."""
    import transformers

    for model_type, family in FAMILIES.items():
        full = getattr(transformers, f"{family.name}Config")(**SIZES).to_dict()
        short = {"model_type": model_type, **SIZES}
        assert config_from_hf(short) == config_from_hf(full)
        assert sliding_window(short) == sliding_window(full)


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ({}, "llama"),
        ({"head_dim": 32}, "mistral"),
        ({"attention_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "head_dim": 32}, "qwen3"),
        ({"qk_norm": "full", "norm_order": "post"}, "olmo2"),
        ({"nope_interval": 3}, "smollm3"),
        ({"dropout": 0.1, "modality_weights": "all", "pretrained_vocab_size": 30}, "llama"),
        ({"qk_norm": "full"}, None),
        ({"norm_order": "post"}, None),
        ({"qk_norm": "layer"}, None),
        ({"nope_interval": 3, "qk_norm": True}, None),
        ({"attention_bias": True, "qk_norm": True}, None),
    ],
)
def test_the_family_that_expresses_a_network(options, model_type):
    assert model_type_of(TransformerConfig(**options)) == model_type
