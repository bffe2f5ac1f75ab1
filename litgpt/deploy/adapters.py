"""Several LoRA adapters beside one model: each token of a call is computed with the one whose slot it has, or with none."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt import names
from litgpt.adapter_v2 import is_new
from litgpt.cache import Latents, Span, upload
from litgpt.checkpoint import find_adapter, load_updates, lora_settings, read_peft_updates, weightless
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.experts import Experts, Rows, grouped_linear
from litgpt.files import is_file, read_json
from litgpt.lora import LoRAExperts, LoRALinear, add_lora, can_be_wrapped, device_of, full_weight, norms_of_sum
from litgpt.model import GPT, LatentAttention
from litgpt.peft_format import STACKS, Factors
from litgpt.translate import CONVERSIONS, fill, find_rule, names_of
from litgpt.weights import Rule

NAME = r"[A-Za-z0-9._/:-]{1,96}"
Ranks = tuple[tuple[int, int], ...]  # slots and how many columns each has, in their order


class Update(NamedTuple):
    """What an adapter changes of one weight: row by row (1 + longer) W + B A."""

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r), times the update's scale
    longer: Tensor | None = None  # (out,), of DoRA


# Which token has which slot


class Slots:
    """The slots of the tokens, or the rows, that a layer sees; 0 is the model without an adapter.

    Args:
        each: In order, the slot of each.
    """

    def __init__(self, each: Sequence[int]) -> None:
        self.each = list(each)
        self.used = set(self.each) - {0}
        self.is_uniform = len(set(self.each)) == 1
        self._masks: dict[tuple[Ranks, int, int], Tensor] = {}
        self._places: dict[Ranks, Tensor] = {}

    def foreign(self, ranks: Ranks, at: slice, device: torch.device) -> Tensor:
        """Return which of the columns `at`, of all that slots of these ranks have, are not a token's, (N, n); equal layers share it."""
        key = ranks, at.start, at.stop
        if key not in self._masks:
            columns = [slot for slot, rank in ranks for _ in range(rank)][at]
            self._masks[key] = upload(self.each, device).unsqueeze(1) != upload(columns, device)
        return self._masks[key]

    def places(self, ranks: Ranks, device: torch.device) -> Tensor:
        """Return the place of each token's slot among the slots of these ranks, from 1, or 0 if it is none of them, (N,)."""
        if ranks not in self._places:
            known = {slot: place for place, (slot, _) in enumerate(ranks, start=1)}
            self._places[ranks] = upload([known.get(slot, 0) for slot in self.each], device)
        return self._places[ranks]


class AdapterIndex:
    """The slots of the call that comes next, which all layers share. Set it before every call of the model."""

    def __init__(self) -> None:
        self.clear()

    def set(self, tokens: Sequence[int], selected: Sequence[int] | None = None) -> None:
        """Say what the next call computes with what.

        Args:
            tokens: The slot of each of its B * T tokens, in the order of `idx.flatten()`, padding included.
            selected: The slot of each token that reaches the head; by default all do.
        """
        self.tokens = Slots(tokens)
        self.selected = self.tokens if selected is None else Slots(selected)

    def clear(self) -> None:
        """Let the next calls, of any size, compute without adapters."""
        self.tokens = self.selected = Slots(())


# Layers


class Stack:
    """The factors of one weight for all its slots, beside each other, so that one product serves every token.

    Args:
        A: (R, in) or, of experts, (E, R, in)
        B: (R, out) or (E, R, out), so that those of some slots are neighbours in memory
        ranks: How many of the R columns each slot has.
        longer: By how much some slots make W's rows longer, (out,) each.
    """

    def __init__(self, A: Tensor, B: Tensor, ranks: Ranks = (), longer: Mapping[int, Tensor] | None = None) -> None:
        self.A, self.B, self.ranks, self.longer = A, B, ranks, longer or {}
        ends = list(accumulate(rank for _, rank in ranks))
        self.places = {slot: slice(end - rank, end) for (slot, rank), end in zip(ranks, ends, strict=True)}
        none = B.new_zeros(B.size(-1))
        rows = [none, *(self.longer.get(slot, none) for slot, _ in ranks)] if self.longer else []
        self.all_longer = torch.stack(rows) if rows else None  # in the order of `Slots.places`

    @classmethod
    def empty(cls, layer: nn.Module, leaf: str) -> "Stack":
        """Return the stack of no slots beside a weight; the factors of a linear layer are in fp32, those of experts in their type."""
        *more, outer, inner = shape_of(layer, leaf)
        like = dict(device=device_of(layer), dtype=getattr(layer, leaf).dtype if more else torch.float32)
        return cls(torch.empty(*more, 0, inner, **like), torch.empty(*more, 0, outer, **like))

    def including(self, slot: int, update: Update) -> "Stack":
        """Return the stack with one more slot."""
        A, B = (torch.cat((old, new.to(old)), -2) for old, new in ((self.A, update.A), (self.B, update.B.mT)))
        longer = {} if update.longer is None else {slot: update.longer.to(B)}
        return Stack(A, B, (*self.ranks, (slot, update.A.size(-2))), {**self.longer, **longer})

    def without(self, slot: int) -> "Stack":
        """Return the stack with the slots but one."""
        kept = torch.ones(self.A.size(-2), dtype=torch.bool, device=self.A.device)
        kept[self.places[slot]] = False
        longer = {other: rows for other, rows in self.longer.items() if other != slot}
        return Stack(self.A[..., kept, :], self.B[..., kept, :], tuple(pair for pair in self.ranks if pair[0] != slot), longer)

    def needed(self, slots: Slots) -> slice | None:
        """Return the columns from the first to the last one that a token needs, or None if no token needs any."""
        if not slots.used:
            return None
        places = [self.places[slot] for slot in slots.used if slot in self.places]
        return slice(min(at.start for at in places), max(at.stop for at in places)) if places else None


def shape_of(layer: nn.Module, leaf: str) -> Sequence[int]:
    """Return the shape of a layer's weight as it is multiplied, however it is stored."""
    return getattr(layer, leaf).shape if isinstance(layer, Experts) else (layer.out_features, layer.in_features)


class AdapterLinear(nn.Module):
    """A linear layer and the updates of all slots, y = W x + B A x with the A and B of each token's slot, and W's rows as long as it says.

    It holds the layer's own parameters under their own names, so that a model has the same weights with it and without.

    Args:
        linear: The layer W, or any that has `in_features`, `out_features`, `weight` and `bias`.
        index: Knows the slots of the call that is under way.
        is_head: Whether it sees the selected tokens only.
    """

    def __init__(self, linear: nn.Module, index: AdapterIndex, is_head: bool = False) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # no submodule, which would change the weights' names
        self._parameters, self._buffers = linear._parameters, linear._buffers
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.index, self.is_head = index, is_head
        self.stacks = {"weight": Stack.empty(linear, "weight")}

    def forward(self, x: Tensor) -> Tensor:
        y, stack, slots = self.linear(x), self.stacks["weight"], self.slots()
        at = stack.needed(slots)
        if at is None:
            return y
        rows = x.reshape(-1, x.size(-1))  # (N, C)
        n = self.shared_by(x)
        assert len(slots.each) * n == len(rows), f"{len(slots.each)} slots are set, but the layer sees {len(rows)} tokens"
        if slots.used & stack.longer.keys():
            longer = stack.all_longer[slots.places(stack.ranks, x.device)].repeat_interleave(n, 0).view_as(y).to(y.dtype)
            y = torch.addcmul(y, y if self.linear.bias is None else y - self.linear.bias.to(y.dtype), longer)
        hidden = F.linear(rows.to(stack.A.dtype), stack.A[at])  # (N, R)
        if not slots.is_uniform:
            hidden = hidden.unflatten(0, (-1, n)).masked_fill(slots.foreign(stack.ranks, at, x.device).unsqueeze(1), 0.0).flatten(0, 1)
        if y.dtype == hidden.dtype:
            return torch.addmm(y.view(-1, y.size(-1)), hidden, stack.B[at]).view_as(y)
        return y + (hidden @ stack.B[at]).view_as(y).to(y.dtype)

    def slots(self) -> Slots:
        """Return the slots of what the layer is about to see."""
        return self.index.selected if self.is_head else self.index.tokens

    def shared_by(self, x: Tensor) -> int:
        """Return how many tokens in a row share a slot."""
        return 1

    def unwrapped(self) -> nn.Module:
        """Return the plain layer."""
        return self.linear


class LatentKeys(AdapterLinear):
    """`kv_b` of a latent attention, which makes keys and values of latents that earlier calls left in the cache, row by row.

    Args:
        attention: Whose `kv_b` it takes the place of.
        index: Knows the slots of the call that is under way.
    """

    def __init__(self, attention: LatentAttention, index: AdapterIndex) -> None:
        super().__init__(attention.kv_b, index)
        self.rows: Slots | None = None  # whose latents were read last
        self.hooks = [attention.register_forward_pre_hook(self._begin), attention.register_forward_hook(self._end, always_call=True)]

    def slots(self) -> Slots:
        return super().slots() if self.rows is None else self.rows

    def shared_by(self, x: Tensor) -> int:
        return 1 if self.rows is None else x.size(1)

    def unwrapped(self) -> nn.Module:
        """Return the plain layer, and leave the attention."""
        for hook in self.hooks:
            hook.remove()
        return self.linear

    def _begin(self, attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, context, state = args
        if state is None or not self.index.tokens.used:
            return None
        span, each = context.span, self.index.tokens.each
        width = x.size(1)
        starts = accumulate(span.counts[:-1], initial=0) if span.packed else range(0, width * len(span.counts), width)
        by_row = {row: each[start] for row, start, n in zip(span.numbers, starts, span.counts, strict=True) if n}
        return x, context, _Noting(state, by_row, self)

    def _end(self, *_: Any) -> None:
        self.rows = None


class _Noting(NamedTuple):
    """The latents of a layer, which tell whose they are when they are read."""

    state: Latents
    by_row: dict[int, int]  # the slot of each row of the cache that the call continues
    reader: LatentKeys

    def write(self, k: Tensor, v: Tensor, span: Span) -> None:
        self.state.write(k, v, span)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        rows = range(span.rows.start, span.rows.stop) if isinstance(span.rows, slice) else span.numbers
        self.reader.rows = Slots([self.by_row.get(row, 0) for row in rows])
        return self.state.read(span)


class AdapterExperts(Experts):
    """Experts and the updates of all slots to each one's two matrices, which keep their names as in `AdapterLinear`.

    Args:
        experts: The plain ones.
        index: Knows the slots of the call that is under way.
    """

    def __init__(self, experts: Experts, index: AdapterIndex) -> None:
        self.__dict__.update(experts.__dict__)  # the same parameters and settings
        self.__dict__["plain"], self.index = experts, index
        self.stacks = {leaf: Stack.empty(experts, leaf) for leaf in STACKS}

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        return self._updated(self.plain.project_up(x, rows), x, rows, "gate_up", spread=True)

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        return self._updated(self.plain.project_down(x, rows), x, rows, "down", spread=False)

    def _updated(self, y: Tensor, x: Tensor, rows: Rows, leaf: str, spread: bool) -> Tensor:
        slots, stack = self.index.tokens, self.stacks[leaf]
        if stack.needed(slots) is None:
            return y
        assert len(slots.each) == rows.places.size(0), f"{len(slots.each)} slots are set, but experts see {rows.places.size(0)} tokens"
        hidden = grouped_linear(x, stack.A.to(x.dtype), rows, spread)  # (S, R)
        hidden = hidden.masked_fill(slots.foreign(stack.ranks, slice(0, stack.A.size(1)), x.device)[rows.tokens], 0.0)
        return y + grouped_linear(hidden, stack.B.mT.to(x.dtype), rows)

    def unwrapped(self) -> Experts:
        """Return the plain experts."""
        return self.plain


# Adapters


class Adapters:
    """The adapters of one model, which can come and go while it is used; `index` says which tokens are computed with which.

    A slot's number is never given again, so that what is remembered of an adapter that is gone is never taken for another's.

    Args:
        model: Plain. A layer is wrapped as long as an adapter needs it.
        base: The model's checkpoint directory, for messages.
        max_adapters: How many can be loaded at the same time.
    """

    def __init__(self, model: GPT, base: Path, max_adapters: int = 8) -> None:
        if any(is_new(name) for name, _ in model.named_parameters()):
            raise UserError(
                "No LoRA adapters can stand beside what Adapter trained. Leave out `adapters` and `adapter_dir`, or serve the base."
            )
        self.model, self.base, self.max_adapters, self.index = model, base.absolute(), max_adapters, AdapterIndex()
        self._plain = {name: layer for name, layer in model.named_modules() if can_be_wrapped(layer)}
        self._wrapped: dict[str, AdapterLinear | AdapterExperts] = {}
        self._slots: dict[str, int] = {}
        self._numbers = count(1)

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order in which they came."""
        return list(self._slots)

    def slot(self, name: str) -> int:
        """Return an adapter's slot.

        Raises:
            UserError: No adapter of this name is loaded.
        """
        if name not in self._slots:
            known = f"Loaded are {', '.join(self._slots)}." if self._slots else "None is loaded."
            raise UserError(f"There is no adapter {name!r:.120}.{did_you_mean(name, self._slots)} {known}")
        return self._slots[name]

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter and give it a slot, between two calls of the model; the others stay in use. See `read` and `install`.

        Args:
            name: What requests call it: letters, digits and `-_./:`, at most 96.
            folder: Any that `--adapter` takes.
        """
        self.check(name)
        self.install(name, self.read(folder))

    def check(self, name: str) -> None:
        """Refuse a name that cannot be loaded now.

        Raises:
            UserError: It is no name, or taken, or no more adapters fit.
        """
        if not re.fullmatch(NAME, name):
            raise UserError(f"An adapter's name has 1 to 96 letters, digits and characters of `-_./:`, but got {name!r:.120}.")
        if name in self._slots:
            raise UserError(f"An adapter {name!r} is loaded already. Unload it first, or choose another name.")
        if len(self._slots) >= self.max_adapters:
            raise UserError(f"At most {self.max_adapters} adapters can be loaded, and so many are. Unload one first.")

    def read(self, folder: Path) -> dict[str, Update]:
        """Return an adapter's updates by our weights' names. It changes nothing, so another thread may do it while the model computes.

        Args:
            folder: See `load`.

        Raises:
            MissingFile: A file is not there.
            UserError: It holds no LoRA updates, or some that cannot be computed beside this model.
        """
        found = find_adapter(folder)
        updates: dict[str, Update] = {}
        for name, (A, B, longer) in self._updates(found):
            if not all(tensor is None or tensor.isfinite().all() for tensor in (A, B, longer)):
                raise UserError(f"{found} updates {name!r} by numbers that are not finite. Train or save the adapter again.")
            used = B.flatten(0, -2).any(0)  # what was not trained, or is padding, adds nothing
            if used.any() or (longer is not None and longer.any()):
                A, B = A[..., used, :], B[..., used]
                if (before := updates.get(name)) is not None:  # experts may have updates as a stack and one by one
                    A, B = torch.cat((before.A, A), -2), torch.cat((before.B, B), -1)
                updates[name] = Update(A, B, longer)
        return updates

    def install(self, name: str, updates: Mapping[str, Update]) -> None:
        """Give an adapter that was read a slot, between two calls of the model.

        Args:
            name: See `load`.
            updates: See `read`.
        """
        self.check(name)
        slot, stacks = next(self._numbers), {}
        for weight, update in updates.items():  # all that can fail for want of memory comes before the first change
            path, leaf = weight.rpartition(".")[::2]
            stack = self._wrapped[path].stacks[leaf] if path in self._wrapped else Stack.empty(self._plain[path], leaf)
            stacks[path, leaf] = stack.including(slot, update)
        for (path, leaf), stack in stacks.items():
            self._wrap(path).stacks[leaf] = stack
        self._slots[name] = slot
        self.index.clear()

    def unload(self, name: str) -> None:
        """Forget an adapter and free its memory, between two calls of the model and when no request uses it any more.

        Raises:
            UserError: No adapter of this name is loaded.
        """
        slot = self.slot(name)
        for path, layer in list(self._wrapped.items()):
            layer.stacks = {leaf: stack.without(slot) if slot in stack.places else stack for leaf, stack in layer.stacks.items()}
            if not any(stack.places for stack in layer.stacks.values()):
                self.model.set_submodule(path, self._wrapped.pop(path).unwrapped())
        del self._slots[name]
        self.index.clear()

    def _wrap(self, path: str) -> AdapterLinear | AdapterExperts:
        if path not in self._wrapped:
            plain, owner = self._plain[path], self.model.get_submodule(path.rpartition(".")[0])
            if isinstance(plain, Experts):
                layer = AdapterExperts(plain, self.index)
            elif isinstance(owner, LatentAttention) and plain is owner.kv_b:
                layer = LatentKeys(owner, self.index)
            else:
                layer = AdapterLinear(plain, self.index, is_head=path == "lm_head")
            self.model.set_submodule(path, layer)
            self._wrapped[path] = layer
        return self._wrapped[path]

    def _layer(self, weight: str) -> nn.Module | None:
        """Return the layer of one of our weights, if it is of a kind that updates can stand beside."""
        path, leaf = weight.rpartition(".")[::2]
        layer = self._plain.get(path)
        return layer if leaf in (STACKS if isinstance(layer, Experts) else ("weight",)) else None

    def _updates(self, folder: Path) -> Iterator[tuple[str, Update]]:
        if is_file(folder / names.ADAPTER_CONFIG):
            return peft_updates(folder, self.base, self.model.config, self._layer)
        return stored_updates(folder, self.base, self.model.config, self._plain)


# Files


def stored_updates(folder: Path, base: Path, config: Config, plain: Mapping[str, nn.Module]) -> Iterator[tuple[str, Update]]:
    """Yield the updates in LitGPT's file, or in a step of a run of ours, by our names of the weights.

    Args:
        folder: See `has_lora`.
        base: The model's folder, for messages.
        config: The architecture of the model.
        plain: The model's layers.
    """
    with weightless():
        model = GPT(config)
        add_lora(model, lora_settings(folder))
    load_updates(model, folder, base)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            layer.linear = plain[name]  # DoRA's lengths are relative to those of its weight
            longer = None if layer.lora_magnitude is None else layer.longer().detach()
            B = layer.spread().detach() * layer.scaling
            yield f"{name}.weight", Update(layer.lora_A.detach(), B if longer is None else B * (1 + longer).unsqueeze(1), longer)
        elif isinstance(layer, LoRAExperts):
            for leaf, A, B in (("gate_up", layer.lora_up_A, layer.lora_up_B), ("down", layer.lora_down_A, layer.lora_down_B)):
                yield f"{name}.{leaf}", Update(A.detach(), B.detach() * layer.scaling)


def peft_updates(folder: Path, base: Path, config: Config, layer_of: Callable[[str], nn.Module | None]) -> Iterator[tuple[str, Update]]:
    """Yield the updates in a PEFT adapter, by our names of the weights.

    Args:
        folder: The adapter's.
        base: The model's folder, for messages.
        config: The architecture of the model.
        layer_of: Returns the layer of one of our weights, or None if no update can stand beside it.
    """
    updates = read_peft_updates(folder, read_json(folder / names.ADAPTER_CONFIG), config)
    for name, factors in updates.stacks.items():
        if (layer := layer_of(name)) is None:
            raise _nowhere(name, base)
        _check_shape(name, factors, shape_of(layer, name.rpartition(".")[2]), base)
        yield name, Update(factors.A.float(), factors.B.float() * factors.scale)
    rules, groups = names_of(config.rules, to_ours=True), {}
    for name, factors in updates.layers.items():
        hit = find_rule(name, rules)
        if hit is None or not hit[0].ours:
            raise _nowhere(name, base)
        rule, i, numbers, leaf = hit
        if rule.count:  # the last number is an expert's
            i, numbers = i + len(rule.theirs) * int(numbers[-1]), numbers[:-1]
        groups.setdefault((rule, numbers, leaf), {})[i] = (name, factors)
    for (rule, numbers, leaf), parts in groups.items():
        targets = [fill(name, numbers, leaf) for name in rule.ours]
        layers = [layer_of(target) for target in targets]
        if any(layer is None for layer in layers):
            raise _nowhere(next(iter(parts.values()))[0], base)
        yield from zip(targets, _joined(rule, parts, layers, targets, config, base), strict=True)


def _joined(
    rule: Rule,
    parts: Mapping[int, tuple[str, Factors]],
    layers: Sequence[nn.Module],
    targets: Sequence[str],
    config: Config,
    base: Path,
) -> Iterator[Update]:
    """Yield the updates beside each of our weights that a rule makes of theirs, of which some have updates.

    A rule moves whole rows, so it moves those of B as it moves those of W. Each part of theirs has its own columns of B and rows of A;
    where experts are kept apart, all of them use the same ones.

    Args:
        rule: What makes ours of theirs.
        parts: By their places in the rule, their names and factors.
        layers: Ours.
        targets: The names of their weights.
        config: The architecture.
        base: The model's folder, for messages.
    """
    kind = "same" if rule.kind == "transposed" else rule.kind  # factors are never transposed
    to_ours, to_theirs = CONVERSIONS[kind]
    untied = replace(config, tie_embeddings=False)  # a tied head has an update alone
    has_lengths = any(factors.magnitudes is not None for _, factors in parts.values())
    shapes = [shape_of(layer, name.rpartition(".")[2]) for layer, name in zip(layers, targets, strict=True)]
    ours = [full_weight(layer) for layer in layers] if has_lengths else [torch.empty(*shape, device="meta") for shape in shapes]
    theirs = to_theirs(rule, untied, tuple(ours), list(rule.ours))
    per, inner = len(rule.theirs), shapes[0][-1]
    ranks = {i: factors.A.size(0) for i, (_, factors) in parts.items()}
    starts = {i: sum(ranks.get(before, 0) for before in range(i - i % per, i)) for i in ranks}
    rank = max(starts[i] + ranks[i] for i in ranks)
    for i, (name, factors) in parts.items():
        if i >= len(theirs):
            raise _nowhere(name, base)
        _check_shape(name, factors, theirs[i].shape, base)
    A = torch.zeros(len(theirs) // per, rank, inner)
    blocks, longer = [torch.zeros(len(rows), rank) for rows in theirs], [torch.zeros(len(rows), 1) for rows in theirs]
    for i, (_, (a, b, scale, magnitudes, _)) in parts.items():
        at, b = slice(starts[i], starts[i] + ranks[i]), b.float() * scale
        if magnitudes is not None:
            gain = magnitudes / norms_of_sum(theirs[i].float(), a.float(), b)
            b, longer[i] = b * gain.unsqueeze(1), gain.unsqueeze(1) - 1
        A[i // per, at], blocks[i][:, at] = a, b

    def moved(rows: list[Tensor]) -> Sequence[Tensor]:
        return to_ours(rule, untied, tuple(rows), list(rule.theirs) * (len(theirs) // per))

    lengths = [column.flatten() for column in moved(longer)] if has_lengths else [None] * len(targets)
    for B, of_rows in zip(moved(blocks), lengths, strict=True):
        yield Update(A if rule.count else A[0], B, of_rows)


def _nowhere(name: str, base: Path) -> UserError:
    return UserError(f"The adapter updates {name!r}, which is no linear layer's or experts' weight of the model in {base}.")


def _check_shape(name: str, factors: Factors, expected: Sequence[int], base: Path) -> None:
    if (found := (*factors.B.shape[:-1], factors.A.size(-1))) != tuple(expected):
        shapes = f"{found}, but in {base} its shape is {tuple(expected)}"
        raise UserError(f"The adapter updates {name!r} as if its shape were {shapes}. Name an adapter that was trained beside this model.")
