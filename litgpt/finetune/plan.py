"""What a finetuning run will take, before it begins: its steps, its memory, and which flags would save some of that."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from litgpt import names
from litgpt.args import OptimizerArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.packing import Sample
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.hardware import GB, device_memory_gb, device_name, find_device, products_dtype
from litgpt.launch import PRECISIONS
from litgpt.lora import LoRAExperts, LoRALinear
from litgpt.model import GPT
from litgpt.optim import make_optimizer, warmup_steps
from litgpt.quantize import KINDS, bytes_per_weight, check_quantize, is_quantizable, n_weights, quantized
from litgpt.run_inputs import counted
from litgpt.scripts.batches import Batches, batches_of, batches_of_texts, texts_of
from litgpt.scripts.memory_plan import Pass, blocks_to_recompute, cast, in_words, measured_pass, without_numbers
from litgpt.training import Limits

PROGRAM = 0.5 * GB  # what Python, torch and its libraries take, where nothing says it
LATER = 0.06 * GB  # and what they load with the first step
KERNEL = 0.95e6  # what oneDNN keeps on a CPU for each different product in 16 bits,
MOST_KERNELS = 1024  # and for how many of them: https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
KEPT = 0.15 * GB  # what the C library keeps of freed memory in a run on a CPU, and between the tensors of products in 16 bits,
GAPS, GAPS_STEPS = 0.6, 8  # up to this share of activations and logits, which it nears in so many steps: benchmarks/results/memory-plan.md
NOTEWORTHY = 0.02  # savings below this share of all memory are not listed


class Trained(Protocol):
    """What a plan needs to know of a `Method`."""

    name: str
    freezes: bool
    prepare: Callable[[GPT, int], None]
    quantize: str | None


class Measured(NamedTuple):
    """What was found out about a model without numbers. Sizes are in bytes."""

    n_parameters: int
    n_trained: int
    n_quantizable: int
    weights: int  # buffers included
    buffers: int  # of that: quantized weights, which every device holds whole
    stored: int  # the weights of the model alone, as they lie on the disk
    merged: int  # of that: those to which updates are added, which are new
    block: int  # the parameters of the largest block
    outside: int  # those of no block: embedding, head and norm
    trained: list[tuple[int, torch.dtype, int]]  # numbers, type and dimensions of each trained parameter
    passes: Pass


@dataclass(frozen=True)
class Memory:
    """What one device holds at the fullest moment of the training. All sizes are in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What forward and backward pass hold beside the logits."""
    logits: int
    """What the head and the loss hold; nothing if the passes are fullest at another moment."""
    program: int
    """What Python, torch, its libraries and the samples take."""
    gaps: int = 0
    """What the C library keeps of what was freed, since what comes next fits there badly."""

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.program + self.gaps


@dataclass(frozen=True)
class Plan:
    """What a run consists of, and what it takes."""

    model: str
    method: str
    precision: str
    n_parameters: int
    n_trained: int
    n_samples: int
    n_tokens: int
    """Of all samples, each without its last one, which is only predicted."""
    longest: int
    """How many tokens the longest sample has."""
    batches: Batches
    packing: bool | str
    limits: Limits
    warmup: int
    memory: Memory
    n_recomputed: int
    """How many blocks are computed again in the backward pass."""
    copying: int
    """What there is on a CPU while the model is read, or the result written, in bytes."""
    device: str
    available: int
    """What each device has, in bytes."""
    n_devices: int
    savings: list[tuple[str, int]]
    """Flags, and about how many bytes each would save; the best one first."""

    @property
    def total(self) -> int:
        """The most that a device holds in the course of the run, in bytes."""
        return max(self.memory.total, self.copying)

    @property
    def fits(self) -> bool:
        """Whether that is no more than it has."""
        return self.total <= self.available


def make_plan(
    method: Trained,
    config: Config,
    samples: Sequence[Sample],
    train: TrainArgs,
    optimizer: OptimizerArgs,
    precision: str,
    limits: Limits,
    *,
    seed: int = 1337,
    n_devices: int = 1,
    n_local: int = 1,
    is_sharded: bool = False,
    offloads: bool = False,
    stored: torch.dtype = torch.bfloat16,
) -> Plan:
    """Return the plan of a run. Nothing of the model's size is allocated.

    Args:
        method: What is trained.
        config: Of the model.
        samples: Those to train on.
        train: Batch sizes, packing, limits, and which blocks are computed again.
        optimizer: Which one, and how it keeps what it remembers.
        precision: A key of `launch.PRECISIONS`.
        limits: When the run ends.
        seed: Of the order of the samples.
        n_devices: How many there are on all machines.
        n_local: How many of them are on one machine.
        is_sharded: Whether each of them holds a slice of every weight, not all.
        offloads: Whether those slices lie in the memory of the CPU.
        stored: In which type the model's weights lie on the disk.

    Raises:
        UserError: The optimizer takes no such argument, or the activations do not fit the budget for them.
    """
    program = program_bytes()
    device, on_cpu = find_device(), find_device().type == "cpu"
    batches = batches_of(samples, train, seed, n_devices)
    found = measure(method, config, precision, batches, stored)
    if on_cpu:
        program += int(KERNEL * min(MOST_KERNELS, found.passes.n_products * batches.n_sizes))
    n_slices, offloads = n_devices if is_sharded else 1, offloads and not on_cpu
    memory, n_recomputed = memory_of(found, train, optimizer, batches, config.n_layer, n_slices, offloads, program)
    if on_cpu:
        share = GAPS * -math.expm1(-(limits.max_steps or math.inf) / GAPS_STEPS) if found.passes.n_products else 0
        memory = replace(memory, gaps=int(KEPT + share * (memory.activations + memory.logits)))
    copying = (
        program + max(found.stored, memory.weights + memory.optimizer + (found.stored + found.merged if method.freezes else 0))
        if on_cpu
        else 0
    )
    texts = texts_of(samples)
    plan = Plan(
        model=config.name,
        method=method.name,
        precision=precision,
        n_parameters=found.n_parameters,
        n_trained=found.n_trained,
        n_samples=len(samples),
        n_tokens=sum(map(sum, texts)),
        longest=max(map(sum, texts)) + 1,
        batches=batches,
        packing=train.packing,
        limits=limits,
        warmup=warmup_steps(train, limits.max_steps),
        memory=memory,
        n_recomputed=n_recomputed,
        copying=copying,
        device=device_name(device) or device.type,
        available=int(device_memory_gb(device) * GB / (n_local if on_cpu else 1)),
        n_devices=n_devices,
        savings=[],
    )
    known = [*savings(method, train, optimizer, plan, found, texts)]
    if is_sharded and not on_cpu and not offloads:
        less, _ = memory_of(found, train, optimizer, batches, config.n_layer, n_slices, True, program)
        known.append(("--cpu_offload true", memory.total - less.total))
    listed = [(flag, saved) for flag, saved in known if saved >= NOTEWORTHY * memory.total]
    return replace(plan, savings=sorted(listed, key=lambda pair: -pair[1]))


def recomputed_blocks(
    method: Trained, config: Config, samples: Sequence[Sample], train: TrainArgs, precision: str, seed: int, n_devices: int = 1
) -> int:
    """Return how many blocks `train.activation_checkpointing` has computed again.

    Raises:
        UserError: It is a budget that the activations of a microbatch do not fit.
    """
    if isinstance(train.activation_checkpointing, str):
        return config.n_layer if train.activation_checkpointing == "full" else 0
    batches = batches_of(samples, train, seed, n_devices)
    passes = measure(method, config, precision, batches).passes
    return blocks_to_recompute(passes, train.activation_checkpointing * GB, accumulates=batches.most > 1)


# What is measured


def measure(method: Trained, config: Config, precision: str, batches: Batches, stored: torch.dtype = torch.bfloat16) -> Measured:
    """Return what the model and the fullest microbatch take, after running them without numbers."""
    check_quantize(method.quantize)  # what it loads for that is real, so it comes first
    policy, products = PRECISIONS[precision], products_dtype(precision)
    with without_numbers():
        model = GPT(config)
        n_own, n_quantizable = _numbers(model), sum(_numbers(layer) for _, layer in _quantizable(model))
        if method.quantize is not None:
            for name, layer in _quantizable(model):
                model.set_submodule(name, quantized(layer, KINDS[method.quantize], policy.frozen, torch.device("cpu")))
        n_before = _numbers(model)
        method.prepare(model, 0)
        any_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        cast(model, policy.frozen, policy.trained if any_frozen else None)
        blocks = [_nbytes(block.parameters()) for block in model.transformer.h]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Measured(
            n_parameters=n_own + _numbers(model) - n_before,
            n_trained=_n_trained(model),
            n_quantizable=n_quantizable,
            weights=_nbytes(model.parameters()) + _nbytes(model.buffers()),
            stored=n_own * stored.itemsize,
            merged=stored.itemsize
            * sum(n_weights(layer) - _n_trained(layer) for layer in model.modules() if isinstance(layer, LoRALinear | LoRAExperts)),
            buffers=_nbytes(model.buffers()),
            block=max(blocks),
            outside=_nbytes(model.parameters()) - sum(blocks),
            trained=[(parameter.numel(), parameter.dtype, parameter.ndim) for parameter in trained],
            passes=measured_pass(
                model.train(), batches.rows, batches.length, batches.lengths, None if products == policy.frozen else products
            ),
        )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _n_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _quantizable(model: GPT) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in model.named_modules() if is_quantizable(name, layer)]


def memory_of(
    found: Measured,
    train: TrainArgs,
    optimizer: OptimizerArgs,
    batches: Batches,
    n_layer: int,
    n_slices: int = 1,
    offloads: bool = False,
    program: int = 0,
) -> tuple[Memory, int]:
    """Return what a device holds at the fullest moment, and how many blocks are computed again for that.

    Args:
        found: See `measure`.
        train: Says which blocks are computed again.
        optimizer: Says what is remembered.
        batches: Says whether a step has several microbatches, so that the gradients of one are there during the next.
        n_layer: How many blocks there are.
        n_slices: Over how many devices weights, gradients and averages are spread.
        offloads: Whether these slices lie elsewhere.
        program: What Python and torch take.
    """
    accumulates, wanted = batches.most > 1, train.activation_checkpointing
    if isinstance(wanted, str):
        n_recomputed = n_layer if wanted == "full" else 0
    else:
        n_recomputed = blocks_to_recompute(found.passes, wanted * GB, accumulates)
    peak = found.passes.peak(n_recomputed, accumulates=False)
    if accumulates:  # the gradients are there in later microbatches, which are smaller
        later = found.passes.peak(n_recomputed)
        share = batches.later / batches.largest
        peak = max(peak, replace(later, activations=round(later.activations * share)), key=lambda peak: peak.total)
    whole, whole_gradients = _gathered(found) if n_slices > 1 else (0, 0)
    slices = (found.weights - found.buffers, peak.gradients, optimizer_bytes(optimizer, found.trained))
    weights, gradients, state = (0 if offloads else size // n_slices for size in slices)
    memory = Memory(
        weights=weights + found.buffers + whole,
        gradients=gradients + whole_gradients,
        optimizer=state,
        activations=peak.activations,
        logits=peak.logits,
        program=program,
    )
    return memory, n_recomputed


def _gathered(found: Measured) -> tuple[int, int]:
    """Return what of weights and gradients is whole where devices hold slices: a block and the next one, and all that is in no block."""
    first, *blocks, last = found.passes.gradients
    return 2 * found.block + found.outside, max(blocks) + first + last


def optimizer_bytes(args: OptimizerArgs, trained: Sequence[tuple[int, torch.dtype, int]]) -> int:
    """Return what an optimizer remembers of parameters, of which numbers, type and dimensions are given; it is tried on small ones."""
    per_number: dict[tuple[torch.dtype, bool], float] = {}
    for _, dtype, n_dimensions in trained:
        if (key := (dtype, n_dimensions > 1)) not in per_number:
            per_number[key] = _remembered(args, nn.Parameter(torch.zeros((256, 256) if n_dimensions > 1 else (256,), dtype=dtype)))
    return round(sum(n * per_number[dtype, n_dimensions > 1] for n, dtype, n_dimensions in trained))


def _remembered(args: OptimizerArgs, parameter: nn.Parameter) -> float:
    tried = make_optimizer(args, nn.ParameterList([parameter]))
    parameter.grad = torch.zeros_like(parameter)
    tried.step()
    return sum(kept.nbytes for kept in tried.state[parameter].values() if isinstance(kept, Tensor) and kept.ndim) / parameter.numel()


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type of a checkpoint's weights, as its config.json says; bf16 where it does not."""
    described = read_json(folder / names.CONFIG)
    known = str(described.get("dtype") or described.get("torch_dtype")).removeprefix("torch.")
    return getattr(torch, known) if known in names.DTYPES else torch.bfloat16


def program_bytes() -> int:
    """Return what Python, torch, its libraries and the samples will take while a model is trained, beside the model."""
    status = Path("/proc/self/status")
    if find_device().type == "cpu" and status.exists() and (found := re.search(r"VmRSS:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 + int(LATER)
    return int(PROGRAM)


# What would save memory


def savings(
    method: Trained, train: TrainArgs, optimizer: OptimizerArgs, plan: Plan, found: Measured, texts: list[list[int]]
) -> Iterator[tuple[str, int]]:
    """Yield flags that are not given yet, and about how many bytes each saves."""
    memory, n_blocks, accumulates = plan.memory, len(found.passes.forward), plan.batches.most > 1
    passing, longest = memory.activations + memory.logits, train.max_seq_length or plan.longest
    if plan.n_recomputed < n_blocks:
        peaks = [found.passes.peak(n, accumulates).total for n in (plan.n_recomputed, n_blocks)]
        yield "--train.activation_checkpointing full", peaks[0] - peaks[1]
    if optimizer.state == "full":
        with suppress(UserError):  # of optimizers and arguments that do not go with it
            share = optimizer_bytes(replace(optimizer, state="8bit"), found.trained) / optimizer_bytes(optimizer, found.trained)
            yield "--optimizer.state 8bit", round(memory.optimizer * (1 - share))
    if method.freezes and method.quantize is None:
        yield "--quantize bnb.nf4", round(found.n_quantizable * (PRECISIONS[plan.precision].frozen.itemsize - bytes_per_weight("bnb.nf4")))
    if not method.freezes:
        yield "litgpt finetune_lora instead", memory.gradients + memory.optimizer
    if plan.precision in ("32-true", "bf16-mixed"):
        halved = memory.weights + (0 if method.freezes else memory.gradients + memory.optimizer)
        yield "--precision bf16-true", (halved + (memory.activations if plan.precision == "32-true" else 0)) // 2
    if train.micro_batch_size > 1:
        size = train.micro_batch_size // 2
        fewer = batches_of_texts(texts, longest, replace(train, micro_batch_size=size))
        yield f"--train.micro_batch_size {size}", _saved(passing, plan.batches, fewer)
    if (length := longest // 2) > 1 and train.packing != "global":
        cut = batches_of_texts([[min(n, length - 1) for n in sample] for sample in texts], length, train)
        yield f"--train.max_seq_length {length}", _saved(passing, plan.batches, cut)
    if not train.packing:
        yield "--train.packing true", _saved(passing, plan.batches, batches_of_texts(texts, longest, replace(train, packing=True)))


def _saved(passing: int, now: Batches, then: Batches) -> int:
    return round(passing * (1 - then.largest / now.largest))


# What is shown


def text(plan: Plan) -> str:
    """Return the plan for people."""
    batches, limits, memory = plan.batches, plan.limits, plan.memory
    how = {False: "padded to one length", True: "laid end to end, without padding", "global": "packed into full rows, without padding"}
    rows = {
        "parameters": f"{plan.n_parameters:,}, of which {plan.n_trained:,} are trained ({plan.n_trained / plan.n_parameters:.2%})",
        "samples": f"{plan.n_samples:,}, {plan.n_tokens / plan.n_samples:,.1f} tokens on average, {plan.longest:,} at most",
        "an epoch": f"{counted(plan.n_tokens, 'token')}, {how[plan.packing]}"
        + (f": {batches.padding:.1%} more are padding" if not plan.packing else ""),
        "a step": f"{batches.n_tokens:,.0f} tokens in {batches.n_microbatches:,.1f} forward passes of at most {batches.largest:,} tokens"
        + (f" on each of {plan.n_devices} devices" if plan.n_devices > 1 else ""),
        "steps": _steps(limits, plan.warmup, batches.n_tokens),
        "weights": in_words(memory.weights),
        "gradients": in_words(memory.gradients) if memory.gradients else "none yet at the fullest moment",
        "optimizer": in_words(memory.optimizer),
        "activations": in_words(memory.activations)
        + (f", {counted(plan.n_recomputed, 'block')} computed again in the backward pass" if plan.n_recomputed else ""),
        "logits": in_words(memory.logits),
        "program": f"{in_words(memory.program)} for Python, torch and the samples",
        "gaps": f"{in_words(memory.gaps)} that are free, but not given back",
        "all memory": in_words(memory.total),
    }
    if plan.copying > memory.total:
        rows["copying"] = f"{in_words(plan.copying)} at most while the model is read and the result written"
    verdict = "it fits" if plan.fits else "it does not fit"
    if not memory.gaps:
        del rows["gaps"]
    lines = [f"Plan: {plan.model} with {plan.method} in {plan.precision}.", *(f"  {name:12} {value}" for name, value in rows.items())]
    lines.append(f"  {'device':12} {plan.device} with {in_words(plan.available)} for each process: {verdict}.")
    if plan.savings:
        lines += ["Memory could be saved by, about:", *(f"  {in_words(saved):>9}  {flag}" for flag, saved in plan.savings)]
    return "\n".join(lines)


def _steps(limits: Limits, warmup: int, n_tokens: float) -> str:
    rising = f"the learning rate rises in the first {warmup:,}" if warmup else "without a warm-up"
    if limits.max_steps is None:
        return f"as many as time allows, {rising}"
    return f"{limits.max_steps:,}, {rising}; {limits.max_steps * n_tokens:,.0f} tokens in all"
