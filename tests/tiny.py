"""Tiny configs of every family. What is special about one is in `tests/facts/<model_type>.py`."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

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
    n_expert=4,
    n_expert_per_token=2,
    moe_intermediate_size=24,
)
ALWAYS = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size", "padded_vocab_size")  # the others only where a family has them
DEFAULTS = dict(
    TINY={},  # our fields that the family's tiny model needs
    VARIANTS={},  # further tiny models of the family: changes of our fields by name
    OLD={},  # a config.json as transformers 4 spells it, or as it was published
    TIES=True,  # whether head and embedding may be tied and untied
    PLAIN_ROPE=True,  # whether config.json has one base and one scaling for all layers
    ACTIVATION="hidden_act",  # how config.json calls the activation; None if it does not name it
    TIED=[],  # patterns of the published checkpoints whose heads are tied
    IN_LITGPT=True,  # whether LitGPT can express the tiny model
)


def facts(family: Family | str) -> SimpleNamespace:
    """What tests know of a family."""
    module = import_module(f"facts.{family if isinstance(family, str) else family.model_type}")
    return SimpleNamespace(**DEFAULTS | {name: value for name, value in vars(module).items() if name.isupper()})


def tiny_config(family: Family | str, **overrides: Any) -> Config:
    """A config of a family small enough for tests, that uses what the family has: groups, windows, experts.

    Args:
        family: The family or its model_type.
        **overrides: Fields that differ.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    mapped = {ours for row in family.fields for ours in row.ours}
    fields = {name: value for name, value in TINY.items() if name in mapped or name in ALWAYS}
    return Config(
        **dict(name=f"tiny-{family.model_type}", family=family.model_type) | family.base | fields | facts(family).TINY | overrides
    )


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Tiny models of all families: the plain one, one with the other kind of head, and those that the facts name."""
    found = {}
    for model_type, family in FAMILIES.items():
        known = facts(family)
        found[model_type] = (model_type, {})
        if known.TIES:
            tied = tiny_config(family).tie_embeddings
            found[f"{model_type} {'untied' if tied else 'tied'}"] = (model_type, dict(tie_embeddings=not tied))
        found |= {f"{model_type} {name}": (model_type, changes) for name, changes in known.VARIANTS.items()}
    return found


EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
EVERY_VARIANT = pytest.mark.parametrize("model_type, changes", variants().values(), ids=variants())
