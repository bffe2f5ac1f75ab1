"""Tiny configs of every family."""

from typing import Any

from litgpt.config import Config
from litgpt.families import FAMILIES, Family

TINY = dict(
    n_layer=2,
    n_embd=32,
    n_head=4,
    n_query_groups=2,
    intermediate_size=48,
    block_size=128,
    vocab_size=96,
    padded_vocab_size=96,
    sliding_window_size=8,
)
WHERE_MAPPED = ("n_query_groups", "sliding_window_size")  # fields that only some families have


def tiny_config(family: Family | str, **overrides: Any) -> Config:
    """A config of a family small enough for tests, that uses what the family has: groups, windows.

    Args:
        family: The family or its model_type.
        **overrides: Fields that differ.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    mapped = {ours for row in family.fields for ours in row.ours}
    fields = {name: value for name, value in TINY.items() if name in mapped or name not in WHERE_MAPPED}
    return Config(**dict(name=f"tiny-{family.model_type}", family=family.model_type) | family.base | fields | overrides)
