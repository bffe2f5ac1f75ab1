"""What a run says about itself: the values that are logged, the line or bar that is shown, the report at its end."""

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litgpt.hardware import peak_memory_gb

# Values


class Throughput:
    """Tokens per second over the last steps.

    Args:
        window: How many steps count.
    """

    def __init__(self, window: int = 50) -> None:
        self.steps: deque[tuple[float, int]] = deque(maxlen=window)

    def add(self, seconds: float, n_tokens: int) -> None:
        """Count one step."""
        self.steps.append((seconds, n_tokens))

    def seconds_per_step(self) -> float:
        """Return the mean time of the counted steps; 0 before the first."""
        return sum(seconds for seconds, _ in self.steps) / len(self.steps) if self.steps else 0.0

    def tokens_per_second(self) -> float:
        """Return the rate over the counted steps; 0 before the first."""
        seconds = sum(seconds for seconds, _ in self.steps)
        return sum(n_tokens for _, n_tokens in self.steps) / seconds if seconds > 0 else 0.0


class Meter:
    """Counts the steps of a run and makes the values that loggers get.

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
        self.tokens = 0  # of this process's life
        self.training_seconds = 0.0
        self.throughput = Throughput()
        self.started = self.last = clock()

    def count(self, n_tokens: int) -> None:
        """Note that a step is done.

        Args:
            n_tokens: What it saw, over all devices.
        """
        now = self.clock()
        self.throughput.add(now - self.last, n_tokens)
        self.training_seconds += now - self.last
        self.last = now
        self.step, self.tokens, self.total_tokens = self.step + 1, self.tokens + n_tokens, self.total_tokens + n_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the training time what happens inside: validation, saving."""
        start = self.clock()
        try:
            yield
        finally:
            self.last += self.clock() - start

    def elapsed(self) -> float:
        """Return the seconds since this process began to train, pauses included."""
        return self.clock() - self.started

    def values(self, loss: float, learning_rate: float, grad_norm: float, epoch: int = 1, **more: float) -> dict[str, float]:
        """Return what loggers get after a step: `iter_time` and `remaining_time` in seconds, `memory` in GB."""
        per_step = self.throughput.seconds_per_step()
        known = {} if self.max_steps is None else {"remaining_time": max(0, self.max_steps - self.step) * per_step}
        return {
            "loss": loss,
            "step": self.step,
            "epoch": epoch,
            "iter_time": per_step,
            **known,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "learning_rate": learning_rate,
            "tokens_per_second": self.throughput.tokens_per_second(),
            "grad_norm": grad_norm,
            "memory": peak_memory_gb(),
            **more,
        }


def validation_values(val_loss: float) -> dict[str, float]:
    """Return what loggers get after a validation: the mean loss of a token, and its perplexity."""
    return {"val_loss": val_loss, "val_ppl": math.exp(min(val_loss, 700.0))}


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


def _details(values: Mapping[str, float]) -> str:
    rates = f"lr {values['learning_rate']:.2e} | {values['tokens_per_second']:,.0f} tokens/s | {values['memory']:.2f} GB"
    return f"loss {values['loss']:.3f} | {rates}"


def duration(seconds: float) -> str:
    """Return a time for people: `0:01:40`."""
    return str(timedelta(seconds=round(seconds)))


def report(meter: Meter, **more: str) -> str:
    """Return the table for the end of a run.

    Args:
        meter: What counted the steps.
        more: Further rows, with `_` for spaces in their names.
    """
    rows = {
        "steps": f"{meter.step:,}",
        "tokens": f"{meter.total_tokens:,}",
        "training time": duration(meter.training_seconds),
        "tokens per second": f"{meter.tokens / meter.training_seconds:,.0f}" if meter.training_seconds > 0 else "-",
        "peak memory": f"{peak_memory_gb():.2f} GB",
    } | {name.replace("_", " "): value for name, value in more.items()}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
