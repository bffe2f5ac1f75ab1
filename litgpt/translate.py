"""Carry out the rules of `litgpt.weights` over streams of tensors."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.weights import Rule

Tensors = tuple[Tensor, ...]
Conversion = Callable[[Rule, Config, Tensors, list[str]], Tensors]


def translate(stream: Iterable[tuple[str, Tensor]], rules: Iterable[Rule], config: Config, to_ours: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every renamed tensor as soon as all the tensors it is made from have been seen.

    Args:
        stream: Names and tensors of one side.
        rules: How a family's weights are named and laid out.
        config: Has the head counts and sizes, and says whether the head is tied.
        to_ours: From Hugging Face's names to ours, or back.

    Raises:
        UserError: No rule knows a weight, a part of one is missing, or its rows do not fit the config.
    """
    rules = list(rules)
    names = names_of(rules, to_ours)
    prefixes = prefixes_of(rules) if to_ours else []
    waiting: dict[tuple, dict[int, Tensor]] = {}
    for name, tensor in stream:
        if to_ours and is_beyond(name, rules, config):
            continue
        found = find_rule(name, names) or find_rule(usual_name(name, names, prefixes), names)
        if found is None and to_ours and is_skipped(name, rules):
            continue
        if found is None:
            raise _unknown(name, config)
        rule, i, numbers, leaf = found
        if to_ours and rule.count:
            *numbers, part = numbers
            if int(part) >= _count(rule, config):
                raise UserError(f"The weight {name!r} is one of more than the config has, whose `{rule.count}` is {_count(rule, config)}.")
            numbers, i = tuple(numbers), i + len(rule.theirs) * int(part)
        sources, targets = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        parts = waiting.setdefault((rule, numbers, leaf), {})
        parts[i] = tensor
        if len(parts) == len(sources) * (_count(rule, config) if to_ours else 1):
            del waiting[rule, numbers, leaf]
            yield from _converted(rule, parts, numbers, leaf, config, to_ours)
    for (rule, numbers, leaf), parts in waiting.items():
        sources = _filled_names(rule, rule.theirs if to_ours else rule.ours, numbers, leaf, config, to_ours)
        missing, present = next(name for i, name in enumerate(sources) if i not in parts), sources[next(iter(parts))]
        raise UserError(
            f"The weight {missing!r} is missing, without which {present!r} is of no use. Download or write the checkpoint again."
        )


def _unknown(name: str, config: Config) -> UserError:
    """Return what to raise for a weight that no rule renames."""
    kind = f"{config.family} model" if config.family is not None else "model of this config"
    return UserError(
        f"The checkpoint holds a weight {name!r} that no {kind} has, so it is of another architecture, or damaged. "
        f"(For developers: to read it, add a rule to the family's table, or `ignored({name!r})`.)"
    )


def names_of(rules: Iterable[Rule], to_ours: bool) -> dict[str, tuple[Rule, int]]:
    """Return for each name that rules start from the rule and which of its parts that is."""
    kept = (rule for rule in rules if rule.kind not in ("prefixed", "skipped", "beyond") and (to_ours or rule.kind != "alias"))
    return {name: (rule, i) for rule in kept for i, name in enumerate(rule.theirs if to_ours else rule.ours)}


def prefixes_of(rules: Iterable[Rule]) -> list[tuple[str, str]]:
    """Return each unusual beginning of names with the usual one."""
    return [(rule.theirs[0], rule.ours[0]) for rule in rules if rule.kind == "prefixed"]


def is_skipped(name: str, rules: Iterable[Rule]) -> bool:
    """Say whether a weight of theirs belongs to a part of a multimodal model that is not computed here."""
    return any(rule.kind == "skipped" and name.startswith(rule.theirs[0]) for rule in rules)


def is_beyond(name: str, rules: Iterable[Rule], config: Config) -> bool:
    """Say whether a weight of theirs belongs to a layer behind the last one, which predicts tokens further ahead."""
    starts = (rule.theirs[0] for rule in rules if rule.kind == "beyond")
    numbers = (name.removeprefix(start).split(".")[0] for start in starts if name.startswith(start))
    return any(number.isdecimal() and int(number) >= config.n_layer for number in numbers)


def _converted(
    rule: Rule, parts: dict[int, Tensor], numbers: tuple[str, ...], leaf: str, config: Config, to_ours: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a rule makes of all its parts."""
    sources = _filled_names(rule, rule.theirs if to_ours else rule.ours, numbers, leaf, config, to_ours)
    tensors = tuple(parts[i] for i in range(len(sources)))
    made = CONVERSIONS[rule.kind][0 if to_ours else 1](rule, config, tensors, sources)
    if made:
        yield from zip(_filled_names(rule, rule.ours if to_ours else rule.theirs, numbers, leaf, config, not to_ours), made, strict=True)


def _filled_names(rule: Rule, templates: tuple[str, ...], numbers: tuple[str, ...], leaf: str, config: Config, theirs: bool) -> list[str]:
    """Return the names of one application of a rule; of those that are stacked, each expert's or head's."""
    if not (rule.count and theirs):
        return [fill(template, numbers, leaf) for template in templates]
    return [fill(template, (*numbers, str(part)), leaf) for part in range(_count(rule, config)) for template in templates]


def _count(rule: Rule, config: Config) -> int:
    return getattr(config, rule.count) if rule.count else 1


def find_rule(name: str, names: dict[str, tuple[Rule, int]]) -> tuple[Rule, int, tuple[str, ...], str] | None:
    """Return the rule of a weight, which of the rule's parts it is, the numbers in its name, and what `*` stands for."""
    pieces = name.split(".")
    numbers = tuple(piece for piece in pieces if piece.isdecimal())
    pieces = ["{}" if piece.isdecimal() else piece for piece in pieces]
    if hit := names.get(".".join(pieces)):
        return *hit, numbers, ""
    if pieces[-1] in ("weight", "bias") and (hit := names.get(".".join([*pieces[:-1], "*"]))):
        return *hit, numbers, pieces[-1]
    return None


def usual_name(name: str, names: dict[str, tuple[Rule, int]], prefixes: list[tuple[str, str]]) -> str:
    """Return a name with the prefix that the rules have, where it begins in another way of which a rule knows."""
    others = (usual + name[len(other) :] for other, usual in prefixes if name.startswith(other))
    return name if find_rule(name, names) else next((other for other in others if find_rule(other, names)), name)


def fill(template: str, numbers: tuple[str, ...], leaf: str) -> str:
    """Return the name that a template stands for, with numbers for `{}` and a leaf for `*`; see `find_rule`."""
    return (template.removesuffix("*") + leaf if leaf else template).format(*numbers)


def _as_they_are(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return tensors


def _nothing(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return ()


def _unless_tied(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return () if config.tie_embeddings else tensors


def _join_qkv(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    for tensor, size, name in zip(tensors, config.qkv_sizes, names, strict=True):
        _check_rows(tensor, size, name)
    _check_widths(tensors, names)
    return (torch.cat(tensors),)


def _split_qkv(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_rows(tensors[0], sum(config.qkv_sizes), names[0])
    return tensors[0].split(config.qkv_sizes)


def _cat(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_widths(tensors, names)
    return (torch.cat(tensors),)


def _halve(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    if tensors[0].ndim == 0 or tensors[0].size(0) % 2:
        raise UserError(f"The weight {names[0]!r} holds two equal blocks of rows, but its shape is {tuple(tensors[0].shape)}.")
    return tensors[0].chunk(2)


def _deinterleave(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_rows(tensors[0], sum(config.qkv_sizes), names[0])
    groups = tensors[0].unflatten(0, (config.n_query_groups, -1, config.head_size))  # (G, q_per_group + 2, D, ...)
    blocks = groups.split((groups.size(1) - 2, 1, 1), dim=1)
    return (torch.cat([block.flatten(0, 2) for block in blocks]),)


def _interleave(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    blocks = _split_qkv(rule, config, tensors, names)
    return (torch.cat([block.unflatten(0, (config.n_query_groups, -1, config.head_size)) for block in blocks], dim=1).flatten(0, 2),)


def _join_gated_qkv(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    q, k, v = tensors
    _check_rows(q, 2 * config.qkv_sizes[0], names[0])
    heads = q.unflatten(0, (config.n_head, 2, config.head_size))
    return (*_join_qkv(rule, config, (heads[:, 0].flatten(0, 1), k, v), names), heads[:, 1].flatten(0, 1))


def _split_gated_qkv(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    q, k, v = _split_qkv(rule, config, tensors[:1], names)
    heads = [part.unflatten(0, (config.n_head, config.head_size)) for part in (q, tensors[1])]
    return torch.stack(heads, dim=1).flatten(0, 2), k, v


def _transpose(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return (tensors[0].transpose(-1, -2) if tensors[0].ndim > 1 else tensors[0],)


def _stack(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_widths(tensors, names)
    each = [tensors[i : i + len(rule.theirs)] for i in range(0, len(tensors), len(rule.theirs))]
    if len({tuple(tensor.shape for tensor in parts) for parts in each}) > 1:
        raise UserError(f"{names[0]!r} and its likes are stacked, but have different shapes. Download the checkpoint again.")
    made = tensors[0].new_empty((len(each), sum(len(part) for part in each[0]), *tensors[0].shape[1:]))
    for place, parts in zip(made, each):  # straight to their places: a layer of experts is the largest thing that is held twice
        torch.cat(parts, out=place)
    return (made,)


def _unstack(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_rows(tensors[0], _count(rule, config), names[0])
    return tuple(part for tensor in tensors[0] for part in tensor.chunk(len(rule.theirs)))


def _gate_then_up(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    is_bias = names[0].endswith("bias")
    if tensors[0].ndim != (2 if is_bias else 3) or tensors[0].size(-1) % 2:
        raise UserError(f"The weight {names[0]!r} holds gate and up in turn for each expert, but its shape is {tuple(tensors[0].shape)}.")
    tensor = tensors[0] if is_bias else tensors[0].transpose(1, 2)  # (E, 2 I, ...)
    return (torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1),)


def _gate_and_up_in_turn(rule: Rule, config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    tensor = torch.stack(tensors[0].chunk(2, dim=1), dim=2).flatten(1, 2)
    return (tensor if names[0].endswith("bias") else tensor.transpose(1, 2),)


def _check_widths(tensors: Tensors, names: list[str]) -> None:
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.ndim == 0 or tensor.shape[1:] != tensors[0].shape[1:]:
            raise UserError(f"The weight {name!r} has the shape {tuple(tensor.shape)}, but {names[0]!r} has {tuple(tensors[0].shape)}.")


def _check_rows(tensor: Tensor, expected: int, name: str) -> None:
    if tensor.ndim == 0 or tensor.size(0) != expected:
        raise UserError(f"The weight {name!r} has the shape {tuple(tensor.shape)}, but the config makes it {expected} rows.")


CONVERSIONS: dict[str, tuple[Conversion, Conversion]] = {  # kind of rule -> (to ours, to theirs)
    "same": (_as_they_are, _as_they_are),
    "joined": (_join_qkv, _split_qkv),
    "parted": (_halve, _cat),
    "interleaved_qkv": (_deinterleave, _interleave),
    "gated_qkv": (_join_gated_qkv, _split_gated_qkv),
    "transposed": (_transpose, _transpose),
    "stacked": (_stack, _unstack),
    "alternating": (_gate_then_up, _gate_and_up_in_turn),
    "alias": (_as_they_are, _as_they_are),
    "tied": (_as_they_are, _unless_tied),
    "ignored": (_nothing, _nothing),
}
