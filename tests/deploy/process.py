"""The command `serve` in a process of its own: forked from one that has imported all it needs, so that starting takes no time."""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from forked import fork, run_litgpt
from safetensors.torch import load_file, save_file
from speaking import make_checkpoint

from litgpt.generate.batch import Batch

BREAK = "BREAK_ENGINE"  # a variable of the environment: the engine breaks once a file of this name is there


def _serve(words: list[str], folder: Path) -> None:
    """Be the command `litgpt serve`."""
    step, trap = Batch.step, folder / BREAK

    def breakable(batch: Batch) -> Any:
        if trap.exists():
            raise RuntimeError("broken on purpose")
        return step(batch)

    Batch.step = breakable
    run_litgpt(["serve", *words], folder / "out", folder / "err")


def make_endless(folder: Path) -> Path:
    """Write a model whose likeliest token never ends an answer, and whose context is so long that answers take seconds."""
    model = make_checkpoint(folder, context=4096)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][:3] = 0  # the special tokens': others' logits are above and below
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


class Server:
    """A running server.

    Args:
        model: The checkpoint to serve.
        folder: Where its output goes, and `BREAK`.
        flags: Of the command.
    """

    def __init__(self, model: Path, folder: Path, *flags: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        words = [str(model), "--port", "0", "--precision", "32-true", *map(str, flags)]
        self.process = fork(_serve, words, folder)
        self.pid = self.process.pid
        self.children: set[psutil.Process] = set()
        self.headers: dict[str, str] = {}

    @property
    def output(self) -> str:
        file = self.folder / "out"
        return file.read_text() if file.exists() else ""

    @property
    def errors(self) -> str:
        return (self.folder / "err").read_text()

    def wait_until_ready(self, seconds: float = 200) -> "Server":
        deadline = time.monotonic() + seconds
        while "\n" not in self.output:
            assert self.process.is_alive() and time.monotonic() < deadline, self.errors
            time.sleep(0.02)
        return self

    @property
    def port(self) -> int:
        return int(self.output.split(":")[-1])

    @property
    def state(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def signal(self, number: int) -> None:
        self._look_for_children()
        os.kill(self.pid, number)

    def exit_code(self, seconds: float = 30) -> int:
        """Wait for the end, after which nothing of it is left."""
        self._look_for_children()
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it did not end"
        assert not psutil.wait_procs(self.children, timeout=1)[1]
        return self.process.exitcode

    def _look_for_children(self) -> None:
        with suppress(psutil.NoSuchProcess):  # it can end at any moment
            self.children.update(self.state.children(recursive=True))

    # Requests

    @contextmanager
    def connection(self, seconds: float = 30) -> Iterator[http.client.HTTPConnection]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)) as client:
            yield client

    def ask(self, path: str, body: object = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
        """Return status and content of an answer."""
        with self.connection() as client:
            given = {"Content-Type": "application/json", **self.headers, **headers}
            client.request(method or ("GET" if body is None else "POST"), path, None if body is None else json.dumps(body), given)
            answer = client.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if text and "json" in answer.headers.get("Content-Type", "") else text

    def measure(self, name: str) -> float:
        """Return one number of `/metrics`."""
        lines = self.ask("/metrics")[1].splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def wait_until_idle(self, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while self.measure("litgpt_running") + self.measure("litgpt_waiting") > 0:
            assert time.monotonic() < deadline, "something still runs"
            time.sleep(0.02)


@contextmanager
def served(model: Path, folder: Path, *flags: object) -> Iterator[Server]:
    """A server that is ready, and gone afterwards."""
    server = Server(model, folder, *flags)
    try:
        yield server.wait_until_ready()
    finally:
        if server.process.is_alive():
            server.process.kill()
        server.process.join(10)


class Reader(threading.Thread):
    """A client that reads a streamed answer.

    Args:
        server: Whom to ask.
        leave_after: Seconds after which it goes away; None stays.
        body: Further fields of the request.
    """

    def __init__(self, server: Server, leave_after: float | None = None, **body: object) -> None:
        super().__init__(daemon=True)
        self.server, self.leave_after = server, leave_after
        self.body = {"prompt": "Once", "max_tokens": 3000, "temperature": 0, "stream": True} | body
        self.events: list[Any] = []
        self.started = threading.Event()
        self.status, self.first, self.error = 0, 0.0, None
        self.start()

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            with self.server.connection(self.leave_after or 30) as client:
                headers = {"Content-Type": "application/json", **self.server.headers}
                client.request("POST", "/v1/completions", json.dumps(self.body), headers)
                answer = client.getresponse()
                self.status = answer.status
                for line in answer:
                    if self.leave_after is not None and time.perf_counter() - begin > self.leave_after:
                        return
                    if line.startswith(b"data: "):
                        self.first = self.first or time.perf_counter() - begin
                        self.started.set()
                        self.events.append(line[6:].strip().decode())
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            self.started.set()

    def wait(self, seconds: float = 60) -> "Reader":
        self.join(seconds)
        assert not self.is_alive(), "the stream does not end"
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the stream ended as it should."""
        return self.status == 200 and self.events[-1:] == ["[DONE]"]

    @property
    def text(self) -> str:
        pieces = [json.loads(event) for event in self.events if event != "[DONE]"]
        return "".join(choice["text"] for piece in pieces for choice in piece.get("choices", ()))

    @property
    def problem(self) -> str | None:
        """The code of the error frame that it ended with, if it did."""
        frames = [json.loads(event) for event in self.events if event != "[DONE]"]
        return frames[-1]["error"]["code"] if frames and "error" in frames[-1] else None


TERM, KILL = signal.SIGTERM, signal.SIGKILL
