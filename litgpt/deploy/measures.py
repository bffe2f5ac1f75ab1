"""What the server counts and times, as Prometheus reads it."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt.deploy.engine import Engine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Measures:
    """Counters and timings of one server, in a registry of its own.

    Args:
        engine: Whose queue and rows are shown.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("litgpt_requests", "Requests, by route and status.", ["route", "status"], **own)
        self.prompt_tokens = Counter("litgpt_prompt_tokens", "Tokens of prompts.", **own)
        self.generated_tokens = Counter("litgpt_generated_tokens", "Tokens of answers.", **own)
        self.reused_tokens = Counter("litgpt_reused_prompt_tokens", "Tokens of prompts that were remembered from earlier requests.", **own)
        self.first_token = Histogram("litgpt_time_to_first_token_seconds", "From a request to its first token.", buckets=FIRST_TOKEN, **own)
        self.next_token = Histogram("litgpt_inter_token_seconds", "From one token to the next.", buckets=NEXT_TOKEN, **own)
        self.registry.register(_EngineState(engine))

    def text(self) -> bytes:
        """Return all of it in Prometheus' format."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's numbers."""
        engine = self.engine
        yield GaugeMetricFamily("litgpt_running", "Answers that are being made.", engine.n_running)
        yield GaugeMetricFamily("litgpt_waiting", "Answers that wait for a row.", engine.n_waiting)
        yield GaugeMetricFamily("litgpt_alive", "1 while the engine works.", float(engine.is_alive))
        for name, value in engine.counters.items():
            yield CounterMetricFamily(f"litgpt_engine_{name}", f"The engine's {name.replace('_', ' ')}.", value)

    def describe(self) -> list[Metric]:
        """Return nothing: names are not checked before they are read."""
        return []


class CountsRequests:
    """Counts the requests to an app by the path of their route, never by one that a client made up."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self.app, self.measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            route: Any = scope.get("route")
            self.measures.requests.labels(getattr(route, "path", "other"), str(status)).inc()
