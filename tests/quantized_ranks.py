"""Training of a quantized model on several processes of this machine; `train_on_ranks` returns what each of them found."""

import os
import socket
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from forked import forkserver
from torch.distributed.tensor import DTensor

from litgpt.config import Config
from litgpt.launch import cast_parameters, launch_fabric
from litgpt.lora import LoRA, add_lora
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear, quantize_model

SIZES = dict(block_size=32, n_layer=2, n_embd=64, n_head=2, vocab_size=31, padded_vocab_size=32, intermediate_size=96, bias=False)
BLOCKS = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, rotary_percentage=1.0)


def train(kind: str, strategy: str = "auto", precision: str = "32-true", offload: bool = False, n_steps: int = 5) -> dict[str, Any]:
    """Train LoRA over a quantized model, each process on its part of the batch; return losses, updates, and what is held of a weight."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = launch_fabric(world, accelerator="cpu", strategy=strategy, precision=precision, cpu_offload=offload)
    torch.manual_seed(0)
    model = GPT(Config(**SIZES | BLOCKS))
    quantize_model(model, kind)
    add_lora(model, LoRA(r=3, alpha=6, dropout=0.0, key=True, projection=True, mlp=True))
    cast_parameters(model, precision)
    model = fabric.setup_module(model.train())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False))
    ids = torch.randint(31, (4, 12), generator=torch.Generator().manual_seed(1))
    mine, losses = ids.chunk(world)[fabric.global_rank], []
    for _ in range(n_steps):
        loss = model(mine, targets=mine)
        fabric.backward(loss.nll * world / ids.numel())  # DDP and FSDP2 average over the processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.nll.detach(), reduce_op="sum").item() / ids.numel())
    updates = {name: whole(p.detach()) for name, p in model.module.named_parameters() if p.requires_grad}
    held = sum(b.numel() for layer in model.modules() if isinstance(layer, QuantizedLinear) for b in layer.buffers(recurse=False))
    return {"losses": losses, "updates": {name: tensor.tolist() for name, tensor in updates.items()}, "held": held}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_on_ranks(world: int, *runs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Call `train` on so many processes, once for each run; return what each process found in each."""
    context = forkserver()
    ports = [_free_port() for _ in runs]  # one each: of a port used again, the other rank may find the server of the run before
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [context.Process(target=_rank, args=(there, rank, world, ports, runs), daemon=True) for rank, (_, there) in enumerate(pipes)]
    for rank in ranks:
        rank.start()
    try:
        answers = [here.recv() if here.poll(120) else "a rank did not answer in time" for here, _ in pipes]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if errors := [answer for answer in answers if isinstance(answer, str)]:
        raise RuntimeError("\n".join(errors))
    return answers


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(pipe: Any, rank: int, world: int, ports: Sequence[int], runs: Sequence[dict[str, Any]]) -> None:
    shared = dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE=world, NODE_RANK=0, LOCAL_RANK=rank, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        found = []
        for port, run in zip(ports, runs, strict=True):
            os.environ |= {name: str(value) for name, value in (shared | {"MASTER_PORT": port}).items()}
            found.append(train(**run))
            dist.destroy_process_group()
        pipe.send(found)
    except BaseException:
        pipe.send(traceback.format_exc())
