"""What tests need to know of Ministral 3."""

IN_LITGPT = False

YARN = dict(factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
SMALL = YARN | dict(original_max_seq_len=8)  # so that queries grow

TINY = dict(head_size=8, sliding_window_size=None, rope_base=1_000_000, rope_adjustments=SMALL)

VARIANTS = {
    "queries grow fast": dict(rope_adjustments=SMALL | dict(llama_4_scaling_beta=2.0)),
    "window": dict(sliding_window_size=5),
    "wide heads": dict(head_size=16),
}

TIED = ["Ministral-3-3B-{Base,Instruct,Reasoning}-2512"]

OLD = dict(  # the text part as it was published
    architectures=["Ministral3ForCausalLM"],
    attention_dropout=0.0,
    head_dim=24,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=96,
    max_position_embeddings=262144,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    rms_norm_eps=1e-05,
    rope_parameters={
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    sliding_window=None,
    tie_word_embeddings=True,
    use_cache=True,
    vocab_size=120,
    torch_dtype="bfloat16",
)
