"""How the samples of a run are laid out in its microbatches: how many there are, how large they get, and what of them is padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from litgpt.args import TrainArgs
from litgpt.data.packing import PackedSamples, Sample, n_inputs, pack
from litgpt.loss import ROW_MULTIPLE
from litgpt.training import longest_sample, steps, steps_per_epoch

MOST_STEPS = 5000  # so many of an epoch are looked at


@dataclass(frozen=True)
class Batches:
    """The microbatches of a run's first epoch, or of its steps if these are fewer, as one device sees them.

    Tokens are those that go into the model: no sample's last one.
    """

    rows: int
    """Of the fullest microbatch."""
    length: int
    """How many tokens each of its rows has."""
    lengths: list[int] | None
    """Of the texts in its row, if they are laid end to end."""
    later: int
    """How many tokens the fullest of those has, with padding, that come after another one in their step; 0 if none does."""
    n_sizes: int
    """How many different numbers of tokens they have for products in bf16 on a CPU."""
    most: int
    """How many microbatches a step has at most."""
    n_microbatches: float
    """And on average."""
    n_tokens: float
    """How many tokens a step has on average over all devices, padding aside."""
    n_slots: float
    """The same with padding."""

    @property
    def largest(self) -> int:
        """How many tokens the fullest microbatch has, with padding."""
        return self.rows * self.length

    @property
    def padding(self) -> float:
        """The share of all tokens that is padding."""
        return 1 - self.n_tokens / self.n_slots


def batches_of(samples: Sequence[Sample], train: TrainArgs, seed: int, n_devices: int = 1) -> Batches:
    """Return how the training script would lay out samples, of which at most some thousand steps are looked at.

    Args:
        samples: All of them.
        train: Batch sizes, and whether samples are packed.
        seed: Of the order of the samples.
        n_devices: How many share the samples of a step.
    """
    return batches_of_texts(texts_of(samples), longest_sample(samples, train), train, seed, n_devices)


def batches_of_texts(texts: list[list[int]], longest: int | None, train: TrainArgs, seed: int = 0, n_devices: int = 1) -> Batches:
    """Return the same for samples of which `texts_of` and `training.longest_sample` are known."""
    packing = bool(train.packing)
    n_steps = min(MOST_STEPS, train.max_steps or MOST_STEPS, steps_per_epoch(len(texts), train.global_batch_size))
    counts, sizes, n_tokens, n_slots, fullest, later = [], set(), 0, 0, [[1]], 0
    for drawn in islice(steps(len(texts), train.global_batch_size, seed), n_steps):
        for rank in range(min(n_devices, len(drawn.indices))):
            mine = [texts[i] for i in drawn.indices[rank::n_devices]]
            microbatches = laid_out(mine, train.micro_batch_size, packing, longest)
            counts.append(len(microbatches))
            n_tokens, n_slots = n_tokens + sum(map(sum, mine)), n_slots + sum(map(slots, microbatches))
            sizes.update(math.ceil(slots(rows) / ROW_MULTIPLE) if packing else slots(rows) for rows in microbatches)
            fullest = max(fullest, *microbatches, key=slots)
            later = max(later, *map(slots, microbatches[1:]), 0)
    means = sum(counts) / len(counts), n_tokens / n_steps, n_slots / n_steps
    return Batches(len(fullest), max(map(sum, fullest)), fullest[0] if packing else None, later, len(sizes), max(counts), *means)


def texts_of(samples: Sequence[Sample]) -> list[list[int]]:
    """Return how many tokens of each text in each sample go into the model."""
    if isinstance(samples, PackedSamples):
        known = _lengths(samples.samples)
        return [[max(1, known[i] - 1) for i in row] for row in samples.rows]
    return [[max(1, n - 1)] for n in _lengths(samples)]


def _lengths(samples: Sequence[Sample]) -> list[int]:
    return getattr(samples, "lengths", None) or [n_inputs(samples[i]) + 1 for i in range(len(samples))]


def laid_out(texts: list[list[int]], micro_batch_size: int, packing: bool, longest: int | None) -> list[list[list[int]]]:
    """Return microbatches of rows of texts, all as lengths; see `packing.microbatches_of`."""
    sizes = list(map(sum, texts))
    if packing:
        capacity = micro_batch_size * (longest or max(sizes) + 1)
        return [[[n for i in row for n in texts[i]]] for row in pack(sizes, capacity)]
    ordered = sorted(texts, key=sum, reverse=True)
    return [ordered[i : i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]


def slots(rows: list[list[int]]) -> int:
    """Return how many tokens a microbatch has, with padding."""
    return len(rows) * max(map(sum, rows))
