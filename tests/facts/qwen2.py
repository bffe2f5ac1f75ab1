"""What tests need to know of Qwen 2."""

TIED = [
    *("Qwen2-{0.5B,1.5B}{,-Instruct}", "Qwen2.5-{0.5B,1.5B,3B}{,-Instruct}"),
    *("Qwen2.5-Coder-{0.5B,1.5B,3B}{,-Instruct}", "Qwen2.5-Math-1.5B{,-Instruct}"),
]

TINY = dict(n_layer=3, sliding_window_indices=[0, 1, 1])

VARIANTS = {
    "windows where no later layer has none": dict(sliding_window_indices=[1, 0, 1]),
    "no window": dict(sliding_window_size=None),
    "wide heads": dict(head_size=16),
    "no groups": dict(n_query_groups=4),
    "yarn": dict(rope_adjustments=dict(factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16, rope_type="yarn")),
}

OLD = dict(  # as it was published
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    head_dim=24,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=32768,
    max_window_layers=2,
    num_attention_heads=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    sliding_window=64,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    use_sliding_window=True,
    vocab_size=120,
)
