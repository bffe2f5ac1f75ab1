"""Answers that keep to a grammar: a JSON schema, a regular expression, or a Lark grammar, through the package llguidance."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import lru_cache
from math import lcm
from typing import Any, TypeVar
from urllib.parse import unquote

import torch
from torch import Tensor

from litgpt.errors import UserError, optional
from litgpt.tokenizer import Tokenizer

T = TypeVar("T")

WHITE_SPACE = r"[ ]?|\n[ ]{0,16}"  # what may stand between the parts of JSON: a weak model would go on with it for ever
OPTIONS = {  # of llguidance's; a schema cannot change them
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITE_SPACE,
    "lenient": False,
    "coerce_one_of": False,
}
AS_BYTES = '%llguidance {"no_forcing": true}'  # else it encodes what must follow, and fails where a normalizer changes that

# What one request may cost. Beyond, llguidance takes minutes, gigabytes, or more stack than a thread has, which ends the process.
MAX_LEVELS = 2000  # of the schema and of all definitions that it refers to, one within the other: each takes some 7 kB of stack
STACK = 2**26  # bytes
MAX_LITERAL = 4000  # characters of a key or a constant: each token costs time that grows with it
MAX_PATTERN = 2000  # characters of a regular expression
MAX_PATTERNS = 10_000  # characters of all of them
MAX_MULTIPLES = 100_000  # states that remember a remainder
MAX_RULES = 1000  # lines of a Lark grammar
NOTES = ("title", "description", "$comment", "default", "examples")  # say nothing about what is allowed
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # hold schemas by any names


class Grammar:
    """What one answer may say, and how far it has come.

    Args:
        matcher: A parser of llguidance in its first state.
        vocab_size: How many tokens the model's logits have.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self.vocab_size = matcher, vocab_size
        self._bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32)

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (V,): none if there is an `error`."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        if self._matcher.is_error():
            return torch.zeros(self.vocab_size, dtype=torch.bool)
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = self._bits.view(torch.uint8).flatten()[:, None].bitwise_right_shift(shifts).bitwise_and_(1)  # (V / 8, 8), low bits first
        return bits.flatten()[: self.vocab_size].bool()

    def accept(self, token: int) -> None:
        """Go on behind a token; one that is not allowed is an `error`."""
        self._matcher.consume_token(token)

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on, such as a grammar that has become too ambiguous; None where all is well."""
        return f"The answer cannot go on by its grammar: {_reason(self._matcher.get_error())}" if self._matcher.is_error() else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow, because of an `error` too."""
        return self._matcher.is_stopped()


def compile_grammar(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    schema: dict[str, Any] | bool | None = None,
    regex: str | None = None,
    lark: str | None = None,
    stop: Sequence[Sequence[int]] = (),
) -> Grammar:
    """Return a grammar for one answer; give one of `schema`, `regex` and `lark`.

    Args:
        tokenizer: The model's.
        vocab_size: How many tokens the model's logits have.
        schema: A JSON schema; `{}` allows any JSON.
        regex: A regular expression that the whole answer matches.
        lark: A grammar in llguidance's dialect of Lark. Schemas in it are to be written by `schema_text`.
        stop: Token sequences that end the model's answers; single ones may follow where the grammar is satisfied.

    Raises:
        UserError: The grammar is damaged, allows nothing, uses what is not supported, or would take too long.
    """
    ends = (*tokenizer.eos_ids, *(sequence[0] for sequence in stop if len(sequence) == 1))
    if schema is not None:
        kind, text = "JSON schema", schema_text(schema)
    elif regex is not None:
        kind, text = "regular expression", regex
        if len(regex) > MAX_PATTERN:
            raise UserError(f"A regular expression may have {MAX_PATTERN} characters, but this one has {len(regex)}.")
    else:
        kind, text = "grammar", lark or ""
        if text.count("\n") >= MAX_RULES:
            raise UserError(f"A grammar may have {MAX_RULES} lines, but this one has {text.count(chr(10)) + 1}.")
    first = _with_stack(lambda: _first_state(tokenizer, vocab_size, tuple(dict.fromkeys(ends)), kind, text))
    return Grammar(first.deep_copy(), vocab_size)


def _with_stack(function: Callable[[], T]) -> T:
    """Return what a function returns, called in a thread of its own that has a large stack: a server's may have little."""
    with STARTING:
        before = threading.stack_size(STACK)
        try:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(function)
        finally:
            threading.stack_size(before)
    with pool:
        return future.result()


STARTING = threading.Lock()  # the size is that of all threads that start


@lru_cache(maxsize=8)
def _first_state(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...], kind: str, text: str) -> Any:
    """Return a parser that has seen nothing, to be copied."""
    package, vocabulary = optional("llguidance", "all"), _vocabulary(tokenizer, vocab_size, ends)
    made = package.LLMatcher
    try:
        if kind == "JSON schema":
            text = f"start: %json {text}"
        elif kind == "regular expression":
            text = json.loads(made.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
        limits = package.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # a state has 1 to 2 kB
        matcher = made(vocabulary, f"{text}\n{AS_BYTES}", log_level=0, limits=limits)
    except ValueError as error:
        raise UserError(f"The {kind} cannot be used: {_reason(error)}") from None
    if not matcher.is_error() and not Grammar(matcher, vocab_size).allowed().any() and not matcher.is_error():
        raise UserError(f"The {kind} cannot be used: no token of the model can begin an answer.")
    if matcher.is_error():
        raise UserError(f"The {kind} cannot be used: {_reason(matcher.get_error())}")
    if warnings := matcher.get_grammar_warnings():
        raise UserError(f"The {kind} cannot be used: {_reason(warnings[0])}")
    return matcher


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Any:
    package = optional("llguidance", "all")
    text = tokenizer.as_json()
    is_known = text is not None and "Metaspace" not in json.dumps(json.loads(text)["decoder"])  # llguidance leaves its spaces as they are
    given: Any = text if is_known else package.TokenizerWrapper(_Pieces(tokenizer, vocab_size, ends))
    try:
        return package.LLTokenizer(given, n_vocab=vocab_size, eos_token=list(ends) or None)
    except ValueError as error:
        raise UserError(f"Answers of this model cannot be kept to a grammar: {_reason(error)}") from None


class _Pieces:
    """A vocabulary whose tokens begin with `▁` for a space, as llguidance wants it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0] if ends else vocab_size - 1, tokenizer.bos_id
        texts = [tokenizer.text(i) for i in range(vocab_size)]
        special = {None, "<unk>", tokenizer.special_tokens.get("unk_token")}
        self.special_token_ids = [i for i, text in enumerate(texts) if text in special or i in tokenizer.special_ids]
        self.tokens = [_bytes_of(text or f"<unused {i}>", tokenizer.is_byte(i)) for i, text in enumerate(texts)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.offsets(text.decode(errors="replace") if isinstance(text, bytes) else text, inside=True)[0]


def _bytes_of(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _reason(error: object) -> str:
    """Return in one line what llguidance says: its first one, and the parser of regular expressions' own."""
    text = str(error).replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use `anyOf`.")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("<")] or ["no reason given"]
    if lines[0].startswith("NoExtension"):
        return "no text satisfies it."
    lines[0] = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: |failed to parse \"%json\": ", "", lines[0])
    more = next((line for line in lines if line.startswith("error:")), "")
    return f"{lines[0][:200]}{'…' * (len(lines[0]) > 200)} {more[:200]}".rstrip()


# JSON schemas


def schema_text(schema: dict[str, Any] | bool) -> str:
    """Return a JSON schema's text with our way to lay out JSON, for `compile_grammar` or after `%json` in a Lark grammar.

    Args:
        schema: A mapping; or True, which allows any JSON.

    Raises:
        UserError: It is no schema, or would take too long.
    """
    if schema is False or not isinstance(schema, dict | bool):
        raise UserError(f"A JSON schema is a mapping{' that allows something' * (schema is False)}, but got {schema!r:.60}.")
    schema = {} if schema is True else schema
    try:
        text = json.dumps(schema | {"x-guidance": OPTIONS}, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"The JSON schema cannot be used: {error}") from None
    schema = json.loads(text)  # as it will be read: keys are texts
    _check_literals(schema)
    levels = _levels(schema)
    refs = {ref for value in _parts(schema) if isinstance(ref := value.get("$ref"), str)}
    for ref in refs:
        levels += _levels(_target(schema, ref))
    if levels > MAX_LEVELS:
        raise UserError(
            f"The JSON schema and the {len(refs)} definitions it refers to have {levels} levels together, but {MAX_LEVELS} are "
            "possible. Refer to fewer, or nest less."
        )
    return text


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping within a value, itself included."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()


def _levels(value: Any) -> int:
    """Return how many mappings stand within each other."""
    most, waiting = 0, [(value, 0)]
    while waiting:
        found, level = waiting.pop()
        if isinstance(found, dict):
            level += 1
            most = max(most, level)
        waiting += ((each, level) for each in (found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()))
    return most


def _target(schema: dict[str, Any], ref: str) -> Any:
    """Return what a reference names; the whole schema stands for what cannot be found."""
    found: Any = schema
    for key in unquote(ref.partition("#")[2]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return schema
    return found


def _check_literals(schema: dict[str, Any]) -> None:
    """Refuse texts and numbers that would cost too much."""
    patterns, multiples = [], []
    waiting: list[tuple[Any, str]] = [(schema, "schema")]  # and what it is: names are those of schemas
    while waiting:
        value, kind = waiting.pop()
        if isinstance(value, str) and len(value) > MAX_LITERAL:
            raise UserError(f"A text in a JSON schema may have {MAX_LITERAL} characters, but {value[:20]!r}… has {len(value)}.")
        if isinstance(value, list):
            waiting += ((each, kind) for each in value)
        if not isinstance(value, dict):
            continue
        for key, each in value.items():
            waiting.append((key, "value"))
            if kind == "schema" and key == "pattern" and isinstance(each, str):
                patterns.append(each)
            elif kind == "schema" and key == "multipleOf" and isinstance(each, int | float):
                multiples.append(each)
            elif kind != "schema" or key not in NOTES:
                waiting.append((each, _kind(kind, key)))
            if kind == "schema" and key == "patternProperties":
                patterns += each if isinstance(each, dict) else ()
    longest = max(patterns, key=len, default="")
    if len(longest) > MAX_PATTERN or sum(map(len, patterns)) > MAX_PATTERNS:
        raise UserError(
            f"The patterns in a JSON schema may have {MAX_PATTERN} characters each and {MAX_PATTERNS} together, "
            f"but the longest one has {len(longest)}, and all have {sum(map(len, patterns))}."
        )
    units = [int("".join(map(str, Decimal(str(each)).normalize().as_tuple().digits))) for each in multiples]
    if lcm(*filter(None, units)) * len(units) > MAX_MULTIPLES:
        raise UserError(f"The JSON schema has multiples of {max(multiples)}, which take too long. Use smaller or fewer `multipleOf`.")


def _kind(kind: str, key: str) -> str:
    """Return what stands under a key."""
    if kind == "schema" and key in BY_NAME:
        return "names"
    return "value" if kind == "value" or (kind == "schema" and key in ("enum", "const")) else "schema"
