"""Attempts to compile a schema and to answer by it, each in a process of its own, for it might end that."""

import json
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

from forked import fork

from litgpt.errors import UserError
from litgpt.generate.grammar import compile_grammar
from litgpt.tokenizer import Tokenizer


def attempt(folder: Path, schema: str) -> dict[str, Any]:
    """What came of a schema, as a text of JSON: `seconds`, and `refused` or the `slowest` step and the `error` of an answer."""
    here, there = Pipe(duplex=False)
    with here:
        process = fork(_attempt, folder, schema, there)
        there.close()
        process.join(120)
        process.kill()
        assert process.exitcode == 0, process.exitcode
        return here.recv()


def _attempt(folder: Path, schema: str, answer: Connection) -> None:
    tokenizer = Tokenizer(folder)
    compile_grammar(tokenizer, 800, schema={})
    threading.stack_size(2**21)  # as small as that of any thread that a server may have
    thread = threading.Thread(target=lambda: answer.send(_used(tokenizer, schema)))
    thread.start()
    thread.join()


def _used(tokenizer: Tokenizer, schema: str) -> dict[str, Any]:
    start = monotonic()
    try:
        grammar, random, slowest = compile_grammar(tokenizer, 800, schema=json.loads(schema)), Random(0), 0.0
    except UserError as error:
        return dict(refused=str(error), seconds=monotonic() - start)
    seconds = monotonic() - start
    for _ in range(100):
        start = monotonic()
        allowed = grammar.allowed().nonzero().flatten().tolist()
        if grammar.is_finished or not allowed:
            break
        grammar.accept(random.choice(allowed))
        slowest = max(slowest, monotonic() - start)
    return dict(seconds=seconds, slowest=slowest, error=grammar.error)
