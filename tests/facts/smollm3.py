"""What tests need to know of SmolLM3."""

TIED = ["SmolLM3-3B{,-Base}"]
IN_LITGPT = False  # in it every layer turns

TINY = dict(rope_indices=[0, None], sliding_window_size=None)

VARIANTS = {
    "windows": dict(sliding_window_size=8, sliding_window_indices=[0, 1]),
    "windows in the other layers": dict(sliding_window_size=8, sliding_window_indices=[1, 0]),
    "biases": dict(bias=True),
    "no layer turns": dict(rope_indices=[None, None]),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["SmolLM3ForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=5,
    intermediate_size=80,
    max_position_embeddings=65536,
    no_rope_layer_interval=4,
    rope_theta=5000000.0,
    use_sliding_window=False,
    sliding_window=None,
    torch_dtype="bfloat16",
    eos_token_id=3,
    bos_token_id=4,
    pad_token_id=0,
    vocab_size=120,
)
