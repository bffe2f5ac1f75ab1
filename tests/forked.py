"""Processes forked from a server that has imported all they need, so that starting one takes no time."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from litgpt import cli

PRELOADED = [  # for one server, which is that of the first test of a worker that asks for a process
    *("workers", "finetune.run_and_kill", "litgpt.finetune.lora", "litgpt.pretrain"),
    *("deploy.process", "litgpt.deploy.serve", "litgpt.generate.base", "generate.hostile", "llguidance"),
]


def forkserver() -> BaseContext:
    """The one server of this process."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def fork(target: Callable, *args: Any) -> BaseProcess:
    """A process that calls a function of a module of tests in this folder."""
    process = forkserver().Process(target=target, args=args)
    process.start()
    return process


def run_litgpt(words: list[str], out: str | Path, err: str | Path, is_buffered: bool = True) -> None:
    """Be the command `litgpt`, with files for what it says."""
    for number, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = TextIOWrapper(open(1, "wb", -1 if is_buffered else 0, closefd=False), write_through=not is_buffered)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.exit(cli.main(words))
