"""Gemma 2: norms before and after attention and MLP, soft-capped scores and logits, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, field
from litgpt.families.gemma import GELU_FIRST, GEMMA_BASE, GEMMA_FIELDS
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import FULL, LLAMA_WEIGHTS, SLIDING, float_or_none, given, one_of, only, windows
from litgpt.weights import same

SANDWICH_WEIGHTS = [  # Llama's name of the MLP's norm means attention's second one here
    *(rule for rule in LLAMA_WEIGHTS if "transformer.h.{}.norm_2.*" not in rule.ours),
    same("model.layers.{}.post_attention_layernorm.*", "transformer.h.{}.post_attention_norm.*"),
    same("model.layers.{}.pre_feedforward_layernorm.*", "transformer.h.{}.norm_2.*"),
    same("model.layers.{}.post_feedforward_layernorm.*", "transformer.h.{}.post_mlp_norm.*"),
]
SANDWICH_BASE = GEMMA_BASE | dict(post_attention_norm=True, post_mlp_norm=True)
SANDWICH_FIELDS = [
    *GEMMA_FIELDS,
    field("hidden_size", "n_embd", default=2304),
    field("intermediate_size", "intermediate_size", default=9216),
    field("num_hidden_layers", "n_layer", default=26),
    field("num_attention_heads", "n_head", default=8),
    field("num_key_value_heads", "n_query_groups", default=4),
    field("head_dim", "head_size", default=256),
    field("hidden_activation", "gelu_approximate", default="gelu_pytorch_tanh", **one_of(GELU_FIRST, "hidden_activation")),
    field("query_pre_attn_scalar", "attention_scores_scalar", default=256, parse=given("query_pre_attn_scalar")),
    only("use_bidirectional_attention", False),
]


def window_size(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of the window, which transformers wants to know even where no layer has one."""
    return dict(sliding_window=fields["sliding_window_size"] or 4096)


def every_other(n_layer: int) -> dict[str, Any]:
    """Return the fields of so many layers of which the first, the third and so on have a window."""
    return dict(n_layer=n_layer, sliding_window_indices=[(i + 1) % 2 for i in range(n_layer)])


G2_27B = dict(n_head=32, n_query_groups=16, n_embd=4608, head_size=128, intermediate_size=36864, attention_scores_scalar=144)

GEMMA_2 = Family(
    model_type="gemma2",
    architectures=["Gemma2ForCausalLM"],
    fields=[
        *SANDWICH_FIELDS,
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=256000),
        field("max_position_embeddings", "block_size", default=8192),
        field("attn_logit_softcapping", "attention_logit_softcapping", default=50.0, format=float_or_none),
        field("final_logit_softcapping", "final_logit_softcapping", default=30.0, format=float_or_none),
        windows(4096, lambda mapping, i: FULL if i % 2 else SLIDING, n_layer=26, extra=window_size),
        *rope_fields(["rope_theta"]),
    ],
    weights=SANDWICH_WEIGHTS,
    base=SANDWICH_BASE,
    brands=[
        Brand(
            "google",
            base=dict(
                block_size=8192,
                vocab_size=256000,
                padded_vocab_size=256000,
                head_size=256,
                attention_scores_scalar=256,
                attention_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
                sliding_window_size=4096,
            ),
            sizes={
                "Gemma-2-2b{,-it}": every_other(26) | dict(n_head=8, n_query_groups=4, n_embd=2304, intermediate_size=9216),
                "Gemma-2-9b{,-it}": every_other(42) | dict(n_head=16, n_query_groups=8, n_embd=3584, intermediate_size=14336),
                "Gemma-2-27b{,-it}": every_other(46) | G2_27B,
            },
            prompt={"Gemma-2-{2b,9b,27b}-it": "gemma"},
            published_as={"Gemma-2-{2b,9b,27b}{,-it}": "gemma-2-{2b,9b,27b}{,-it}"},
        ),
    ],
)
