"""OLMo 3: as OLMo 2, but three of four layers have a window, and only the others stretch positions."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, Joint
from litgpt.families.olmo2 import B7, B32, OLMO2_BASE, OLMO2_FIELDS, OLMO2_WEIGHTS
from litgpt.families.ropes import format_ropes, half_said, parse_ropes
from litgpt.families.tables import FULL, SLIDING, layer_types

LOCAL_BASE = 500_000
WINDOW = 4096


def parse_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have the window, and the angles of those with and without it."""
    kinds = layer_types(mapping, lambda i: SLIDING if (i + 1) % 4 else FULL, 32)
    size = mapping.get("sliding_window", WINDOW)
    indices = [int(kind == SLIDING and size is not None) for kind in kinds]
    said = mapping.get("rope_theta")
    usual = LOCAL_BASE if said is None else said
    base, local_base, adjustments = parse_ropes(mapping, usual, usual)
    differ = any(indices) and (base != local_base or adjustments is not None)
    return dict(
        sliding_window_size=size if any(indices) else None,
        sliding_window_indices=indices if any(indices) else None,
        rope_indices=indices if differ else None,
        rope_base=base,
        rope_local_base_freq=local_base if differ else None,
        rope_adjustments=adjustments,
    )


def format_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_layers` reads."""
    indices = fields["rope_indices"] or fields["sliding_window_indices"] or [0] * fields["n_layer"]
    base, local_base = fields["rope_base"], fields["rope_local_base_freq"]
    kinds = [SLIDING if index else FULL for index in indices]
    ropes = format_ropes(base, base if local_base is None else local_base, fields["rope_adjustments"])
    window = fields["sliding_window_size"] or WINDOW  # transformers needs a number even where no layer has the window
    return dict(layer_types=kinds, sliding_window=window) | ropes


def for_some_layers(mapping: Mapping[str, Any]) -> bool:
    """Return whether transformers 5 would take `rope_theta` for layers without a window only, which means all of them."""
    nested, base = mapping.get("rope_parameters"), mapping.get("rope_theta")
    local = nested.get(SLIDING) if isinstance(nested, Mapping) else None
    return half_said(mapping) or (base not in (None, LOCAL_BASE) and not (isinstance(local, Mapping) and "rope_theta" in local))


def three_of_four(n_layer: int) -> dict[str, Any]:
    """Return the fields of so many layers of which every fourth sees all and the others have a window."""
    indices = [int((i + 1) % 4 > 0) for i in range(n_layer)]
    return dict(n_layer=n_layer, sliding_window_indices=indices, rope_indices=indices)


OLMO3 = Family(
    model_type="olmo3",
    architectures=["Olmo3ForCausalLM"],
    fields=[
        *(row for row in OLMO2_FIELDS if not {"rope_base", "rope_adjustments"} & {*row.ours}),
        Joint(
            ("layer_types", "sliding_window", "rope_theta", "rope_scaling", "rope_parameters"),
            ("sliding_window_size", "sliding_window_indices", "rope_indices", "rope_base", "rope_local_base_freq", "rope_adjustments"),
            parse_layers,
            format_layers,
            for_some_layers,
        ),
    ],
    weights=OLMO2_WEIGHTS,
    base=OLMO2_BASE | dict(rope_base=LOCAL_BASE),
    brands=[
        Brand(
            "allenai",
            base=dict(
                block_size=65536,
                norm_eps=1e-6,
                sliding_window_size=WINDOW,
                rope_base=500_000,
                rope_local_base_freq=LOCAL_BASE,
                rope_adjustments=dict(
                    factor=8.0, original_max_seq_len=8192, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2079441541679836
                ),
                vocab_size=100278,
                padded_vocab_size=100278,
            ),
            sizes={
                "Olmo-3-1025-7B": B7 | three_of_four(32),
                "Olmo-3-7B-{Think,Instruct}{,-SFT,-DPO}": B7 | three_of_four(32),
                "Olmo-3-1125-32B": B32 | three_of_four(64),
                "Olmo-3-32B-Think{,-SFT,-DPO}": B32 | three_of_four(64),
            },
        ),
    ],
)
