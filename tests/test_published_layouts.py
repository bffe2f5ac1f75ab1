"""Checkpoints as their publishers wrote them: the spellings and the names that only their files have."""

import pytest
import torch
from tiny import tiny_config

from litgpt.checkpoint import assemble
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.translate import translate

PUBLISHED = {  # the entries of config.json that say what is computed
    "falcon-7b": dict(
        model_type="falcon", alibi=False, bias=False, hidden_size=4544, multi_query=True, new_decoder_architecture=False,
        num_attention_heads=71, num_hidden_layers=32, parallel_attn=True, vocab_size=65024,
    ),
    "falcon-40b": dict(
        model_type="falcon", alibi=False, bias=False, hidden_size=8192, new_decoder_architecture=True,
        num_attention_heads=128, num_hidden_layers=60, num_kv_heads=8, parallel_attn=True, vocab_size=65024,
    ),
    "stablelm-2-12b": dict(
        model_type="stablelm", hidden_act="silu", hidden_size=5120, intermediate_size=13824, layer_norm_eps=1e-5,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8, partial_rotary_factor=0.25,
        qk_layernorm=True, rope_theta=10000, tie_word_embeddings=False, use_parallel_residual=True, use_qkv_bias=False, vocab_size=100352,
    ),
    "c4ai-command-r-plus": dict(
        model_type="cohere", attention_bias=False, hidden_act="silu", hidden_size=12288, intermediate_size=33792, layer_norm_eps=1e-5,
        logit_scale=0.8333333333333334, max_position_embeddings=8192, num_attention_heads=96, num_hidden_layers=64, num_key_value_heads=8,
        rope_theta=75000000.0, use_qk_norm=True, vocab_size=256000,
    ),
    "OLMo-1B-hf": dict(
        model_type="olmo", attention_bias=False, clip_qkv=None, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=2048, num_attention_heads=16, num_hidden_layers=16, num_key_value_heads=16, rope_scaling=None,
        rope_theta=10000.0, tie_word_embeddings=True, vocab_size=50304,
    ),
    "gpt2-xl": dict(
        model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48,
        n_positions=1024, vocab_size=50257,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_one_that_its_name_stands_for(name):
    ours, known = Config.from_hf(PUBLISHED[name]).to_dict(), Config.from_name(name).to_dict()
    unsaid = ("name", "hf_config", "vocab_size", "padding_multiple", "bias")
    assert {k: v for k, v in ours.items() if k not in unsaid} == {k: v for k, v in known.items() if k not in unsaid}


@pytest.mark.parametrize(
    "mapping, sentence",
    [
        (dict(model_type="falcon", alibi=True), "`alibi` is True in config.json"),
        (dict(model_type="falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=3), "1, 2 or null in config.json, but got 3"),
        (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "`scale_attn_by_inverse_layer_idx` is True"),
        (dict(model_type="gpt2", add_cross_attention=True), "`add_cross_attention` is True"),
        (dict(model_type="smollm3", num_hidden_layers=3, no_rope_layers=[1, 0]), "`no_rope_layers` says for each of 3 layers"),
        (
            dict(model_type="olmo3", rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))),
            "stretches the positions of sliding_attention layers",
        ),
    ],
)
def test_what_we_would_compute_otherwise_is_refused(mapping, sentence):
    with pytest.raises(UserError, match=sentence):
        Config.from_hf(mapping)


def test_the_first_files_of_gpt2_have_no_prefix_and_hold_masks():
    config = tiny_config("gpt2")
    ours = GPT(config).state_dict()
    theirs = translate(ours.items(), config.rules, config, to_ours=False)
    first = {name.removeprefix("transformer."): tensor for name, tensor in theirs}
    first |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    back = dict(translate(first.items(), config.rules, config, to_ours=True))
    assert back.keys() | {"lm_head.weight"} == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())


def test_falcons_files_hold_a_copy_of_the_tied_head_which_stays_tied(capsys):
    config = tiny_config("falcon")
    weights = {name: tensor.clone() for name, tensor in GPT(config).state_dict().items()}
    model = assemble(config, weights, "the file")
    assert model.config.tie_embeddings and model.lm_head.weight is model.transformer.wte.weight and not capsys.readouterr().err
