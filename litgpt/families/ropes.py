"""How `config.json` describes rotary embeddings and the ways in which they are stretched."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import FULL, SLIDING, Field, Joint, field, whole

ROPE_KEYS = {  # for each way of stretching the keys that it has, of which the first ones have to be there
    "linear": (["factor"], []),
    "dynamic": (["factor"], []),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor"], ["original_max_seq_len"]),
    "longrope": (["short_factor", "long_factor"], ["factor", "original_max_seq_len", "attention_factor"]),
    "yarn": (
        ["factor"],
        [
            "original_max_seq_len",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "llama_4_scaling_beta",
        ],
    ),
}
TRAINED = "original_max_position_embeddings"  # how long sequences were before positions were stretched
ROPE_SPELLINGS = {"original_max_seq_len": TRAINED}  # the others are spelled as we spell them
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # without them nothing would tell yarn from linear


def rope_type(adjustments: dict[str, Any]) -> str:
    """Return what Hugging Face calls a `rope_adjustments` of ours."""
    if adjustments.get("dynamic"):
        return "dynamic"
    if "long_factor" in adjustments:
        return "longrope"
    if "low_freq_factor" in adjustments or "high_freq_factor" in adjustments:
        return "llama3"
    return "yarn" if YARN_BETAS.keys() & adjustments.keys() or adjustments.get("rope_type") == "yarn" else "linear"


def parse_rope(value: Any) -> dict[str, Any] | None:
    """Return the `rope_adjustments` of a `rope_scaling` or `rope_parameters`; further keys are ignored, as transformers does."""
    if not value:
        return None
    if not isinstance(value, dict) or any(isinstance(nested, dict) for nested in value.values()):
        raise UserError(f"`rope_parameters` is {value!r} in config.json, but one set of values for all layers is expected.")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    if kind not in list(ROPE_KEYS):  # a list, as `kind` may be anything
        raise UserError(f"`rope_type` is {kind!r} in config.json, which is not supported. Supported are: default, {', '.join(ROPE_KEYS)}.")
    needed, optional = ROPE_KEYS[kind]
    spelled = {ours: value.get(ROPE_SPELLINGS.get(ours, ours)) for ours in [*needed, *optional]}
    if missing := [ROPE_SPELLINGS.get(ours, ours) for ours in needed if spelled[ours] is None]:
        raise UserError(f"`rope_type` is {kind!r} in config.json, which needs {missing[0]!r}, but that is not there.")
    extra = {"dynamic": {"dynamic": True}, "yarn": YARN_BETAS}.get(kind, {})
    return extra | {ours: setting for ours, setting in spelled.items() if setting is not None}


def parse_still_rope(value: Any) -> dict[str, Any] | None:
    """Return the same of a model that does not scale queries by their position, whatever `config.json` says."""
    parsed = parse_rope(value)
    return parsed and {key: setting for key, setting in parsed.items() if key != "llama_4_scaling_beta"}


def format_rope(adjustments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a `rope_adjustments`."""
    if not adjustments:
        return None
    kind = rope_type(adjustments)
    needed, optional = ROPE_KEYS[kind]
    keys = {ours: ROPE_SPELLINGS.get(ours, ours) for ours in [*needed, *optional] if adjustments.get(ours) is not None}
    return {"rope_type": kind} | {theirs: adjustments[ours] for ours, theirs in keys.items()}


class Scaling(Field):
    """The row for `rope_adjustments`, of which the length of pretraining may stand outside the mapping, and then counts more."""

    def read(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return our field of their `config.json`."""
        old, new = mapping.get("rope_scaling"), mapping.get("rope_parameters")
        base = old.get("rope_theta") if isinstance(old, Mapping) else None
        if base not in (None, mapping.get("rope_theta"), new.get("rope_theta") if isinstance(new, Mapping) else None):
            raise UserError(f"`rope_scaling` holds a `rope_theta` of {base!r} in config.json. Write it beside `rope_scaling`.")
        return {name: _as_trained(adjustments, mapping) for name, adjustments in super().read(mapping).items()}

    def write(self, mapping: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Put our field into their `config.json`; a length of pretraining that has changed is changed wherever it stands."""
        adjustments = fields[self.ours[0]]
        trained = (adjustments or {}).get("original_max_seq_len")
        if trained is not None and mapping.get(TRAINED) not in (None, trained):
            for place in (mapping, *(mapping.get(spelling) for spelling in self.theirs)):
                if isinstance(place, dict) and place.get(TRAINED) is not None:
                    place[TRAINED] = trained
        elif trained is None and _as_trained(adjustments, mapping) != adjustments:
            del mapping[TRAINED]
        Field.write(replace(self, parse=lambda said: _as_trained(self.parse(said), mapping)), mapping, fields)


def _as_trained(adjustments: dict[str, Any] | None, mapping: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_adjustments` with the length of pretraining that stands outside of them, if it does and their kind has one."""
    if adjustments is None or mapping.get(TRAINED) is None or "original_max_seq_len" not in sum(ROPE_KEYS[rope_type(adjustments)], []):
        return adjustments
    return adjustments | dict(original_max_seq_len=whole(mapping, TRAINED, 0, most=2**31))


def rope_fields(base: list[str], share: list[str] | None = None, default_share: float = 1.0, default_base: float = 10000) -> list[Field]:
    """Return the rows for rotary embeddings. The scaling comes first: what it writes is then completed by the others.

    Args:
        base: The older spellings of the base.
        share: The older spellings of the rotated share of a head, where a model may rotate less than all.
        default_share: That share where it is left out.
        default_base: The base where it is left out.
    """
    nested = ("rope_theta", "partial_rotary_factor")  # transformers 5 has them in the same mapping; the next rows write them

    def respell(said: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in said.items() if key not in nested}

    rows = [
        Scaling(("rope_scaling", "rope_parameters"), ("rope_adjustments",), None, parse_still_rope, format_rope, respell),
        field(["rope_parameters.rope_theta", *base], "rope_base", default=default_base, parse=whole_if_equal, format=float),
    ]
    if share is not None:
        rows.append(field(["rope_parameters.partial_rotary_factor", *share], "rotary_percentage", default=default_share))
    return rows


def parse_ropes(mapping: Mapping[str, Any], base: float, local_base: float) -> tuple[Any, Any, dict[str, Any] | None]:
    """Return both bases and the `rope_adjustments` of a model whose layers with a window turn by angles of their own, never stretched.

    Args:
        mapping: What `config.json` says, as transformers 5 for each kind of layers or as 4 in one.
        base: Of layers that see all, where no kind of layers has its own.
        local_base: Of layers with a window, likewise.
    """
    nested, scaling = mapping.get("rope_parameters") or {}, mapping.get("rope_scaling") or {}
    if not isinstance(nested, Mapping) or not nested.keys() <= {FULL, SLIDING}:
        raise UserError(f"`rope_parameters` is {nested!r} in config.json, but a mapping for each of {FULL} and {SLIDING} is expected.")
    full, local = nested.get(FULL) or {}, nested.get(SLIDING) or {}
    if not all(isinstance(part, Mapping) for part in (full, local, scaling)):
        raise UserError(f"`rope_parameters` and `rope_scaling` hold mappings in config.json, but got {nested!r} and {scaling!r}.")
    if parse_rope(dict(local)) is not None:
        raise UserError(f"`rope_parameters` stretches the positions of {SLIDING} layers in config.json, which is not supported.")
    bases = (whole_if_equal(part.get("rope_theta", usual)) for part, usual in ((full, base), (local, local_base)))
    return *bases, parse_rope({**full, **scaling})


def half_said(mapping: Mapping[str, Any]) -> bool:
    """Return whether `rope_scaling` names its kind by the older word alone, which transformers 5 overlooks here."""
    scaling = mapping.get("rope_scaling")
    return isinstance(scaling, Mapping) and "type" in scaling and "rope_type" not in scaling


def format_ropes(base: float, local_base: float, adjustments: dict[str, Any] | None) -> dict[str, Any]:
    """Return what `parse_ropes` reads, as transformers 4 and as 5 spells it."""
    scaling = format_rope(adjustments)
    nested = {
        SLIDING: {"rope_type": "default", "rope_theta": float(local_base)},
        FULL: {"rope_type": "default"} | (scaling or {}) | {"rope_theta": float(base)},
    }
    return dict(rope_theta=float(base), rope_scaling=scaling, rope_parameters=nested)


def whole_if_equal(value: Any) -> Any:
    """Return 10000 for 10000.0, as the base of a rotary embedding is usually written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def stretched(rows: Iterable[Field | Joint], scaling: dict[str, Any], parse: Callable = parse_still_rope) -> list[Field | Joint]:
    """Return rows of which the one for the scaling of positions means a certain one where `config.json` says nothing of it.

    Args:
        rows: Those of a family without.
        scaling: As `config.json` spells it.
        parse: Reads it.
    """

    def parse_said(value: Any) -> dict[str, Any] | None:
        return parse(scaling if value is None else value)

    return [replace(row, default=scaling, parse=parse_said) if row.ours == ("rope_adjustments",) else row for row in rows]
