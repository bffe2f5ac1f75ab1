"""Low-rank adaptation (arXiv:2106.09685) and its kin: freeze the model and learn small updates beside chosen linear layers.

rsLoRA (arXiv:2312.03732) scales updates otherwise, LoRA+ (arXiv:2402.12354) trains B faster than A, and DoRA (arXiv:2402.09353)
also learns how long each row of the updated weight is.
"""

from litgpt.lora.layers import (
    Dropout,
    LoRAExperts,
    LoRALinear,
    device_of,
    full_weight,
    norms_of_sum,
    row_norms,
    take_inside,
    updated,
)
from litgpt.lora.models import (
    GPT,
    Config,
    add_lora,
    can_be_wrapped,
    lora_filter,
    mark_only_lora_as_trainable,
    merge_lora_weights,
    seed_of,
)
from litgpt.lora.settings import LoRA

__all__ = [
    "GPT",
    "Config",
    "Dropout",
    "LoRA",
    "LoRAExperts",
    "LoRALinear",
    "add_lora",
    "can_be_wrapped",
    "device_of",
    "full_weight",
    "lora_filter",
    "mark_only_lora_as_trainable",
    "merge_lora_weights",
    "norms_of_sum",
    "row_norms",
    "seed_of",
    "take_inside",
    "updated",
]
