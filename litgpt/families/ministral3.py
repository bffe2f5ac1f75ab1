"""Ministral 3: the Llama block, whose queries grow with the position as in Llama 4; published with eyes, as `mistral3`."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, field
from litgpt.families.mistral import EYES, PREFIXES
from litgpt.families.ropes import parse_rope, stretched
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS, with_defaults

YARN = dict(factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
# What transformers takes where nothing is said of positions; 5 then overlooks a `rope_theta`, which we do not
DEFAULT = dict(type="yarn", original_max_position_embeddings=16384) | YARN


def parse_growing_rope(value: Any) -> dict[str, Any] | None:
    """Return `rope_adjustments`, of which YaRN alone may make queries grow."""
    adjustments, growth = parse_rope(value), value.get("llama_4_scaling_beta") if isinstance(value, dict) else None
    if growth and "llama_4_scaling_beta" not in (adjustments or {}):
        kind = value.get("rope_type", value.get("type", "default"))
        raise UserError(
            f"`llama_4_scaling_beta` is {growth!r} in config.json beside the `rope_type` {kind!r}, but it is supported beside 'yarn' only."
        )
    return adjustments


MINISTRAL_3 = Family(
    model_type="ministral3",
    architectures=["Ministral3ForCausalLM"],
    fields=[
        *with_defaults(
            stretched(LLAMA_FIELDS, DEFAULT, parse_growing_rope),
            vocab_size=131072,
            num_hidden_layers=34,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=1_000_000,
        ),
        field("intermediate_size", "intermediate_size", default=14336),
        field("num_key_value_heads", "n_query_groups", default=8),
        field("max_position_embeddings", "block_size", default=262144),
        field("sliding_window", "sliding_window_size"),
    ],
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE,
    brands=[
        Brand(
            "mistralai",
            base=dict(
                block_size=262144,
                vocab_size=131072,
                padded_vocab_size=131072,
                n_head=32,
                n_query_groups=8,
                head_size=128,
                norm_eps=1e-5,
                rope_base=1_000_000,
                rope_adjustments=YARN | dict(original_max_seq_len=16384),
            ),
            sizes={
                "Ministral-3-3B-{Base,Instruct,Reasoning}-2512": dict(n_layer=26, n_embd=3072, intermediate_size=9216, tie_embeddings=True),
                "Ministral-3-8B-{Base,Instruct,Reasoning}-2512": dict(n_layer=34, n_embd=4096, intermediate_size=14336),
                "Ministral-3-14B-{Base,Instruct,Reasoning}-2512": dict(
                    n_layer=40, n_embd=5120, intermediate_size=16384, rope_base=1_000_000_000
                ),
            },
        ),
    ],
    wrappers=("mistral3",),
    prefixes=PREFIXES,
    others=EYES,
)
