"""Rules that rename and reshape weights between Hugging Face's names and ours, as data that knows nothing of torch.

A name may hold `{}`, a layer's or expert's number, and end in `.*`, which stands for `.weight` and `.bias`; both sides share them.
`litgpt.translate` carries the rules out, each in both directions.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Some tensors there are some tensors here."""

    kind: str
    """What has to be done, a row of the table in `litgpt.translate`."""
    theirs: tuple[str, ...]
    """The names on their side."""
    ours: tuple[str, ...]
    """The names on our side."""
    count: str = ""
    """Where their names have one number more than ours: the field of `Config` that says how many of them there are."""
    only: tuple[tuple[str, Any], ...] = ()
    """Fields of `Config`, and what they are where the rule counts."""


def same(theirs: str, ours: str) -> Rule:
    """The tensor is the same; only its name differs."""
    return Rule("same", (theirs,), (ours,))


def joined(theirs: Iterable[str], ours: str) -> Rule:
    """They keep queries, keys and values apart; we keep them in one tensor, in that order of rows."""
    return Rule("joined", tuple(theirs), (ours,))


def parted(theirs: str, ours: Iterable[str]) -> Rule:
    """They keep in one tensor equal row blocks that we keep apart."""
    return Rule("parted", (theirs,), tuple(ours))


def interleaved_qkv(theirs: str, ours: str) -> Rule:
    """They store the rows of queries, key and value group by group; we store all queries, then all keys, then all values."""
    return Rule("interleaved_qkv", (theirs,), (ours,))


def gated_qkv(theirs: Iterable[str], ours: Iterable[str]) -> Rule:
    """Their queries hold, head by head, those of attention and then those of its gate; we join the first with keys and values."""
    return Rule("gated_qkv", tuple(theirs), tuple(ours))


def transposed(theirs: str, ours: str) -> Rule:
    """They store the last two dimensions of a weight the other way round; a bias is the same."""
    return Rule("transposed", (theirs,), (ours,))


def stacked(theirs: str | Iterable[str], ours: str, count: str) -> Rule:
    """They store a tensor for each expert or head; we stack them. Several of one expert become one, row under row."""
    return Rule("stacked", (theirs,) if isinstance(theirs, str) else tuple(theirs), (ours,), count)


def alternating(theirs: str, ours: str) -> Rule:
    """They store experts with the rows of gate and up in turn, weights transposed; we store all of gate, then all of up."""
    return Rule("alternating", (theirs,), (ours,))


def alias(theirs: str, ours: str) -> Rule:
    """Another of their names for what one of ours is; it is read but not written."""
    return Rule("alias", (theirs,), (ours,))


def tied(theirs: str, ours: str) -> Rule:
    """The tensor is the same, but where the config ties it to the embedding it is not written."""
    return Rule("tied", (theirs,), (ours,))


def ignored(theirs: str) -> Rule:
    """They store it; we do not need it."""
    return Rule("ignored", (theirs,), ())


def where(rule: Rule, **fields: Any) -> Rule:
    """The rule counts only where fields of `Config` have these values."""
    return replace(rule, only=tuple(fields.items()))


def prefixed(theirs: str, usual: str) -> Rule:
    """Some of their files begin names with `theirs` where the other rules say `usual`; we write the usual one."""
    return Rule("prefixed", (theirs,), (usual,))


def beyond(theirs: str) -> Rule:
    """Layers whose number, after this beginning, is as large as the model is deep are not computed here."""
    return Rule("beyond", (theirs,), ())


def skipped(theirs: str) -> Rule:
    """Names that begin so belong to another part of a multimodal model, which is not computed here."""
    return Rule("skipped", (theirs,), ())
