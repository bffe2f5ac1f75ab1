"""What tests need to know of OLMo 2."""

VARIANTS = {
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["Olmo2ForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=80,
    rms_norm_eps=1e-06,
    rope_theta=500000,
    torch_dtype="bfloat16",
    vocab_size=120,
)
