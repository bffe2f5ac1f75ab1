"""What tests need to know of GPT-2."""

ACTIVATION = "activation_function"
TIED = ["gpt2{,-medium,-large,-xl}", "distilgpt2"]
PLAIN_ROPE = False  # there is none
IN_LITGPT = False  # it has no learned positions

VARIANTS = {"exact GELU": dict(gelu_approximate="none")}

OLD = dict(  # as first published
    activation_function="gelu_new",
    architectures=["GPT2LMHeadModel"],
    attn_pdrop=0.1,
    bos_token_id=50256,
    embd_pdrop=0.1,
    eos_token_id=50256,
    initializer_range=0.02,
    layer_norm_epsilon=1e-05,
    n_ctx=64,
    n_embd=64,
    n_head=4,
    n_layer=3,
    n_positions=64,
    resid_pdrop=0.1,
    summary_activation=None,
    summary_first_dropout=0.1,
    summary_proj_to_labels=True,
    summary_type="cls_index",
    summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    vocab_size=50257,
)
