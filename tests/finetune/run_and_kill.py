"""Training runs that are killed as if by `kill -9`, in processes forked from a server that has imported all they need."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any


def run_and_kill(module: str, at_step: int, *args: Any, **kwargs: Any) -> int:
    """Call `module.setup` in a process that is killed within step `at_step`; return its exit code, -9 if all went as planned."""
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join({folder, str(Path(folder).parent), *filter(None, [os.environ.get("PYTHONPATH")])})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_and_kill", "workers", "litgpt.finetune.lora", "litgpt.pretrain"])
    process = context.Process(target=_run, args=(module, at_step, args, kwargs), daemon=True)
    process.start()
    process.join(60)
    return process.exitcode


def _run(module: str, at_step: int, args: tuple, kwargs: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    script = import_module("litgpt.pretrain" if module == "litgpt.pretrain" else "litgpt.finetune.loop")
    script.forward_backward = at_call(at_step, script.forward_backward, lambda: os.kill(os.getpid(), signal.SIGKILL))
    import_module(module).setup(*args, **kwargs)


def at_call(n: int, function: Callable, act: Callable[[], Any]) -> Callable:
    """Return the function, which does something more in its n-th call, after its own work."""
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
