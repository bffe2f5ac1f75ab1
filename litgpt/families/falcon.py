"""Falcon: attention and MLP side by side, one key head (7B) or a few, LayerNorm, no other biases."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GELUS, four_times, one_of, only, whole
from litgpt.weights import ignored, interleaved_qkv, same, tied, where

SEPARATE = dict(parallel_residual=True, shared_attention_norm=False)  # attention and MLP side by side, each with its own norm
B7 = dict(n_layer=32, n_head=71, n_query_groups=1, n_embd=4544, shared_attention_norm=True)
B11 = dict(n_layer=60, n_head=32, n_embd=4096, shared_attention_norm=True, rope_base=500_042, block_size=8192, tie_embeddings=False)
B40 = dict(n_layer=60, n_head=128, n_embd=8192)
B180 = dict(n_layer=80, n_head=232, n_embd=14848)


def parse_layout(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many key heads there are and where the norms stand."""
    n_head = whole(mapping, "num_attention_heads", 71)
    if mapping.get("new_decoder_architecture"):
        norms = mapping.get("num_ln_in_parallel_attn")
        if norms is not None and (isinstance(norms, bool) or norms not in (1, 2)):
            raise UserError(f"`num_ln_in_parallel_attn` is 1, 2 or null in config.json, but got {norms!r}.")
        groups = mapping.get("num_kv_heads")
        return dict(n_query_groups=n_head if groups is None else groups, parallel_residual=True, shared_attention_norm=norms == 1)
    entries = {name: mapping.get(name) for name in ("multi_query", "parallel_attn")}
    one_key, parallel = (value is None or bool(value) for value in entries.values())
    return dict(n_query_groups=1 if one_key else n_head, parallel_residual=parallel, shared_attention_norm=parallel)


def format_layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries for key heads and norms; the older architecture where it has them."""
    groups, parallel, shared = fields["n_query_groups"], fields["parallel_residual"], fields["shared_attention_norm"]
    new = parallel and not (shared and groups in (1, fields["n_head"]))
    return dict(
        new_decoder_architecture=new,
        multi_query=groups == 1 or new,
        parallel_attn=parallel,
        num_kv_heads=groups,
        num_ln_in_parallel_attn=(1 if shared else 2) if new else None,
    )


FALCON = Family(
    model_type="falcon",
    architectures=["FalconForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=65024),
        field("hidden_size", "n_embd", default=4544),
        field("num_hidden_layers", "n_layer", default=32),
        field("num_attention_heads", "n_head", default=71),
        four_times("ffn_hidden_size", "hidden_size", 4544),
        field("max_position_embeddings", "block_size", default=2048),
        field("layer_norm_epsilon", "norm_eps", default=1e-5),
        field("activation", "gelu_approximate", default="gelu", **one_of(GELUS, "activation")),
        field("bias", ["attn_bias", "attn_proj_bias", "mlp_bias"], default=False),
        field("tie_word_embeddings", "tie_embeddings", default=True),
        only("alibi", False),
        Joint(
            ("new_decoder_architecture", "multi_query", "parallel_attn", "num_kv_heads", "num_ln_in_parallel_attn", "num_attention_heads"),
            ("n_query_groups", "parallel_residual", "shared_attention_norm"),
            parse_layout,
            format_layout,
        ),
        *rope_fields(["rope_theta"]),
    ],
    weights=[
        same("transformer.word_embeddings.weight", "transformer.wte.weight"),
        where(same("transformer.h.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"), shared_attention_norm=True),
        where(same("transformer.h.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"), parallel_residual=False),
        where(same("transformer.h.{}.post_attention_layernorm.*", "transformer.h.{}.norm_2.*"), parallel_residual=False),
        where(same("transformer.h.{}.ln_attn.*", "transformer.h.{}.norm_1.*"), **SEPARATE),
        where(same("transformer.h.{}.ln_mlp.*", "transformer.h.{}.norm_2.*"), **SEPARATE),
        interleaved_qkv("transformer.h.{}.self_attention.query_key_value.*", "transformer.h.{}.attn.qkv.*"),
        same("transformer.h.{}.self_attention.dense.*", "transformer.h.{}.attn.proj.*"),
        same("transformer.h.{}.mlp.dense_h_to_4h.*", "transformer.h.{}.mlp.fc.*"),
        same("transformer.h.{}.mlp.dense_4h_to_h.*", "transformer.h.{}.mlp.proj.*"),
        same("transformer.ln_f.*", "transformer.ln_f.*"),
        tied("lm_head.weight", "lm_head.weight"),
        ignored("transformer.h.{}.self_attention.rotary_emb.inv_freq"),
    ],
    base=dict(norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", bias=False, rotary_percentage=1.0, tie_embeddings=True),
    brands=[
        Brand(
            "tiiuae",
            base=dict(block_size=2048, vocab_size=65024, padded_vocab_size=65024, n_query_groups=8),
            sizes={
                "falcon-7b{,-instruct}": B7,
                "falcon-11B": B11,
                "falcon-40b{,-instruct}": B40,
                "falcon-180B{,-chat}": B180,
            },
            prompt={"falcon-{7b,40b}-instruct": "falcon", "falcon-180B-chat": "falcon-180b-chat"},
        ),
    ],
)
