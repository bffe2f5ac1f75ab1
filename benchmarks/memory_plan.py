"""How near the memory that `--dry_run` plans is to what finetuning takes, in a process of its own each.

    python benchmarks/memory_plan.py [--only NAME] > benchmarks/results/memory-plan.md

Models are random. What is measured is the most memory the process had in RAM (VmHWM of /proc/self/status), up to the end of the last step,
and up to the end of the program, which also writes the result.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from litgpt.checkpoint import write_checkpoint
from litgpt.config import Config
from litgpt.hardware import GB, device_name, instruction_sets
from litgpt.model import GPT

SHAPE = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, bias=False, rotary_percentage=1.0)
MODELS = {
    "deep": dict(n_layer=12, n_embd=512, n_head=8, n_query_groups=4, intermediate_size=1408, padded_vocab_size=4096),
    "wide": dict(n_layer=4, n_embd=1024, n_head=16, n_query_groups=4, intermediate_size=2816, padded_vocab_size=16384),
    "SmolLM2-135M": dict(n_layer=30, n_embd=576, n_head=9, n_query_groups=3, intermediate_size=1536, padded_vocab_size=49152),
}
ONE_THREAD = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
PADDED = {"train.packing": "false"}
LONG = {"train.max_steps": "25", "train.global_batch_size": "16", "train.max_seq_length": "512"}  # rows of many lengths
CHECKPOINTED = {"train.activation_checkpointing": "full"}


class Case(NamedTuple):
    """One row of the table."""

    method: str
    model: str
    precision: str
    options: dict[str, str] = {}


CASES = {
    "full, fp32, packed": Case("full", "deep", "32-true"),
    "full, fp32, padded": Case("full", "deep", "32-true", PADDED),
    "full, bf16-true, 8-bit state": Case("full", "wide", "bf16-true", {"optimizer.state": "8bit"}),
    "full, bf16-mixed, checkpointing": Case("full", "wide", "bf16-mixed", CHECKPOINTED),
    "full, fp32, checkpointing, bf16 state": Case("full", "deep", "32-true", CHECKPOINTED | {"optimizer.state": "bf16"}),
    "lora, fp32, packed": Case("lora", "deep", "32-true"),
    "lora on all layers, bf16-mixed, padded": Case("lora", "deep", "bf16-mixed", PADDED | {"lora_targets": "all-linear"}),
    "lora, bf16-true, checkpointing": Case("lora", "wide", "bf16-true", CHECKPOINTED),
    "lora, fp32, packed over all samples": Case("lora", "deep", "32-true", {"train.packing": "global"}),
    "qlora nf4, bf16-true, packed": Case("lora", "wide", "bf16-true", {"quantize": "bnb.nf4"}),
    "adapter, fp32, packed": Case("adapter", "deep", "32-true"),
    "adapter v2, bf16-true, padded": Case("adapter_v2", "deep", "bf16-true", PADDED),
    "lora, bf16-true, packed, 25 steps": Case("lora", "SmolLM2-135M", "bf16-true", LONG),
    "full, bf16-mixed, packed, 25 steps": Case("full", "SmolLM2-135M", "bf16-mixed", LONG),
}
CHILD = """
import re, sys
from litgpt import cli
from litgpt.finetune import loop
from litgpt.run import Run
def most():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
def finish(run, *given, kept=Run.finish):
    print("MOST", most())
    kept(run, *given)
def make_plan(*given, kept=loop.make_plan, **more):
    plan = kept(*given, **more)
    print("PLAN", plan.memory.total, plan.total)
    return plan
Run.finish, loop.make_plan = finish, make_plan
code = cli.main([*sys.argv[1:], "--dry_run", "true"]) or cli.main(sys.argv[1:])
print("MOST", most())
sys.exit(code)
"""


def make_model(folder: Path, name: str) -> None:
    """Write the folder of a model with random weights in bf16, and a tokenizer whose tokens are bytes."""
    config = Config(name=name, block_size=512, vocab_size=MODELS[name]["padded_vocab_size"], **SHAPE, **MODELS[name])
    write_checkpoint(folder, GPT(config).state_dict(), config, dtype=torch.bfloat16)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_data(file: Path, n: int = 64) -> None:
    """Write instructions whose lengths are log-normal."""
    draw = Random(0)
    records = [{"instruction": "Go on.", "output": "x" * min(600, int(draw.lognormvariate(5, 0.8)) + 1)} for _ in range(n)]
    file.write_text(json.dumps(records))


def words_of(case: Case, model: Path, data: Path, out: Path) -> list[str]:
    """Return the command line of a case."""
    options = {
        "data": "JSON",
        "data.json_path": str(data),
        "data.val_split_fraction": "0.1",
        "data.prompt_style": "default",
        "out_dir": str(out),
        "precision": case.precision,
        "train.max_steps": "3",
        "train.max_seq_length": "384",
        "train.global_batch_size": "12",
        "train.micro_batch_size": "4",
        "eval.max_new_tokens": "4",
        **case.options,
    }
    return [f"finetune_{case.method}", str(model), *(word for name, value in options.items() for word in (f"--{name}", value))]


def measure(case: Case, folder: Path) -> dict[str, list[int]]:
    """Return what was planned and what was taken, in bytes: while training, and in the whole run."""
    if not (model := folder / case.model).exists():
        make_model(model, case.model)
    make_data(data := folder / "data.json")
    words = [*words_of(case, model, data, folder / "out"), "--overwrite", "true"]
    done = subprocess.run([sys.executable, "-c", CHILD, *words], env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    said = [line.split() for line in done.stdout.splitlines()]
    planned = next([int(n) for n in line[1:]] for line in said if line[:1] == ["PLAN"])
    return {"planned": planned, "taken": [int(line[1]) for line in said if line[:1] == ["MOST"]]}


def rows(only: str, folder: Path) -> Iterator[str]:
    """Yield the rows of the table."""
    for name, case in CASES.items():
        if only in name:
            found = measure(case, folder)
            pairs = list(zip(found["planned"], found["taken"], strict=True))
            shown = (f"{planned / GB:.3f} | {taken / GB:.3f} | {planned / taken - 1:+.1%}" for planned, taken in pairs)
            yield f"| {name} | {case.model} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the names of the rows to measure")
    only = parser.parse_args().only
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "bitsandbytes"))
    print("# Memory of finetuning, planned and taken\n")
    print(f"CPU: {device_name()} ({instruction_sets()}).")
    print(f"Python {sys.version.split()[0]}, {versions}. Command: `python benchmarks/memory_plan.py`.\n")
    print(" ".join(__doc__.split("\n\n")[2].split()) + "\n")
    print("| run | model | planned for training, GB | taken | off by | planned for the whole run, GB | taken | off by |")
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for row in rows(only, Path(folder)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
