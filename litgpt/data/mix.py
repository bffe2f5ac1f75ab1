"""Several data sets as one, each with its share."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from litgpt.data.base import DataModule, Samples, SFTDataset, get_sft_collate_fn, seeded
from litgpt.errors import UserError
from litgpt.loss import IGNORED
from litgpt.prompts import Message, PromptStyle
from litgpt.tokenizer import Tokenizer


@dataclass(eq=False)
class Mix(DataModule):
    """Several data sets as one, each with its share of the samples and its own prompt style.

    Without weights, an epoch sees every sample of every source once. With weights it has as many samples as all sources together (or
    `n_samples`), and each source gets its share of them, to within one sample. Where that is more than the source has, it is gone
    through several times, the last time in part; where it is less, some of its samples are drawn. They are the same in every epoch.

    What the sources hold out is validated on, all of it once. Each source has its own prompt style; that of the first one is saved with
    the checkpoint.
    """

    sources: list[DataModule]
    """The data sets, such as `[{"class_path": "JSON", "init_args": {"json_path": "a.json"}}, {"class_path": "Dolly"}]`."""
    weights: list[float] | None = None
    """For each source its share of the samples, such as `[0.7, 0.3]`; they need not add up to 1. By default as many as it has."""
    n_samples: int | None = None
    """How many samples an epoch has, with `weights`. By default as many as all sources together."""
    seed: int = 42
    """Decides which samples are drawn. How a source is split is decided by its own seed."""
    ignore_index: int = IGNORED
    """The label of tokens that are not trained on, in all sources. Finetuning always takes -100, whatever this says."""
    num_workers: int = 0
    """How many processes the loaders (`train_dataloader`, `val_dataloader`) use. The training scripts put batches together without them."""

    def __post_init__(self) -> None:
        super().__init__()
        if not self.sources:
            raise UserError("`sources` names the data sets to mix, but is empty.")
        if self.weights is None:
            if self.n_samples is not None:
                raise UserError(f"`n_samples` {self.n_samples} is how many samples `weights` share out, but there are none. Set them too.")
            return
        if len(self.weights) != len(self.sources) or not all(0 < weight < math.inf for weight in self.weights):
            raise UserError(f"`weights` has one positive number for each of the {len(self.sources)} sources, but is {self.weights}.")
        if self.n_samples is not None and self.n_samples < 1:
            raise UserError(f"`n_samples` is a positive number, but is {self.n_samples}. Leave it out to take as many as there are.")

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Tell all sources what they are read for."""
        super().connect(tokenizer, batch_size, max_seq_length)
        for source in self.sources:
            source.connect(tokenizer, batch_size, max_seq_length)

    def prepare_data(self) -> None:
        """Download what is not there."""
        for source in self.sources:
            source.prepare_data()

    def setup(self, stage: str = "") -> None:
        """Read all sources and choose the samples of an epoch."""
        for source in self.sources:
            source.ignore_index = self.ignore_index
            source.setup(stage)
            if not isinstance(source.train_dataset, SFTDataset | MixedSamples):
                raise UserError(f"{type(source).__name__} has no instructions with answers, so it cannot be a part of a Mix.")
        parts = [source.train_dataset for source in self.sources]
        held_out = [source.val_dataset for source in self.sources if source.val_dataset]
        self.train_dataset = MixedSamples(parts, self._chosen([len(part) for part in parts]))
        self.val_dataset = MixedSamples(held_out, [torch.arange(len(part)) for part in held_out]) if held_out else []
        self.collate_fn = get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index)

    def _chosen(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return for each source which of its samples an epoch has."""
        if self.weights is None:
            return [torch.arange(size) for size in sizes]
        counts, generator = shares(self.weights, self.n_samples or sum(sizes)), seeded(self.seed)
        return [repeated(size, count, generator) for size, count in zip(sizes, counts)]


class MixedSamples(Samples):
    """Samples of several data sets, laid among each other evenly: any beginning of it has each one's share.

    Args:
        parts: The data sets.
        chosen: For each of them, which of its samples are in it.

    Attributes:
        lengths: The number of tokens of each sample.
        n_targets: How many of those are trained on.
        highest_id: The highest token id of all samples.
        data: The mappings of all parts, one part after the other.
        n_lost: How many tokens of `data` are cut off or missing.
        n_kept: How many tokens the samples of all parts have, chosen or not.
        prompt_style: How the prompts of the first part are written.
    """

    def __init__(self, parts: Sequence["SFTDataset | MixedSamples"], chosen: Sequence[Tensor]) -> None:
        places = torch.cat([(torch.arange(len(those)) + 0.5) / len(those) for those in chosen])
        order = places.sort(stable=True).indices
        owners = torch.cat([torch.full((len(those),), i) for i, those in enumerate(chosen)])
        self.parts = parts
        self._owners, self._indices = owners[order].tolist(), torch.cat(list(chosen))[order].tolist()
        self.lengths, self.n_targets = self._of_each("lengths"), self._of_each("n_targets")
        self.highest_id = max(part.highest_id for part in parts)
        self.data = ConcatDataset([part.data for part in parts])
        starts = [0, *self.data.cumulative_sizes]
        self.cut = [start + i for start, part in zip(starts, parts) for i in part.cut]
        self.dropped = {
            reason: [start + i for start, part in zip(starts, parts) for i in part.dropped[reason]] for reason in parts[0].dropped
        }
        self.n_lost = sum(part.n_lost for part in parts)
        self.n_kept = sum(part.n_kept for part in parts)
        self.prompt_style: PromptStyle = parts[0].prompt_style

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.parts[self._owners[index]][self._indices[index]]

    def messages(self, index: int) -> list[Message]:
        """The messages of `data[index]`, answers included."""
        part, index = self._part_of(index)
        return part.messages(index)

    def style_of(self, index: int) -> PromptStyle:
        """How `data[index]` is written."""
        part, index = self._part_of(index)
        return part.style_of(index)

    def example(self, index: int) -> tuple[list[Message], str]:
        """The messages of `data[index]` that lead to its last answer, and that answer."""
        part, index = self._part_of(index)
        return part.example(index)

    def place(self, index: int) -> str:
        """Where `data[index]` comes from, in words."""
        part, index = self._part_of(index)
        return part.place(index)

    def _part_of(self, index: int) -> "tuple[SFTDataset | MixedSamples, int]":
        """Return the part that `data[index]` is in, and which of its own mappings it is."""
        owner = bisect_right(self.data.cumulative_sizes, index)
        return self.parts[owner], index - (self.data.cumulative_sizes[owner - 1] if owner else 0)

    def _of_each(self, name: str) -> list[int]:
        values = [getattr(part, name) for part in self.parts]
        return [values[owner][index] for owner, index in zip(self._owners, self._indices)]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Return how many of `total` samples each weight gets: its share, rounded so that all are given out.

    Every count is less than one sample off. Those with the largest remainders are rounded up.

    Args:
        weights: Positive numbers.
        total: How many there are to give.
    """
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def repeated(n_available: int, n_wanted: int, generator: torch.Generator) -> Tensor:
    """Return the indices of `n_wanted` samples: all of them as often as that goes, and some drawn at random.

    Args:
        n_available: How many samples there are.
        n_wanted: How many are wanted.
        generator: Draws them.
    """
    times, rest = divmod(n_wanted, n_available)
    drawn = torch.randperm(n_available, generator=generator)[:rest].sort().values
    return torch.cat([torch.arange(n_available).repeat(times), drawn])
