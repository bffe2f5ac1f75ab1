"""What tests need to know of StarCoder 2."""

TIED = ["starcoder2-{3b,7b}"]

VARIANTS = {
    "no window": dict(sliding_window_size=None),
    "no biases": dict(bias=False),
    "no groups, wide heads": dict(n_query_groups=4, head_size=16),
}

OLD = dict(  # as first published
    architectures=["Starcoder2ForCausalLM"],
    activation_function="gelu",
    attention_softmax_in_fp32=True,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=80,
    max_position_embeddings=16384,
    mlp_type="default",
    norm_epsilon=1e-05,
    norm_type="layer_norm",
    rope_theta=999999.4420358813,
    sliding_window=4096,
    torch_dtype="bfloat16",
    use_bias=True,
    vocab_size=120,
)
