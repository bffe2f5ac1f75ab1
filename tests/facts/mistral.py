"""What tests need to know of Mistral."""

VARIANTS = {
    "short window": dict(sliding_window_size=5),
    "no window, wide heads": dict(sliding_window_size=None, head_size=12),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["MistralForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=None,
    head_dim=24,
    rope_theta=1000000.0,
    torch_dtype="bfloat16",
    vocab_size=99,
)
