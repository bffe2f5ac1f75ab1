"""What both training scripts share: which samples a step sees, its passes, and what all ranks must agree on."""

import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt.args import EvalArgs, TrainArgs
from litgpt.attention import Segments
from litgpt.data.packing import Microbatch, Sample, end_to_end, evened, microbatches_of, pack, padded, rounded_up, without_padding
from litgpt.errors import UserError
from litgpt.loss import IGNORED, ROW_MULTIPLE, Loss
from litgpt.model import GPT
from litgpt.optim import FirstNonFinite, clip_gradients, set_learning_rate
from litgpt.run_state import loss_scaler


def data_share(fabric: Fabric) -> tuple[int, int]:
    """Return this rank's number among those that get different data, and how many those are. A tensor-parallel group shares its data."""
    share = getattr(fabric.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
    return share["rank"], share["num_replicas"]


def seed_generators(fabric: Fabric, seed: int) -> None:
    """Seed all global generators by data share: ranks that see the same data drop out alike, others do not."""
    share, _ = data_share(fabric)
    seed = (seed + 1_000_003 * share) % 2**32  # numpy's seeds end there
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Which samples a step sees


class Drawn(NamedTuple):
    """The samples of one step, over all ranks."""

    epoch: int  # from 1
    indices: list[int]


def steps(n_samples: int, global_batch_size: int, seed: int, first: int = 1) -> Iterator[Drawn]:
    """Yield the samples of every step, for ever. Each epoch goes through all of them in an order of its own; its last step can be smaller.

    The order depends on seed and epoch only, so a run can begin at any step and on any number of ranks.

    Args:
        n_samples: How many there are.
        global_batch_size: How many one step sees.
        seed: Of the orders.
        first: The step to begin with, from 1.
    """
    for step in count(first):
        epoch, position = divmod(step - 1, steps_per_epoch(n_samples, global_batch_size))
        if position == 0 or step == first:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(n_samples, generator=generator)
        yield Drawn(epoch + 1, order[position * global_batch_size :][:global_batch_size].tolist())


def steps_per_epoch(n_samples: int, global_batch_size: int) -> int:
    """Return how many steps it takes to see every sample once."""
    return math.ceil(n_samples / global_batch_size)


# What all ranks agree on


class Agreed(NamedTuple):
    """What all ranks know of a step before they begin it."""

    n_targets: int
    n_tokens: int  # without padding
    n_slots: int  # with it
    n_microbatches: int  # the most that any rank has; 0 when nobody has data
    stop: bool
    waited: float = 0.0  # how many seconds this process stood still until the samples of the step were there, on all ranks


class Votes:
    """One small CPU all-gather for each step, begun while the step before it runs.

    It counts targets, evens out microbatches, and agrees to stop. It has its own gloo group, so it waits for no GPU and mixes with
    no gradient's all-reduce.

    Args:
        fabric: The launched one.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.n_copies = fabric.world_size // data_share(fabric)[1]  # ranks that see the same data
        self.group = dist.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.all = torch.zeros(fabric.world_size, 5, dtype=torch.int64)

    def begin(self, microbatches: Sequence[Microbatch], stop: bool) -> None:
        """Tell the others what this rank has for the next step, and whether it wants to stop before it."""
        sizes = ((int((batch.targets != IGNORED).sum()), batch.n_tokens, batch.ids.numel(), 1) for batch in microbatches)
        mine = torch.tensor([*map(sum, zip((0, 0, 0, 0), *sizes, strict=True)), int(stop)])
        self.work = dist.all_gather(list(self.all), mine, group=self.group, async_op=True) if self.group else self.all[0].copy_(mine)

    def read(self) -> Agreed:
        """Wait for the others and return what they said."""
        if self.group:
            self.work.wait()
        n_targets, n_tokens, n_slots, *_ = (self.all.sum(0) // self.n_copies).tolist()
        return Agreed(n_targets, n_tokens, n_slots, int(self.all[:, 3].max()), bool(self.all[:, 4].any()))


class Feed:
    """The microbatches of this rank, step by step, with what all ranks agreed on.

    While a step runs, a thread fetches the samples of the next one and begins the vote on it. Iteration ends after step `last`, or
    before a step that some rank does not want to begin (`stopped` is then true). Samples must draw from no global generator.

    Args:
        fabric: The launched one.
        samples: All samples, the same on all ranks.
        train: Its batch sizes, and whether samples are packed.
        seed: Of the order of the samples.
        first: The step to begin with, from 1.
        last: The last step, or None.
        wants_to_stop: Asked before each step.

    Raises:
        UserError: There is no sample; later, none of a step's samples has a target.
    """

    def __init__(
        self,
        fabric: Fabric,
        samples: Sequence[Sample],
        train: TrainArgs,
        seed: int,
        first: int = 1,
        last: int | None = None,
        wants_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if not len(samples):
            raise UserError("There is no sample to train on. Look at the data's file and at its validation split.")
        self.samples, self.train, self.step, self.wants_to_stop = samples, train, first - 1, wants_to_stop
        self.longest = longest_sample(samples, train)
        self.share, self.pinned, self.votes = data_share(fabric), fabric.device.type == "cuda", Votes(fabric)
        self.drawn = steps(len(samples), train.global_batch_size, seed, first)
        self.n_left = None if last is None else max(0, last - first + 1)
        self.stopped = False

    def __iter__(self) -> Iterator[tuple[int, list[Microbatch], Agreed]]:
        """Yield for each step its epoch, this rank's microbatches, and what the ranks agreed on."""
        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(self._fetch)
            while True:
                began = perf_counter()
                epoch, microbatches = following.result()
                agreed = self.votes.read()
                if self.votes.group is None and self.wants_to_stop():  # since the vote, which was begun before the last step
                    agreed = agreed._replace(stop=True)
                if agreed.stop or not agreed.n_microbatches:
                    self.stopped = agreed.stop
                    return
                self.step += 1
                self._check(agreed)
                waited = perf_counter() - began
                following = thread.submit(self._fetch)
                yield epoch, evened(microbatches, agreed.n_microbatches), agreed._replace(waited=waited)

    def _check(self, agreed: Agreed) -> None:
        if not agreed.n_targets:
            raise UserError(
                f"No sample of step {self.step} has a token to learn: all its labels are {IGNORED}. "
                "Look at the samples, raise `train.max_seq_length` if it cuts answers off, or raise `train.global_batch_size`."
            )

    def _fetch(self) -> tuple[int, list[Microbatch]]:
        epoch, microbatches = 0, []
        if self.n_left is None or self.n_left > 0:
            self.n_left = None if self.n_left is None else self.n_left - 1
            rank, n_shares = self.share
            epoch, indices = next(self.drawn)
            mine = [self.samples[i] for i in indices[rank::n_shares]]
            microbatches = microbatches_of(mine, self.train.micro_batch_size, bool(self.train.packing), self.longest)
            if self.pinned:  # so that copies to the GPU do not wait
                microbatches = [batch._replace(ids=batch.ids.pin_memory(), targets=batch.targets.pin_memory()) for batch in microbatches]
        self.votes.begin(microbatches, self.wants_to_stop())
        return epoch, microbatches


def longest_sample(samples: Sequence[Sample], train: TrainArgs) -> int | None:
    """Return how many tokens a sample may have; None if neither the options nor the data set say so."""
    return train.max_seq_length or max(getattr(samples, "lengths", None) or [0]) or None


class StopRequest:
    """True once the system asked this process to stop (SIGTERM, SIGINT, SIGUSR1). Use it as a context, which gives the signals back.

    A second signal of the same kind does what it did before.

    Args:
        answers: Whether to say on stderr that the signal was heard, for a step can take minutes: true on one process only.
    """

    def __init__(self, answers: bool = False) -> None:
        self.answers = answers
        self.requested = False
        self.number: int | None = None  # of the first signal
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if (number := getattr(signal, name, None)) is not None:  # Windows lacks the last
                    self.previous[number] = signal.signal(number, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in list(self.previous):
            self._give_back(number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.answers and not self.requested:
            with suppress(OSError):  # `print` is not to be called in a handler: the signal may have interrupted another one
                os.write(2, b"\nStopping after this step ... Again to stop at once, which saves nothing.\n")
        self.requested, self.number = True, number if self.number is None else self.number
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        if (handler := self.previous.pop(number, None)) is not None:
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.requested


# The passes of a step


def forward_backward(fabric: Fabric, model: nn.Module, microbatches: Sequence[Microbatch], n_targets: int) -> Tensor:
    """Leave in `grad` the gradients of one step's loss; the mean over ranks of what is returned is that loss.

    The loss is the sum over all targets divided by their number, so how the batch is cut up changes nothing. What experts add
    to balance their load is weighted by the targets of its microbatch.

    Args:
        fabric: What the model was set up with.
        model: The wrapped model.
        microbatches: Those of this rank. All ranks need equally many, for FSDP2 gathers weights in each forward pass.
        n_targets: The targets of the whole step, over all microbatches and ranks.
    """
    scale = data_share(fabric)[1] / max(1, n_targets)  # DDP and FSDP2 average the gradients over the shares
    total = torch.zeros((), device=fabric.device, dtype=_sum_dtype(fabric.device))
    for i, microbatch in enumerate(microbatches, start=1):
        with fabric.no_backward_sync(model, enabled=i < len(microbatches)):  # forward too: DDP decides there
            nll, n, aux = _loss(fabric, model, microbatch)
            fabric.backward((nll + aux * n) * scale)
        total += nll.detach() * scale
    return total


def _loss(fabric: Fabric, model: nn.Module, microbatch: Microbatch) -> Loss:
    """Return what the model says to a microbatch. Its targets stay on the CPU, where `token_nll` counts them without waiting for a GPU."""
    plain = getattr(model, "module", model)
    if _sees_padding(plain):
        microbatch = without_padding(microbatch)
    elif fabric.device.type == "cpu" and _multiplies_bf16(fabric, plain):
        microbatch = rounded_up(microbatch, ROW_MULTIPLE)
    ids = microbatch.ids.to(fabric.device, non_blocking=True)
    packed = {} if microbatch.lengths is None else {"segments": Segments(microbatch.lengths, fabric.device)}
    return model(ids, targets=microbatch.targets, **packed)


def _sees_padding(model: nn.Module) -> bool:
    """Say whether padding behind a text changes what is learned from it: how long the row is, or where experts get their tokens from."""
    return isinstance(model, GPT) and (model.rope.depends_on_length or model.expert_balance > 0)


def _multiplies_bf16(fabric: Fabric, model: nn.Module) -> bool:
    return fabric.strategy.precision.precision == "bf16-mixed" or any(weight.dtype == torch.bfloat16 for weight in model.parameters())


def take_step(
    fabric: Fabric, model: nn.Module, optimizer: Optimizer, step: int, lr: float, max_norm: float | None, non_finite: FirstNonFinite
) -> Tensor:
    """Clip the gradients, change the weights, clear the gradients; return the gradients' norm before clipping, without waiting.

    Args:
        fabric: What the model was set up with.
        model: The wrapped model.
        optimizer: The one that `fabric.setup_optimizers` returned.
        step: Its number, from 1.
        lr: The step's learning rate.
        max_norm: None does not clip.
        non_finite: Notes a norm that is not finite; not under fp16, whose scaler skips such steps.
    """
    if (scaler := loss_scaler(fabric)) is not None:
        scaler.unscale_(optimizer.optimizer)
    grad_norm = clip_gradients(model, max_norm, non_finite if scaler is None else None, step)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, microbatches: Iterable[Microbatch]) -> float:
    """Return the mean loss of a target over the microbatches of all ranks, NaN if there is none. All ranks need equally many."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=fabric.device, dtype=_sum_dtype(fabric.device))
    for microbatch in microbatches:
        nll, n, _ = _loss(fabric, model, microbatch)
        sums += torch.stack([nll.to(sums), n.to(sums)])
    model.train(was_training)
    nll, n = fabric.all_reduce(sums, reduce_op="sum").tolist()
    return nll / n if n else float("nan")


def validation_microbatches(
    fabric: Fabric, samples: Sequence[Sample], train: TrainArgs, eval: EvalArgs | None = None
) -> Iterator[Microbatch]:
    """Yield this rank's share of a data set's first samples, equally many microbatches on all ranks.

    Samples are packed as in training, but over all of them at once. Where the data set does not say how long they are, those of a
    microbatch are laid end to end.

    Args:
        fabric: The launched one.
        samples: All samples, the same on all ranks.
        train: Its micro-batch size, and whether samples are packed.
        eval: Its `max_iters` times that size is how many samples are seen, over all ranks; by default all.
    """
    size, (rank, n_shares) = train.micro_batch_size, data_share(fabric)
    n = len(samples) if eval is None else min(len(samples), eval.max_iters * size)
    packing = train.packing and n > 0 and isinstance(samples[0], Mapping)
    if packing and (lengths := getattr(samples, "lengths", None)):
        rows: Sequence[Sequence[int]] = pack([max(1, length - 1) for length in lengths[:n]], size * longest_sample(samples, train))
    else:
        shares = [range(n)[share::n_shares] for share in range(n_shares)]
        rows = [share[i : i + size] for i in range(0, len(shares[0]), size) for share in shares]
    for i in range(0, len(rows), n_shares):
        held = [samples[j] for row in rows[i + rank : i + rank + 1] for j in row]
        yield evened([(end_to_end if packing else padded)(held)] if held else [], 1)[0]


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which it does not have


# When a run ends


@dataclass(frozen=True)
class Limits:
    """When a run ends."""

    last: int | None  # the last step that `epochs` and `max_steps` allow
    max_steps: int | None  # how many steps are expected, where `max_tokens` counts too: what a schedule is made for
    max_tokens: int | None
    max_time: float | None

    @classmethod
    def of(cls, train: TrainArgs, n_samples: int, tokens_per_sample: float) -> "Limits":
        """Return the limits that the options set.

        Args:
            train: Its `epochs`, `max_steps`, `max_tokens` and `max_time`.
            n_samples: How many samples there are.
            tokens_per_sample: How many tokens a sample has on average.

        Raises:
            UserError: None of them is set.
        """
        if all(limit is None for limit in (train.epochs, train.max_steps, train.max_tokens, train.max_time)):
            raise UserError("Nothing ends this run. Set `train.epochs`, `train.max_steps`, `train.max_tokens` or `train.max_time`.")
        size = train.global_batch_size
        by_epochs = None if train.epochs is None else train.epochs * steps_per_epoch(n_samples, size)
        last = min((limit for limit in (by_epochs, train.max_steps) if limit is not None), default=None)
        expected = last
        if train.max_tokens is not None:
            epochs, rest = divmod(math.ceil(train.max_tokens / tokens_per_sample), n_samples)
            by_tokens = epochs * steps_per_epoch(n_samples, size) + steps_per_epoch(rest, size)
            expected = by_tokens if last is None else min(last, by_tokens)
        return cls(last, expected, train.max_tokens, train.max_time)

    def reached(self, total_tokens: int) -> bool:
        """Say whether all tokens were seen. Equal on all ranks."""
        return self.max_tokens is not None and total_tokens >= self.max_tokens

    def out_of_time(self, seconds: float) -> bool:
        """Say whether the time is over. Clocks differ, so ranks must vote on it."""
        return self.max_time is not None and seconds >= self.max_time


def check_limits(train: TrainArgs, eval: EvalArgs) -> None:
    """Raise a UserError for a size, an interval or a limit that is not positive, or not finite."""
    groups = {
        "train": (
            train,
            "global_batch_size micro_batch_size log_interval save_interval epochs max_steps max_tokens max_time max_norm max_seq_length "
            "keep_last",
        ),
        "eval": (eval, "interval max_iters max_new_tokens patience"),
    }
    for group, (args, options) in groups.items():
        for option in options.split():
            if (value := getattr(args, option)) is not None and not 0 < value < math.inf:
                raise UserError(f"`{group}.{option}` is a positive number, but got {value}.")
    if train.expert_balance is not None and not 0 <= train.expert_balance < math.inf:
        raise UserError(f"`train.expert_balance` is a number of at least 0, but got {train.expert_balance}.")
