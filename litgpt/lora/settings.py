"""Which layers get an update, of what size, and how it is scaled and trained."""

import math
from dataclasses import dataclass, fields

from litgpt.errors import UserError

MAKES = {  # what layers of other mixers than plain attention make, where it is not their output
    "gate": ["query"],
    **dict.fromkeys(("q", "q_a", "q_b"), ["query"]),
    **dict.fromkeys(("kv_a", "kv_b"), ["key", "value"]),
    **dict.fromkeys(("in_proj", "in_proj_qkvz", "in_proj_ba"), ["query", "key", "value"]),
}
NUMBER = int | float, "a number"
KINDS = {  # of options that are no switches
    "r": (int, "an integer"),
    "alpha": NUMBER,
    "dropout": NUMBER,
    "targets": (str | None, "a text"),
    "plus_ratio": (int | float | None, "a number"),
}


@dataclass(frozen=True)
class LoRA:
    """Which layers get an update, and of what size."""

    r: int = 8
    """The rank of the update."""
    alpha: float = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.05
    """How likely an input of the update is dropped while training."""
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False
    targets: str | None = None
    """"all-linear" turns on every switch above but `head`, which still decides about the head; None leaves all to them.

    A `key`, `projection` or `mlp` that is given as false is turned on too: it cannot be told from one that is left out.
    """
    rslora: bool = False
    """Whether the update is scaled by alpha / sqrt(r) instead."""
    dora: bool = False
    """Whether the length of each updated row of a weight is learned apart from its direction."""
    plus_ratio: float | None = None
    """How many times the learning rate of A that of B is; by default they are equal."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (wanted, kind) = getattr(self, field.name), KINDS.get(field.name, (bool, "true or false"))
            is_flag = isinstance(value, bool)
            if not isinstance(value, wanted) or is_flag != (wanted is bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise UserError(f"`lora_{field.name}` is {kind}, but got {value!r:.40}.")
        if self.r < 1:
            raise UserError(f"`lora_r` is the rank of the update and at least 1, but got {self.r}.")
        if self.alpha <= 0:
            raise UserError(f"`lora_alpha` scales the update and is a number above 0, but got {self.alpha}. Use twice the rank, say.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`lora_dropout` is a probability, at least 0 and below 1, but got {self.dropout}. Use 0 to drop nothing.")
        if self.plus_ratio is not None and self.plus_ratio <= 0:
            raise UserError(f"`lora_plus_ratio` multiplies a learning rate and is above 0, but got {self.plus_ratio}. Use 16, say.")
        if self.targets is not None:
            self._choose_all_linear()
        if not any((self.query, self.key, self.value, self.projection, self.mlp, self.head)):
            raise UserError(
                "All of `lora_query`, `lora_key`, `lora_value`, `lora_projection`, `lora_mlp` and `lora_head` are false. Turn one on."
            )

    def _choose_all_linear(self) -> None:
        if self.targets != "all-linear":
            raise UserError(f"`lora_targets` is 'all-linear' or left out, but got {self.targets!r:.40}. Single parts have switches.")
        for part in ("query", "value"):  # the others are false unless they are given
            if not getattr(self, part):
                raise UserError(f"`lora_targets` all-linear contradicts `lora_{part}` false. Leave one of them out.")
        for part in ("key", "projection", "mlp"):
            object.__setattr__(self, part, True)

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def enabled(self, name: str) -> list[bool]:
        """Return which row blocks of a layer get an update: of `attn.qkv` those of q, k and v, of any other its only one."""
        *_, part, leaf = f".{name}".split(".")
        if (part, leaf) == ("attn", "qkv"):
            return [self.query, self.key, self.value]
        if part == "attn":
            return [any(getattr(self, made) for made in MAKES.get(leaf, ["projection"]))]
        if part in ("mlp", "shared"):
            return [self.mlp and leaf not in ("gate", "shared_gate")]
        return [self.head and leaf == "lm_head"]
