"""What stands between the network and the app: connections with deadlines, and a guard that reads a request before the app sees it."""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from ipaddress import ip_address
from time import perf_counter
from typing import Any
from urllib.parse import quote

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from litgpt.deploy.service import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

log = logging.getLogger("litgpt.serve")

OPEN = frozenset({"/health", "/ready"})  # what an orchestrator asks for
WATCHED = OPEN | {"/metrics"}  # answered to the end
MAX_CONNECTIONS = 512
MAX_HEADERS = 64
MAX_HEADER_BYTES = 32 * 1024  # the request line and all headers together
HEADER_SECONDS = 10.0  # from a connection's or a request's first byte to the end of its headers
BODY_SECONDS = 60.0  # from there to the end of its body
STALLED_SECONDS = 30.0  # how long a client may leave what was sent to it unread
SLOWEST = 2**16  # bytes that a client has to read in a second, of more than could be sent at once
LOGGED_CHARACTERS = 4000  # of a body, with `log_prompts`
HEADERS = {  # of every answer that has no other
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
FURTHER_HEADERS = {  # of refusals, by status
    401: [(b"www-authenticate", b"Bearer")],
    408: [(b"connection", b"close")],
    503: [(b"retry-after", b"1")],
}


class Guard:
    """Lets a request through to the app once its key, origin, headers and body are in order, and logs it without its text.

    Without a key only this machine's own programs are meant to ask, so pages of other sites are kept out, which a browser would let
    reach a server on its machine: by the Host header (a name that was pointed here, "DNS rebinding") and by the Origin header. With a
    key neither matters, for a browser does not send a key by itself.

    Args:
        app: The app.
        key: What every request has to name, but for reading `OPEN` and the page; None asks for none.
        max_body: The most bytes that a request's body may have.
        page: The paths of the page that asks for the key, fixed files without data.
        log_prompts: Whether to log the bodies of requests.

    Attributes:
        is_ending: Set it to refuse new requests from now on.
        active: The requests that the app works on.
    """

    def __init__(self, app: App, *, key: str | None, max_body: int, page: Iterable[str] = (), log_prompts: bool = False) -> None:
        self.app, self.max_body, self.log_prompts = app, max_body, log_prompts
        self.open = OPEN.union(page)
        self.is_ending = False
        self.active: set[Exchange] = set()
        self.key = None if key is None else digest(key.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = Exchange(scope, receive, send)
        try:
            try:
                self.check(scope)
                await exchange.read(self.max_body)
            except ApiError as refusal:
                await exchange.refuse(refusal)
                return
            if not exchange.is_abandoned:
                self.active.add(exchange)
                try:
                    await self.app(scope, exchange.receive, exchange.send)
                finally:
                    self.active.remove(exchange)
        finally:
            exchange.report(self.log_prompts)

    def check(self, scope: Message) -> None:
        """Raise an ApiError for what is wrong before the body."""
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS:
            raise ApiError(431, f"A request may have {MAX_HEADERS} headers, but this one has {len(headers)}.", code="too_many_headers")
        if self.key is None:
            check_local(headers)
        elif not (scope["method"] in ("GET", "HEAD") and scope["path"] in self.open):
            self.check_key(headers)
        if self.is_ending and scope["path"] not in WATCHED:
            raise ApiError(503, "The server is about to end.", code="stopping")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = values(headers, b"content-type")
            if [text.partition(b";")[0].strip().lower() for text in kind] != [b"application/json"]:
                raise ApiError(415, "Send JSON, with the header `Content-Type: application/json`.", code="unsupported_media_type")

    def check_key(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raise an ApiError unless a header names the key. How long that takes says nothing about the key."""
        given = values(headers, b"x-api-key")
        for value in values(headers, b"authorization"):
            scheme, _, rest = value.partition(b" ")
            given += [rest.strip()] if scheme.lower() == b"bearer" else []
        if not any([hmac.compare_digest(digest(key), self.key) for key in given]):  # a list: all are compared, whichever fits
            said = "That is not this server's key." if given else "This server wants a key."
            how = "Send it as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`."
            raise ApiError(401, f"{said} {how}", code="invalid_api_key")


def digest(key: bytes) -> bytes:
    """Return as many bytes for every key, so that comparing them does not tell how long the key is."""
    return hashlib.sha256(key).digest()


def values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """Return what all headers of a name hold."""
    return [value for key, value in headers if key == name]


def check_local(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise an ApiError for a request that a page of another site made a browser send."""
    hosts = [value.decode("latin-1").lower() for value in values(headers, b"host")]
    if len(hosts) != 1 or not is_local(hosts[0]):
        raise ApiError(403, "Without a key this server answers only to localhost. Start it with `--api_key_file`.", code="wrong_host")
    for origin in values(headers, b"origin"):
        if origin.decode("latin-1").lower().partition("://")[2] != hosts[0]:
            raise ApiError(403, "Pages of other sites may not use this server without a key.", code="wrong_origin")


def is_local(host: str) -> bool:
    """Return whether a Host header can only mean this machine."""
    match = re.fullmatch(r"(?:([a-z0-9.-]+)|\[([0-9a-f:.]+)\])(?::[0-9]*)?", host)
    return match is not None and is_loopback(match[1] or match[2])


def is_loopback(name: str) -> bool:
    """Return whether a host's name or address can only mean this machine."""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


class Exchange:
    """One request and its answer on their way between network and app.

    Args:
        scope: What ASGI says of the request.
        receive: Where its body comes from.
        send: Where the answer goes.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.start = perf_counter()
        self.body = b""
        self.status: int | None = None  # of the answer, once it began
        self.is_unread, self.is_whole, self.is_abandoned = True, False, False

    async def read(self, most: int) -> None:
        """Read the whole body, so that the app never waits for a slow client, or raise an ApiError as soon as it is too large."""
        too_large = ApiError(413, f"A request's body may have {most} bytes, but this one is larger.", code="body_too_large")
        lengths = values(self.scope["headers"], b"content-length")
        if any(not length.isdigit() or int(length[:20]) > most for length in lengths):
            raise too_large
        if not lengths and not values(self.scope["headers"], b"transfer-encoding"):
            return
        pieces, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await self.receive_now()
                    if self.is_abandoned:
                        return
                    pieces.append(message.get("body", b""))
                    size, more = size + len(pieces[-1]), message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} seconds.", code="body_too_slow") from None
        self.body = b"".join(pieces)

    async def receive_now(self) -> Message:
        """Return the next message of the network, and notice when the client leaves."""
        message = await self._receive()
        self.is_abandoned |= message["type"] == "http.disconnect" and not self.is_whole
        return message

    async def receive(self) -> Message:
        """Return the body that was read, and after it what the network says."""
        if self.is_unread:
            self.is_unread = False
            return {"type": "http.request", "body": self.body, "more_body": False}
        message = await self.receive_now()
        while message["type"] == "http.request":  # the end of an empty body, which was answered for already
            message = await self.receive_now()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer on, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", ())}
            more = [(name, value) for name, value in HEADERS.items() if name not in given]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, refusal: ApiError) -> None:
        """Answer with a refusal."""
        body = refusal.answer.json_bytes()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *FURTHER_HEADERS.get(refusal.status, []),
        ]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def report(self, log_prompts: bool) -> None:
        """Write one line to the log: method, path, status, milliseconds, and tokens where the app noted them."""
        milliseconds = (perf_counter() - self.start) * 1000
        path = quote(self.scope["path"], safe="/:.-_~")[:200]  # no line of a client's making, and no query: it may hold a key
        words = [self.scope["method"][:16], path, str(self.status or "-"), f"{milliseconds:.0f} ms"]
        if tokens := self.scope.get("state", {}).get("tokens"):
            words.append("{} + {} tokens".format(*tokens))
        if self.is_abandoned:
            words.append("(the client left)")
        elif not self.is_whole:
            words.append("(not finished)")
        log.info(" ".join(words))
        if log_prompts and self.body:
            log.info("%s", ascii(self.body[: 4 * LOGGED_CHARACTERS].decode(errors="replace"))[:LOGGED_CHARACTERS])


class Connection(H11Protocol):
    """One client's connection, which ends where the client neither goes on sending nor reading, and gives way when there are too many."""

    deadline: asyncio.TimerHandle | None = None
    phase: tuple[bool, type, bool] | None = None
    stalled: asyncio.TimerHandle | None = None
    since = 0.0  # when this phase began

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin, and end the one that has been idle longest where there are too many."""
        super().connection_made(transport)
        self.watch()
        going_on = [other for other in self.connections if isinstance(other, Connection) and not other.transport.is_closing()]
        if len(going_on) > MAX_CONNECTIONS:
            idle = (other for other in going_on if other.is_waiting)
            min(idle, key=lambda other: other.since).transport.abort()  # there is one: this

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client."""
        super().data_received(data)
        self.watch()

    def on_response_complete(self) -> None:
        """Go on behind an answer."""
        super().on_response_complete()
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self.deadline, self.stalled):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether there is no request that the app works on."""
        return self.conn.their_state is h11.IDLE or (self.cycle is not None and self.cycle.response_complete)

    def watch(self) -> None:
        """Start the clock of what the connection waits for now, unless it runs already."""
        state, is_waiting = self.conn.their_state, self.is_waiting
        is_started = state is h11.IDLE and bool(self.conn.trailing_data[0])
        phase = (is_waiting, state, is_started)
        if phase == self.phase or self.transport.is_closing():
            return
        self.phase, self.since = phase, perf_counter()
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        if is_waiting and (is_started or self.cycle is None or state is h11.SEND_BODY):  # a body that is not wanted any more
            self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)  # between requests uvicorn's own clock runs
        elif state is h11.SEND_BODY:  # longer than the guard waits, which can still say why
            self.deadline = self.loop.call_later(BODY_SECONDS + STALLED_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Wait for a client that does not read, but not for ever."""
        super().pause_writing()
        seconds = STALLED_SECONDS + self.transport.get_write_buffer_size() / SLOWEST
        self.stalled = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on, as the client has read."""
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None
