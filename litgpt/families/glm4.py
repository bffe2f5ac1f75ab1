"""GLM-4 of April 2025: norms before and after attention and MLP, of each head one half turns, neighbours together."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import DECODER_FIELDS, FRAME_WEIGHTS, LLAMA_BASE, QKV, with_defaults
from litgpt.weights import joined, parted, same

B9 = dict(n_layer=40, n_head=32, n_query_groups=2, n_embd=4096, intermediate_size=13696, attn_bias=True)
B32 = dict(n_layer=61, n_head=48, n_query_groups=2, n_embd=6144, intermediate_size=23040)

GLM4 = Family(
    model_type="glm4",
    architectures=["Glm4ForCausalLM"],
    fields=[
        *with_defaults(
            DECODER_FIELDS,
            vocab_size=151552,
            num_hidden_layers=40,
            head_dim=128,
            rms_norm_eps=1.5625e-07,
        ),
        *rope_fields(["rope_theta"], ["partial_rotary_factor"], default_share=0.5),
        field("intermediate_size", "intermediate_size", default=13696),
        field("num_key_value_heads", "n_query_groups", default=2),
        field("max_position_embeddings", "block_size", default=131072),
        field("attention_bias", "attn_bias", default=True),
    ],
    weights=[
        *FRAME_WEIGHTS,
        joined(QKV, "transformer.h.{}.attn.qkv.*"),
        parted("model.layers.{}.mlp.gate_up_proj.*", ["transformer.h.{}.mlp.fc_1.*", "transformer.h.{}.mlp.fc_2.*"]),
        same("model.layers.{}.mlp.down_proj.*", "transformer.h.{}.mlp.proj.*"),
        same("model.layers.{}.post_self_attn_layernorm.*", "transformer.h.{}.post_attention_norm.*"),
        same("model.layers.{}.post_mlp_layernorm.*", "transformer.h.{}.post_mlp_norm.*"),
    ],
    base=LLAMA_BASE | dict(rotary_percentage=0.5, rope_interleave=True, post_attention_norm=True, post_mlp_norm=True),
    brands=[
        Brand(
            "zai-org",
            base=dict(block_size=32768, head_size=128, norm_eps=1e-5, vocab_size=151343, padded_vocab_size=151552),
            sizes={
                "GLM-4-9B-0414": B9,
                "GLM-Z1-9B-0414": B9,
                "GLM-4-32B{,-Base}-0414": B32,
                "GLM-Z1-32B-0414": B32,
            },
            also={
                "GLM-{4,Z1}-{9B,32B}-0414": "THUDM/GLM-{4,Z1}-{9B,32B}-0414",
                "GLM-4-32B-Base-0414": "THUDM/GLM-4-32B-Base-0414",
            },
        ),
    ],
)
