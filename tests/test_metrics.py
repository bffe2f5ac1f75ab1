"""What a run counts, shows and reports."""

import errno
import io
import json
import os
import subprocess
import sys
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt.config import Config
from litgpt.lora import LoRA, add_lora
from litgpt.metrics import (
    Journal,
    Meter,
    ProgressLine,
    Throughput,
    _Console,
    duration,
    profiled,
    report,
    train_flops_per_token,
    validation_values,
)
from litgpt.model import GPT
from litgpt.quantize import quantize_model


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(n_steps: int = 3, n_slots: int | None = None, waited: float = 0.0, **settings) -> Meter:
    """Steps of 2 s and 10 tokens."""
    clock = Clock()
    meter = Meter(clock=clock, **settings)
    for _ in range(n_steps):
        clock.now += 2
        meter.count(10, n_slots, waited)
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
        learning_rate=1e-3, tokens_per_second=5.0, padded_share=0.0, wait_share=0.0, grad_norm=0.5, aux_loss=0.1,
    )  # fmt: skip


def test_padding_and_waiting_are_shares_of_the_last_steps():
    throughput = Throughput(window=2)
    assert throughput.padded_share() == throughput.wait_share() == 0
    for seconds, n_tokens, n_slots, waited in ((9, 1, 100, 9), (2, 10, 20, 0.5), (2, 50, 60, 0.1)):
        throughput.add(seconds, n_tokens, n_slots, waited)
    assert (throughput.padded_share(), throughput.wait_share()) == (0.25, pytest.approx(0.15))
    values = run(n_slots=40, waited=0.5).values(**VALUES)
    assert (values["tokens_per_second"], values["padded_share"], values["wait_share"]) == (5.0, 0.75, 0.25)


def test_the_utilization_is_there_once_both_its_parts_are_known():
    meter = run(n_slots=40)
    assert "mfu" not in meter.values(**VALUES)
    meter.flops_per_token, meter.peak_flops = 30.0, 600.0
    assert meter.values(**VALUES)["mfu"] == 0.25  # 5 tokens a second; padding is no use


def test_a_resumed_run_counts_on():
    values = run(step=5, total_tokens=1000).values(**VALUES)
    assert (values["step"], values["tokens"], values["total_tokens"]) == (8, 30, 1030) and "remaining_time" not in values


def test_the_training_time_of_a_resumed_run_is_that_of_all_its_lives():
    meter = run(n_steps=3)
    meter.seconds_before = 100.0
    assert meter.all_seconds == 106.0 and "training time      0:01:46\ntokens per second  5\n" in report(meter)


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
    assert first.startswith("step 3/10 | epoch 2 | loss 2.500 | lr 1.00e-03 | grad norm 0.5 | 5 tokens/s | ")
    assert first.endswith(" GB | 0:00:14 left")
    assert second == "val loss 2.000 [not markup]"


def test_utilization_padding_and_waiting_are_shown_where_they_are_notable():
    meter, file = run(max_steps=10, n_slots=40, waited=0.5), io.StringIO()
    meter.flops_per_token, meter.peak_flops = 30.0, 600.0
    with ProgressLine(10, console=Console(file=file, width=200)) as progress:
        progress.update(meter.values(**VALUES))
    assert " GB | MFU 25% | padding 75% | waiting for data 25% | 0:00:14 left" in file.getvalue()


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
    expected = {"steps": "3", "tokens": "30", "training time": "0:00:06", "tokens per second": "5", "padding": "0.0%", "final loss": "2.5"}
    assert rows == expected
    assert "75.0%" in report(run(n_slots=40))
    assert "-" in report(Meter()), "a run without a step has no rate"


def test_a_duration_is_for_people():
    assert [duration(seconds) for seconds in (0.4, 100, 90000)] == ["0:00:00", "0:01:40", "1 day, 1:00:00"]


# What the model computes

SHAPE = dict(block_size=64, n_layer=12, n_embd=96, n_head=6, intermediate_size=160, vocab_size=200, padding_multiple=1, bias=False)
LLAMA = SHAPE | dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False)
EXPERTS = dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, moe_intermediate_size=48)
LATENT = dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24)
MODELS = {
    "neox": SHAPE,
    "groups": LLAMA | dict(n_query_groups=2),
    "wide heads": LLAMA | dict(head_size=32),
    "tied": LLAMA | dict(tie_embeddings=True),
    "experts": LLAMA | EXPERTS,
    "shared experts": LLAMA | EXPERTS | dict(shared_intermediate_size=64),
    "latent": LLAMA | dict(mixers=["latent"] * 12, latent_attention=LATENT, head_size=32, n_query_groups=6),
}
UPDATES = dict(dropout=0.0, key=True, projection=True, mlp=True)


def measured(model: GPT, n_rows: int = 2, length: int = 48) -> float:
    """What torch counts of one microbatch, for each token. In float64 every product is one that it knows."""
    idx = torch.randint(0, 200, (n_rows, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model.double()(idx).flatten(0, 1), idx.flatten()).backward()
    return counter.get_total_flops() / (n_rows * length)


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", ["full", "lora", "head alone", "last blocks"])
def test_the_operations_of_a_token_are_those_that_torch_counts(shape, method):
    model = GPT(Config(**shape))
    if method == "lora":
        add_lora(model, LoRA(r=2, **UPDATES))
    elif method == "head alone":
        model.requires_grad_(False).lm_head.requires_grad_(True)
    elif method == "last blocks":
        model.requires_grad_(False).transformer.h[8:].requires_grad_(True)
    if method != "full" and shape.get("tie_embeddings"):
        model.transformer.wte.weight.requires_grad_(method == "head alone")
    assert train_flops_per_token(model, 48) == pytest.approx(measured(model), rel=0.03)


@pytest.mark.parametrize("name", ["groups", "shared experts"])
def test_quantized_layers_take_as_many_operations_as_plain_ones(name):
    plain, quantized = (GPT(Config(**MODELS[name])) for _ in range(2))
    quantize_model(quantized, "bnb.nf4")
    for model in (plain, quantized):
        add_lora(model, LoRA(r=2))
    assert train_flops_per_token(quantized, 48) == pytest.approx(train_flops_per_token(plain, 48))


def test_a_large_models_operations_are_six_or_four_times_its_weights():
    with torch.device("meta"):
        model = GPT(Config.from_name("Llama-3.2-1B"))
        n_weights = sum(parameter.numel() for parameter in model.parameters())
        attention = 16 * 32 * 64 * 12  # for each token that one looks at: layers, heads, features, two products three times
        assert train_flops_per_token(model, 100) == pytest.approx(6 * n_weights + 100 * attention, rel=1e-3)
        add_lora(model, LoRA(r=1))
        assert train_flops_per_token(model, 100) == pytest.approx(4 * n_weights + 100 * attention, rel=2e-3)
        head = 4 * model.config.n_embd * model.config.padded_vocab_size
        assert train_flops_per_token(model, 100) - train_flops_per_token(model, 100, target_share=0.25) == pytest.approx(0.75 * head)


def test_a_token_looks_at_no_more_than_its_window():
    sizes = LLAMA | dict(sliding_window_size=16, sliding_window_indices=[1, 0] * 6)
    near, far = (train_flops_per_token(GPT(Config(**sizes)), length) for length in (16, 64))
    plain = [train_flops_per_token(GPT(Config(**LLAMA)), length) for length in (16, 64)]
    assert near == plain[0] and far - near == (plain[1] - plain[0]) / 2


# What is kept


def test_the_journal_keeps_what_was_written_in_order(tmp_path):
    journal = Journal(tmp_path / "logs" / "metrics.jsonl")
    assert journal.rows() == []
    journal.write({"step": 1, "loss": 0.1 + 0.2})
    journal.write({"step": 1, "val_loss": float("nan"), "val_ppl": float("inf")})
    assert journal.rows() == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 1, "val_loss": None, "val_ppl": None}]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in journal.path.read_text().splitlines()), "strict JSON"


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\xff\x00", '{"step": "é'.encode()[:-1]])
def test_a_line_that_a_kill_cut_short_is_forgotten(tmp_path, torn):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        journal.write({"step": step})
    with open(journal.path, "ab") as file:
        file.write(torn)
    resumed = Journal(journal.path)
    assert [row["step"] for row in resumed.rows()] == [1, 2]
    resumed.write({"step": 3})
    assert [row["step"] for row in Journal(journal.path).rows()] == [1, 2, 3]
    assert len(journal.path.read_bytes().splitlines()) == 3


def test_a_line_of_zeros_hides_no_other(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.path.write_bytes(b'{"step": 1}\n' + b"\x00" * 20 + b'\n[1]\n{"step": "1"}\n{"loss": 1}\n{"step": 2}\n')
    assert [row["step"] for row in journal.rows()] == [1, 2]


def test_a_run_that_goes_on_has_each_step_once(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.cut_after(3)  # of no file
    journal.write({"step": 0, "val_loss": 3.0})
    for step in range(1, 6):
        journal.write({"step": step, "loss": 1 / step})
    before = journal.rows()
    journal.cut_after(3)
    assert journal.rows() == before[:4]
    for step in (4, 5):
        journal.write({"step": step, "loss": 1 / step})
    assert journal.rows() == before and os.listdir(tmp_path) == ["metrics.jsonl"]
    journal.cut_after(-1)
    assert journal.rows() == []


# A trace


def steps_recorded(path, n_steps: int, n_done: int) -> list[int]:
    """Which steps of a run are in its trace."""
    with profiled(n_steps, path) as step_done:
        for i in range(1, n_done + 1):
            with torch.profiler.record_function(f"step {i}"):
                torch.ones(3, 3) @ torch.ones(3, 3)
            step_done()
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]} if path.exists() else set()
    return [i for i in range(1, n_done + 1) if f"step {i}" in names]


def test_a_trace_holds_so_many_steps_from_the_third_on(tmp_path):
    numbers = count()
    trace = lambda *sizes: steps_recorded(tmp_path / "logs" / f"trace{next(numbers)}.json", *sizes)  # noqa: E731
    assert trace(2, 6) == [3, 4]
    assert trace(5, 4) == [3, 4], "a shorter run's end is no reason to lose it"


@pytest.mark.parametrize("n_done", [0, 1, 2])
def test_a_run_too_short_for_a_trace_says_so_and_writes_none(tmp_path, n_done):
    with pytest.warns(UserWarning, match="No step was profiled"):
        assert steps_recorded(tmp_path / "trace.json", 5, n_done) == []
    assert not os.listdir(tmp_path)


def test_without_a_profile_nothing_is_recorded(tmp_path):
    with profiled(None, tmp_path / "trace.json") as step_done:
        step_done()
    assert not os.listdir(tmp_path)
