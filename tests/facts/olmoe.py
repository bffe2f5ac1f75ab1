"""What tests need to know of OLMoE."""

IN_LITGPT = False  # which always makes the weights of the chosen experts sum to 1

TINY = dict(moe_intermediate_size=48)

VARIANTS = {
    "clipped": dict(clip_qkv=0.3),
    "weights that sum to 1": dict(norm_topk_prob=True),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as it was published
    architectures=["OlmoeForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    clip_qkv=None,
    eos_token_id=50279,
    hidden_act="silu",
    hidden_size=64,
    initializer_range=0.02,
    intermediate_size=40,
    max_position_embeddings=4096,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=3,
    num_hidden_layers=3,
    num_key_value_heads=4,
    output_router_logits=False,
    pad_token_id=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=10000.0,
    router_aux_loss_coef=0.01,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    norm_topk_prob=False,
    vocab_size=120,
)
