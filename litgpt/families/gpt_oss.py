"""gpt-oss: experts with biases and a clamped gate, sinks that take attention from all keys, every other layer with a short window."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import stretched
from litgpt.families.tables import FRAME_WEIGHTS, FULL, LLAMA_BASE, LLAMA_FIELDS, QKV, SLIDING, only, windows, with_defaults, with_experts
from litgpt.weights import alternating, joined, same, transposed

YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096)
UNUSED = dict(sliding_window=128)  # transformers makes the mask of a window even where no layer has one
OURS = {key: value for key, value in YARN.items() if key not in ("rope_type", "original_max_position_embeddings")}

GPT_OSS = Family(
    model_type="gpt_oss",
    architectures=["GptOssForCausalLM"],
    fields=[
        *with_defaults(
            stretched(with_experts(LLAMA_FIELDS), YARN),
            vocab_size=201088,
            hidden_size=2880,
            num_hidden_layers=36,
            num_attention_heads=64,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=150000,
        ),
        field("num_key_value_heads", "n_query_groups", default=8),
        field("intermediate_size", ["moe_intermediate_size", "intermediate_size"], default=2880),
        field("max_position_embeddings", "block_size", default=131072),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=True),
        windows(
            128,
            lambda mapping, i: FULL if i % 2 else SLIDING,
            n_layer=36,
            extra=lambda fields: UNUSED if fields["sliding_window_size"] is None else {},
        ),
        field(["num_local_experts", "num_experts"], "n_expert", default=128),
        field("num_experts_per_tok", "n_expert_per_token", default=4),
        field(
            "swiglu_limit",
            "swiglu_limit",
            default=7.0,
            parse=lambda said: 7.0 if said is None else said,
            format=lambda ours: ours and float(ours),
        ),
        only("swiglu_alpha", 1.702),
    ],
    weights=[
        *FRAME_WEIGHTS,
        joined(QKV, "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.self_attn.sinks", "transformer.h.{}.attn.sinks"),
        same("model.layers.{}.mlp.router.*", "transformer.h.{}.mlp.gate.*"),
        alternating("model.layers.{}.mlp.experts.gate_up_proj", "transformer.h.{}.mlp.experts.gate_up"),
        alternating("model.layers.{}.mlp.experts.gate_up_proj_bias", "transformer.h.{}.mlp.experts.gate_up_bias"),
        transposed("model.layers.{}.mlp.experts.down_proj", "transformer.h.{}.mlp.experts.down"),
        same("model.layers.{}.mlp.experts.down_proj_bias", "transformer.h.{}.mlp.experts.down_bias"),
    ],
    base=LLAMA_BASE
    | dict(mlp_class_name="LLaMAMoE", attention_sinks=True, router_bias=True, expert_bias=True, norm_topk_prob=True, swiglu_limit=7.0),
    brands=[
        Brand(
            "openai",
            base=dict(
                block_size=131072,
                vocab_size=201088,
                padded_vocab_size=201088,
                n_embd=2880,
                n_head=64,
                n_query_groups=8,
                head_size=64,
                norm_eps=1e-5,
                attn_bias=True,
                attn_proj_bias=True,
                rope_base=150000,
                rope_adjustments=OURS | dict(original_max_seq_len=4096),
                sliding_window_size=128,
                intermediate_size=2880,
                n_expert_per_token=4,
            ),
            sizes={
                "gpt-oss{,-safeguard}-20b": dict(n_layer=24, n_expert=32, sliding_window_indices=[1, 0] * 12),
                "gpt-oss{,-safeguard}-120b": dict(n_layer=36, n_expert=128, sliding_window_indices=[1, 0] * 18),
            },
        ),
    ],
)
