"""The route `/v1/embeddings`: vectors that stand for texts, computed between two steps of the engine."""

import asyncio
import struct
from base64 import b64encode
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from litgpt.deploy.answering import ENDS, engine_errors, in_thread, prepared, unless_gone
from litgpt.deploy.completions import read_prompts
from litgpt.deploy.protocol import Embedding, EmbeddingRequest, Embeddings, Usage
from litgpt.deploy.service import ApiError, Service
from litgpt.errors import UserError
from litgpt.generate.reading import embeddings

PACKED = 512  # tokens that are computed at a time: answers that are being made wait meanwhile


async def answer_embedding(service: Service, body: EmbeddingRequest, request: Request) -> Response:
    """Return the vectors of texts.

    Raises:
        ApiError: The request cannot be served.
    """
    adapter = service.adapter(body.model)
    sequences = await prepared(service, request, _read, service, body)
    if service.embedding.total() >= max(service.engine.max_queue, 1):
        raise ApiError(429, "Too many texts wait for their vectors. Try again in a second.", code="queue_full", retry_after=1)
    service.embedding[adapter] += 1
    try:
        return await unless_gone(request, _answer(service, body, sequences, adapter))
    finally:
        service.embedding[adapter] -= 1


def _read(service: Service, body: EmbeddingRequest) -> list[list[int]]:
    """Return the ids of the texts."""
    sequences = [ids for ids, _ in read_prompts(service, body.input, "input")]
    for ids in sequences:
        if not 1 <= len(ids) <= service.engine.max_length:
            message = f"A text must have 1 to {service.engine.max_length} tokens, but one has {len(ids)}."
            raise ApiError(400, message, "input", "context_length_exceeded" if ids else None)
    return sequences


async def _answer(service: Service, body: EmbeddingRequest, sequences: list[list[int]], adapter: str | None) -> Response:
    vectors: list[list[float]] = []
    try:
        while len(vectors) < len(sequences):
            chosen = _next_few(sequences[len(vectors) :])
            with engine_errors():
                async with asyncio.timeout(service.limits.timeout):
                    vectors += await asyncio.wrap_future(service.engine.call(_computing(service, chosen, adapter)))
    except TimeoutError:
        status, message, code = ENDS["timeout"]
        raise ApiError(status, message, code=code) from None
    except UserError as error:
        service.adapter(adapter)  # was it unloaded meanwhile?
        raise ApiError(400, str(error)) from None
    n_tokens = sum(map(len, sequences))
    service.measures.prompt_tokens.inc(n_tokens)
    return await in_thread(_embeddings, service, body, vectors, n_tokens)


def _embeddings(service: Service, body: EmbeddingRequest, vectors: list[list[float]], n_tokens: int) -> Response:
    """Return all vectors; a million numbers take long to be written."""
    data = [
        Embedding(object="embedding", index=i, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
        for i, vector in enumerate(vectors)
    ]
    usage = Usage(prompt_tokens=n_tokens, total_tokens=n_tokens)
    answer = Embeddings(object="list", model=body.model or service.name, data=data, usage=usage)
    return Response(answer.json_bytes(), media_type="application/json")


def _next_few(sequences: Sequence[list[int]]) -> list[list[int]]:
    """Return the first few that are computed in one go."""
    chosen = [sequences[0]]
    for ids in sequences[1:]:
        if sum(map(len, chosen)) + len(ids) > PACKED:
            break
        chosen.append(ids)
    return chosen


def _computing(service: Service, sequences: list[list[int]], adapter: str | None) -> Callable[[], list[list[float]]]:
    """Return what the engine's thread shall do."""

    def compute() -> list[list[float]]:
        if service.adapters is not None:
            slot = 0 if adapter is None else service.adapters.slot(adapter)
            service.adapters.index.set([slot] * sum(map(len, sequences)))
        return embeddings(service.speaker.model, sequences, normalized=True).tolist()

    return compute


def _base64(vector: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
