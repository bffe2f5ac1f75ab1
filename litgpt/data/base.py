"""What every data set is made of: a module that yields loaders, and the data set of finetuning samples."""

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from litgpt.config import Config
from litgpt.data.records import messages_of, shown, tools_of
from litgpt.errors import UserError, did_you_mean
from litgpt.loss import IGNORED
from litgpt.prompts import Message, PromptStyle, encode_training, find_prompt_style
from litgpt.prompts.encode import TrainOn
from litgpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
Truncation = Literal["drop", "left", "right", "error"]

NAMED = 3  # so many samples are named where some are cut or dropped
TOO_LONG, NO_TARGET = "longer than `max_seq_length`", "without a target"  # why samples are dropped


class DataModule(LightningDataModule):
    """Base of all data sets. A subclass has to define its two loaders, or to set the two data sets in `setup`.

    The training scripts call `connect`, `prepare_data` (on one process first), `setup`, and then ask for loaders.
    """

    tokenizer: Tokenizer | None = None
    batch_size: int = 1
    max_seq_length: int = -1
    seed: int = 42
    num_workers: int = 0
    train_dataset: Dataset | None = None
    val_dataset: Dataset | None = None
    collate_fn: Callable | None = None

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Tell the data set what it is read for.

        Args:
            tokenizer: Turns text into ids.
            batch_size: How many samples a batch of the loaders holds.
            max_seq_length: Samples are cut to this many tokens; -1 or None leaves them whole.
        """
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length

    def setup(self, stage: str = "") -> None:
        """Read the data. Runs on every process, after `prepare_data`."""

    def train_dataloader(self) -> DataLoader:
        """Batches of the training samples, in an order that depends on the seed alone."""
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation samples, in the order of the file."""
        return self._loader(self.val_dataset, shuffle=False)

    def _loader(self, dataset: Dataset | None, shuffle: bool) -> DataLoader:
        if dataset is None:
            raise UserError(f"{type(self).__name__} has no samples yet. Call `connect`, `prepare_data` and `setup` first.")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle and len(dataset) > 0,
            generator=seeded(self.seed),  # without one, a loader draws from torch's global generator
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )


@dataclass(kw_only=True, eq=False)
class SFTModule(DataModule):
    """Base of the data sets for finetuning: a subclass only has to say in `records` what its samples are."""

    train_on: TrainOn | None = None
    """What is learned: every answer of the `assistant` and the token that ends it, only the `last` answer of a conversation, or `all`,
    the prompts too. By default `assistant`, or `all` if `mask_prompt` is false."""
    mask_prompt: bool | None = None
    """Whether only answers are trained on, and not the prompts: true is `train_on` `assistant`, false is `all`. By default as it says."""
    truncation: Truncation = "right"
    """What happens to samples of more than `max_seq_length` tokens: they lose their end (`right`) or their beginning (`left`), or are
    left out (`drop`), all of which is counted and reported; or the run does not begin (`error`)."""
    prompt_style: str | PromptStyle | None = None
    """How a prompt is written. By default as the checkpoint says: its own prompt style, else its chat template, else `alpaca`."""
    ignore_index: int = IGNORED
    """The label of tokens that are not trained on. Finetuning always takes -100, whatever this says."""
    seed: int = 42
    """The seed of the split and of the loaders' order."""
    num_workers: int = 0
    """How many processes the loaders (`train_dataloader`, `val_dataloader`) use. The training scripts put batches together without them."""

    def __post_init__(self) -> None:
        super().__init__()
        what_is_trained(self.train_on, self.mask_prompt)  # refuses what contradicts itself
        check_choice("truncation", self.truncation, Truncation)

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its samples are: define `records`.")

    def setup(self, stage: str = "") -> None:
        """Read the samples and encode each once."""
        if self.tokenizer is None:
            raise UserError(f"{type(self).__name__} needs a tokenizer. Give it one with `connect`.")
        options = dict(
            prompt_style=self._style(),
            max_seq_length=self.max_seq_length,
            ignore_index=self.ignore_index,
            train_on=what_is_trained(self.train_on, self.mask_prompt),
            truncation=self.truncation,
        )
        self.train_dataset, self.val_dataset = (SFTDataset(data, self.tokenizer, **options) for data in self.records())
        self.collate_fn = get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index)
        if len(self.train_dataset) == 0:
            n, length = len(self.train_dataset.data), self.max_seq_length
            if n == 0:
                raise UserError(f"{type(self).__name__} has no samples to train on. Look at the files that its options name.")
            raise UserError(f"All {n} samples are dropped at `max_seq_length` {length}, so there is nothing to train on. Raise it.")
        if len(self.val_dataset.data) and not len(self.val_dataset):
            log.warning("No validation sample is left, so this run validates nothing.")

    def _style(self) -> PromptStyle:
        folder = self.tokenizer.checkpoint_dir
        try:
            config = Config.from_checkpoint(folder)
        except UserError:  # a tokenizer alone, or that of a model which we cannot run
            config = None
        return find_prompt_style(folder, self.tokenizer, self.prompt_style, config=config, for_instructions=True)


def what_is_trained(train_on: TrainOn | None, mask_prompt: bool | None) -> TrainOn:
    """Which tokens are trained on, by the option for that and the older one.

    Raises:
        UserError: They contradict each other, or there is no such choice.
    """
    if train_on is None:
        return "all" if mask_prompt is False else "assistant"
    check_choice("train_on", train_on, TrainOn)
    if mask_prompt is not None and mask_prompt == (train_on == "all"):
        raise UserError(f"`mask_prompt` is {str(mask_prompt).lower()}, but `train_on` is {train_on!r}. Leave one of them out.")
    return train_on


def check_choice(option: str, value: str, kind: Any) -> None:
    """Raise a UserError for a word that is none of a `Literal`: in Python nobody looks at it before."""
    if value not in (choices := get_args(kind)):
        hint = did_you_mean(str(value), choices)
        raise UserError(f"`{option}` must be one of {', '.join(map(repr, choices))}, but is {value!r}.{hint}")


class Samples(Dataset):
    """Base of what finetuning samples are read from.

    Attributes:
        cut: Which mappings of the data were longer than `max_seq_length` and are cut, once for each sample
            that was, if something is left to train on.
        dropped: Which of them are missing, by the reason.
    """

    cut: list[int]
    dropped: dict[str, list[int]]

    @property
    def n_cut(self) -> int:
        """How many samples are cut."""
        return len(self.cut)

    @property
    def n_dropped(self) -> int:
        """How many samples are missing, because they were too long or had nothing to train on."""
        return sum(map(len, self.dropped.values()))


class SFTDataset(Samples):
    """Finetuning samples, each encoded once: `{"input_ids": (T,), "labels": (T,)}`, both int64.

    Labels are the ids themselves, not shifted, with `ignore_index` where a token is not trained on. A sample may become several
    (a conversation whose prompts are not prefixes of each other), or none, if it is dropped.

    Args:
        data: Mappings with `instruction`, `output` and maybe `input`, or with `messages`, a list of `{"role": ..., "content": ...}`, and
            maybe `tools`; see `messages_of`.
        tokenizer: Turns text into ids.
        prompt_style: How a prompt is written, or its name.
        max_seq_length: Longer samples are handled as `truncation` says; -1 leaves them whole.
        mask_prompt: Whether only answers are trained on.
        ignore_index: The label of what is not trained on.
        transform: Applied to a copy of each mapping first.
        train_on: Whether all answers (`assistant`), the `last` one, or `all` tokens are trained on. By default as `mask_prompt` says.
        truncation: Whether a sample that is too long loses its end (`right`), its beginning without the BOS token (`left`), is left out
            (`drop`), or is refused (`error`).

    Attributes:
        data: The mappings, as they were given.
        empty: Which of them have an answer without a word.
        lengths: The number of tokens of each sample.
        n_targets: The number of tokens of each sample that are trained on.
        highest_id: The highest token id of all samples.
        n_lost: How many tokens are cut off or missing.

    Raises:
        UserError: A sample misses a key, a value is not text, the prompt style cannot write it, or it is too long.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        prompt_style: str | PromptStyle,
        max_seq_length: int = -1,
        mask_prompt: bool = True,
        ignore_index: int = IGNORED,
        transform: Callable[[Any], Any] | None = None,
        train_on: TrainOn | None = None,
        truncation: Truncation = "right",
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.prompt_style = PromptStyle.from_name(prompt_style) if isinstance(prompt_style, str) else prompt_style
        self.max_seq_length = max_seq_length
        self.train_on = what_is_trained(train_on, None if mask_prompt else False)  # true is the default, and contradicts nothing
        check_choice("truncation", truncation, Truncation)
        self.truncation = truncation
        self.ignore_index = ignore_index
        self.transform = transform
        self.lengths: list[int] = []
        self.n_targets: list[int] = []
        self.cut: list[int] = []
        self.dropped: dict[str, list[int]] = {TOO_LONG: [], NO_TARGET: []}
        self.empty: list[int] = []
        self.n_lost = 0
        self._encode()
        self._report()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_kept(self) -> int:
        """How many tokens all samples have."""
        return sum(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        span = slice(self._starts[index], self._starts[index] + self.lengths[index])
        ids = self._ids[span].to(torch.int64)
        return {"input_ids": ids, "labels": ids.masked_fill(~self._trained[span], self.ignore_index)}

    def messages(self, index: int) -> list[Message]:
        """The messages of `data[index]`, answers included."""
        return self._read(index)[1]

    def style_of(self, index: int) -> PromptStyle:
        """How `data[index]` is written: the prompt style, which also tells the model of the sample's own functions, if it has some."""
        return self._read(index)[0]

    def example(self, index: int) -> tuple[list[Message], str]:
        """The messages of `data[index]` that lead to its last answer, and that answer.

        Of several messages of the assistant in a row, the first is the answer: the one before is what was asked.
        """
        messages = self.messages(index)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        while last and messages[last - 1]["role"] == "assistant":
            last -= 1
        return messages[:last], messages[last]["content"] or ""  # a call of a function may have no text

    def place(self, index: int) -> str:
        """Where `data[index]` comes from, in words."""
        return getattr(self.data[index], "place", "") or f"Sample {index}"

    def _read(self, index: int) -> tuple[PromptStyle, list[Message]]:
        """Return how a record is written, and its messages."""
        record = self.data[index] if self.transform is None else self.transform(dict(self.data[index]))
        messages, tools = messages_of(record), tools_of(record)
        style = self.prompt_style.with_tools(tools) if tools else self.prompt_style
        return style, style.suited(messages)

    def _encoded(self, index: int) -> list[tuple[list[int], list[bool]]]:
        """Return the ids of the samples that a record becomes, and which of them are trained on."""
        try:
            style, messages = self._read(index)
            answers = [message for message in messages if message["role"] == "assistant"]
            if any(map(_says_nothing, answers[-1:] if self.train_on == "last" else answers)):
                self.empty.append(index)
            return encode_training(style, self.tokenizer, messages, train_on=self.train_on)
        except UserError as error:
            place = getattr(self.data[index], "place", "") or f"Sample {index}, {shown(self.data[index])}"
            raise UserError(f"{place}: {error}") from None

    def _encode(self) -> None:
        all_ids, all_trained = array("i"), bytearray()
        for index in range(len(self.data)):
            for ids, trained in self._encoded(index):
                n_whole = len(ids)
                if 0 < self.max_seq_length < n_whole:
                    ids, trained = self._shortened(index, ids, trained)
                n_targets = sum(trained[1:])  # nothing predicts the first token
                self.n_lost += n_whole - (len(ids) if n_targets else 0)
                if n_targets:
                    all_ids.extend(ids)
                    all_trained.extend(trained)
                    self.lengths.append(len(ids))
                    self.n_targets.append(n_targets)
                elif ids:
                    self.dropped[NO_TARGET].append(index)
                    self.cut = self.cut[:-1] if self.cut[-1:] == [index] else self.cut
        self._ids = torch.frombuffer(all_ids, dtype=torch.int32) if all_ids else torch.empty(0, dtype=torch.int32)
        self._trained = torch.frombuffer(all_trained, dtype=torch.bool) if all_trained else torch.empty(0, dtype=torch.bool)
        self.highest_id = max(all_ids, default=-1)
        ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0)
        self._starts = (ends - torch.tensor(self.lengths, dtype=torch.int64)).tolist()

    def _shortened(self, index: int, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """Return what is left of a sample that is too long, which is nothing if it is dropped."""
        if self.truncation == "error":
            raise UserError(
                f"{self.place(index)} is {len(ids)} tokens long, but `max_seq_length` is {self.max_seq_length}. Raise it, or let "
                "`truncation` be 'right', 'left' or 'drop'."
            )
        if self.truncation == "drop":
            self.dropped[TOO_LONG].append(index)
            return [], []
        self.cut.append(index)
        if self.truncation == "right":
            return ids[: self.max_seq_length], trained[: self.max_seq_length]
        n_kept = 1 if ids[0] == self.tokenizer.bos_id else 0
        start = len(ids) - self.max_seq_length + n_kept
        return ids[:n_kept] + ids[start:], trained[:n_kept] + trained[start:]

    def _report(self) -> None:
        total, left_out = len(self) + self.n_dropped, self.dropped[TOO_LONG]
        lost = f"{100 * self.n_lost / max(1, self.n_lost + self.n_kept):.1f}% of all tokens are lost"
        what = "lose their end" if self.truncation == "right" else "lose their beginning"
        for indexes, why in (
            (self.cut, f"are longer than {self.max_seq_length} tokens and {what}; {lost}"),
            (left_out, f"are longer than {self.max_seq_length} tokens and are dropped; {lost}"),
            (self.dropped[NO_TARGET], "had nothing left to train on and are dropped"),
            (sorted({*self.empty} - {*left_out, *self.dropped[NO_TARGET]}), "have an empty answer, which teaches to say nothing"),
        ):
            if indexes:
                named = [self.place(index) for index in indexes[:NAMED]] + (["..."] if len(indexes) > NAMED else [])
                log.warning("%d of %d samples %s: %s", len(indexes), total, why, ", ".join(named))


def _says_nothing(message: Message) -> bool:
    """Whether a message has nothing but its role: no text, no thought, no call."""
    return not any(value.strip() if isinstance(value, str) else value for name, value in message.items() if name != "role")


def split(data: Sequence, fraction: float, seed: int) -> tuple[list, list]:
    """The samples to train on and the others, drawn at random, each in the order they had.

    Args:
        data: What to split.
        fraction: The share of samples to validate on; 0 validates on none. Otherwise at least one sample goes to either side.
        seed: Decides which; torch's global generator plays no part.

    Raises:
        UserError: The fraction is not in [0, 1), or there are too few samples.
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"`val_split_fraction` must be at least 0 and below 1, but is {fraction}. Use 0.1 to validate on a tenth of the samples."
        )
    if fraction == 0:
        return list(data), []
    if len(data) < 2:
        raise UserError(
            f"There is only {len(data)} sample, and it takes two: one to train on and one to validate on. "
            "Add another, or set `val_split_fraction` to 0 to train without validation."
        )
    n_val = min(max(1, round(len(data) * fraction)), len(data) - 1)
    order = torch.randperm(len(data), generator=seeded(seed)).tolist()
    held_out = set(order[:n_val])
    return [data[i] for i in range(len(data)) if i not in held_out], [data[i] for i in sorted(held_out)]


def highest_id(tokenizer: Tokenizer, gap: int = 1000) -> int:
    """The highest id that a tokenizer can give, tokens included that were added to its vocabulary.

    Args:
        tokenizer: The tokenizer.
        gap: How many ids in a row may be unused.
    """
    highest = max(tokenizer.vocab_size - 1, *tokenizer.special_ids, 0)
    following = range(highest + 1, highest + 1 + gap)
    while used := [i for i in following if tokenizer.text(i) is not None]:
        highest = used[-1]
        following = range(highest + 1, highest + 1 + gap)
    return highest


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers that begins with this seed.

    Raises:
        UserError: The seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"`seed` is a whole number of at most 64 bits, but is {seed}. Use 42, say.")
    return torch.Generator().manual_seed(seed)


def get_sft_collate_fn(max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = IGNORED) -> Collate:
    """A function that makes one batch of several samples of an `SFTDataset`: `{"input_ids": (B, T), "labels": (B, T)}`.

    Args:
        max_seq_length: Cut the batch to this many tokens; -1 leaves it whole.
        pad_id: Fills up `input_ids` on the right.
        ignore_index: Fills up `labels` on the right.
    """
    return partial(_collate, max_seq_length=max_seq_length, pad_id=pad_id, ignore_index=ignore_index)


def _collate(samples: list[dict[str, Tensor]], max_seq_length: int, pad_id: int, ignore_index: int) -> dict[str, Tensor]:
    length = max_seq_length if max_seq_length > 0 else None
    return {
        key: pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=fill)[:, :length]
        for key, fill in (("input_ids", pad_id), ("labels", ignore_index))
    }
