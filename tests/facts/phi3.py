"""What tests need to know of Phi 3."""

PLAIN_ROPE = False  # transformers accepts LongRoPE only
TIED = ["Phi-4-mini-{instruct,reasoning}"]

TINY = dict(rotary_percentage=0.5)

FACTORS = dict(short_factor=[1.5, 2.5], long_factor=[4.0, 7.0])

VARIANTS = {
    "all of each head turns": dict(rotary_percentage=1.0),
    "no window": dict(sliding_window_size=None),
    "no groups": dict(n_query_groups=4),
    "wide heads": dict(head_size=16),
    "within the context of pretraining": dict(rope_adjustments=FACTORS | dict(original_max_seq_len=64)),
    "beyond the context of pretraining": dict(rope_adjustments=FACTORS | dict(original_max_seq_len=32)),
    "LongRoPE with a factor of its own": dict(rope_adjustments=FACTORS | dict(original_max_seq_len=32, attention_factor=1.3)),
}

OLD = dict(  # as it was published
    architectures=["Phi3ForCausalLM"],
    attention_bias=False,
    embd_pdrop=0.0,
    head_dim=16,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=131072,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    original_max_position_embeddings=2048,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-06,
    rope_scaling={"long_factor": [2.0, 3.0, 4.0, 5.0], "short_factor": [1.0, 1.1, 1.2, 1.3], "type": "longrope"},
    rope_theta=20000.0,
    sliding_window=64,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=120,
)
