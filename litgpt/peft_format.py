"""LoRA updates in PEFT's format: made from our layers, and added to a model's weights.

PEFT wraps linear layers, whose factors it calls `<layer>.lora_A.weight` (r, in) and `lora_B.weight` (out, r), beside the lengths that
DoRA gives the rows, `lora_magnitude_vector` (out,); and single parameters (`target_parameters`). Of stacked experts A is (E r, in), expert
by expert, and B is (out, r E), whose columns are r groups of E. Wrapped parameters of one module nest, the first one innermost: its factors
are called `<module>.base_layer.lora_A.weight`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.lora import LoRA, LoRAExperts, LoRALinear, row_norms, updated
from litgpt.translate import CONVERSIONS, fill, find_rule, is_skipped, names_of, prefixes_of, usual_name
from litgpt.weights import Rule

STACKS = ("gate_up", "down")  # the experts' matrices, in the order in which they nest
EXPERTS = "transformer.h.{}.mlp.experts"
LAID_OUT_AS_HERE = ("same", "alias")  # other kinds of rules for experts swap in and out
START = "base_model.model."  # of the names in an adapter, before those in the model

# What PEFT's settings may say without changing what A and B mean: what we read ourselves, what chose the layers that the factors' names
# tell, and what mattered only before or while they were trained. Everything else has to be unset.
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    "fan_in_fan_out",  # PEFT corrects it to what the layer is
    "merge_weights",  # of its first versions
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how a start was found that `init_lora_weights` tells
    *("megatron_core", "qalora_group_size"),  # details of `megatron_config` and `use_qalora`
}
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "lora_ga")  # with the others, loading an adapter changes the base


class Factors(NamedTuple):
    """A low-rank update of a weight, or of each weight in a stack: scale * B A."""

    A: Tensor  # (r, in) or (E, r, in)
    B: Tensor  # (out, r) or (E, out, r)
    scale: float
    magnitudes: Tensor | None = None  # the lengths that the rows of the updated weight have, (out,); by default their own
    transposed: bool = False  # whether their weight is (in, out)


@dataclass
class Updates:
    """The updates that an adapter holds."""

    layers: dict[str, Factors]
    """Of linear layers, by the usual names of their weights on Hugging Face's side, whose rows they have."""
    stacks: dict[str, Factors]
    """Of experts, by our names."""
    others: list[str]
    """The modules that are changed in other parts of a multimodal model, which are not computed here."""


# Writing


def adapter_to_peft(model: nn.Module, lora: LoRA) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return PEFT's tensors and `adapter_config.json` for the updates in a model.

    Every rule moves whole rows, so it moves those of B as it moves those of W. Where Hugging Face fuses what we keep apart, or keeps
    blocks of q, k and v in one layer, n updates of rank r become one of rank n r whose B has a block for each.

    Args:
        model: With LoRA layers.
        lora: The settings they were made with.

    Raises:
        UserError: No family of checkpoints can express the model.
    """
    config, modules = model.config, dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for rule, numbers, parts in _layers_by_rule(modules, config):
        for template, A, B, magnitudes in _fused(rule, parts, config):
            path = _in_memory(template, config)
            module = path.format(*numbers)
            tensors[f"{START}{module}.lora_A.weight"] = A.detach()
            tensors[f"{START}{module}.lora_B.weight"] = B.detach()
            if magnitudes is not None:
                tensors[f"{START}{module}.lora_magnitude_vector"] = magnitudes.detach()
            ranks[f"{path}.weight"] = A.size(0)
    for name, layer in modules.items():
        if isinstance(layer, LoRAExperts):
            pairs = ((layer.lora_up_A, layer.lora_up_B), (layer.lora_down_A, layer.lora_down_B))
            for depth, (leaf, (A, B)) in enumerate(zip(reversed(STACKS), reversed(pairs), strict=True)):
                rule, numbers = _stack_rule(f"{name}.{leaf}", config)
                module = rule.theirs[0].format(*numbers).rpartition(".")[0] + ".base_layer" * depth
                tensors[f"{START}{module}.lora_A.weight"] = A.detach().flatten(0, 1)
                tensors[f"{START}{module}.lora_B.weight"] = _turned(B.detach(), rule, config, 1).permute(1, 2, 0).flatten(1)
                ranks[rule.theirs[0]] = layer.r
    return tensors, _peft_config(ranks, config, lora)


def within_whole(tensors: Mapping[str, Tensor], settings: dict[str, Any], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter of a text model as one of the multimodal model that it is a part of, whose other parts it leaves alone.

    Args:
        tensors: See `adapter_to_peft`.
        settings: The same.
        config: The architecture of the text model.
    """
    inside = ((f"{START}{text}", f"{START}{whole}") for whole, text in prefixes_of(config.rules) if text and whole.startswith(text))
    text, whole = next(inside)  # in memory the text model is one part of several; files may have yet another beginning
    tensors = {whole + name.removeprefix(text) if name.startswith(text) else name: tensor for name, tensor in tensors.items()}
    modules = {name.removeprefix(START).split(".lora_")[0] for name in tensors}
    named = [module for module in modules if any(f".{module}".endswith(f".{key}") for key in settings["target_modules"])]
    patterns = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module)) for module in named})
    return tensors, settings | ({"target_modules": "|".join(patterns)} if patterns else {})


def _layers_by_rule(modules: Mapping[str, nn.Module], config: Config) -> Iterator[tuple[Rule, tuple[str, ...], list[nn.Module]]]:
    """Yield each rule that moves updated layers, the numbers in the names it was applied to, and all layers that it moves."""
    names = names_of(config.rules, to_ours=False)
    done = set()
    for name, layer in modules.items():
        if not isinstance(layer, LoRALinear):
            continue
        hit = find_rule(f"{name}.weight", names)
        if hit is None:
            raise UserError(
                f"No rule of the family {config.family!r} names the layer {name!r}, so its update has no place in PEFT's format."
            )
        rule, _, numbers, _ = hit
        if (rule, numbers) not in done:
            done.add((rule, numbers))
            yield rule, numbers, [modules[_layer_of(ours).format(*numbers)] for ours in rule.ours]


def _fused(rule: Rule, parts: list[nn.Module], config: Config) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Yield for each of their layers that has an update the name of its weight, A, B, and what lengths DoRA gives its rows."""
    A = torch.cat([layer.lora_A for layer in parts if isinstance(layer, LoRALinear)])  # (R, in)
    blocks, used, start = [], [], 0
    for layer in parts:
        if isinstance(layer, LoRALinear):
            pad = (start, A.size(0) - start - layer.lora_A.size(0))
            blocks.append(F.pad(layer.spread(), pad))  # (out, R)
            used.append(F.pad(_filled(layer), pad))
            start += layer.lora_A.size(0)
        else:
            blocks.append(A.new_zeros(layer.out_features, A.size(0)))
            used.append(blocks[-1].bool())
    untied = replace(config, tie_embeddings=False)  # the update of a tied head is no part of the embedding's
    kind = "same" if rule.kind == "transposed" else rule.kind  # PEFT itself transposes the product of the factors

    def moved(rows: list[Tensor]) -> Iterable[Tensor]:
        return CONVERSIONS[kind][1](rule, untied, tuple(rows), list(rule.ours))

    magnitudes: Iterable[Tensor | None] = [None] * len(rule.theirs)
    if any(getattr(layer, "lora_magnitude", None) is not None for layer in parts):
        lengths = [layer.magnitudes() if isinstance(layer, LoRALinear) else row_norms(layer) for layer in parts]
        magnitudes = [column.flatten() for column in moved([rows.unsqueeze(1) for rows in lengths])]
    for template, B, where, of_rows in zip(rule.theirs, moved(blocks), moved(used), magnitudes, strict=True):
        columns = where.any(0)
        if columns.any():
            yield template, A[columns], B[:, columns], of_rows


def _filled(layer: LoRALinear) -> Tensor:
    """Return where the spread factor B may differ from zero, (out, n r)."""
    like = copy(layer)
    like._parameters = dict(layer._parameters, lora_B=nn.Parameter(torch.ones_like(layer.lora_B)))
    return like.spread() != 0


def _peft_config(ranks: dict[str, int], config: Config, lora: LoRA) -> dict[str, Any]:
    """Return `adapter_config.json` for updates of these ranks, by the templates of the weights' names.

    PEFT takes the names of a MLP's layers for those of experts if a model has experts, so there all of them are given as parameters.
    """
    all_layers = {_in_memory(name, config) for rule in config.rules for name in rule.theirs if name.endswith((".*", ".weight"))}
    taken = {name.rsplit(".", 1)[-1] for name in all_layers - {name.removesuffix(".weight") for name in ranks}}

    def is_parameter(name: str) -> bool:
        return not name.endswith(".weight") or (config.n_expert > 0 and ".mlp." in name)

    def key(name: str) -> str:
        """Return the shortest end of a path that names it and no other module."""
        path = name.rsplit("{}.", 1)[-1]
        if is_parameter(name):
            return path
        leaf = path.removesuffix(".weight").rsplit(".", 1)[-1]
        return path.removesuffix(".weight") if leaf in taken else leaf

    unusual = {key(name): rank for name, rank in ranks.items() if rank != lora.r}
    parameters = sorted({key(name) for name in ranks if is_parameter(name)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({key(name) for name in ranks if not is_parameter(name)}),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": unusual,
        "alpha_pattern": {name: lora.scaling * (math.sqrt(rank) if lora.rslora else rank) for name, rank in unusual.items()},
        "bias": "none",
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "fan_in_fan_out": any(rule.kind == "transposed" and rule.theirs[0].endswith((".*", ".weight")) for rule in config.rules),
        "inference_mode": True,
    }


def _in_memory(template: str, config: Config) -> str:
    """Return the layer of a weight's name, as transformers calls it in memory where that is not its name in files."""
    path = _layer_of(template) + "."
    return {rule.ours[0]: rule.theirs[0] for rule in config.rules if rule.kind == "prefixed"}.get(path, path)[:-1]


def _layer_of(template: str) -> str:
    return template.removesuffix(".*").removesuffix(".weight")


# Experts


def _stack_rule(ours: str, config: Config) -> tuple[Rule, tuple[str, ...]]:
    """Return the rule for experts' matrices as transformers has them in memory, by our name, and the numbers in the name."""
    hit = find_rule(ours, {rule.ours[0]: (rule, 0) for rule in config.rules if rule.ours and not rule.count})
    if hit is None:
        raise UserError(f"No rule of the family {config.family!r} says how transformers calls {ours!r}, so its update cannot be written.")
    return hit[0], hit[2]


def _turned(B: Tensor, rule: Rule, config: Config, way: int) -> Tensor:
    """Return experts' B (E, out, r) with its rows in their order (`way` 1), or from their order in ours (0)."""
    if rule.kind in LAID_OUT_AS_HERE:
        return B
    if way:
        return CONVERSIONS[rule.kind][1](rule, config, (B,), list(rule.ours))[0].transpose(1, 2)
    return CONVERSIONS[rule.kind][0](rule, config, (B.transpose(1, 2),), list(rule.theirs))[0]


def _targeted_stack(module: str, targets: list[str], config: Config) -> tuple[Rule, str, str] | None:
    """Return the rule, their name and ours of the experts' matrices that a module of an adapter updates, if it updates any."""
    holder = re.sub(r"(\.base_layer)*$", "", module)
    depth = (len(module) - len(holder)) // len(".base_layer")
    nested = []
    for rule in (rule for leaf in STACKS for rule in config.rules if not rule.count and rule.ours[:1] == (f"{EXPERTS}.{leaf}",)):
        hit = find_rule(f"{holder}.{rule.theirs[0].rpartition('.')[2]}", {rule.theirs[0]: (rule, 0)})
        theirs = rule.theirs[0].format(*hit[2]) if hit else ""
        if hit and any(theirs == target or theirs.endswith(f".{target}") for target in targets):
            nested.insert(0, (rule, theirs, rule.ours[0].format(*hit[2])))
    return nested[depth] if depth < len(nested) else None


# Reading


def check_plain(settings: dict[str, Any], folder: Path) -> None:
    """Refuse an adapter that is more than low-rank updates added to its base, by what its `adapter_config.json` says.

    Args:
        settings: What the file holds; what is left out has PEFT's default.
        folder: The adapter's, for error messages.

    Raises:
        UserError: A setting is not known to leave the updates plain.
    """
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder} is not a plain LoRA adapter of PEFT, the only kind that is read.")
    for name, value in settings.items():
        if name == "init_lora_weights":
            plain = value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in PLAIN_STARTS)
        elif name == "bias":
            plain = value == "none"
        else:
            plain = name in HARMLESS or not value
        if not plain:
            raise UserError(
                f"{folder} sets PEFT's `{name}` to {value!r:.40}, so it is not a plain LoRA adapter, the only kind that is read. "
                "Merge it with PEFT first, if it can be merged."
            )


def peft_updates(tensors: Mapping[str, Tensor], settings: dict[str, Any], config: Config) -> Updates:
    """Return the updates in a PEFT adapter.

    Args:
        tensors: What `adapter_model.safetensors` holds.
        settings: What `adapter_config.json` holds.
        config: The architecture of its base.
    """
    targets = settings.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"`target_parameters` in the PEFT adapter's settings is a list of names, but got {targets!r:.40}.")
    found: dict[str, dict[str, Tensor]] = {}
    others = {name for name in tensors if is_skipped(name.removeprefix(START), config.rules)}
    for name, tensor in tensors.items():
        if name in others:
            continue
        match = re.fullmatch(
            rf"{re.escape(START)}(.*)\.lora_(?:(A|B)(?:\.default)?\.weight|(magnitude_vector)(?:\.default\.weight)?)", name
        )
        if match is None and name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # a copy of the base's head, which PEFT saves beside an update of it
        if match is None:
            raise UserError(f"The PEFT adapter holds {name!r}, which is no factor of a linear layer's LoRA update.")
        found.setdefault(match[1], {})[match[2] or match[3]] = tensor
    stored_name = _stored_names(config)
    updates = Updates({}, {}, _changed({name: tensors[name] for name in others}))
    for module, factors in found.items():
        A, B, magnitudes = _checked(factors, module, bool(settings.get("use_dora")))
        if (stack := _targeted_stack(module, targets, config)) is not None and magnitudes is None:
            rule, theirs, ours = stack
            updates.stacks[ours] = _stack_factors(A, B, theirs, rule, settings, config)
        else:
            name, transposed = stored_name(f"{module}.weight")
            is_parameter = any(f"{module}.weight".endswith(f".{target}") for target in targets)
            scale = _scale(settings, f"{module}.weight" if is_parameter else module, A.size(0))
            updates.layers[name] = Factors(A, B, scale, magnitudes, transposed)
    return updates


def _checked(factors: Mapping[str, Tensor], module: str, use_dora: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return A, B and the lengths of rows that an adapter holds for a module, if they are an update of a linear layer."""
    if not {"A", "B"} <= factors.keys():
        raise UserError(f"The PEFT adapter holds only one of the two factors of {module!r}.")
    A, B, magnitudes = factors["A"], factors["B"], factors.get("magnitude_vector")
    if (magnitudes is not None) != use_dora:
        held = "no" if use_dora else "a"
        raise UserError(
            f"The PEFT adapter's settings have `use_dora` {use_dora}, but it holds {held} `lora_magnitude_vector` of {module!r}. "
            "Save the adapter again."
        )
    fits = A.ndim == B.ndim == 2 and A.size(0) == B.size(1) > 0 and (magnitudes is None or magnitudes.shape == B.shape[:1])
    if not fits or not all(tensor.is_floating_point() for tensor in factors.values()):
        shapes = " and ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (A, B, magnitudes) if tensor is not None)
        raise UserError(f"The factors of {module!r} in the PEFT adapter are {shapes}, which is no LoRA update. Save the adapter again.")
    return A, B, magnitudes


def _changed(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that updates change: those of which no factor is zero, as B is that nothing was learned by."""
    same = {name.split(".lora_")[0] for name, tensor in tensors.items() if not tensor.any()}
    return sorted({name.split(".lora_")[0].removeprefix(START) for name in tensors if name.split(".lora_")[0] not in same})


def _stack_factors(A: Tensor, B: Tensor, theirs: str, rule: Rule, settings: dict[str, Any], config: Config) -> Factors:
    if A.size(0) % config.n_expert:
        raise UserError(f"The factors of {theirs!r} in the PEFT adapter are not of {config.n_expert} experts, but {tuple(A.shape)}.")
    rank = A.size(0) // config.n_expert
    by_expert = B.unflatten(1, (rank, config.n_expert)).permute(2, 0, 1)  # (E, out, r)
    return Factors(A.unflatten(0, (config.n_expert, rank)), _turned(by_expert, rule, config, 0), _scale(settings, theirs, rank))


def _stored_names(config: Config) -> Callable[[str], tuple[str, bool]]:
    """Return what tells of a weight, which may be called otherwise in memory or in some files, its usual name, and if it is transposed."""
    names, back, prefixes = names_of(config.rules, to_ours=True), names_of(config.rules, to_ours=False), prefixes_of(config.rules)

    def stored_name(name: str) -> tuple[str, bool]:
        name = usual_name(name, names, prefixes)
        hit = find_rule(name, names)
        if hit is None:
            return name, False
        rule, _, numbers, leaf = hit
        stored = back.get(rule.ours[0]) if rule.kind == "alias" else None
        if stored is not None and not stored[0].count:
            return fill(stored[0].theirs[0], numbers, leaf), False
        return name, rule.kind == "transposed"

    return stored_name


def _scale(settings: dict[str, Any], name: str, rank: int) -> float:
    """Return what an adapter's settings say of the scale of a module or parameter."""
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"`alpha_pattern` in the PEFT adapter's settings maps modules to numbers, but is {patterns!r:.40}.")
    for key, value in patterns.items():
        try:
            alpha, found = (value, True) if re.fullmatch(rf"(.*\.)?(?:{key})", name) else (alpha, False)
        except re.error:
            raise UserError(f"`alpha_pattern` in the PEFT adapter's settings has the pattern {key!r:.40}, which is none.") from None
        if found:
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise UserError(f"The PEFT adapter's settings give {name!r} the `lora_alpha` {alpha!r:.40}, which is no number.")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def add_updates(stream: Iterable[tuple[str, Tensor]], updates: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with the updates of the same names added to them, in the weights' own dtype."""
    waiting = dict(updates)
    for name, weight in stream:
        if name in waiting:
            A, B, scale, magnitudes, transposed = waiting.pop(name)
            weight = weight.T if transposed else weight
            if weight.shape != (shape := (*B.shape[:-1], A.size(-1))):
                shapes = f"{shape}, but in the base model its shape is {tuple(weight.shape)}"
                raise UserError(f"The adapter updates {name!r} as if its shape were {shapes}. Name the model that it was trained beside.")
            weight = updated(weight, A, B, scale, magnitudes)
            weight = weight.T.contiguous() if transposed else weight
        yield name, weight
    if waiting:
        raise UserError(f"The adapter updates {next(iter(waiting))!r}, which the base model does not have.")


def updates_tied_head(updates: Updates, config: Config) -> bool:
    """Say whether updates are of a head that is tied to the embedding, so that adding them makes it a weight of its own."""
    return config.tie_embeddings and _theirs("lm_head.weight", config) in updates.layers


def usual_names(stream: Iterable[tuple[str, Tensor]], config: Config, untie: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield weights of theirs under their usual names; with `untie` the embedding is the head too, whatever is stored as that."""
    stored_name = _stored_names(config)
    head, embedding = _theirs("lm_head.weight", config), _theirs("transformer.wte.weight", config)
    for name, tensor in stream:
        name, _ = stored_name(name)
        if not (untie and name == head):
            yield name, tensor
        if untie and name == embedding:
            yield head, tensor


def _theirs(ours: str, config: Config) -> str:
    return names_of(config.rules, to_ours=False)[ours][0].theirs[0]
