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
from litgpt.cache import Latents, Span, upload
from litgpt.checkpoint import find_adapter, load_updates, lora_settings, read_peft_updates, weightless
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.experts import Experts, Rows, grouped_linear
from litgpt.files import is_file, read_json
from litgpt.lora import LoRAExperts, LoRALinear, add_lora
from litgpt.model import GPT, LatentAttention
from litgpt.peft_format import STACKS, Factors
from litgpt.translate import CONVERSIONS, fill, find_rule, names_of
from litgpt.weights import Rule

NAME = r"[A-Za-z0-9._/:-]{1,96}"
Ranks = tuple[tuple[int, int], ...]  # slots and how many columns each has, in their order
Pair = tuple[Tensor, Tensor]  # A (..., r, in), and B (..., out, r) times the update's scale


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

    def foreign(self, ranks: Ranks, at: slice, device: torch.device) -> Tensor:
        """Return which of the columns `at`, of all that slots of these ranks have, are not a token's, (N, n); equal layers share it."""
        key = ranks, at.start, at.stop
        if key not in self._masks:
            columns = [slot for slot, rank in ranks for _ in range(rank)][at]
            self._masks[key] = upload(self.each, device).unsqueeze(1) != upload(columns, device)
        return self._masks[key]


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
    """

    def __init__(self, A: Tensor, B: Tensor, ranks: Ranks = ()) -> None:
        self.A, self.B, self.ranks = A, B, ranks
        ends = list(accumulate(rank for _, rank in ranks))
        self.places = {slot: slice(end - rank, end) for (slot, rank), end in zip(ranks, ends, strict=True)}

    @classmethod
    def empty(cls, weight: Tensor) -> "Stack":
        """Return the stack of no slots beside a weight; the factors of a linear layer are in fp32, those of experts in their type."""
        *more, outer, inner = weight.shape
        like = dict(device=weight.device, dtype=weight.dtype if more else torch.float32)
        return cls(torch.empty(*more, 0, inner, **like), torch.empty(*more, 0, outer, **like))

    def including(self, slot: int, pair: Pair) -> "Stack":
        """Return the stack with one more slot."""
        A, B = (torch.cat((old, new.to(old)), -2) for old, new in ((self.A, pair[0]), (self.B, pair[1].mT)))
        return Stack(A, B, (*self.ranks, (slot, pair[0].size(-2))))

    def without(self, slot: int) -> "Stack":
        """Return the stack with the slots but one."""
        kept = torch.ones(self.A.size(-2), dtype=torch.bool, device=self.A.device)
        kept[self.places[slot]] = False
        return Stack(self.A[..., kept, :], self.B[..., kept, :], tuple(pair for pair in self.ranks if pair[0] != slot))

    def needed(self, slots: Slots) -> slice | None:
        """Return the columns from the first to the last one that a token needs, or None if no token needs any."""
        if not slots.used:
            return None
        places = [self.places[slot] for slot in slots.used if slot in self.places]
        return slice(min(at.start for at in places), max(at.stop for at in places)) if places else None


class AdapterLinear(nn.Module):
    """A linear layer and the updates of all slots, y = W x + B A x with the A and B of each token's slot.

    It holds the layer's own parameters under their own names, so that a model has the same weights with it and without.

    Args:
        linear: The layer W, or any that has `in_features` and `out_features`.
        index: Knows the slots of the call that is under way.
        is_head: Whether it sees the selected tokens only.
    """

    def __init__(self, linear: nn.Module, index: AdapterIndex, is_head: bool = False) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # no submodule, which would change the weights' names
        self._parameters, self._buffers = linear._parameters, linear._buffers
        self.index, self.is_head = index, is_head
        self.stacks = {"weight": Stack.empty(linear.weight)}

    @property
    def in_features(self) -> int:
        """The width of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """The width of the output."""
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y, stack, slots = self.linear(x), self.stacks["weight"], self.slots()
        at = stack.needed(slots)
        if at is None:
            return y
        rows = x.reshape(-1, x.size(-1))  # (N, C)
        n = self.shared_by(x)
        assert len(slots.each) * n == len(rows), f"{len(slots.each)} slots are set, but the layer sees {len(rows)} tokens"
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
        self.stacks = {leaf: Stack.empty(getattr(experts, leaf)) for leaf in STACKS}

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        return self._updated(super().project_up(x, rows), x, rows, "gate_up", spread=True)

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        return self._updated(super().project_down(x, rows), x, rows, "down", spread=False)

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
        self.model, self.base, self.max_adapters, self.index = model, base, max_adapters, AdapterIndex()
        self._plain = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Experts)}
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

    def read(self, folder: Path) -> dict[str, Pair]:
        """Return an adapter's factors by our weights' names. It changes nothing, so another thread may do it while the model computes.

        Args:
            folder: See `load`.

        Raises:
            MissingFile: A file is not there.
            UserError: It holds no LoRA updates, or some that cannot be computed beside this model.
        """
        found = find_adapter(folder)
        pairs: dict[str, Pair] = {}
        for name, (A, B) in self._pairs(found):
            if not (A.isfinite().all() and B.isfinite().all()):
                raise UserError(f"{found} updates {name!r} by numbers that are not finite. Train or save the adapter again.")
            used = B.flatten(0, -2).any(0)  # what was not trained, or is padding, adds nothing
            if used.any():
                A, B = A[..., used, :], B[..., used]
                before = pairs.get(name)  # experts may have updates as a stack and one by one
                pairs[name] = (A, B) if before is None else (torch.cat((before[0], A), -2), torch.cat((before[1], B), -1))
        return pairs

    def install(self, name: str, pairs: Mapping[str, Pair]) -> None:
        """Give an adapter that was read a slot, between two calls of the model.

        Args:
            name: See `load`.
            pairs: See `read`.
        """
        self.check(name)
        slot, stacks = next(self._numbers), {}
        for weight, pair in pairs.items():  # all that can fail for want of memory comes before the first change
            path, leaf = weight.rpartition(".")[::2]
            stack = self._wrapped[path].stacks[leaf] if path in self._wrapped else Stack.empty(self._weight(weight))
            stacks[path, leaf] = stack.including(slot, pair)
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

    def _weight(self, name: str) -> Tensor | None:
        """Return one of our weights, if it is of a kind that updates can stand beside."""
        path, leaf = name.rpartition(".")[::2]
        layer = self._plain.get(path)
        is_known = leaf in STACKS if isinstance(layer, Experts) else layer is not None and leaf == "weight"
        return getattr(layer, leaf) if is_known else None

    def _pairs(self, folder: Path) -> Iterator[tuple[str, Pair]]:
        if is_file(folder / names.ADAPTER_CONFIG):
            return peft_pairs(folder, self.base, self.model.config, self._weight)
        return stored_pairs(folder, self.base, self.model.config)


# Files


def stored_pairs(folder: Path, base: Path, config: Config) -> Iterator[tuple[str, Pair]]:
    """Yield the factors in LitGPT's file, or in a step of a run of ours, by our names of the weights.

    Args:
        folder: See `has_lora`.
        base: The model's folder, for messages.
        config: The architecture of the model.
    """
    with weightless():
        model = GPT(config)
        add_lora(model, lora_settings(folder))
    load_updates(model, folder, base)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            yield f"{name}.weight", (layer.lora_A.detach(), layer.spread().detach() * layer.scaling)
        elif isinstance(layer, LoRAExperts):
            for leaf, A, B in (("gate_up", layer.lora_up_A, layer.lora_up_B), ("down", layer.lora_down_A, layer.lora_down_B)):
                yield f"{name}.{leaf}", (A.detach(), B.detach() * layer.scaling)


def peft_pairs(folder: Path, base: Path, config: Config, weight_of: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Pair]]:
    """Yield the factors in a PEFT adapter, by our names of the weights.

    Args:
        folder: The adapter's.
        base: The model's folder, for messages.
        config: The architecture of the model.
        weight_of: Returns one of our weights by its name, or None if no update can stand beside it.
    """
    updates = read_peft_updates(folder, read_json(folder / names.ADAPTER_CONFIG), config)
    for name, factors in updates.stacks.items():
        if (weight := weight_of(name)) is None:
            raise _nowhere(name, base)
        _check_shape(name, factors, weight.shape, base)
        yield name, (factors.A.float(), factors.B.float() * factors.scale)
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
        weights = [weight_of(target) for target in targets]
        if any(weight is None for weight in weights):
            raise _nowhere(next(iter(parts.values()))[0], base)
        yield from zip(targets, _joined(rule, parts, weights, config, base), strict=True)


def _joined(rule: Rule, parts: Mapping[int, tuple[str, Factors]], weights: Sequence[Tensor], config: Config, base: Path) -> Iterator[Pair]:
    """Yield the factors beside each of our weights that a rule makes of theirs, of which some have updates.

    A rule moves whole rows, so it moves those of B as it moves those of W. Each part of theirs has its own columns of B and rows of A;
    where experts are kept apart, all of them use the same ones.

    Args:
        rule: What makes ours of theirs.
        parts: By their places in the rule, their names and factors.
        weights: Ours.
        config: The architecture.
        base: The model's folder, for messages.
    """
    swapped = rule.kind == "transposed"
    ways, untied = CONVERSIONS["same" if swapped else rule.kind], replace(config, tie_embeddings=False)  # a tied head has an update alone
    blank = ways[1](rule, untied, tuple(torch.empty_like(weight, device="meta") for weight in weights), list(rule.ours))
    per, inner = len(rule.theirs), weights[0].size(-1)
    ranks = {i: factors.A.size(0) for i, (_, factors) in parts.items()}
    starts = {i: sum(ranks.get(before, 0) for before in range(i - i % per, i)) for i in ranks}
    rank = max(starts[i] + ranks[i] for i in ranks)
    for i, (name, factors) in parts.items():
        if i >= len(blank):
            raise _nowhere(name, base)
        _check_shape(name, factors, blank[i].T.shape if swapped else blank[i].shape, base)
    A = torch.zeros(len(blank) // per, rank, inner)
    blocks = [torch.zeros(len(rows), rank) for rows in blank]
    for i, (_, (a, b, scale)) in parts.items():
        a, b = (b.T, a.T) if swapped else (a, b)
        at = slice(starts[i], starts[i] + ranks[i])
        A[i // per, at], blocks[i][:, at] = a, b.float() * scale
    for B in ways[0](rule, untied, tuple(blocks), list(rule.theirs) * (len(blank) // per)):
        yield A if rule.count else A[0], B


def _nowhere(name: str, base: Path) -> UserError:
    return UserError(f"The adapter updates {name!r}, which is no linear layer's or experts' weight of the model in {base}.")


def _check_shape(name: str, factors: Factors, expected: Sequence[int], base: Path) -> None:
    if (found := (*factors.B.shape[:-1], factors.A.size(-1))) != tuple(expected):
        shapes = f"{found}, but in {base} its shape is {tuple(expected)}"
        raise UserError(f"The adapter updates {name!r} as if its shape were {shapes}. Name an adapter that was trained beside this model.")
