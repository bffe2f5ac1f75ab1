"""The app on a real socket: tests talk to it over the loopback address, as clients do."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

from litgpt.deploy.adapters import Adapters
from litgpt.deploy.app import make_app
from litgpt.deploy.engine import Engine
from litgpt.deploy.service import Service
from litgpt.generate.run import Speaker, load

NAME = "tiny"


@dataclass
class Served:
    """A running server, and a client that keeps its connections."""

    url: str
    service: Service
    client: httpx.Client

    @property
    def speaker(self) -> Speaker:
        return self.service.speaker

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.client.request(method, self.url + path, **{"timeout": 60, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, **({} if body is None else {"json": body}), **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether nothing is computed, now or soon."""
        end = time.monotonic() + seconds
        while self.service.engine.n_running or self.service.engine.n_waiting:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


@contextmanager
def serving(checkpoint: Path, *, rows: int = 4, queue: int = 64, has_adapters: bool = False, **options: Any) -> Iterator[Served]:
    """Serve a checkpoint; the options are those of `Service`."""
    speaker = load(checkpoint, precision="32-true")
    adapters = Adapters(speaker.model, speaker.folder) if has_adapters else None
    engine = Engine(speaker.model, max_rows=rows, max_queue=queue, adapters=adapters)
    service = Service(speaker, engine, **{"name": NAME, "adapters": adapters, **options})
    engine.start()
    service.is_ready = True
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            with httpx.Client(verify=False, trust_env=False) as client:
                yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, client)
        finally:
            engine.stop()
            server.should_exit = True
            thread.join(10)
