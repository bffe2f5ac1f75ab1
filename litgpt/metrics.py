"""What a run says about itself: the values that are logged and kept, the line or bar that is shown, the table at its end."""

import json
import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from litgpt import names
from litgpt.config import Config
from litgpt.experts import Experts
from litgpt.hardware import peak_memory_gb
from litgpt.model import GPT

# Values


class Counted(NamedTuple):
    """One step."""

    seconds: float
    n_tokens: int  # without padding
    n_slots: int  # with it
    waited: float  # of the seconds, how many this process waited for data


class Throughput:
    """Rates and shares over the last steps, all 0 before the first.

    Args:
        window: How many steps count.
    """

    def __init__(self, window: int = 50) -> None:
        self.steps: deque[Counted] = deque(maxlen=window)

    def add(self, seconds: float, n_tokens: int, n_slots: int | None = None, waited: float = 0.0) -> None:
        """Count one step; without `n_slots` nothing of it was padding."""
        self.steps.append(Counted(seconds, n_tokens, n_tokens if n_slots is None else n_slots, waited))

    def seconds_per_step(self) -> float:
        """Return the mean time of a step."""
        return _ratio(self._sum("seconds"), len(self.steps))

    def tokens_per_second(self) -> float:
        """Return the rate of tokens, padding aside."""
        return _ratio(self._sum("n_tokens"), self._sum("seconds"))

    def padded_share(self) -> float:
        """Return which part of what the model computed was padding."""
        return _ratio(self._sum("n_slots") - self._sum("n_tokens"), self._sum("n_slots"))

    def wait_share(self) -> float:
        """Return which part of the time this process waited for data."""
        return _ratio(self._sum("waited"), self._sum("seconds"))

    def _sum(self, name: str) -> float:
        return sum(getattr(step, name) for step in self.steps)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


class Meter:
    """Counts the steps of a run and makes the values that loggers get.

    Where somebody sets `flops_per_token` (see `train_flops_per_token`) and `peak_flops` (of all devices together, see `hardware`), the
    model FLOPs utilization is among them: which part of the machine's products the model's own take (arXiv:2204.02311, appendix B).

    Args:
        max_steps: All steps of the run, or None if it has no planned end.
        step: The last step done before, where a run is resumed.
        total_tokens: The tokens seen before.
        clock: Tells the time in seconds.
    """

    def __init__(
        self, max_steps: int | None = None, step: int = 0, total_tokens: int = 0, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.max_steps, self.step, self.total_tokens, self.clock = max_steps, step, total_tokens, clock
        self.flops_per_token: float | None = None
        self.peak_flops: float | None = None
        self.tokens = self.slots = 0  # of this process's life
        self.training_seconds = 0.0
        self.seconds_before = 0.0  # of the training that a resumed run goes on with
        self.throughput = Throughput()
        self.started = self.last = clock()

    def count(self, n_tokens: int, n_slots: int | None = None, waited: float = 0.0) -> None:
        """Note that a step is done.

        Args:
            n_tokens: What it saw, over all devices, without padding.
            n_slots: The same with padding; by default there was none.
            waited: How many seconds this process waited for its data.
        """
        now = self.clock()
        self.throughput.add(now - self.last, n_tokens, n_slots, waited)
        self.training_seconds += now - self.last
        self.last = now
        self.step, self.tokens, self.total_tokens = self.step + 1, self.tokens + n_tokens, self.total_tokens + n_tokens
        self.slots += n_tokens if n_slots is None else n_slots

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilization at a rate, or None if a part of it is not known."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_second / self.peak_flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the training time what happens inside: validation, saving."""
        start = self.clock()
        try:
            yield
        finally:
            self.last += self.clock() - start

    @property
    def all_seconds(self) -> float:
        """How long the run was trained, pauses aside, in all its lives."""
        return self.seconds_before + self.training_seconds

    def elapsed(self) -> float:
        """Return the seconds since this process began to train, pauses included."""
        return self.clock() - self.started

    def values(self, loss: float, learning_rate: float, grad_norm: float, epoch: int = 1, **more: float) -> dict[str, float]:
        """Return what loggers get after a step: `iter_time` and `remaining_time` in seconds, `memory` in GB, shares between 0 and 1."""
        per_step, rate = self.throughput.seconds_per_step(), self.throughput.tokens_per_second()
        known = {} if self.max_steps is None else {"remaining_time": max(0, self.max_steps - self.step) * per_step}
        used = self.mfu(rate)
        return {
            "loss": loss,
            "step": self.step,
            "epoch": epoch,
            "iter_time": per_step,
            **known,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "learning_rate": learning_rate,
            "tokens_per_second": rate,
            "padded_share": self.throughput.padded_share(),
            "wait_share": self.throughput.wait_share(),
            **({} if used is None else {"mfu": used}),
            "grad_norm": grad_norm,
            "memory": peak_memory_gb(),
            **more,
        }


def validation_values(val_loss: float) -> dict[str, float]:
    """Return what loggers get after a validation: the mean loss of a token, and its perplexity."""
    return {"val_loss": val_loss, "val_ppl": math.exp(min(val_loss, 700.0))}


# What the model computes


def train_flops_per_token(model: GPT, mean_length: float, target_share: float = 1.0) -> float:
    """Return how many floating-point operations training takes for a token, as the model needs them: nothing is computed twice.

    A product counts two for each of its weights in the forward pass, as many for the gradient of its input, and as many again for that
    of its weights, if they are trained. Blocks before the first trained one have a forward pass only. Attention counts as if each token
    saw its whole sample, up to the layer's window (arXiv:2204.02311, appendix B).

    Args:
        model: With what is trained marked so; a token goes to as many of its experts as the config says.
        mean_length: How many tokens the sample of a token has on average.
        target_share: Which part of the tokens has a target; the others do not reach the head.
    """
    embedding, blocks = model.transformer.wte, model.transformer.h
    first = next((i for i, part in enumerate((embedding, *blocks)) if _is_trained(part)), len(blocks) + 1)  # 0: the embedding
    total = target_share * _products_of(model.lm_head, model.config, reached=_is_trained(model.transformer))
    for i, block in enumerate(blocks):
        reached = first <= i + 1
        total += _products_of(block, model.config, reached) + _mixing(model.config, i, mean_length) * (3 if reached else 1)
    return total


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _products_of(part: nn.Module, config: Config, reached: bool, share: float = 1.0) -> float:
    """Return the operations of all weights of a part, of which a share is used; gradients pass it if they have `reached` it."""
    if isinstance(part, nn.Embedding):
        return 0.0
    if isinstance(part, Experts):
        share = config.n_expert_per_token / config.n_expert
    weights = [(weight.numel(), weight.requires_grad) for weight in part.parameters(recurse=False) if weight.ndim > 1]
    if isinstance(part, nn.Linear) and not weights:  # it is quantized
        weights = [(part.in_features * part.out_features, False)]
    own = sum(2 * share * size * (1 + reached + is_trained) for size, is_trained in weights)
    return own + sum(_products_of(child, config, reached, share) for child in part.children())


def _mixing(config: Config, i: int, length: float) -> float:
    """Return the operations of a layer between tokens, for each of them, in the forward pass."""
    if config.mixers[i] == "gated_delta":  # three products of a vector with each head's matrix
        sizes = config.gated_delta
        return 6 * sizes["n_value_heads"] * sizes["key_head_size"] * sizes["value_head_size"]
    if config.mixers[i] == "short_conv":
        return 0
    n_keys = min(length, config.windows[i] or math.inf)
    value_size = config.latent_attention["v_head_dim"] if config.mixers[i] == "latent" else config.head_size
    return 2 * config.n_head * n_keys * (config.head_size + value_size)


# What is kept


class Journal:
    """The file that keeps all logged values, a line of JSON for each time. `kill -9` costs at most the line that was being written.

    Args:
        path: The file; it is made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = False  # whether the last line is known to be complete

    def write(self, values: Mapping[str, Any]) -> None:
        """Append values, `step` among them; numbers that are not finite become null."""
        if not self.whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(len(self._complete()))
        self.whole = False
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_as_line(values))
        self.whole = True

    def rows(self) -> list[dict[str, Any]]:
        """Return what was written, in order."""
        found = []
        for line in self._complete().splitlines():
            with suppress(ValueError):  # a disk that lost its power leaves zeros
                found.append(json.loads(line))
        return [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]

    def cut_after(self, step: int) -> None:
        """Drop what was written after a step, from which a run goes on; -1 drops everything."""
        if not self.path.exists():
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        partial = self.path.with_name(self.path.name + names.PARTIAL)
        partial.write_text("".join(map(_as_line, kept)), encoding="utf-8")
        os.replace(partial, self.path)

    def _complete(self) -> bytes:
        """Return the file up to its last complete line."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return data[: data.rfind(b"\n") + 1]


def _as_line(values: Mapping[str, Any]) -> str:
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


UNRECORDED = 2  # steps at the beginning of a run, which do what no later one does


@contextmanager
def profiled(n_steps: int | None, path: Path) -> Iterator[Callable[[], None]]:
    """Give what to call after each step: it records `n_steps` of them, from the third on, and writes them for https://ui.perfetto.dev.

    Warns if there were not so many that one could be recorded, and writes nothing then.

    Args:
        n_steps: A positive number; None records nothing.
        path: The file of the trace, in Chrome's format.
    """
    if n_steps is None:
        yield lambda: None
        return

    def write(trace: profile) -> None:
        if trace.step_num <= UNRECORDED:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=UNRECORDED - 1, warmup=1, active=n_steps, repeat=1)  # a shorter run's end writes what there is
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as recorder:
        yield recorder.step
    if recorder.step_num <= UNRECORDED:
        warnings.warn(f"No step was profiled, for the run had no more than {UNRECORDED}: the first ones are left out.", stacklevel=3)


# What is shown


class _Console(Console):
    """A console that leaves it to its user what a closed output means; rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class ProgressLine:
    """A bar on a terminal, else one plain line for each logged step. Use it as a context.

    An output that is closed or full (`litgpt finetune ... | head`) shows nothing more, and training goes on.

    Args:
        max_steps: All steps of the run, or None if it has no planned end.
        shown: Whether to show anything: true on one process only.
        console: Where to; by default the standard output.
    """

    def __init__(self, max_steps: int | None, shown: bool = True, console: Console | None = None) -> None:
        self.max_steps, self.shown = max_steps, shown
        self.console = console or _Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=max_steps, text="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            with self._unharmed():
                self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            with self._unharmed():
                self.bar.stop()

    def update(self, values: Mapping[str, float]) -> None:
        """Show what `Meter.values` returned."""
        if self.bar is not None:
            self.bar.update(self.task, completed=values["step"], text=_details(values))
        elif self.shown:
            total = "" if self.max_steps is None else f"/{self.max_steps}"
            left = f" | {duration(values['remaining_time'])} left" if "remaining_time" in values else ""
            self.say(f"step {int(values['step'])}{total} | epoch {int(values['epoch'])} | {_details(values)}{left}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.shown:
            with self._unharmed():
                self.console.print(text, markup=False)
                self.console.file.flush()

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Go on in silence if the output takes no more."""
        try:
            yield
        except OSError as error:
            first, self.shown = self.shown, False
            with suppress(OSError):  # an output of Python's own has no descriptor
                self._discard()
            if first:
                why = f"cannot be written ({error.strerror or 'closed'})"
                with suppress(OSError):
                    print(f"Nothing more is shown, for the output {why}; training goes on.", file=sys.stderr)

    def _discard(self) -> None:
        """Let what is still buffered go nowhere, lest it be written when the program ends, and fail again."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self.console.file.fileno())
        finally:
            os.close(nowhere)


NOTABLE = 0.01  # smaller shares are not shown


def _details(values: Mapping[str, float]) -> str:
    parts = [
        f"loss {values['loss']:.3f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad norm {values['grad_norm']:.3g}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"{values['memory']:.2f} GB",
    ]
    shares = {"mfu": "MFU", "padded_share": "padding", "wait_share": "waiting for data"}
    parts += [f"{text} {values[name]:.0%}" for name, text in shares.items() if values.get(name, 0.0) >= NOTABLE]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Return a time for people: `0:01:40`."""
    return str(timedelta(seconds=round(seconds)))


def summary(meter: Meter) -> dict[str, str]:
    """Return what a run took, by name, for people."""
    rate = _ratio(meter.tokens, meter.training_seconds)
    used = meter.mfu(rate)
    return {
        "steps": f"{meter.step:,}",
        "tokens": f"{meter.total_tokens:,}",
        "training time": duration(meter.all_seconds),
        "tokens per second": f"{rate:,.0f}" if meter.training_seconds > 0 else "-",
        "padding": f"{_ratio(meter.slots - meter.tokens, meter.slots):.1%}",
        **({} if used is None else {"model FLOPs utilization": f"{used:.1%}"}),
        "peak memory": f"{peak_memory_gb():.2f} GB",
    }


def report(meter: Meter, **more: str) -> str:
    """Return the table for the end of a run.

    Args:
        meter: What counted the steps.
        more: Further rows, with `_` for spaces in their names.
    """
    rows = summary(meter) | {name.replace("_", " "): value for name, value in more.items()}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
