"""The route `/v1/embeddings`: vectors that stand for texts, computed between two steps of the engine."""

import asyncio
import struct
from base64 import b64encode
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from litgpt.deploy.answering import ENDS, engine_errors, prepared, unless_gone
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
    if service.n_embedding >= max(service.engine.max_queue, 1):
        raise ApiError(429, "Too many texts wait for their vectors. Try again in a second.", code="queue_full", retry_after=1)
    service.n_embedding += 1
    try:
        return await unless_gone(request, _answer(service, body, sequences, adapter))
    finally:
        service.n_embedding -= 1


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
        async with asyncio.timeout(service.limits.timeout):
            while len(vectors) < len(sequences):
                chosen = _next_few(sequences[len(vectors) :], alone=adapter is not None)
                with engine_errors():
                    vectors += await asyncio.wrap_future(service.engine.call(_computing(service, chosen, adapter)))
    except TimeoutError:
        status, message, code = ENDS["timeout"]
        raise ApiError(status, message, code=code) from None
    except UserError as error:
        service.adapter(adapter)  # was it unloaded meanwhile?
        raise ApiError(400, str(error)) from None
    service.measures.prompt_tokens.inc(n_tokens := sum(map(len, sequences)))
    data = [
        Embedding(object="embedding", index=i, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
        for i, vector in enumerate(vectors)
    ]
    answer = Embeddings(
        object="list", model=body.model or service.name, data=data, usage=Usage(prompt_tokens=n_tokens, total_tokens=n_tokens)
    )
    return Response(answer.json_bytes(), media_type="application/json")


def _next_few(sequences: Sequence[list[int]], alone: bool) -> list[list[int]]:
    """Return the first few that are computed in one go."""
    chosen = [sequences[0]]
    for ids in sequences[1:]:
        if alone or sum(map(len, chosen)) + len(ids) > PACKED:
            break
        chosen.append(ids)
    return chosen


def _computing(service: Service, sequences: list[list[int]], adapter: str | None):
    """Return what the engine's thread shall do."""

    def compute() -> list[list[float]]:
        adapters = service.adapters
        if adapters is not None:
            adapters.index.clear()
        if adapter is not None:
            [ids] = sequences
            if adapter not in service.adapter_names:
                raise UserError(f"The adapter {adapter!r} was unloaded.")
            adapters.index.set([adapters.slot(adapter)] * len(ids))
        try:
            return embeddings(service.speaker.model, sequences, normalized=True).tolist()
        finally:
            if adapters is not None:
                adapters.index.clear()

    return compute


def _base64(vector: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
