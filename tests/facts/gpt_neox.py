"""What tests need to know of GPT-NeoX."""

VARIANTS = {
    "one after the other": dict(parallel_residual=False),
    "half of each head turns": dict(rotary_percentage=0.5),
    "no biases in attention": dict(attn_bias=False, attn_proj_bias=False),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["GPTNeoXForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    rotary_pct=0.5,
    rotary_emb_base=20000,
    hidden_act="gelu_new",
    use_parallel_residual=False,
    torch_dtype="float16",
    rope_scaling={"type": "linear", "factor": 2.0},
)
