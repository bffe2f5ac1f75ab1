"""Training runs in other processes, forked from a server that has imported all they need: on several ranks, or killed."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from forked import forkserver

from litgpt import launch


def run_and_kill(module: str, at_step: int, *args: Any, **options: Any) -> int:
    """Call `module.setup` in a process that is killed, as if by `kill -9`, within step `at_step`; return its exit code."""
    return _exit_codes(_start(module, at_step, {}, args, options))[0]


def run_and_kill_after(seconds: float, module: str, out_dir: Path, *args: Any, **options: Any) -> tuple[int, float]:
    """Call `module.setup` in a process that is killed so long after it began to use `out_dir`; return its exit code and how long it ran."""
    lock = out_dir / "logs" / ".lock"
    lock.unlink(missing_ok=True)
    process = _start(module, 0, {}, args, options | dict(out_dir=out_dir))
    while process.is_alive() and not lock.exists():
        sleep(0.001)
    start = monotonic()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode, monotonic() - start


def run_on_ranks(module: str, world: int, *args: Any, fits: bool = True, timeout: float = 60, **options: Any) -> list[int]:
    """Call `module.setup` on so many ranks of this machine, each large enough for the training or not; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=world, NODE_RANK=0, FITS=int(fits), GLOO_SOCKET_IFNAME="lo")
    ranks = [_start(module, 0, shared | dict(LOCAL_RANK=rank), args, options | dict(devices=world)) for rank in range(world)]
    return _exit_codes(*ranks, timeout=timeout)


def _start(module: str, kill_at: int, environment: dict[str, Any], args: tuple, options: dict[str, Any]) -> Any:
    process = forkserver().Process(target=_run, args=(module, kill_at, environment, args, options), daemon=True)
    process.start()
    return process


def _exit_codes(*processes: Any, timeout: float = 60) -> list[int]:
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


def _run(module: str, kill_at: int, environment: dict[str, Any], args: tuple, options: dict[str, Any]) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if os.environ.get("FITS") == "0":
        launch.training_fits = lambda *args, **options: False
    script = import_module("litgpt.pretrain" if module == "litgpt.pretrain" else "litgpt.finetune.loop")
    script.forward_backward = at_call(kill_at, script.forward_backward, lambda: os.kill(os.getpid(), signal.SIGKILL))
    import_module(module).setup(*args, **options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def at_call(n: int, function: Callable, act: Callable[[], Any]) -> Callable:
    """Return the function, which does something more at the end of its n-th call."""
    calls = 0

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == n:
            act()
        return result

    return counted
