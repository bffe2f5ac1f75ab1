"""What clients send and get, field by field: OpenAI's API as far as it is supported, and our own routes.

Values are taken as they are written: no number as a string, no NaN, no truth value as a number. A field that is not here is refused,
and so is every value that would have to be ignored. `null` means the same as leaving a field out.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_ID = 2**31 - 1  # far above any token's
MAX_INTEGER = 2**63 - 1
MAX_FIELDS = 64  # of any object: to complain of each of a million would take minutes


def at_most(n: int) -> Callable[[Any], Any]:
    """Return a check that refuses a value with more entries before it looks at them."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > n:
            raise ValueError(f"it may have at most {n} entries, but has {len(value)}")
        return value

    return check


def few(n: int) -> tuple[Any, ...]:
    """Return what limits a list: its length, and that the first wrong entry is enough."""
    return Field(max_length=n, fail_fast=True), BeforeValidator(at_most(n))


TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
TokenIds = Annotated[list[TokenId], *few(2**20)]
Texts = Annotated[list[str], *few(2**12)]
Nothing = Annotated[dict[str, float], Field(max_length=0), BeforeValidator(at_most(0))]
Labels = Annotated[dict[str, str], Field(max_length=16), BeforeValidator(at_most(16))]
Count = Annotated[int, Field(ge=1, le=MAX_ID)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
AdapterName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_\-][a-zA-Z0-9_.\-]{0,95}$")]


class Strict(BaseModel):
    """What a client sends: exactly the fields of the class."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def has_few_fields(cls, given: Any) -> Any:
        """Refuse an object with so many fields that complaining of each would take long."""
        return at_most(MAX_FIELDS)(given)


class Sampling(Strict):
    """How tokens are drawn. What is left out is as the server was started with."""

    temperature: float | None = Field(None, ge=0, le=10, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_ID, description="Draw from the k likeliest tokens; 0 or -1 from all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-MAX_INTEGER - 1, le=MAX_INTEGER)


class PredictRequest(Sampling):
    """A prompt in the model's own prompt style."""

    prompt: str
    max_new_tokens: Count | None = None


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Generating(Sampling):
    """What requests for an answer have in common."""

    model: str | None = Field(None, description="The model or an adapter, as `/v1/models` lists them; by default the model.")
    n: Count | None = Field(None, description="How many answers to give.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_ID)
    stop: str | Texts | None = Field(None, description="Texts that end the answer; they are no part of it.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Nothing | None = Field(None, description="Not supported: it may only be empty.")
    user: str | None = Field(None, description="Accepted, and not used.")


# Conversations


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], *few(2**10)]


class SystemMessage(Strict):
    """What the model shall keep to."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class GivenFunction(Strict):
    """A function that was called, with its arguments as JSON."""

    name: FunctionName
    arguments: str


class GivenCall(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: GivenFunction


class AssistantMessage(Strict):
    """What the model said. The fields that may only be empty are those that OpenAI's client sends back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[GivenCall], *few(2**10)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], *few(0)] | None = None


class ToolMessage(Strict):
    """What a function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[AnyMessage], Field(min_length=1), *few(2**12)]


class Function(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Has no effect: calls that `tool_choice` asks for always keep to the schema.")


class Tool(Strict):
    """A tool; there are no others than functions."""

    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    """The name of a function."""

    name: FunctionName


class NamedChoice(Strict):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionChoice


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaOfFormat(Strict):
    """A JSON schema and what it is called."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Has no effect: answers always keep to the schema.")


class SchemaFormat(Strict):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaOfFormat


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(Generating):
    """A conversation to go on with."""

    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="By default as many as there is room for.")
    max_tokens: Count | None = Field(None, description="The older name of `max_completion_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], *few(2**10)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Whether one answer may hold several calls; by default it may.")
    response_format: ResponseFormat | None = None
    metadata: Labels | None = Field(None, description="Accepted, and not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")


class CompletionRequest(Generating):
    """A text to go on with, as it is."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], *few(2**12)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_ID, description="16 by default; 0, with `echo`, only scores the prompt.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Count | None = Field(None, description="Must be equal to `n`.")
    suffix: None = Field(None, description="Not supported.")


class EmbeddingRequest(Strict):
    """Texts, or lists of token ids, to turn into vectors."""

    model: str | None = None
    input: str | Texts | TokenIds | Annotated[list[TokenIds], *few(2**12)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(None, description="Not supported: vectors have the width of the model.")
    user: str | None = Field(None, description="Accepted, and not used.")


class TokenizeRequest(Strict):
    """A text, or a conversation, to turn into token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Whether a text gets the BOS token that the tokenizer puts in front.")


class DetokenizeRequest(Strict):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: TokenIds


class AdapterRequest(Strict):
    """An adapter to load, by the name of its folder in the server's `--adapter_dir`."""

    name: AdapterName


# Answers


class Answered(BaseModel):
    """What a client gets; only fields that were set are written."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)

    def json_bytes(self) -> bytes:
        """Return the JSON text."""
        return self.model_dump_json(exclude_unset=True, by_alias=True).encode()


class Problem(Answered):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answered):
    """An answer to a request that cannot be served, in OpenAI's form."""

    error: Problem


class Prediction(Answered):
    """The answer to a prompt; in a stream, a piece of it."""

    output: str


class PromptDetails(Answered):
    """Of the prompt's tokens, how many the server still remembered."""

    cached_tokens: int


class Usage(Answered):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(Answered):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answered):
    """The tokens of an answer."""

    content: list[ContentLogprob] | None
    refusal: None = None


class CalledFunction(Answered):
    """A function and its arguments, which are JSON."""

    name: str | None = None
    arguments: str


class ToolCall(Answered):
    """A call that the model makes. In a stream `index` counts them."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Answered):
    """What the model says; in a stream, a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Answered):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answered):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Answered):
    """A piece of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answered):
    """A piece of the answers to a conversation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Answered):
    """Tokens of a text, side by side; the first token of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answered):
    """One text; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Answered):
    """The texts that go on from prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(Answered):
    """The vector of one text, of length 1; as base64 of little-endian 32-bit numbers if asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answered):
    """The vectors of texts."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(Answered):
    """The model, or an adapter over it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(None, description="The model that an adapter belongs to.")
    max_model_len: int | None = None


class ModelCards(Answered):
    """All that `model` may name."""

    object: Literal["list"]
    data: list[ModelCard]


class DeletedModel(Answered):
    """An adapter that was unloaded."""

    id: str
    object: Literal["model"]
    deleted: bool


class Tokenized(Answered):
    """The ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Answered):
    """The text of ids."""

    prompt: str


class Health(Answered):
    """How the server is."""

    status: str
