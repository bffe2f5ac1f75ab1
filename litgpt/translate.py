"""Carry out the rules of `litgpt.weights`: over streams of tensors, and over the factors of LoRA updates."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.config import Config, refuse_quantization
from litgpt.errors import UserError
from litgpt.lora import LoRA, LoRALinear
from litgpt.weights import Rule

Tensors = tuple[Tensor, ...]
Conversion = Callable[[Config, Tensors, list[str]], Tensors]


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
    names = {name: (rule, i) for rule in rules if rule.kind != "prefixed" for i, name in enumerate(rule.theirs if to_ours else rule.ours)}
    prefixes = [(rule.theirs[0], rule.ours[0]) for rule in rules if rule.kind == "prefixed"] if to_ours else []
    waiting: dict[tuple, dict[int, Tensor]] = {}
    for name, tensor in stream:
        found = _find(name, names) or next(
            (hit for alias, usual in prefixes if name.startswith(alias) and (hit := _find(usual + name[len(alias) :], names))), None
        )
        if found is None:
            raise UserError(f"No rule renames the weight {name!r}. Add one to the family's table, or `ignored({name!r})`.")
        rule, i, numbers, leaf = found
        sources, targets = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        parts = waiting.setdefault((rule, numbers, leaf), {})
        parts[i] = tensor
        if len(parts) == len(sources):
            del waiting[rule, numbers, leaf]
            made = CONVERSIONS[rule.kind][0 if to_ours else 1](
                config, tuple(parts[j] for j in range(len(sources))), [_fill(source, numbers, leaf) for source in sources]
            )
            if made:
                yield from zip([_fill(target, numbers, leaf) for target in targets], made, strict=True)
    for (rule, numbers, leaf), parts in waiting.items():
        sources = [_fill(source, numbers, leaf) for source in (rule.theirs if to_ours else rule.ours)]
        missing, present = next(name for i, name in enumerate(sources) if i not in parts), sources[next(iter(parts))]
        raise UserError(
            f"The weight {missing!r} is missing, without which {present!r} is of no use. Download or write the checkpoint again."
        )


def dequantized(stream: Iterable[tuple[str, Tensor]], quantization_config: dict[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a checkpoint as plain floating-point tensors, under the names that the rules know.

    Args:
        stream: Names and tensors as they are stored.
        quantization_config: What `config.json` says about how they are stored; None if nothing.

    Raises:
        UserError: They are stored in a way that cannot be read.
    """
    refuse_quantization(quantization_config)
    yield from stream


def _find(name: str, names: dict[str, tuple[Rule, int]]) -> tuple[Rule, int, tuple[str, ...], str] | None:
    """Return the rule of a weight, which of the rule's parts it is, the numbers in its name, and what `*` stands for."""
    pieces = name.split(".")
    numbers = tuple(piece for piece in pieces if piece.isdecimal())
    pieces = ["{}" if piece.isdecimal() else piece for piece in pieces]
    if hit := names.get(".".join(pieces)):
        return *hit, numbers, ""
    if pieces[-1] in ("weight", "bias") and (hit := names.get(".".join([*pieces[:-1], "*"]))):
        return *hit, numbers, pieces[-1]
    return None


def _fill(template: str, numbers: tuple[str, ...], leaf: str) -> str:
    return (template.removesuffix("*") + leaf if leaf else template).format(*numbers)


def _as_they_are(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return tensors


def _nothing(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return ()


def _unless_tied(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return () if config.tie_embeddings else tensors


def _join_qkv(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    for tensor, size, name in zip(tensors, config.qkv_sizes, names, strict=True):
        _check_rows(tensor, size, name)
    return (torch.cat(tensors),)


def _split_qkv(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_rows(tensors[0], sum(config.qkv_sizes), names[0])
    return tensors[0].split(config.qkv_sizes)


def _cat(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    return (torch.cat(tensors),)


def _halve(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    if tensors[0].size(0) % 2:
        raise UserError(f"The weight {names[0]!r} holds two equal blocks of rows, but it has {tensors[0].size(0)} rows.")
    return tensors[0].chunk(2)


def _deinterleave(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    _check_rows(tensors[0], sum(config.qkv_sizes), names[0])
    groups = tensors[0].unflatten(0, (config.n_query_groups, -1, config.head_size))  # (G, q_per_group + 2, D, ...)
    blocks = groups.split((groups.size(1) - 2, 1, 1), dim=1)
    return (torch.cat([block.flatten(0, 2) for block in blocks]),)


def _interleave(config: Config, tensors: Tensors, names: list[str]) -> Tensors:
    blocks = _split_qkv(config, tensors, names)
    return (torch.cat([block.unflatten(0, (config.n_query_groups, -1, config.head_size)) for block in blocks], dim=1).flatten(0, 2),)


def _check_rows(tensor: Tensor, expected: int, name: str) -> None:
    if tensor.ndim == 0 or tensor.size(0) != expected:
        raise UserError(f"The weight {name!r} has the shape {tuple(tensor.shape)}, but the config makes it {expected} rows.")


CONVERSIONS: dict[str, tuple[Conversion, Conversion]] = {  # kind of rule -> (to ours, to theirs)
    "same": (_as_they_are, _as_they_are),
    "joined": (_join_qkv, _split_qkv),
    "parted": (_halve, _cat),
    "interleaved_qkv": (_deinterleave, _interleave),
    "tied": (_unless_tied, _unless_tied),
    "ignored": (_nothing, _nothing),
}


# LoRA in PEFT's format


def adapter_to_peft(layers: Mapping[str, LoRALinear], config: Config, lora: LoRA) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return PEFT's tensors and `adapter_config.json` for the updates of these layers.

    Every rule moves whole rows, so it moves those of B as it moves those of W. Where Hugging Face fuses what we keep apart, or keeps
    blocks of q, k and v in one layer, n updates of rank r become one of rank n r whose B has a block for each.

    Args:
        layers: The wrapped layers by name.
        config: The architecture; its family's rules say where each row belongs.
        lora: The settings they were made with.

    Raises:
        UserError: No family of checkpoints can express the model.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    untied = replace(config, tie_embeddings=False)  # the update of a tied head is no part of the embedding's
    for rule, numbers, parts in _layers_by_rule(layers, config):
        factors = [layer.lora_A for layer in parts]
        A = torch.cat(factors)  # (R, in)
        blocks, used, start = [], [], 0
        for layer in parts:
            pad = (start, A.size(0) - start - layer.lora_A.size(0))
            blocks.append(F.pad(layer.spread(), pad))  # (out, R)
            used.append(F.pad(_filled(layer), pad))
            start += layer.lora_A.size(0)
        to_theirs = CONVERSIONS[rule.kind][1]
        moved, moved_used = (to_theirs(untied, tuple(rows), list(rule.ours)) for rows in (blocks, used))
        for template, B, where in zip(rule.theirs, moved, moved_used, strict=True):
            columns = where.any(0)
            if not columns.any():
                continue
            path = _module(template, config)
            module = path.format(*numbers)
            tensors[f"base_model.model.{module}.lora_A.weight"] = A[columns].detach()
            tensors[f"base_model.model.{module}.lora_B.weight"] = B[:, columns].detach()
            ranks[path] = int(columns.sum())
    return tensors, _peft_config(ranks, config, lora)


def _layers_by_rule(layers: Mapping[str, LoRALinear], config: Config) -> Iterator[tuple[Rule, tuple[str, ...], list[LoRALinear]]]:
    """Yield each rule, the numbers in the names it was applied to, and the layers that it is made from."""
    names = {name: (rule, i) for rule in config.rules if rule.kind != "prefixed" for i, name in enumerate(rule.ours)}
    found: dict[tuple[Rule, tuple[str, ...]], dict[int, LoRALinear]] = {}
    for name, layer in layers.items():
        hit = _find(f"{name}.weight", names)
        if hit is None:
            raise UserError(
                f"No rule of the family {config.family!r} names the layer {name!r}, so its update has no place in PEFT's format."
            )
        rule, i, numbers, _ = hit
        found.setdefault((rule, numbers), {})[i] = layer
    for (rule, numbers), parts in found.items():
        yield rule, numbers, [parts[i] for i in sorted(parts)]


def _module(template: str, config: Config) -> str:
    """Return the layer of a weight's name, as transformers calls it in memory where that is not its name in files."""
    path = template.removesuffix(".*").removesuffix(".weight") + "."
    return {rule.ours[0]: rule.theirs[0] for rule in config.rules if rule.kind == "prefixed"}.get(path, path)[:-1]


def _filled(layer: LoRALinear) -> Tensor:
    """Return where the spread factor B may differ from zero, (out, n r)."""
    like = copy(layer)
    like._parameters = dict(layer._parameters, lora_B=nn.Parameter(torch.ones_like(layer.lora_B)))
    return like.spread() != 0


def _peft_config(ranks: dict[str, int], config: Config, lora: LoRA) -> dict[str, Any]:
    others = {_module(name, config) for rule in config.rules for name in rule.theirs if name.endswith((".*", ".weight"))} - ranks.keys()
    taken = {name.rsplit(".", 1)[-1] for name in others}

    def key(name: str) -> str:
        """Return the shortest end of a module's path that names it and no other module."""
        path, leaf = name.rsplit("{}.", 1)[-1], name.rsplit(".", 1)[-1]
        return path if leaf in taken else leaf

    unusual = {key(name): rank for name, rank in ranks.items() if rank != lora.r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({key(name) for name in ranks}),
        "rank_pattern": unusual,
        "alpha_pattern": {name: lora.alpha * rank / lora.r for name, rank in unusual.items()},
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def peft_updates(tensors: Mapping[str, Tensor], settings: dict[str, Any], config: Config) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and scale of each layer that a PEFT adapter updates, by the name of the layer's weight.

    Args:
        tensors: What `adapter_model.safetensors` holds.
        settings: What `adapter_config.json` holds.
        config: The architecture of its base.
    """
    in_files = {rule.theirs[0]: rule.ours[0] for rule in config.rules if rule.kind == "prefixed"}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None and name.endswith(".base_layer.weight"):
            continue  # a copy of the base's head, which PEFT saves beside an update of it
        if match is None:
            raise UserError(f"The PEFT adapter holds {name!r}, which is no factor of a linear layer's LoRA update.")
        found.setdefault(match[1], {})[match[2]] = tensor
    updates = {}
    for module, factors in found.items():
        if len(factors) < 2:
            raise UserError(f"The PEFT adapter holds only one of the two factors of {module!r}.")
        rank = factors["A"].size(0)
        alpha = next(
            (a for key, a in (settings.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?{key}", module)),
            settings["lora_alpha"],
        )
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        updates[in_files.get(f"{module}.", f"{module}.") + "weight"] = factors["A"], factors["B"], scale
    return updates


def add_updates(stream: Iterable[tuple[str, Tensor]], updates: dict[str, tuple[Tensor, Tensor, float]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with the low-rank updates of `peft_updates` added to them, in the weights' own dtype."""
    waiting = dict(updates)
    for name, weight in stream:
        if name in waiting:
            A, B, scale = waiting.pop(name)
            weight = (weight.float() + scale * (B.float() @ A.float()).to(weight.device)).to(weight.dtype)
        yield name, weight
    if waiting:
        raise UserError(f"The adapter updates {next(iter(waiting))!r}, which the base model does not have.")
