"""A Hugging Face Llama becomes ours by renaming: same logits, and clear words when it cannot."""

import json

import pytest
import torch

from tf_lightning.attention import DocumentAttention
from tf_lightning.batch import Batch
from tf_lightning.errors import UserError
from tf_lightning.transformer import Transformer
from tf_lightning.weights import llama_state_dict, load_llama


def tiny_llama(**sizes):
    """A random `LlamaForCausalLM`; its norms are not all ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False} | sizes
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes
    )
    llama = LlamaForCausalLM(config).requires_grad_(False).eval()
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return llama


def our_logits(transformer: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of one document a row."""
    rows, length = ids.shape
    empty = torch.empty(0)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        positions=torch.arange(length).expand(rows, length),
        document_ids=torch.zeros_like(ids),
        image_ids=torch.full_like(ids, -1),
        **dict.fromkeys(
            (
                "patch_index",
                "text_index",
                "target_index",
                "code_index",
                "latents",
                "noise",
                "t",
                "copied",
                "source_ids",
                "row_tokens",
            ),
            empty,
        ),
    )
    x = transformer.tok_embeddings(ids)
    return transformer.output(transformer(x, batch.positions, DocumentAttention(batch)))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ],
)
def test_a_loaded_llama_gives_hugging_faces_logits(tmp_path, sizes):
    llama = tiny_llama(**sizes)
    llama.save_pretrained(tmp_path)
    config, state_dict = load_llama(tmp_path)
    transformer = Transformer(config).requires_grad_(False)
    transformer.load_state_dict(state_dict)
    ids = torch.randint(50, (2, 9))
    torch.testing.assert_close(
        our_logits(transformer, ids), llama(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_a_sharded_llama_loads_like_a_single_file(tmp_path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_llama(tmp_path / "one"), load_llama(tmp_path / "many")
    assert one[0] == many[0]
    assert one[1].keys() == many[1].keys()
    assert all(torch.equal(weight, many[1][name]) for name, weight in one[1].items())


def test_weights_are_renamed_and_nothing_else():
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
    renamed = llama_state_dict(weights | constant)
    assert {ours: weights[theirs] for theirs, ours in names.items()} == renamed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mistral"}, "model_type='mistral' but only 'llama' is supported"),
        ({"attention_bias": True}, "attention_bias=True but only False is supported"),
        ({"head_dim": 16}, "head_dim=16 but only 8 is supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3' but only 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
    ],
)
def test_a_network_that_is_no_plain_llama_is_refused(tmp_path, change, message):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_llama(tmp_path)


def test_configs_of_before_transformers_5_are_read(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 123.0, "rope_scaling": None}))
    assert load_llama(tmp_path)[0].rope_theta == 123.0


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere/config.json cannot be read"):
        load_llama(tmp_path / "nowhere")


def test_missing_weights_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load_llama(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="download it again"):
        load_llama(tmp_path)
