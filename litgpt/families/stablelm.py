"""StableLM since its second generation: a gated MLP, LayerNorm, partly rotated heads."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GATED_MLPS, LLAMA_WEIGHTS, one_of
from litgpt.weights import stacked

B3 = dict(n_layer=32, n_head=32, n_embd=2560, intermediate_size=6912, vocab_size=50254, padded_vocab_size=50304)
SECOND = dict(vocab_size=100289, padded_vocab_size=100352)
B1_6 = dict(n_layer=24, n_head=32, n_embd=2048, intermediate_size=5632, attn_bias=True) | SECOND
B12 = dict(n_layer=40, n_head=32, n_query_groups=8, n_embd=5120, intermediate_size=13824, norm_qk=True) | SECOND
SIDE_BY_SIDE = dict(parallel_residual=True, shared_attention_norm=True)

STABLELM = Family(
    model_type="stablelm",
    architectures=["StableLmForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=50304),
        field("hidden_size", "n_embd", default=2560),
        field("num_hidden_layers", "n_layer", default=32),
        field("num_attention_heads", "n_head", default=32),
        field("num_key_value_heads", "n_query_groups", default=32),
        field("intermediate_size", "intermediate_size", default=6912),
        field("max_position_embeddings", "block_size", default=4096),
        field("layer_norm_eps", "norm_eps", default=1e-5),
        field("hidden_act", "mlp_class_name", default="silu", **one_of(GATED_MLPS)),
        field("use_parallel_residual", ["parallel_residual", "shared_attention_norm"], default=False),
        field("use_qkv_bias", "attn_bias", default=False),
        field("qk_layernorm", "norm_qk", default=False),
        field("tie_word_embeddings", "tie_embeddings", default=False),
        *rope_fields(["rope_theta"], ["partial_rotary_factor"], default_share=0.25),
    ],
    weights=[
        *LLAMA_WEIGHTS,
        stacked("model.layers.{}.self_attn.q_layernorm.norms.{}.weight", "transformer.h.{}.attn.norm_q.weight", "n_head"),
        stacked("model.layers.{}.self_attn.k_layernorm.norms.{}.weight", "transformer.h.{}.attn.norm_k.weight", "n_query_groups"),
    ],
    base=dict(
        norm_class_name="LayerNorm",
        norm_qk_type="per_head",
        mlp_class_name="LLaMAMLP",
        bias=False,
        parallel_residual=False,
        rotary_percentage=0.25,
    ),
    brands=[
        Brand(
            "stabilityai",
            base=dict(block_size=4096),
            sizes={
                "stablelm-3b-4e1t": B3,
                "stablelm-zephyr-3b": B3,
                "stable-code-3b": B3 | dict(block_size=16384, rope_base=1_000_000),
                "stable-code-instruct-3b": B3 | dict(block_size=16384, rope_base=1_000_000),
                "stablelm-2-{,zephyr-}1_6b": B1_6,
                "stablelm-2-1_6b-chat": B1_6,
                "stablelm-2-12b{,-chat}": B12 | SIDE_BY_SIDE,
            },
            prompt={
                "stablelm-zephyr-3b": "stablelm-zephyr",
                "stable-code-instruct-3b": "chatml",
                "stablelm-2-zephyr-1_6b": "stablelm2-zephyr",
                "stablelm-2-{1_6b,12b}-chat": "stablelm2-chat",
            },
        ),
    ],
)
