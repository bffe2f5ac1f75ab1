"""A real browser for the chat page, and a server that answers as a test wants."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from litgpt.deploy.app import POLICY, WEB

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


@contextmanager
def chromium() -> Iterator:
    """Give a headless Chromium of its own; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with playwright.sync_playwright() as running:
        options = [f"--{name}" for name in ("headless " + OPTIONS).split()]
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=options)  # in a new, empty profile
        yield browser
        browser.close()


@dataclass
class Reply:
    """How the server answers one question: a refusal where `status` says so, otherwise a stream of pieces.

    Args:
        text: What is streamed.
        pause: Seconds before each piece.
        end: "whole"; "cut" closes the connection after the text; "error" sends an error frame; "never" goes on until the client leaves.
        finish: The finish reason.
        status: Of HTTP.
        message: Of the refusal or the error frame.
        headers: More headers.
    """

    text: str = "Grass and hay."
    pause: float = 0.0
    end: str = "whole"
    finish: str = "stop"
    status: int = 200
    message: str = "The engine failed."
    headers: dict = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """Answers with the page's files, the models, and the test's replies."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path.removeprefix("/web/")
        if self.path == "/v1/models":
            if self.is_refused():
                return self.refuse(Reply(status=401, message="Wrong key."))
            return self.whole(200, "application/json", json.dumps({"data": [{"id": model} for model in self.server.models]}))
        if not (WEB / name).is_file():
            return self.refuse(Reply(status=404, message="Nothing is here."))
        return self.whole(200, TYPES[Path(name).suffix], (WEB / name).read_text(), {"Content-Security-Policy": POLICY})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return self.refuse(Reply(status=401, message="Wrong key."))
        self.server.asked.append(body)
        reply = self.server.replies.popleft() if self.server.replies else Reply()
        return self.refuse(reply) if reply.status != 200 else self.stream(reply)

    def is_refused(self) -> bool:
        return self.server.key is not None and self.headers.get("Authorization") != f"Bearer {self.server.key}"

    def refuse(self, reply: Reply) -> None:
        self.whole(reply.status, "application/json", json.dumps({"error": {"message": reply.message}}), reply.headers)

    def whole(self, status: int, kind: str, text: str, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text.encode())), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, reply: Reply) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.stream_frames(reply)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def stream_frames(self, reply: Reply) -> None:
        size = 5
        pieces = [reply.text[at : at + size] for at in range(0, len(reply.text), size)]
        for piece in pieces:
            time.sleep(reply.pause)
            self.send({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        while reply.end == "never":
            time.sleep(0.02)
            self.send({"choices": [{"index": 0, "delta": {"content": "and on "}, "finish_reason": None}]})
        if reply.end == "cut":
            time.sleep(reply.pause)
            return  # without the chunk that ends the body
        if reply.end == "error":
            self.send({"error": {"message": reply.message}})
        else:
            self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish}]})
            self.send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)}})
            self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def send(self, data: dict) -> None:
        text = json.dumps(data, ensure_ascii=False)
        middle = len(text) // 2  # events come in pieces, as they do over a network
        self.chunk("data: " + text[:middle])
        self.chunk(text[middle:] + "\n\n")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n".encode() + text.encode() + b"\r\n")


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page under its strict policy, and gives the `replies` in turn.

    Attributes:
        asked: The bodies of the questions so far.
        left: Set once a client left before its answer was complete.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self) -> None:
        self.replies, self.asked, self.left = deque(), [], threading.Event()
        self.key, self.models = None, ["llama", "pirate"]


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Run a server in a thread."""
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Reader:
    """Someone in front of the page: opens it, types, waits, and notes what a good page never does."""

    def __init__(self, browser, address: str, waits: bool = True, **options) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
        self.context.set_default_timeout(10_000)
        self.address, self.page, self.complaints = address, self.context.new_page(), []
        self.context.on("request", lambda request: self.check_address(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("console", self.check_console)
        self.open(waits)

    def open(self, waits: bool = True) -> None:
        """Open the page as if for the first time."""
        self.page.goto(self.address + "/web/chat.css")  # a page of the same origin that keeps nothing
        self.page.evaluate("localStorage.clear(), sessionStorage.clear()")
        self.page.goto(self.address + "/")
        if waits:
            self.page.wait_for_selector("#model option", state="attached")

    def check_address(self, url: str) -> None:
        if not url.startswith((self.address + "/", "data:image/svg+xml", f"blob:{self.address}/")):
            self.complaints.append(f"a request left the origin: {url}")

    def check_console(self, message) -> None:
        # the browser itself notes each refused request
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(f"console: {message.text}")

    def ask(self, text: str, waits: bool = True) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        if waits:
            self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("#send:not([hidden])")

    def until(self, claim: str) -> None:
        """Wait until an expression is true (by asking again: the page's policy forbids Playwright's own way)."""
        deadline = time.monotonic() + 10
        while not self.page.evaluate(claim):
            assert time.monotonic() < deadline, f"never true: {claim}"
            time.sleep(0.02)

    def answers(self) -> list[str]:
        return self.page.locator(".answer .prose:not(.thought *)").all_inner_texts()

    def questions(self) -> list[str]:
        return self.page.locator(".user .bubble").all_inner_texts()

    def conversations(self) -> list[str]:
        return self.page.locator("#conversations .row").all_inner_texts()

    def note(self) -> str:
        return self.page.locator(".answer:last-child .note").inner_text()
