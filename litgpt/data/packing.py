"""How samples become microbatches: padded to one length, or laid end to end in rows, which costs no padding."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from litgpt.loss import IGNORED

Sample = Tensor | Mapping[str, Any]  # token ids (T,), or `input_ids` and `labels`, both (T,), and maybe `lengths`: of the texts in it


class Microbatch(NamedTuple):
    """What one forward pass sees."""

    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), the id that follows each; -100 does not count
    n_tokens: int = 0  # without padding
    lengths: list[int] | None = None  # of the texts that are laid end to end, where B is 1; None if each row is one
    unpadded: list[int] | None = None  # how long each row is without padding; None if there is none


def microbatches_of(
    samples: Sequence[Sample], micro_batch_size: int, packing: bool = False, max_length: int | None = None
) -> list[Microbatch]:
    """Return the samples as microbatches, the fullest first, so that memory runs out early if at all.

    Args:
        samples: Those of one rank in one step.
        micro_batch_size: How many one microbatch holds if they are padded.
        packing: Lay them end to end instead, as many as fit a row that is no longer than `micro_batch_size` of the longest ones. Samples
            that are plain ids have one length, and stay as they are.
        max_length: How long samples get; by default as the longest of these.
    """
    if packing and samples and isinstance(samples[0], Mapping):
        capacity = micro_batch_size * (max_length or max(len(sample["input_ids"]) for sample in samples))
        return [end_to_end([samples[i] for i in row]) for row in pack([n_inputs(sample) for sample in samples], capacity)]
    ordered = sorted(samples, key=lambda sample: -len(_ids(sample)))
    return [padded(ordered[i : i + micro_batch_size]) for i in range(0, len(ordered), micro_batch_size)]


def padded(samples: Sequence[Sample]) -> Microbatch:
    """Return samples as one microbatch, a row each: targets are what follows, and shorter samples are padded on the right."""
    ids, targets = zip(*(pair for sample in samples for pair in _shifted(sample)), strict=True)
    batch, lengths = pad_sequence(ids, batch_first=True).long(), list(map(len, ids))
    unpadded = lengths if min(lengths) < max(lengths) else None
    return Microbatch(batch, pad_sequence(targets, batch_first=True, padding_value=IGNORED).long(), sum(lengths), unpadded=unpadded)


def end_to_end(samples: Sequence[Sample]) -> Microbatch:
    """Return samples as one microbatch of one row, in which no text sees another: targets are what follows within each."""
    ids, targets = zip(*(pair for sample in samples for pair in _shifted(sample)), strict=True)
    row = torch.cat(ids).long().unsqueeze(0)
    return Microbatch(row, torch.cat(targets).long().unsqueeze(0), row.numel(), list(map(len, ids)))


def without_padding(microbatch: Microbatch) -> Microbatch:
    """Return the same texts end to end in one row, if some are padded."""
    if microbatch.unpadded is None:
        return microbatch
    ids, targets = (torch.cat([row[:n] for row, n in zip(rows, microbatch.unpadded, strict=True)]) for rows in microbatch[:2])
    return Microbatch(ids.unsqueeze(0), targets.unsqueeze(0), microbatch.n_tokens, microbatch.unpadded)


def rounded_up(microbatch: Microbatch, multiple: int) -> Microbatch:
    """Return texts laid end to end and, behind them, one of ignored tokens that makes the row's length a multiple; others as they are."""
    ids, targets, n_tokens, lengths, _ = microbatch
    if lengths is None or not (surplus := -ids.numel() % multiple):
        return microbatch
    return Microbatch(F.pad(ids, (0, surplus)), F.pad(targets, (0, surplus), value=IGNORED), n_tokens, [*lengths, surplus])


def evened(microbatches: list[Microbatch], n_microbatches: int) -> list[Microbatch]:
    """Return the same microbatches, followed by ones without targets until there are as many as on the other ranks."""
    ignored = Microbatch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED))
    return microbatches + [ignored] * (n_microbatches - len(microbatches))


def n_inputs(sample: Sample) -> int:
    """Return how many tokens of a sample a forward pass sees: each text's last one is only predicted."""
    lengths = sample.get("lengths") if isinstance(sample, Mapping) else None
    return sum(max(1, n - 1) for n in lengths or [len(_ids(sample))])


def _shifted(sample: Sample) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield ids and targets of each text in a sample. A single token has nothing to predict, but a row must not be empty."""
    ids, labels = _ids(sample), sample if isinstance(sample, Tensor) else sample["labels"]
    lengths = (sample.get("lengths") if isinstance(sample, Mapping) else None) or [len(ids)]
    for text, told in zip(ids.split(lengths), labels.split(lengths), strict=True):
        yield text[: max(1, len(text) - 1)], told[1:] if len(told) > 1 else torch.full((1,), IGNORED)


def _ids(sample: Sample) -> Tensor:
    return sample if isinstance(sample, Tensor) else sample["input_ids"]


# Rows


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows, each the numbers of what it holds, by best-fit decreasing: the longest first, each into the fullest row it fits.

    Args:
        lengths: Of what is to be packed.
        capacity: How much a row holds. What is longer gets a row of its own.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = defaultdict(list)  # the rows that have so much room left
    rooms = 0  # bit r says whether there are rows with room r: the lowest of those bits that are high enough is the best fit
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        if enough := rooms >> n:
            room = n + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = [], max(capacity, n)
            rows.append(row)
        row.append(i)
        if room > n:
            with_room[room - n].append(row)
            rooms |= 1 << (room - n)
    return rows


class PackedSamples(Sequence[Mapping[str, Any]]):
    """Rows of samples laid end to end, filled from the whole data set; a row counts as one sample.

    A row is `{"input_ids": (T,), "labels": (T,), "lengths": [...]}`. Which samples it holds depends on their lengths alone, so a run
    that is resumed finds the same rows. What else the data set knows (`data`, `example`, `prompt_style`, ...) it is asked for.

    Args:
        samples: The samples: mappings with `input_ids` and `labels`.
        capacity: How many tokens a row holds; by default as many as the longest sample.
    """

    def __init__(self, samples: Sequence[Mapping[str, Tensor]], capacity: int | None = None) -> None:
        self.samples = samples
        lengths = getattr(samples, "lengths", None) or [len(samples[i]["input_ids"]) for i in range(len(samples))]
        self.rows = pack(lengths, capacity or max(lengths, default=1))
        self.lengths = [sum(lengths[i] for i in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        held = [self.samples[i] for i in self.rows[index]]
        row = {key: torch.cat([sample[key] for sample in held]) for key in ("input_ids", "labels")}
        return row | {"lengths": [len(sample["input_ids"]) for sample in held]}

    def __getattr__(self, name: str) -> Any:
        if name == "samples":  # not there yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.samples, name)
