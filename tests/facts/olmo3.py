"""What tests need to know of OLMo 3."""

PLAIN_ROPE = False  # layers with a window have a base of their own

YARN = dict(factor=4.0, original_max_seq_len=16, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2)

TINY = dict(sliding_window_indices=[1, 0], rope_indices=[1, 0], rope_local_base_freq=700, rope_base=9000)

VARIANTS = {
    "stretched": dict(rope_adjustments=YARN, rope_base=500.0, rope_local_base_freq=500),
    "equal bases": dict(rope_indices=None, rope_local_base_freq=None),
    "no windows": dict(sliding_window_size=None, sliding_window_indices=None, rope_indices=None, rope_local_base_freq=None),
    "windows everywhere": dict(sliding_window_indices=[1, 1], rope_indices=[1, 1]),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["Olmo3ForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=5,
    intermediate_size=80,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    max_position_embeddings=65536,
    rms_norm_eps=1e-06,
    rope_scaling=dict(
        attention_factor=1.2079441541679836,
        beta_fast=32.0,
        beta_slow=1.0,
        factor=8.0,
        original_max_position_embeddings=8192,
        rope_type="yarn",
    ),
    rope_theta=500000,
    sliding_window=4096,
    torch_dtype="bfloat16",
    vocab_size=120,
)
