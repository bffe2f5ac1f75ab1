"""A mixture-of-experts layer as Qwen3-MoE has it, here and in transformers, in turn in one process.

    python benchmarks/experts.py [--threads 2 1] [--rounds 5] [--only "1024 x 768"] > benchmarks/results/experts-CPU.md

Times are medians of rounds that alternate between ours, transformers' default and its loop over the experts. Where that loop's backward
pass would write the whole stack of weights for each busy expert and more than 1 GB in all, it is left out.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import torch
from smollm2 import Run, timed
from transformers import Qwen3MoeConfig, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from litgpt import hardware
from litgpt.experts import LLaMAMoE

SIZES = [(256, 128), (1024, 768)]  # width, width inside an expert
EXPERTS = [(8, 2), (64, 8), (128, 8)]  # how many, how many per token
TOKENS = [1, 8, 512]
DTYPES = [torch.float32, torch.bfloat16]
NO_OPTIONS = dict.fromkeys(("n_expert_groups", "swiglu_limit", "shared_intermediate_size"))
QWEN3 = dict(norm_topk_prob=True, routed_scaling_factor=1.0, expert_scores="softmax")
NO_PARTS = dict(router_bias=False, expert_bias=False, shared_expert_gate=False)


def our_layer(C: int, I: int, E: int, k: int) -> LLaMAMoE:
    sizes = dict(n_embd=C, moe_intermediate_size=I, n_expert=E, n_expert_per_token=k)
    return LLaMAMoE(SimpleNamespace(**sizes, **QWEN3, **NO_OPTIONS, **NO_PARTS))


def their_layer(ours: LLaMAMoE, C: int, I: int, E: int, k: int, implementation: str) -> Qwen3MoeSparseMoeBlock:
    """Return their layer with our very weights."""
    config = Qwen3MoeConfig(hidden_size=C, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k, norm_topk_prob=True)
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = Qwen3MoeSparseMoeBlock(config)
    weights = {"gate.weight": ours.gate.weight, "experts.gate_up_proj": ours.experts.gate_up, "experts.down_proj": ours.experts.down}
    layer.load_state_dict(weights, assign=True)
    return layer


def default_implementation() -> str:
    """Return how transformers computes experts if nobody says how."""
    config = Qwen3MoeConfig(vocab_size=8, hidden_size=64, num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    return Qwen3MoeModel(config).config._experts_implementation


def run_of(layer: torch.nn.Module, x: torch.Tensor, is_training: bool) -> Run:
    def forward() -> None:
        with torch.inference_mode():
            layer(x)

    def train() -> None:
        inputs = x.clone().requires_grad_()
        layer(inputs).backward(x)
        layer.zero_grad()

    return train if is_training else forward


def rows(args: argparse.Namespace, default: str) -> None:
    """Print a row for each shape, dtype, pass and number of threads."""
    for (C, I), (E, k), dtype in product(SIZES, EXPERTS, DTYPES):
        if args.only not in f"{C} x {I}, {E} experts":
            continue
        ours = our_layer(C, I, E, k).to(dtype)
        layers = [ours, *(their_layer(ours, C, I, E, k, implementation) for implementation in (default, "eager"))]
        stack = sum(parameter.nbytes for parameter in ours.experts.parameters())
        for n, is_training, threads in product(TOKENS, (False, True), args.threads):
            if n == 1 and is_training:
                continue
            torch.set_num_threads(threads)
            x = torch.randn(1, n, C, dtype=dtype)
            taken = layers[:2] if is_training and stack * min(E, n * k) > 1e9 else layers
            large = stack > 5e7 and (is_training or n == 512)
            times = timed([run_of(layer, x, is_training) for layer in taken], 3 if large else args.rounds)
            name = "forward, backward" if is_training else "forward"
            cells = [f"{C} x {I}", f"{E}, {k}", n, str(dtype).removeprefix("torch."), name, threads]
            cells += [f"{1000 * seconds:.2f}" for seconds in times] + ["-"] * (3 - len(times))
            cells += [f"{seconds / times[0]:.2f}" for seconds in times[1:]] + ["-"] * (3 - len(times))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5, help="Large layers get 3.")
    parser.add_argument("--only", default="", help='Only layers whose description ("1024 x 768, 64 experts") contains this.')
    args = parser.parse_args()
    torch.manual_seed(0)
    default = default_implementation()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"# A layer of experts against transformers\n\nCPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"{versions}; commit {commit}. transformers' default is {default!r}.")
    print(f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} alternating rounds (large layers 3), in milliseconds.")
    print(f"Processes that wanted a core when it began: {os.getloadavg()[0]:.1f}, of {os.cpu_count()} cores.\n")
    print("| sizes | experts, per token | tokens | dtype | pass | threads | ours | default | loop | default / ours | loop / ours |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows(args, default)


if __name__ == "__main__":
    main()
