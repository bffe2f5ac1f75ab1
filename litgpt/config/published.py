"""The names under which checkpoints were published, and the fields of each."""

from collections.abc import Mapping
from typing import Any

from litgpt.families import FAMILIES

_PUBLISHED = [(family, row) for family in FAMILIES.values() for row in family.published()]
configs: list[dict[str, Any]] = [
    dict(name=row.name, hf_config=dict(org=row.org, name=row.hub_name), family=family.model_type) | row.fields for family, row in _PUBLISHED
]
name_to_config: dict[str, dict[str, Any]] = {config["name"]: config for config in configs}
_PROMPTS = {row.name: row.prompt for _, row in _PUBLISHED}


def hub_id(hf_config: Mapping[str, str]) -> str:
    """Return `org/name`."""
    return f"{hf_config['org']}/{hf_config['name']}"


BY_ANY_NAME: dict[str, str] = (
    {row.also: row.name for _, row in _PUBLISHED if row.also is not None}
    | {hub_id(config["hf_config"]): config["name"] for config in configs}
    | {config["hf_config"]["name"]: config["name"] for config in configs}
    | {name: name for name in name_to_config}
)


def prompt_of(name: str) -> str | None:
    """Return the prompt style that a published checkpoint was tuned with, if any.

    Args:
        name: LitGPT's name for it, its name on the hub, or `org/name`.
    """
    return _PROMPTS.get(BY_ANY_NAME.get(name, ""))


def known_names() -> list[str]:
    """Return every published checkpoint as `org/name`, in the order of the alphabet."""
    hub_ids = (hub_id(config["hf_config"]) for config in configs)
    return sorted(hub_ids, key=lambda hub_id: (hub_id.lower(), hub_id))


def listing(grouped: bool) -> str:
    """Return every published checkpoint as `org/name`: a line each, or under its family's `model_type`."""
    if not grouped:
        return "\n".join(known_names())
    kinds: dict[str, list[str]] = {}
    for config in configs:
        kinds.setdefault(config["family"], []).append(hub_id(config["hf_config"]))
    return "\n\n".join("\n  ".join([kind, *sorted(ids, key=str.lower)]) for kind, ids in sorted(kinds.items()))
