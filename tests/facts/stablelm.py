"""What tests need to know of StableLM."""

IN_LITGPT = False  # it has no norms of each head's own

VARIANTS = {
    "side by side": dict(parallel_residual=True, shared_attention_norm=True),
    "normed heads": dict(norm_qk=True),
    "normed heads, no groups": dict(norm_qk=True, n_query_groups=4, parallel_residual=True, shared_attention_norm=True),
    "biases": dict(attn_bias=True),
    "whole heads turn": dict(rotary_percentage=1.0),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["StableLmForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=3,
    intermediate_size=80,
    layer_norm_eps=1e-05,
    partial_rotary_factor=0.5,
    rope_theta=20000,
    use_qkv_bias=True,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=120,
    rope_scaling={"type": "linear", "factor": 2.0},
)
