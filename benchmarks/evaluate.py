"""Evaluating SmolLM2-135M on the requests of lm-eval's kinds of tasks, here and by lm-eval's own class for transformers (HFLM), in turn.

    python benchmarks/evaluate.py [--threads 2 1] [--batch_sizes 1 8] [--rounds 5] [--limit 40] > benchmarks/results/evaluate-CPU.md

Both get the same requests and batch sizes; each is timed in both number types, where the processor multiplies bf16 natively, and counts in
its own faster one. Times are medians of rounds that alternate between all of them. Needs the model that `make quickstart` downloads,
lm-eval and transformers. The texts are words of the file LICENSE in random order: how long they are counts, not what they say.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from smollm2 import MODEL, timed

from litgpt import hardware
from litgpt.eval.evaluate import load_speaker
from litgpt.eval.harness import as_lm

WORDS = Path("LICENSE").read_text().split()
FEWSHOT = 5


def words(random: Random, low: int, high: int) -> str:
    """Return between `low` and `high` words."""
    return " ".join(random.choices(WORDS, k=random.randint(low, high)))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def tasks(n: int) -> dict[str, list[Instance]]:
    """Return the requests of n questions of each kind: as long, and as alike, as those of the tasks that are named."""
    random = Random(0)
    completed = [(question, " " + words(random, 10, 35)) for question in (words(random, 30, 80) for _ in range(n)) for _ in range(4)]
    solved = "\n\n".join(words(random, 60, 90) + "\nAnswer: A" for _ in range(FEWSHOT))
    asked = [f"{solved}\n\n{words(random, 60, 90)}\nAnswer:" for _ in range(n)]
    lettered = [(question, f" {letter}") for question in asked for letter in "ABCD"]
    last_words = [(words(random, 50, 100), " " + words(random, 1, 1)) for _ in range(n)]
    solved_once = [f"{solved}\n\n{words(random, 20, 60)}\nAnswer:" for _ in range(n // 4)]
    return {
        "endings (like HellaSwag)": requests("loglikelihood", completed),
        "letters, 5-shot (like MMLU)": requests("loglikelihood", lettered),
        "last words (like LAMBADA)": requests("loglikelihood", last_words),
        "texts (like WikiText)": requests("loglikelihood_rolling", [(words(random, 300, 1200),) for _ in range(n // 4)]),
        "answers of 32 tokens, 5-shot (like GSM8K)": requests("generate_until", [(each, {"max_gen_toks": 32}) for each in solved_once]),
    }


def sides(batch_size: int) -> dict[str, Callable[[torch.dtype], Any]]:
    """Return what makes each side's model."""
    path, cpu = str(MODEL), torch.device("cpu")
    return {
        "ours": lambda dtype: as_lm(load_speaker(MODEL, dtype, cpu), batch_size),
        "HFLM": lambda dtype: HFLM(pretrained=path, device="cpu", dtype=str(dtype).removeprefix("torch."), batch_size=batch_size),
    }


def answered(lm: Any, asked: list[Instance]) -> list[Any]:
    return getattr(lm, asked[0].request_type)(asked, disable_tqdm=True)


def largest_difference(first: list[Any], second: list[Any]) -> str:
    """Return how far the answers to the same requests lie apart, in fp32; of texts how many differ."""
    if isinstance(first[0], str):
        return f"{sum(a != b for a, b in zip(first, second, strict=True))} of {len(first)} differ"
    numbers = [[each[0] if isinstance(each, tuple) else each for each in side] for side in (first, second)]
    return f"{max(abs(a - b) for a, b in zip(*numbers, strict=True)):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=40, help="How many questions a task has.")
    parser.add_argument("--only", default="", help="Only tasks whose name contains this.")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    dtypes = [torch.float32, *([torch.bfloat16] if hardware.compute_dtype() == torch.bfloat16 else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "lm_eval"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print("# Evaluating SmolLM2-135M against lm-eval's class for transformers\n")
    print(f"CPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"{versions}; commit {commit}.")
    print(f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} alternating rounds; {args.limit} questions.\n")
    print("| task | batch size | threads | ours, s | type | HFLM, s | type | speed ratio | largest difference, fp32 |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for batch_size in args.batch_sizes:
        models = [(side, dtype, make(dtype)) for side, make in sides(batch_size).items() for dtype in dtypes]
        for name, asked in tasks(args.limit).items():
            if args.only not in name:
                continue
            for threads in args.threads:
                torch.set_num_threads(threads)
                seconds = timed([lambda lm=lm, asked=asked: answered(lm, asked) for _, _, lm in models], args.rounds)
                times = [(side, second, str(dtype)[6:]) for second, (side, dtype, _) in zip(seconds, models, strict=True)]
                ours_s, ours_type = min(pair for side, *pair in times if side == "ours")
                theirs_s, theirs_type = min(pair for side, *pair in times if side == "HFLM")
                difference = largest_difference(*(answered(lm, asked) for _, dtype, lm in models if dtype == torch.float32))
                row = f"{ours_s:.2f} | {ours_type} | {theirs_s:.2f} | {theirs_type} | {theirs_s / ours_s:.2f} | {difference}"
                print(f"| {name} | {batch_size} | {threads} | {row} |", flush=True)


if __name__ == "__main__":
    main()
