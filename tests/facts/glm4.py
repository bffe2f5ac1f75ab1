"""What tests need to know of GLM-4."""

TINY = dict(attn_bias=True)

VARIANTS = {
    "no biases": dict(attn_bias=False),
    "whole heads turn": dict(rotary_percentage=1.0),
    "wide heads": dict(head_size=16),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["Glm4ForCausalLM"],
    attention_bias=False,
    head_dim=16,
    hidden_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=80,
    max_position_embeddings=32768,
    partial_rotary_factor=0.25,
    rms_norm_eps=1e-05,
    rope_theta=20000.0,
    torch_dtype="bfloat16",
    eos_token_id=[4, 5],
    pad_token_id=0,
    vocab_size=120,
)
