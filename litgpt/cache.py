"""What the layers of a model remember between calls, for many rows of different lengths."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from mmap import mmap
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 2048  # the most prompt tokens that one call of a model should see: more would only cost memory
LAZY = 2**20  # bytes from which on memory is taken as it is used


def upload(values: list, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return the numbers as a tensor on the device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def empty_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU, large ones take memory only where they are written to: the system gives pages as they are touched."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < LAZY:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, n_bytes), dtype=dtype).view(shape)


class State(Protocol):
    """What one mixer remembers of all rows."""

    rewinds_freely: bool  # whether any number of tokens can be taken back by changing the length alone

    def parts(self, row: int, length: int) -> list[Tensor]:
        """Return views of all that a row of `length` tokens remembers."""


@dataclass
class KeyValues:
    """The keys and values of one attention layer, in a ring of S slots; without a window the ring never wraps."""

    keys: Tensor  # (R, G, S + 1, D); the last slot takes what padding writes and is never read
    values: Tensor  # (R, G, S + 1, D)
    window: int | None
    rewinds_freely: bool

    @classmethod
    def zeros(
        cls, rows: int, groups: int, length: int, chunk: int, head_size: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> "KeyValues":
        """Return the empty memory of one layer.

        A ring keeps a window and the tokens of one call beside it, so that the call's first token still sees its whole window.
        """
        size = length if window is None else min(length, window - 1 + chunk)
        shape = (rows, groups, size + 1, head_size)
        keys, values = (empty_memory(shape, dtype, device) for _ in range(2))
        return cls(keys, values, window, rewinds_freely=size == length)

    @property
    def size(self) -> int:
        """How many tokens the ring holds."""
        return self.keys.size(2) - 1

    def parts(self, row: int, length: int) -> list[Tensor]:
        """Return views of all that a row of `length` tokens remembers."""
        live = min(length, self.size)
        return [self.keys[row, :, :live], self.values[row, :, :live]]

    def write(self, k: Tensor, v: Tensor, span: "Span") -> None:
        """Put the keys and values of a call, (B, T, G, D), where the span says."""
        self._put([(self.keys, k), (self.values, v)], span)

    def read(self, span: "Span") -> tuple[Tensor, Tensor]:
        """Return the keys and values that the span's rows look at, (B, G, S, D) each."""
        live = min(span.read, self.size)
        return self.keys[span.rows, :, :live], self.values[span.rows, :, :live]

    def _put(self, pairs: list[tuple[Tensor, Tensor]], span: "Span") -> None:
        stretch = span.stretch(self.size)
        if stretch is not None:
            for ring, new in pairs:
                ring[span.rows, :, stretch] = new.transpose(1, 2)
            return
        slots = span.positions.remainder(self.size)  # (B, T)
        if span.padded:
            slots = torch.where(span.positions < 0, self.size, slots)
        for ring, new in pairs:
            ring[span.index, :, slots] = new.to(ring.dtype)


class Latents(KeyValues):
    """One head of keys that are their own values: what all heads of a latent attention make theirs from.

    A key is [latent | rotated part], and a value's features after the latent are for nobody: kept in one tensor, it costs
    `kv_lora_rank + qk_rope_head_dim` numbers a token (arXiv:2405.04434).
    """

    @classmethod
    def zeros(
        cls, rows: int, length: int, chunk: int, width: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> "Latents":
        """Return the empty memory of one layer; see `KeyValues.zeros`."""
        size = length if window is None else min(length, window - 1 + chunk)
        keys = empty_memory((rows, 1, size + 1, width), dtype, device)
        return cls(keys, keys, window, rewinds_freely=size == length)

    def parts(self, row: int, length: int) -> list[Tensor]:
        """Return views of all that a row of `length` tokens remembers."""
        return super().parts(row, length)[:1]

    def write(self, k: Tensor, v: Tensor, span: "Span") -> None:
        """Put the keys of a call, (B, T, 1, width), where the span says."""
        self._put([(self.keys, k)], span)


@dataclass
class Recent:
    """What went into a recurrent layer at the last N tokens, in a ring."""

    inputs: Tensor  # (R, N + 1, C); the last slot takes what need not be kept and is never read
    rewinds_freely: bool = False  # what a state has folded into itself cannot be taken out again

    @classmethod
    def zeros(cls, rows: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> "Recent":
        """Return the empty memory of one layer, of `size` tokens and `width` numbers each."""
        return cls(torch.zeros((rows, size + 1, width), dtype=dtype, device=device))

    @property
    def size(self) -> int:
        """How many tokens the ring holds."""
        return self.inputs.size(1) - 1

    def parts(self, row: int, length: int) -> list[Tensor]:
        """Return views of all that a row of `length` tokens remembers."""
        return [self.inputs[row, : min(length, self.size)]]

    def read(self, span: "Span") -> tuple[Tensor, Tensor]:
        """Return the inputs of the N tokens before a call and their positions, (B, N, C) and (B, N); zeros where there was none."""
        places = span.starts.unsqueeze(1) + torch.arange(-self.size, 0, device=span.starts.device)  # (B, N)
        inputs = self.inputs[span.index[:, :1], places.remainder(max(self.size, 1))]  # a kernel of 1 looks back at nothing
        return inputs.masked_fill((places < 0).unsqueeze(-1), 0.0), places

    def write(self, inputs: Tensor, span: "Span") -> None:
        """Keep the last N of a call's inputs (B, T, C)."""
        kept = span.positions >= (span.ends - self.size).clamp(min=0).unsqueeze(1)  # (B, T)
        slots = torch.where(kept, span.positions.remainder(max(self.size, 1)), self.size)
        self.inputs[span.index, slots] = inputs.to(self.inputs.dtype)


@dataclass
class DeltaState(Recent):
    """The matrix of a delta rule, and the inputs that are not yet part of it.

    The matrix stands for the tokens before the row's floor. What came since is computed from the inputs in every call,
    so that a row is truncated by changing its length alone.
    """

    matrix: Tensor = field(kw_only=True)  # (R, H, K, V), fp32: its errors add up

    def parts(self, row: int, length: int) -> list[Tensor]:
        """Return views of all that a row of `length` tokens remembers."""
        return [*super().parts(row, length), self.matrix[row]]

    def read_matrix(self, span: "Span") -> Tensor:
        """Return the matrices at the floors before the call, (B, H, K, V)."""
        return self.matrix[span.rows].masked_fill((span.floors[:, 0] == 0).view(-1, 1, 1, 1), 0.0)

    def write_matrix(self, matrix: Tensor, span: "Span") -> None:
        """Put the matrices at the floors after the call, (B, H, K, V)."""
        self.matrix[span.rows] = matrix


@dataclass
class Span:
    """Where the tokens of one call go: B rows of at most T new tokens each, or, packed, (1, N) with all of them in a line."""

    cache: "Cache"
    numbers: list[int]  # the rows, as Python ints
    counts: list[int]  # how many new tokens each row gets
    rows: slice | Tensor  # the same rows, as what picks them from a state
    index: Tensor  # (B, 1) or (1, N), the row of every token
    positions: Tensor  # (B, T) or (1, N), -1 is padding
    starts: Tensor  # (B,) lengths before the call
    ends: Tensor  # (B,) lengths after it
    floors: Tensor  # (B, 2) floors before and after the call
    padded: bool
    packed: bool
    aligned: bool  # all rows have the same length, and attention reads just that
    read: int  # how many slots attention looks at

    def commit(self) -> None:
        """Count the tokens as remembered. The model calls it once every layer has seen them."""
        self.cache.advance(self.numbers, self.counts)

    def stretch(self, size: int) -> slice | None:
        """Return the slots of a ring of `size` that the tokens fill, where that is the same unbroken run in every row."""
        if not self.aligned or not isinstance(self.rows, slice):
            return None
        first = (self.read - self.counts[0]) % size
        return slice(first, first + self.counts[0]) if first + self.counts[0] <= size else None

    def pieces(self) -> list[tuple[slice, "Span"]]:
        """Split a packed call by rows."""
        found, start = [], 0
        for i, (row, n) in enumerate(zip(self.numbers, self.counts, strict=True)):
            if n == 0:
                continue
            at, here = slice(start, start + n), slice(i, i + 1)
            parts = dict(index=self.index[:, at], positions=self.positions[:, at])
            rows = dict(starts=self.starts[here], ends=self.ends[here], floors=self.floors[here], rows=slice(row, row + 1))
            read = self.cache.lengths[row] + n
            found.append((at, replace(self, counts=[n], packed=False, aligned=True, read=read, **parts, **rows)))
            start += n
        return found

    def last(self) -> Tensor:
        """Return where, among all tokens of the call, each row's last one stands, (B,)."""
        width = self.positions.size(1)
        before = list(accumulate(self.counts, initial=0)) if self.packed else range(0, width * len(self.counts), width)
        return upload([start + n - 1 for start, n in zip(before, self.counts, strict=False)], self.positions.device)


@dataclass
class Snapshot:
    """A copy of what one row remembers, see `Cache.snapshot`."""

    length: int
    floor: int
    parts: list[list[Tensor]]


class Cache:
    """The states of all layers and, as Python ints, the length of every row.

    A row's floor is the shortest length it can be truncated to: its last `rewind` tokens can always be taken back.

    Args:
        states: One per layer, None for a layer without a mixer.
        rows: How many sequences fit.
        length: How many tokens fit in a row.
        chunk: The most tokens that one call may add to a row.
        rewind: How many tokens `truncate` can undo.
        device: Where the states lie.
    """

    def __init__(self, states: Sequence[State | None], rows: int, length: int, chunk: int, rewind: int, device: torch.device) -> None:
        self.states, self.length, self.chunk, self.rewind, self.device = list(states), length, chunk, rewind, device
        self.bucket = 1  # attention reads a multiple of so many slots, which is what compiled decoding needs
        rings = [state for state in self.states if isinstance(state, KeyValues)]
        self.sizes = {None: length} | {ring.window: ring.size for ring in rings}  # by window
        self.lengths, self.floors = [0] * rows, [0] * rows
        self.rewinds_freely = all(state is None or state.rewinds_freely for state in self.states)

    def span(self, counts: Sequence[int], rows: Sequence[int] | None = None, packed: bool = False) -> Span:
        """Say which rows the next call continues, and by how many tokens each.

        Args:
            counts: New tokens of each row.
            rows: Which rows; by default the first ones.
            packed: The tokens of all rows stand in one line, (1, N), instead of (B, T) padded to the longest at the right.

        Raises:
            ValueError: More tokens than a call may add, or than fit.
        """
        rows = list(range(len(counts))) if rows is None else list(rows)
        counts, starts = list(counts), [self.lengths[row] for row in rows]
        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        if max(counts) > self.chunk or max(ends) > self.length:
            raise ValueError(
                f"A call may add {self.chunk} tokens to a row of at most {self.length}, but got {counts} for rows of {starts}."
            )
        width = max(counts)
        padded = not packed and (self.bucket > 1 or min(counts) < width)  # a fixed form for compiled decoding
        index, positions = _packed_places(rows, starts, ends) if packed else _padded_places(rows, starts, ends, width)
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        floors = [[self.floors[row], self._floor(row, end)] for row, end in zip(rows, ends, strict=True)]
        put: Callable[[list], Tensor] = lambda values: upload(values, self.device)  # noqa: E731
        picked = slice(rows[0], rows[0] + len(rows)) if adjacent else put(rows)
        read = min(-(-max(ends) // self.bucket) * self.bucket, self.length)
        aligned = self.bucket == 1 and not padded and not packed and min(starts) == max(starts)
        tensors = [put(values) for values in (index, positions, starts, ends, floors)]
        return Span(self, rows, counts, picked, *tensors, padded=padded, packed=packed, aligned=aligned, read=read)

    def truncate(self, row: int, n: int) -> int:
        """Forget all but the first n tokens; return how many the row still knows: n, or 0 where n is below its floor."""
        n = min(n, self.lengths[row])
        if n < self.floors[row]:
            n = 0
        self.lengths[row] = n
        self.floors[row] = min(self.floors[row], n)
        return n

    def snapshot(self, row: int) -> Snapshot:
        """Return a copy of what a row remembers."""
        parts = [[part.clone() for part in parts] for parts in self._parts(row, self.lengths[row])]
        return Snapshot(self.lengths[row], self.floors[row], parts)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make a row, this one or another, remember what a snapshot holds."""
        self.lengths[row], self.floors[row] = snapshot.length, snapshot.floor
        self._fill(row, snapshot.parts)

    def copy(self, src: int, dst: int) -> None:
        """Make row `dst` remember what row `src` does."""
        self.lengths[dst], self.floors[dst] = self.lengths[src], self.floors[src]
        self._fill(dst, self._parts(src, self.lengths[src]))

    def advance(self, rows: list[int], counts: list[int]) -> None:
        """Count new tokens as remembered; `Span.commit` calls it."""
        for row, n in zip(rows, counts, strict=True):
            self.lengths[row] += n
            self.floors[row] = self._floor(row, self.lengths[row])

    def _parts(self, row: int, length: int) -> list[list[Tensor]]:
        return [state.parts(row, length) for state in self.states if state is not None]

    def _fill(self, row: int, parts: list[list[Tensor]]) -> None:
        for ours, saved in zip(self._parts(row, self.lengths[row]), parts, strict=True):
            for part, value in zip(ours, saved, strict=True):
                part.copy_(value)

    def _floor(self, row: int, length: int) -> int:
        return 0 if self.rewinds_freely else max(self.floors[row], length - self.rewind)


def _packed_places(rows: list[int], starts: list[int], ends: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return row and position of every token, (1, N) each."""
    index = [row for row, a, b in zip(rows, starts, ends, strict=True) for _ in range(b - a)]
    return [index], [[place for a, b in zip(starts, ends, strict=True) for place in range(a, b)]]


def _padded_places(rows: list[int], starts: list[int], ends: list[int], width: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return each row, (B, 1), and the position of every token, (B, width), -1 behind a row's last one."""
    positions = [[*range(a, b)] + [-1] * (width - (b - a)) for a, b in zip(starts, ends, strict=True)]
    return [[row] for row in rows], positions
