"""Ranks of small training runs: processes forked from a server that has imported all they need, so that starting one takes no time.

A case is a function of this file; `run_ranks(case, world, ...)` calls it on every rank and returns what each returned.
"""

import os
import random
import resource
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked import forkserver
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litgpt import run_state, training
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.hardware import peak_memory_gb
from litgpt.launch import cast_parameters, launch_fabric
from litgpt.lora import LoRA, add_lora
from litgpt.model import GPT
from litgpt.optim import FirstNonFinite, clip_gradients, learning_rate, make_optimizer

TINY = dict(block_size=32, n_layer=2, n_embd=16, n_head=2, vocab_size=31, padding_multiple=1, intermediate_size=24, rotary_percentage=1.0)
KINDS = {  # tied or not, fused biases or none, both kinds of blocks
    "llama": dict(TINY, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, bias=False, tie_embeddings=True),
    "neox": TINY,
}


# Starting ranks


class Killed(Exception):
    """All ranks ended by a signal."""


def run_ranks(case: str, world: int = 1, timeout: float = 60, **args: Any) -> list[Any]:
    """Call a case on so many ranks of this machine."""
    context = forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [context.Process(target=_rank, args=(pipes[i][1], case, i, world, port, args), daemon=True) for i in range(world)]
    for rank, (_, there) in zip(ranks, pipes, strict=True):
        rank.start()
        there.close()
    try:
        answers = [_answer(here, rank, timeout) for rank, (here, _) in zip(ranks, pipes, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if errors := [text for is_error, text in answers if is_error]:
        raise RuntimeError("\n".join(errors))
    return [value for _, value in answers]


def _answer(pipe: Any, rank: Any, timeout: float) -> tuple[bool, Any]:
    if not pipe.poll(timeout):
        return True, "a rank did not answer in time"
    try:
        return pipe.recv()
    except EOFError:
        rank.join()
        raise Killed(rank.exitcode) from None


def _rank(pipe: Any, case: str, rank: int, world: int, port: int, args: dict[str, Any]) -> None:
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=world, NODE_RANK=0, LOCAL_RANK=rank, GLOO_SOCKET_IFNAME="lo")
    if world > 1:
        os.environ |= {name: str(value) for name, value in shared.items()}
    torch.set_num_threads(1)
    try:
        pipe.send((False, globals()[case](**args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    if dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


# What is trained


def build(method: str = "full", kind: str = "llama", dropout: float = 0.0) -> GPT:
    """A tiny model, the same every time."""
    torch.manual_seed(0)
    model = GPT(Config(**KINDS[kind]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    if method == "lora":
        add_lora(model, LoRA(r=3, alpha=6, dropout=dropout, key=True, projection=True, mlp=True), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0.0, 0.2)
    return model.train()


def samples(n: int = 30, seed: int = 0) -> list[dict[str, Tensor]]:
    """Ragged samples, masked at their beginning; a few have no target at all."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        ids = torch.tensor([draw.randrange(31) for _ in range(draw.randint(1, 12))])
        labels = ids.clone()
        labels[: draw.randint(0, len(ids))] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def set_up(method="full", kind="llama", precision="32-true", strategy="auto", dropout=0.0, offload=False, optimizer="AdamW"):
    """Fabric, model and optimizer, as a training script makes them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = launch_fabric(world, accelerator="cpu", strategy=strategy, precision=precision, cpu_offload=offload)
    model = build(method, kind, dropout)
    cast_parameters(model, precision)
    model = fabric.setup_module(model)
    made = make_optimizer(OptimizerArgs(optimizer, lr=1e-2, weight_decay=0.1), model)
    return fabric, model, fabric.setup_optimizers(made)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(model: nn.Module) -> dict[str, list]:
    """What is trained, as plain numbers."""
    return {name: whole(p.detach()).tolist() for name, p in run_state.saved_parameters(model).items()}


# Cases


def train(
    n_steps=8, micro=2, batch=7, n_samples=30, save_every=None, out_dir=None, resume=None, noise=False, kill=None, nan=None, sigterm=None,
    log=None, packing=True, masked=False, **setup,
):  # fmt: skip
    """A training script in short; returns losses, norms, weights, and where it began and ended."""
    fabric, model, optimizer = set_up(**setup)
    training.seed_generators(fabric, 1)
    args, data = TrainArgs(global_batch_size=batch, micro_batch_size=micro, packing=packing), samples(n_samples)
    if masked:
        data = [sample | {"labels": torch.full_like(sample["labels"], -100)} for sample in data]
    if batch == 1:  # whose steps have no other sample to learn from
        data = [sample for sample in data if (sample["labels"][1:] != -100).any()]
    first, total_tokens = 1, 0
    if resume == "latest":
        resume = run_state.latest_step(Path(out_dir))
    if resume is not None:
        counters = run_state.load_run_state(fabric, Path(resume), model, optimizer)
        first, total_tokens = counters["step"] + 1, counters["total_tokens"]
    non_finite, step, losses, norms = FirstNonFinite(fabric.device), first - 1, {}, []

    def save() -> None:
        counters = {"step": step, "total_tokens": total_tokens}
        path = Path(out_dir) / f"step-{step:06d}"
        run_state.save_run_state(fabric, path, model, optimizer, counters, lambda folder: (folder / "note").write_text("hi"), non_finite)

    with training.StopRequest() as stop:
        feed = training.Feed(fabric, data, args, seed=5, first=first, last=n_steps, wants_to_stop=lambda: bool(stop))
        for _, microbatches, agreed in feed:
            step += 1
            if sigterm == [fabric.global_rank, step]:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = training.forward_backward(fabric, model, microbatches, agreed.n_targets)
            if nan == [fabric.global_rank, step]:
                next(p for p in model.parameters() if p.requires_grad).grad.mul_(float("nan"))
            if noise:  # all three generators take part
                loss, factor = (
                    loss + 1e-3 * random.random(),
                    1 + 1e-3 * (random.gauss(0, 1) + np.random.standard_normal() + torch.randn(()).item()),
                )
                for parameter in model.parameters():
                    _ = parameter.grad is not None and parameter.grad.mul_(factor)
            if kill == ["step", step]:
                os.kill(os.getpid(), signal.SIGKILL)
            norm = training.take_step(fabric, model, optimizer, step, learning_rate(step, 1e-2, 50, 3), 1.0, non_finite)
            losses[step] = fabric.all_reduce(loss, reduce_op="mean").item()
            norms.append(norm.item())
            total_tokens += agreed.n_tokens
            if save_every and step % save_every == 0:
                if kill is not None and kill[1] == step:
                    _die_while_saving(kill[0])
                save()
        if feed.stopped:
            save()
    return dict(losses=losses, norms=norms, weights=weights_of(model), first=first, step=step, total_tokens=total_tokens)


def _die_while_saving(stage: str) -> None:
    """Let the next save end as if by `kill -9`: in the middle of a file, after it, or just before the folder gets its name."""
    save_file = run_state.save_file

    def dying(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        if stage == "bytes":
            os.truncate(path, path.stat().st_size // 2)
        if stage != "rename":
            os.kill(os.getpid(), signal.SIGKILL)

    run_state.save_file = dying
    if stage == "rename":
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def clip(max_norm=0.1, by_torch=False, **setup):
    """Norm and clipped gradients of one step, by our function or by torch's."""
    fabric, model, _ = set_up(**setup)
    (rank, n_shares), data = training.data_share(fabric), samples(8)
    n_targets = sum(int((microbatch.targets != -100).sum()) for microbatch in training.microbatches_of(data, 8))
    training.forward_backward(fabric, model, training.microbatches_of(data[rank::n_shares], 4), n_targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, max_norm) if by_torch else clip_gradients(model, max_norm)
    return whole(norm).item(), {name: whole(p.grad).tolist() for name, p in run_state.saved_parameters(model).items()}


def dtypes(**setup):
    """The dtypes of a run after setup and one step."""
    fabric, model, optimizer = set_up(**setup)
    outputs = []
    model.lm_head.register_forward_hook(lambda module, inputs, y: outputs.append(y))
    training.forward_backward(fabric, model, training.microbatches_of(samples(8), 8), 30)
    optimizer.step()
    parameters = list(model.parameters())
    found = dict(
        trained=[p for p in parameters if p.requires_grad],
        frozen=[p for p in parameters if not p.requires_grad],
        state=[value for state in optimizer.state.values() for value in state.values() if value.ndim],
        tables=[table for table, _ in getattr(model, "module", model).rope.tables.values()],
        products=outputs,
    )
    return {what: sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}) for what, tensors in found.items()}


class Sized(list):
    """Samples that say how long they are, as ours do."""

    @property
    def lengths(self) -> list[int]:
        return [len(sample["input_ids"]) for sample in self]


def validate(micro=2, max_iters=None, packing=True, sized=True, **setup):
    """The validation loss."""
    fabric, model, _ = set_up(**setup)
    args, limits = TrainArgs(micro_batch_size=micro, packing=packing), max_iters and EvalArgs(max_iters=max_iters)
    data = samples(9, seed=3)
    return training.validate(fabric, model, training.validation_microbatches(fabric, Sized(data) if sized else data, args, limits))


def failing_write(rank=1, **args):
    """A full disk on one rank: the message each rank gets."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if int(os.environ.get("LOCAL_RANK", "0")) == rank:
        run_state.save_file = full
    try:
        train(**args)
    except UserError as error:
        return str(error)


def disk_quota(n_bytes, **args):
    """A disk that takes no more than so many bytes of a file: the message."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    try:
        train(**args)
    except UserError as error:
        return str(error)


def said(file, **args):
    """What a run and all below it print."""
    with open(file, "w") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    train(**args)
    return Path(file).read_text()


def memory_of(n_bytes):
    """By how much so many bytes raise the peak."""
    before = peak_memory_gb()
    torch.ones(n_bytes, dtype=torch.uint8)
    return peak_memory_gb() - before


def several(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Many cases in turn, on the same ranks."""
    return [globals()[case](**args) for case, args in cases]
