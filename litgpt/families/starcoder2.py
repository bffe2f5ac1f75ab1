"""StarCoder 2: grouped queries, a window, LayerNorm, an MLP without gate, biases everywhere."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import FRAME_WEIGHTS, GELUS, QKV, head_dim, one_of
from litgpt.weights import joined, same

STARCODER2 = Family(
    model_type="starcoder2",
    architectures=["Starcoder2ForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=49152),
        field("hidden_size", "n_embd", default=3072),
        field("num_hidden_layers", "n_layer", default=30),
        field("num_attention_heads", "n_head", default=24),
        field("num_key_value_heads", "n_query_groups", default=2),
        head_dim(3072, 24),
        field("intermediate_size", "intermediate_size", default=12288),
        field("max_position_embeddings", "block_size", default=4096),
        field("norm_epsilon", "norm_eps", default=1e-5),
        field("hidden_act", "gelu_approximate", default="gelu_pytorch_tanh", **one_of({"gelu_pytorch_tanh": "tanh"} | GELUS)),
        field("use_bias", ["attn_bias", "attn_proj_bias", "mlp_bias"], default=True),
        field("sliding_window", "sliding_window_size"),
        field("tie_word_embeddings", "tie_embeddings", default=True),
        *rope_fields(["rope_theta"]),
    ],
    weights=[
        *FRAME_WEIGHTS,
        joined(QKV, "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.mlp.c_fc.*", "transformer.h.{}.mlp.fc.*"),
        same("model.layers.{}.mlp.c_proj.*", "transformer.h.{}.mlp.proj.*"),
    ],
    base=dict(
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        bias=True,
        parallel_residual=False,
        rotary_percentage=1.0,
        tie_embeddings=True,
    ),
    brands=[
        Brand(
            "bigcode",
            base=dict(block_size=16384, sliding_window_size=4096, vocab_size=49152, padded_vocab_size=49152),
            sizes={
                "starcoder2-3b": dict(
                    n_layer=30, n_head=24, n_query_groups=2, n_embd=3072, intermediate_size=12288, rope_base=999999.4420358813
                ),
                "starcoder2-7b": dict(n_layer=32, n_head=36, n_query_groups=4, n_embd=4608, intermediate_size=18432, rope_base=1_000_000),
                "starcoder2-15b{,-instruct-v0.1}": dict(
                    n_layer=40, n_head=48, n_query_groups=4, n_embd=6144, intermediate_size=24576, rope_base=100_000, tie_embeddings=False
                ),
            },
        ),
    ],
)
