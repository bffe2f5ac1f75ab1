"""What every data set is made of: a module that yields loaders, and the data set of finetuning samples."""

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.loss import IGNORED
from litgpt.prompts import PromptStyle, encode_training, find_prompt_style
from litgpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Message = dict[str, Any]
Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]

SPEAKERS = {"human": "user", "gpt": "assistant"}  # what `conversations` calls them


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

    mask_prompt: bool = True
    """Whether only the answers are trained on, and not the prompts."""
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

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its samples are: define `records`.")

    def setup(self, stage: str = "") -> None:
        """Read the samples and encode each once."""
        if self.tokenizer is None:
            raise UserError(f"{type(self).__name__} needs a tokenizer. Give it one with `connect`.")
        train, val = self.records()
        style = self._style()
        self.train_dataset, self.val_dataset = (
            SFTDataset(data, self.tokenizer, style, self.max_seq_length, self.mask_prompt, self.ignore_index) for data in (train, val)
        )
        self.collate_fn = get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index)
        if len(self.train_dataset) == 0:
            raise UserError(f"No answer begins within `max_seq_length` {self.max_seq_length}, so there is nothing to train on. Raise it.")

    def _style(self) -> PromptStyle:
        folder = self.tokenizer.checkpoint_dir
        try:
            config = Config.from_checkpoint(folder)
        except UserError:  # a tokenizer alone, or that of a model which we cannot run
            config = None
        return find_prompt_style(folder, self.tokenizer, self.prompt_style, config=config, for_instructions=True)


class Record(dict):
    """One sample as a file holds it, and `place`, which names that file and where in it."""

    place: str = ""


class SFTDataset(Dataset):
    """Finetuning samples, each encoded once: `{"input_ids": (T,), "labels": (T,)}`, both int64.

    Labels are the ids themselves, not shifted, with `ignore_index` where a token is not trained on. A sample may become several
    (a conversation whose prompts are not prefixes of each other), or none, when `max_seq_length` leaves nothing of its answers.

    Args:
        data: Mappings with `instruction`, `output` and maybe `input`, or with `messages`, a list of `{"role": ..., "content": ...}`.
        tokenizer: Turns text into ids.
        prompt_style: How a prompt is written, or its name.
        max_seq_length: Longer samples are cut at the end; -1 leaves them whole.
        mask_prompt: Whether only answers are trained on.
        ignore_index: The label of what is not trained on.
        transform: Applied to a copy of each mapping first.

    Attributes:
        data: The mappings, as they were given.
        lengths: The number of tokens of each sample.
        highest_id: The highest token id of all samples.
        n_cut: How many samples were longer than `max_seq_length`.
        n_dropped: How many of those had nothing left to train on, and are missing.

    Raises:
        UserError: A sample misses a key, or a value is not text.
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
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.prompt_style = PromptStyle.from_name(prompt_style) if isinstance(prompt_style, str) else prompt_style
        self.max_seq_length = max_seq_length
        self.mask_prompt = mask_prompt
        self.ignore_index = ignore_index
        self.transform = transform
        self.lengths: list[int] = []
        self.n_cut = self.n_dropped = 0
        self._encode()
        self._report()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        span = slice(self._starts[index], self._starts[index] + self.lengths[index])
        ids = self._ids[span].to(torch.int64)
        return {"input_ids": ids, "labels": ids.masked_fill(~self._trained[span], self.ignore_index)}

    def messages(self, index: int) -> list[Message]:
        """The messages of `data[index]`, answers included."""
        record = self.data[index]
        return messages_of(record if self.transform is None else self.transform(dict(record)))

    def example(self, index: int) -> tuple[list[Message], str]:
        """The messages of `data[index]` that lead to its last answer, and that answer."""
        messages = self.messages(index)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last], messages[last]["content"]

    def _encode(self) -> None:
        all_ids, all_trained = array("i"), bytearray()
        for index in range(len(self.data)):
            try:
                encoded = encode_training(self.prompt_style, self.tokenizer, self.messages(index), mask_prompt=self.mask_prompt)
            except UserError as error:
                place = getattr(self.data[index], "place", "") or f"Sample {index}, {_shown(self.data[index])}"
                raise UserError(f"{place}: {error}") from None
            for ids, trained in encoded:
                if 0 < self.max_seq_length < len(ids):
                    ids, trained = ids[: self.max_seq_length], trained[: self.max_seq_length]
                    self.n_cut += 1
                if not any(trained[1:]):  # nothing predicts the first token
                    self.n_dropped += 1
                    continue
                all_ids.extend(ids)
                all_trained.extend(trained)
                self.lengths.append(len(ids))
        self._ids = torch.tensor(all_ids, dtype=torch.int32)
        self._trained = torch.tensor(all_trained, dtype=torch.bool)
        self.highest_id = max(all_ids, default=-1)
        ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0)
        self._starts = (ends - torch.tensor(self.lengths, dtype=torch.int64)).tolist()

    def _report(self) -> None:
        total = len(self) + self.n_dropped
        if self.n_cut:
            log.warning("%d of %d samples were longer than %d tokens and are cut.", self.n_cut, total, self.max_seq_length)
        if self.n_dropped:
            log.warning("%d of %d samples had nothing left to train on and are dropped.", self.n_dropped, total)


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The messages of one record, checked; an `input` is a key of the user's message.

    Args:
        record: A mapping with `instruction`, `output` and maybe `input`; or with `messages` (`role`, `content`); or with `conversations`
            (`from`, `value`). Other keys do not matter.

    Raises:
        UserError: A key is missing, or a value is not text.
    """
    if not isinstance(record, Mapping):
        raise UserError(
            f"A record must be a mapping with the keys `instruction` and `output`, or `messages`, but this is {_shown(record)}."
        )
    if "messages" in record:
        return _checked_messages(record["messages"], "messages", "role", "content")
    if "conversations" in record:
        messages = _checked_messages(record["conversations"], "conversations", "from", "value")
        return [message | {"role": SPEAKERS.get(message["role"], message["role"])} for message in messages]
    for key in ("instruction", "output"):
        if key not in record:
            raise UserError(f"The key `{key}` is missing. It has {_keys(record)}.{did_you_mean(key, map(str, record))}")
        if not isinstance(record[key], str):
            raise UserError(f"`{key}` must be text, but is {_shown(record[key])}.")
    user: Message = {"role": "user", "content": record["instruction"]}
    if record.get("input") is not None:
        if not isinstance(record["input"], str):
            raise UserError(f"`input` must be text, but is {_shown(record['input'])}.")
        if record["input"]:
            user["input"] = record["input"]
    return [user, {"role": "assistant", "content": record["output"]}]


def _checked_messages(messages: Any, key: str, role: str, content: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"`{key}` must be a list of messages with the keys `{role}` and `{content}`, but is {_shown(messages)}.")
    checked = []
    for number, message in enumerate(messages, start=1):
        for part in (role, content):
            if not isinstance(message, Mapping) or not isinstance(message.get(part), str):
                found = _shown(message.get(part)) if isinstance(message, Mapping) and part in message else f"missing in {_shown(message)}"
                raise UserError(f"`{part}` of message {number} in `{key}` must be text, but is {found}.")
        rest = {name: value for name, value in message.items() if name not in (role, content)}
        checked.append({"role": message[role], "content": message[content]} | rest)
    if not any(SPEAKERS.get(message["role"], message["role"]) == "assistant" for message in checked):
        raise UserError(f"`{key}` has no message of the role `assistant`, so there is nothing to train on.")
    return checked


def _keys(record: Mapping[str, Any]) -> str:
    return "the keys " + ", ".join(f"`{key}`" for key in record) if record else "no keys"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
