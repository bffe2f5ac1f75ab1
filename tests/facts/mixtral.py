"""What tests need to know of Mixtral."""

TINY = dict(moe_intermediate_size=48, sliding_window_size=None, head_size=12)

VARIANTS = {
    "window": dict(sliding_window_size=5),
    "one expert a token": dict(n_expert_per_token=1),
    "all experts": dict(n_expert_per_token=4),
    "heads as wide as the width makes them": dict(head_size=8),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["MixtralForCausalLM"],
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_experts_per_tok=2,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_local_experts=3,
    output_router_logits=False,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=120,
)
