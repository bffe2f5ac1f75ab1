"""What a run counts, shows and reports."""

import errno
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from litgpt.metrics import Meter, ProgressLine, Throughput, _Console, duration, report, validation_values


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(n_steps: int = 3, **settings) -> Meter:
    """Steps of 2 s and 10 tokens."""
    clock = Clock()
    meter = Meter(clock=clock, **settings)
    for _ in range(n_steps):
        clock.now += 2
        meter.count(10)
    return meter


VALUES = dict(loss=2.5, learning_rate=1e-3, grad_norm=0.5, epoch=2)


def test_throughput_forgets_what_left_the_window():
    throughput = Throughput(window=2)
    assert throughput.tokens_per_second() == throughput.seconds_per_step() == 0
    for seconds, n_tokens in ((100, 1), (2, 10), (4, 20)):
        throughput.add(seconds, n_tokens)
    assert (throughput.tokens_per_second(), throughput.seconds_per_step()) == (5.0, 3.0)


def test_values_have_the_names_and_units_that_loggers_show():
    values = run(max_steps=10).values(**VALUES, aux_loss=0.1)
    memory = values.pop("memory")
    assert 0 < memory < 1000
    assert values == dict(
        loss=2.5, step=3, epoch=2, iter_time=2.0, remaining_time=14.0, tokens=30, total_tokens=30,
        learning_rate=1e-3, tokens_per_second=5.0, grad_norm=0.5, aux_loss=0.1,
    )  # fmt: skip


def test_a_resumed_run_counts_on():
    values = run(step=5, total_tokens=1000).values(**VALUES)
    assert (values["step"], values["tokens"], values["total_tokens"]) == (8, 30, 1030) and "remaining_time" not in values


def test_validation_and_saving_are_no_training_time():
    clock = Clock()
    meter = Meter(clock=clock)
    clock.now += 2
    with meter.paused():
        clock.now += 50
    clock.now += 1
    meter.count(30)
    assert (meter.training_seconds, meter.elapsed(), meter.throughput.tokens_per_second()) == (3.0, 53.0, 10.0)


def test_perplexity_is_the_exponential_of_the_loss():
    assert validation_values(2.0) == {"val_loss": 2.0, "val_ppl": pytest.approx(7.389, abs=1e-3)}
    assert validation_values(1e9)["val_ppl"] > 1e300


def shown(terminal: bool, **settings) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=140, highlight=False, soft_wrap=True)
    with ProgressLine(10, console=console, **settings) as progress:
        progress.update(run(max_steps=10).values(**VALUES))
        progress.say("val loss 2.000 [not markup]")
    return file.getvalue()


def test_piped_output_is_one_plain_line_for_each_step():
    first, second = shown(terminal=False).splitlines()
    assert first.startswith("step 3/10 | epoch 2 | loss 2.500 | lr 1.00e-03 | 5 tokens/s | ") and first.endswith(" GB | 0:00:14 left")
    assert second == "val loss 2.000 [not markup]"


def test_a_terminal_shows_a_bar_and_lines_above_it():
    text = shown(terminal=True)
    assert "3/10" in text and "loss 2.500" in text and "5 tokens/s" in text and "val loss 2.000 [not markup]" in text


def test_other_processes_show_nothing():
    assert shown(terminal=False, shown=False) == shown(terminal=True, shown=False) == ""


class Closed(io.StringIO):
    """An output whose reader is gone, or whose disk is full."""

    def __init__(self, error: type[OSError] | OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_output_that_nobody_reads_stops_nothing_and_is_told_of_once(error, terminal: bool, capsys):
    console = _Console(file=Closed(error), force_terminal=terminal, width=140)
    with ProgressLine(10, console=console) as progress:
        for _ in range(3):
            progress.update(run(max_steps=10).values(**VALUES))
            progress.say("said")
    assert capsys.readouterr().err.count("Nothing more is shown") == 1


def test_nothing_is_left_to_write_into_a_closed_pipe_when_the_program_ends():
    code = "from litgpt.metrics import ProgressLine\nwith ProgressLine(1) as line:\n for _ in range(3): line.say('said')\nprint('more')"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-c", code], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert done.returncode == 0 and done.stderr.startswith("Nothing more is shown") and len(done.stderr.splitlines()) == 1


def test_the_report_tells_tokens_time_rate_and_memory():
    rows = dict(line.split("  ", 1) for line in report(run(max_steps=3), final_loss="2.5").splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows.pop("peak memory").endswith(" GB")
    expected = {"steps": "3", "tokens": "30", "training time": "0:00:06", "tokens per second": "5", "final loss": "2.5"}
    assert rows == expected
    assert "-" in report(Meter()), "a run without a step has no rate"


def test_a_duration_is_for_people():
    assert [duration(seconds) for seconds in (0.4, 100, 90000)] == ["0:00:00", "0:01:40", "1 day, 1:00:00"]
