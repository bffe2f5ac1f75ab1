"""What a run begins with: its samples and its model, read, checked and described before anything is learned."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import LightningDataModule
from lightning.fabric import Fabric
from torch import Tensor, nn

from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data.packing import PackedSamples
from litgpt.errors import UserError
from litgpt.quantize import n_weights
from litgpt.training import Sample, steps

MAX_NAMED = 32  # samples that an error lists
PATIENCE = timedelta(days=2)  # for how long ranks wait for one that reads data or writes the result

# Data


def sample_length(train: TrainArgs, config: Config) -> int:
    """Return how many tokens a sample may have: what the options say, up to the model's context."""
    if (length := train.max_seq_length or config.block_size) > config.block_size:
        raise UserError(f"`train.max_seq_length` is {length}, but the model's context is {config.block_size} tokens. Lower it.")
    return length


def prepared(fabric: Fabric, data: LightningDataModule) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Download and read a connected data set; return its samples to train on and those to validate on, which may be none."""
    with together(fabric):
        if fabric.is_global_zero:
            data.prepare_data()
    with together(fabric), redirect_stderr(sys.stderr if fabric.is_global_zero else StringIO()):  # or each rank would tell what was cut
        if not fabric.is_global_zero:
            data.prepare_data()  # finds what the first one left, or is on another machine
        data.setup()
    train, val = data.train_dataset, data.val_dataset
    if train is None:  # a module that defines its loaders only
        train, val = (getattr(loader, "dataset", None) for loader in (data.train_dataloader(), data.val_dataloader()))
    if not hasattr(train, "__len__"):
        raise UserError(f"{type(data).__name__} does not say how many samples it has: its data set needs `__len__` and `__getitem__`.")
    return train, [] if val is None else val


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Let an error in this part of a program end it on all ranks, which would else wait for ever; the first that has one tells it."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if fabric.world_size > 1 else None  # NCCL's ranks wait for minutes only
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if group is not None:
        codes = torch.zeros(fabric.world_size)
        codes[fabric.global_rank] = 0 if error is None else 2 if isinstance(error, UserError) else 1  # see `cli.main`
        dist.all_reduce(codes, group=group)
        dist.destroy_process_group(group)
        failed = [(rank, int(code)) for rank, code in enumerate(codes.tolist()) if code]
        if failed and failed[0][0] != fabric.global_rank:
            raise SystemExit(failed[0][1])
    if error is not None:
        raise error


def digest(samples: Sequence[Sample]) -> str:
    """Return a short text that differs where the samples do, after some of them."""
    found = hashlib.sha256(str(len(samples)).encode())
    for sample in _some(samples):
        for part in sample.values() if isinstance(sample, Mapping) else [sample]:
            found.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()[:12]


def check_ids(config: Config, *parts: Sequence[Sample]) -> None:
    """Raise a UserError if samples hold tokens that the model has no embedding of. Of data sets that are not ours, some are looked at."""
    known = config.padded_vocab_size
    if (highest := max(map(_highest_id, parts))) >= known:
        raise UserError(
            f"The samples hold the token id {highest}, but the model knows {known} tokens. Use the tokenizer it was trained with."
        )


def _highest_id(samples: Sequence[Sample]) -> int:
    if (known := getattr(samples, "highest_id", None)) is not None:
        return known
    ids = (sample["input_ids"] if isinstance(sample, Mapping) else sample for sample in _some(samples))
    return max((int(tokens.max()) for tokens in ids if len(tokens)), default=-1)


def _some(samples: Sequence[Sample], n_seen: int = 256) -> Iterator[Sample]:
    yield from (samples[i] for i in range(0, len(samples), max(1, len(samples) // n_seen)))


def samples_of(step: int, samples: Sequence[Sample], train: TrainArgs, seed: int) -> str:
    """Name the samples of a step by their numbers in the data set."""
    indices = next(steps(len(samples), train.global_batch_size, seed, first=step)).indices
    if isinstance(samples, PackedSamples):
        indices = [i for row in indices for i in samples.rows[row]]
    more = f" and {counted(len(indices) - MAX_NAMED, 'other')}" if len(indices) > MAX_NAMED else ""
    return f"the samples {', '.join(map(str, sorted(indices)[:MAX_NAMED]))}{more} (the first is 0)"


# The model


def fingerprint(model: nn.Module, n_seen: int = 64) -> str:
    """Return a short text that differs where the weights do, after some numbers of each."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // n_seen)].contiguous()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def counted(n: int, noun: str) -> str:
    """Return `1 sample` or `1,000 samples`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raise a UserError if a weight of the model that was read from a folder is NaN or infinite, as none can be learned from."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weight {name!r} of the model in {folder} has numbers that are not finite, so it cannot be trained. "
                "Download or convert the model again, or take another."
            )


def described(model: nn.Module, precision: str) -> str:
    """Return what is trained, and in which number types."""
    n_all = n_weights(model)
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if n_trained < n_all:
        return f"{n_trained:,} of {n_all:,} parameters in {precision}"
    held = ", gradients and the optimizer's averages too" if precision == "bf16-true" else ""
    return f"{n_all:,} parameters in {precision}{held}"
