"""What tests need to know of Qwen 3."""

TIED = ["Qwen3-{0.6B,1.7B,4B}{,-Base}", "Qwen3-4B-{Instruct,Thinking}-2507"]

TINY = dict(head_size=12, sliding_window_indices=[0, 1])

VARIANTS = {
    "no window": dict(sliding_window_size=None),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "no groups": dict(n_query_groups=4),
    "yarn": dict(rope_adjustments=dict(factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16, rope_type="yarn")),
}

OLD = dict(  # as it was published
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    head_dim=24,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=40960,
    max_window_layers=28,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    use_sliding_window=False,
    vocab_size=120,
)
