"""Phi 1 and 2: attention and MLP side by side behind one LayerNorm, biases everywhere, partly rotated heads."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GELUS, one_of
from litgpt.weights import ignored, joined, same, tied

PHI_1B = dict(n_layer=24, n_head=32, n_embd=2048, intermediate_size=8192, rotary_percentage=0.5)

PHI = Family(
    model_type="phi",
    architectures=["PhiForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=51200),
        field("hidden_size", "n_embd", default=2048),
        field("intermediate_size", "intermediate_size", default=8192),
        field("num_hidden_layers", "n_layer", default=24),
        field("num_attention_heads", "n_head", default=32),
        field("num_key_value_heads", "n_query_groups"),
        field("head_dim", "head_size"),
        field("max_position_embeddings", "block_size", default=2048),
        field("layer_norm_eps", "norm_eps", default=1e-5),
        field("hidden_act", "gelu_approximate", default="gelu_new", **one_of({"gelu_new": "tanh"} | GELUS)),
        field("tie_word_embeddings", "tie_embeddings", default=False),
        field("qk_layernorm", "norm_qk", default=False),
        *rope_fields(["rope_theta"], ["partial_rotary_factor"], default_share=0.5),
    ],
    weights=[
        same("model.embed_tokens.weight", "transformer.wte.weight"),
        same("model.layers.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"),
        joined([f"model.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"], "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.self_attn.q_layernorm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_layernorm.*", "transformer.h.{}.attn.norm_k.*"),
        same("model.layers.{}.self_attn.dense.*", "transformer.h.{}.attn.proj.*"),
        same("model.layers.{}.mlp.fc1.*", "transformer.h.{}.mlp.fc.*"),
        same("model.layers.{}.mlp.fc2.*", "transformer.h.{}.mlp.proj.*"),
        same("model.final_layernorm.*", "transformer.ln_f.*"),
        tied("lm_head.weight", "lm_head.weight"),
        same("lm_head.bias", "lm_head.bias"),
        ignored("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    ],
    base=dict(
        norm_class_name="LayerNorm",
        norm_eps=1e-5,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        bias=True,
        lm_head_bias=True,
        parallel_residual=True,
        shared_attention_norm=True,
        rotary_percentage=0.5,
    ),
    brands=[
        Brand(
            "microsoft",
            base=dict(block_size=2048, vocab_size=50257, padded_vocab_size=51200),
            sizes={
                "phi-1": PHI_1B,
                "phi-1_5": PHI_1B,
                "phi-2": dict(n_layer=32, n_head=32, n_embd=2560, intermediate_size=10240, rotary_percentage=0.4),
            },
            prompt={"phi-{1,1_5}": "phi-1", "phi-2": "phi-2"},
        ),
    ],
)
