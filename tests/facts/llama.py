"""What tests need to know of Llama."""

TIED = ["Llama-3.2-{1B,3B}{,-Instruct}", "SmolLM2-{135M,360M,1.7B}{,-Instruct}"]

VARIANTS = {
    "linear": dict(rope_adjustments=dict(factor=4.0)),
    "llama3": dict(rope_adjustments=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16), rope_base=500.0),
    "yarn": dict(rope_adjustments=dict(factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16, rope_type="yarn")),
    "biases": dict(bias=True),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "one group": dict(n_query_groups=1),
    "no groups": dict(n_query_groups=4),
    "wide heads": dict(head_size=16),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["LlamaForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=80,
    vocab_size=120,
    max_position_embeddings=131072,
    rms_norm_eps=1e-05,
    rope_theta=500000.0,
    rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    hidden_act="silu",
    attention_bias=True,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    bos_token_id=3,
    eos_token_id=[4, 5],
    pretraining_tp=1,
    use_cache=True,
)
