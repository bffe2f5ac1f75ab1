"""What ranks of this machine do in turn, so that processes are started once for all of it; and what one does that is killed."""

import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from finetune.run_and_kill import at_call
from forked import run_litgpt

from litgpt.finetune import loop


def setup(*runs: tuple[str, Path, dict[str, Any]], devices: int) -> None:
    """Call `setup` of each run's module with its base and its options."""
    for module, base, options in runs:
        import_module(module).setup(base, devices=devices, **options)


def be_rank(rank: int, world: int, port: int, kill_at: int, words: list[str], said: Path) -> None:
    """Be one process of the command `litgpt`, which is killed, as if by `kill -9`, within step `kill_at` unless that is 0."""
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=world, NODE_RANK=0, LOCAL_RANK=rank, GLOO_SOCKET_IFNAME="lo")
    os.environ |= {name: str(value) for name, value in shared.items()}
    torch.set_num_threads(1)
    loop.forward_backward = at_call(kill_at, loop.forward_backward, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_litgpt(words, said / f"out-{rank}", said / f"err-{rank}")
