"""The HTTP app: which route does what, and every error in OpenAI's form."""

import asyncio
import mimetypes
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from litgpt.deploy.answering import engine_errors, in_thread, prepared
from litgpt.deploy.chat import MANY_TURNS, answer_chat, n_turns, prompt_ids
from litgpt.deploy.completions import answer_completion, answer_prediction
from litgpt.deploy.embeddings import answer_embedding
from litgpt.deploy.measures import CountsRequests
from litgpt.deploy.protocol import (
    AdapterRequest,
    Answered,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DeletedModel,
    Detokenized,
    DetokenizeRequest,
    EmbeddingRequest,
    Embeddings,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelCards,
    Prediction,
    PredictRequest,
    Tokenized,
    TokenizeRequest,
)
from litgpt.deploy.service import ApiError, Defaults, Limits, Service
from litgpt.errors import MissingFile, UserError
from litgpt.generate.batch import check_ids

__all__ = ["Defaults", "Limits", "Service", "make_app"]

T = TypeVar("T")

PREDICT, CHAT = "/predict", "/v1/chat/completions"
WEB = Path(__file__).with_name("web")
POLICY = (  # for the page: everything comes from this server, and nothing is written into the page itself
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
WRONG: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": f"{HTTPStatus(status).phrase}."}
    for status in (400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 421, 429, 431, 503, 504)
}
STREAMED: dict[str, Any] = {"text/event-stream": {"schema": {}}}  # of each event
KIND = re.compile(r"str|[\w-]+\[.*\]|[A-Z]\w+")  # a form that a value may have, which pydantic writes among the names of fields
MISSPELLED = {"extra_forbidden": "is not a field that is supported here", "missing": "is missing", "none_required": "is not supported here"}


class StrictJSON(APIRoute):
    """A route whose body must be JSON as it is defined: UTF-8, no NaN, no half characters, no more than 200 levels."""

    def get_route_handler(self) -> Callable:
        """Return the handler, given requests that read JSON so."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from None


router = APIRouter(route_class=StrictJSON, responses=WRONG)


def make_app(service: Service) -> FastAPI:
    """Return the app that serves a model. What stands between it and the network (keys, sizes, deadlines) is put around it."""
    app = FastAPI(title="LitGPT", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    _add(app, PREDICT if service.openai_spec else service.api_path, predict)
    if service.openai_spec and service.api_path not in (PREDICT, CHAT):
        _add(app, service.api_path, chat_completions)
    for path in [WEB / "index.html", *sorted(WEB.glob("*.js")), *sorted(WEB.glob("*.css"))]:
        _add_page(app, path)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_field)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(CountsRequests, measures=service.measures)
    app.openapi = lambda: _described(app)
    return app


def service_of(request: Request) -> Service:
    """Return the service that an app was made for."""
    return request.app.state.service


def answered(answer: Answered, status: int = 200) -> Response:
    """Return an answer as a response."""
    return Response(answer.json_bytes(), status, media_type="application/json")


# Answers


@router.post(CHAT, responses={200: {"model": ChatCompletion | ChatChunk, "content": STREAMED}})
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation; with `stream` in events that end with `[DONE]`."""
    return await answer_chat(service_of(request), body, request)


@router.post("/v1/completions", responses={200: {"model": Completion, "content": STREAMED}})
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with texts as they are; with `stream` in events that end with `[DONE]`."""
    return await answer_completion(service_of(request), body, request)


@router.post("/v1/embeddings", responses={200: {"model": Embeddings}})
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Return a vector of length 1 for each text: the mean of what the model computes for its tokens."""
    return await answer_embedding(service_of(request), body, request)


async def predict(body: PredictRequest, request: Request) -> Response:
    """Answer a prompt in the model's prompt style; in lines of JSON if the server was started with `--stream true`."""
    return await answer_prediction(service_of(request), body, request)


def _add(app: FastAPI, path: str, answer: Callable) -> None:
    """Add a route whose path is a setting."""
    if answer is predict:
        content, model = {"application/x-ndjson": {"schema": {"type": "string"}}}, Prediction
    else:
        content, model = STREAMED, ChatCompletion | ChatChunk
    own = APIRouter(route_class=StrictJSON, responses=WRONG)
    own.post(path, responses={200: {"model": model, "content": content}}, operation_id=f"{answer.__name__}_at_api_path")(answer)
    app.include_router(own)


# Models


@router.get("/v1/models", responses={200: {"model": ModelCards}})
async def list_models(request: Request) -> Response:
    """List all that `model` may name: the model and its adapters."""
    service = service_of(request)
    cards = [model_card(service, name) for name in (service.name, *service.adapter_names)]
    return answered(ModelCards(object="list", data=cards))


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}})
async def show_model(model: str, request: Request) -> Response:
    """Describe the model or an adapter."""
    service = service_of(request)
    return answered(model_card(service, service.adapter(model) or service.name))


def model_card(service: Service, name: str) -> ModelCard:
    """Return the description of the model or an adapter."""
    own = {} if name == service.name else {"parent": service.name}
    created = service.loaded.get(name, service.started)
    return ModelCard(id=name, object="model", created=created, owned_by="litgpt", max_model_len=service.engine.max_length, **own)


@router.post("/v1/adapters", responses={200: {"model": ModelCard}})
async def load_adapter(body: AdapterRequest, request: Request) -> Response:
    """Load an adapter: a folder of this name in the server's `--adapter_dir`. From then on `model` may name it."""
    service, name = service_of(request), body.name
    if service.adapters is None or service.adapter_dir is None:
        raise ApiError(400, "This server loads no adapters. Start it with `--adapter_dir`.", code="not_supported")
    folder = service.adapter_dir / name
    if not await in_thread(folder.is_dir):
        raise ApiError(404, f"There is no folder {name!r} in the server's folder of adapters.", "name", "model_not_found")
    async with service.turn():
        if name in (service.name, *service.adapter_names):
            raise ApiError(409, f"There is a model {name!r} already. Unload it first.", "name", "model_exists")
        pairs = await _for_adapters(service, asyncio.to_thread(service.adapters.read, folder))  # the model computes meanwhile
        await _in_engine(service, lambda: service.adapters.install(name, pairs))
    service.note_loaded(name)
    return answered(model_card(service, name))


@router.delete("/v1/adapters/{name:path}", responses={200: {"model": DeletedModel}})
async def unload_adapter(name: str, request: Request) -> Response:
    """Unload an adapter, unless requests are using it."""
    service = service_of(request)
    if service.adapter(name) is None:
        raise ApiError(400, f"{name!r} is the model itself, which stays.", "name")
    if n := service.embedding[name]:
        raise ApiError(409, f"The adapter {name!r} is in use ({n}). Unload it when its requests have ended.", "name", "model_in_use")
    try:
        await _in_engine(service, lambda: service.engine.unload(name))
    except ApiError as error:
        service.adapter(name)  # did another request unload it?
        raise ApiError(409 if error.status == 400 else error.status, error.message, "name", "model_in_use") from None
    return answered(DeletedModel(id=name, object="model", deleted=True))


async def _in_engine(service: Service, function: Callable[[], object]) -> None:
    """Run a function in the engine's thread."""
    with engine_errors():
        await _for_adapters(service, asyncio.wrap_future(service.engine.call(function)))


async def _for_adapters(service: Service, work: Awaitable[T]) -> T:
    """Return what comes of work with adapters; what is wrong with their files is the client's to know."""
    try:
        return await work
    except MissingFile as error:
        raise ApiError(404, _without_folders(service, error)) from None
    except UserError as error:
        raise ApiError(400, _without_folders(service, error)) from None


def _without_folders(service: Service, error: UserError) -> str:
    """Return what is wrong, without where on the server's disk."""
    return str(error).replace(f"{service.adapter_dir}/", "").replace(str(service.adapters.base), service.name)


# Tokens


@router.post("/tokenize", responses={200: {"model": Tokenized}})
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Return the ids of a text, or of a conversation as the chat route gives it to the model."""
    service = service_of(request)
    service.adapter(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give one of `prompt` and `messages`.", "prompt")
    if body.messages is not None and body.add_special_tokens is not None:
        raise ApiError(400, "`add_special_tokens` is for a `prompt`: what messages get is in the prompt style.", "add_special_tokens")
    ids = await prepared(service, request, _ids, service, body, is_slow=n_turns(body.messages or []) > MANY_TURNS)
    return answered(Tokenized(tokens=ids, count=len(ids), max_model_len=service.engine.max_length))


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    tokenizer = service.speaker.tokenizer
    if body.messages is not None:
        return prompt_ids(service, service.speaker.style, body.messages)
    return tokenizer.ids(body.prompt) if body.add_special_tokens is False else tokenizer.encode(body.prompt).tolist()


@router.post("/detokenize", responses={200: {"model": Detokenized}})
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of ids; special tokens are left out."""
    service = service_of(request)
    service.adapter(body.model)
    return answered(Detokenized(prompt=await prepared(service, request, _text_of, service, body.tokens)))


def _text_of(service: Service, ids: list[int]) -> str:
    check_ids(ids or [0], service.vocab_size)
    return service.speaker.tokenizer.decode(ids)


# How the server is


@router.get("/health", responses={200: {"model": Health}})
async def health(request: Request) -> Response:
    """Say whether the engine works: 200, or 503 once it broke."""
    if not service_of(request).is_alive:
        raise ApiError(503, "The engine broke. Start the server again.", code="engine_failed")
    return answered(Health(status="ok"))


@router.get("/ready", responses={200: {"model": Health}})
async def ready(request: Request) -> Response:
    """Say whether requests are taken: 503 until the model is warm, and again once the server is about to end."""
    service = service_of(request)
    if not (service.is_ready and service.is_alive):
        raise ApiError(503, "The server is starting, or about to end.", code="not_ready", retry_after=1)
    return answered(Health(status="ready"))


for path, answer in {"/health": health, "/ready": ready}.items():  # as some orchestrators ask
    router.head(path, include_in_schema=False)(answer)


@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}, response_class=Response)
async def metrics(request: Request) -> Response:
    """Show counters and timings in Prometheus' format."""
    return Response(service_of(request).measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, path: Path) -> None:
    """Serve one file of the chat page, as it was when the server started."""
    content, kind = path.read_bytes(), mimetypes.types_map[path.suffix]
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}

    async def page() -> Response:
        return Response(content, media_type=kind, headers=headers)

    where = "/" if path.name == "index.html" else f"/web/{path.name}"
    app.api_route(where, methods=["GET", "HEAD"], include_in_schema=False)(page)


# Errors


def _response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    more = {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}
    return Response(error.answer.json_bytes(), error.status, {**(headers or {}), **more}, "application/json")


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return _response(error)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Answer where we have made a mistake, whose traceback is logged."""
    return _response(ApiError(500, "The server made a mistake, which its log tells of.", code="internal_error"))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    known = {404: f"There is no {request.url.path[:200]!a} here.", 405: f"{request.method[:20]} is not allowed here."}
    message = known.get(error.status_code, str(error.detail))
    return _response(ApiError(error.status_code, message), dict(error.headers or {}))


async def _on_wrong_field(request: Request, error: RequestValidationError) -> Response:
    """Name the first field that is wrong; of a value that may have several forms, the one that got furthest."""
    found = max(error.errors(), key=lambda problem: len(problem["loc"]))
    *path, last = map(str, found["loc"])
    path = [part for part in path if not KIND.fullmatch(part)] + [last] * (found["type"] == "extra_forbidden" or not KIND.fullmatch(last))
    path = path[1:]  # behind "body"
    if found["type"] == "json_invalid":
        detail = str(found.get("ctx", {}).get("error", ""))
        return _response(ApiError(400, f"The body is not JSON: {detail or 'it cannot be parsed'}.", code="invalid_json"))
    if not path:
        return _response(ApiError(400, "The body must be a JSON object, sent as `Content-Type: application/json`."))
    name = ".".join(path)[:200]
    what = MISSPELLED.get(found["type"], f"is wrong: {found['msg'].removeprefix('Value error, ')}")
    if path == ["logit_bias"]:  # an empty one is taken
        what = MISSPELLED["none_required"]
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(found["type"], "invalid_value")
    return _response(ApiError(400, f"{name!a} {what}.", name, code))


def _described(app: FastAPI) -> dict[str, Any]:
    """Return the app's OpenAPI description, without the status 422, which is never sent."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described.get("components", {}).get("schemas", {}).pop(name, None)
    return app.openapi_schema
