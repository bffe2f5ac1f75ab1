"""How much memory loading and converting take beyond the memory-mapped files, in a process of its own each.

    python benchmarks/loading_memory.py [--size 2GB] > benchmarks/results/loading-memory.md

Weights are random and lie in a temporary folder, which needs three times the size. What is measured is the anonymous memory of the
process (RssAnon), looked at from outside every millisecond: its peak above what there was after the same call on a tiny model. Weights that
are used straight from their file lie in the system's cache and are not part of it.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import NamedTuple

import torch

from litgpt import hardware, names
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.config import Config
from litgpt.families import FAMILIES
from litgpt.model import GPT
from litgpt.scripts.cast import cast_weights
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

SIZES = {  # width, layers, width of MLP, of experts, vocabulary
    "1MB": (64, 2, 176, 24, 500),
    "60MB": (512, 9, 1408, 88, 4000),
    "2GB": (2048, 20, 5632, 352, 32000),
}
KINDS = {"llama": "Llama", "gpt_neox": "GPT-NeoX", "qwen3_moe": "Qwen3-MoE, 16 experts"}


class Case(NamedTuple):
    """One row of the table."""

    what: str
    dtype: torch.dtype  # of the source
    target: torch.dtype
    layout: str


CASES = [
    Case("load", torch.bfloat16, torch.bfloat16, "hf"),
    Case("load", torch.float32, torch.bfloat16, "hf"),
    Case("load", torch.bfloat16, torch.bfloat16, "litgpt"),
    Case("convert_to_litgpt", torch.bfloat16, torch.bfloat16, "hf"),
    Case("convert_to_litgpt", torch.float32, torch.bfloat16, "hf"),
    Case("convert_from_litgpt", torch.bfloat16, torch.bfloat16, "litgpt"),
    Case("convert_from_litgpt", torch.bfloat16, torch.bfloat16, "hf"),
    Case("cast, as download --dtype does", torch.float32, torch.bfloat16, "hf"),
]


def config_of(kind: str, size: str) -> Config:
    width, n_layer, inner, inner_of_experts, vocab_size = SIZES[size]
    n_head = width // 32
    heads = dict(n_head=n_head, n_query_groups=n_head if kind == "gpt_neox" else n_head // 2, head_size=32)
    fields = dict(n_layer=n_layer, n_embd=width, intermediate_size=inner, vocab_size=vocab_size, padded_vocab_size=vocab_size)
    if kind == "qwen3_moe":
        fields |= dict(n_expert=16, n_expert_per_token=2, moe_intermediate_size=inner_of_experts, norm_topk_prob=True)
    return Config(**FAMILIES[kind].base | dict(family=kind, block_size=512) | heads | fields)


def make(folder: Path, kind: str, size: str, dtype: torch.dtype, layout: str) -> int:
    """Write a checkpoint of random weights, and return the bytes they would take in bfloat16."""
    config = config_of(kind, size)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if layout == "hf":
        write_checkpoint(folder, weights, config)
    else:
        folder.mkdir()
        torch.save(weights, folder / names.LIT_WEIGHTS)
        config.save(folder)
    return sum(2 * shape.numel() for shape in shapes.values())


def carry_out(case: Case, folder: Path) -> object:
    if case.what == "load":
        return load_model(folder, case.target)
    if case.what == "convert_to_litgpt":
        return convert_hf_checkpoint(folder, dtype=str(case.target).removeprefix("torch."))
    if case.what == "convert_from_litgpt":
        return convert_lit_checkpoint(folder, folder.with_name("out"))
    return cast_weights(folder, str(case.target).removeprefix("torch."))


def child(index: int, warm: Path, folder: Path) -> None:
    """Do it for a tiny model, wait for a word, and do it."""
    case = CASES[index]
    carry_out(case, warm)
    print("ready", flush=True)
    sys.stdin.readline()
    kept = carry_out(case, folder)
    print("done", flush=True)
    sys.stdin.readline()
    del kept


def anonymous(pid: int) -> int:
    """Return the bytes of a process that are no part of a file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_of(index: int, warm: Path, folder: Path) -> tuple[int, float]:
    """Return how far the anonymous memory of a case's process grows, in bytes, and how many seconds it takes."""
    words = [sys.executable, __file__, "--child", str(index), str(warm), str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "the child failed"
        peak = before = anonymous(process.pid)
        start = time.perf_counter()
        process.stdin.write("go\n")
        process.stdin.flush()
        reader = Thread(target=lambda: all(line != "done\n" for line in process.stdout))  # up to this line, or the child's end
        reader.start()
        while reader.is_alive():
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.001)
        seconds = time.perf_counter() - start
        process.stdin.close()
    assert process.returncode == 0, "the child failed"
    return peak - before, seconds


def measured(kind: str, size: str, index: int, where: Path) -> tuple[int, int, float]:
    """Return the bytes of a case's weights in their target type, the peak, and the seconds."""
    case = CASES[index]
    with TemporaryDirectory(dir=where) as place:
        (Path(place) / "warm").mkdir()
        warm, folder = Path(place) / "warm" / "in", Path(place) / "in"
        make(warm, kind, "1MB", case.dtype, case.layout)
        n_bytes = make(folder, kind, size, case.dtype, case.layout)
        return n_bytes, *peak_of(index, warm, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="2GB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--where", type=Path, help="The folder for temporary files.")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(int(args.child[0]), Path(args.child[1]), Path(args.child[2]))
        return
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"# Memory that loading and converting take\n\nCPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"Python {sys.version.split()[0]}, {packages}; commit {commit}. Command: `python {' '.join(sys.argv)}`.")
    print("\n" + " ".join(__doc__.split("\n\n")[-1].split()) + "\n")
    print("| model | what | from | to | weights in that type, GB | peak of anonymous memory, GB | ratio | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for kind in args.kinds:
        for index, case in enumerate(CASES):
            n_bytes, peak, seconds = measured(kind, args.size, index, args.where)
            source, target = (str(dtype).removeprefix("torch.") for dtype in (case.dtype, case.target))
            cells = [KINDS[kind], case.what, f"{source} ({case.layout})", target]
            cells += [f"{n_bytes / 1e9:.3f}", f"{peak / 1e9:.3f}", f"{peak / n_bytes:.2f}", f"{seconds:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
