"""What tests need to know of Phi."""

VARIANTS = {
    "no groups": dict(n_query_groups=4),
    "all of each head turns": dict(rotary_percentage=1.0),
    "norms of queries and keys": dict(norm_qk=True),
    "wide heads": dict(head_size=16),
    "exact gelu": dict(gelu_approximate="none"),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
}

OLD = dict(  # as it was published
    architectures=["PhiForCausalLM"],
    attention_dropout=0.0,
    embd_pdrop=0.0,
    head_dim=24,
    hidden_act="gelu_new",
    hidden_size=64,
    intermediate_size=80,
    layer_norm_eps=1e-06,
    max_position_embeddings=1024,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=None,
    partial_rotary_factor=0.25,
    qk_layernorm=False,
    resid_pdrop=0.1,
    rope_scaling=None,
    rope_theta=20000.0,
    torch_dtype="float16",
    vocab_size=120,
)
