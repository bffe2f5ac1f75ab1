"""Functions that a model may call: told through its chat template, read out of its answers, and forced by a grammar.

How a model writes a call stands nowhere but in its chat template, so the template itself is asked: it writes a known call, and what
stands around the name and the arguments is how calls are written.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from os.path import commonprefix
from typing import Any, NamedTuple

from litgpt.deploy.answering import Piece, Scored
from litgpt.deploy.protocol import Function
from litgpt.errors import UserError
from litgpt.generate.grammar import schema_text
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.tokenizer import Tokenizer

QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
NAME, ARGUMENTS = "function_to_find", {"probe": 1}  # of the call that the template is asked to write
KEYS = ("arguments", "parameters")  # what the arguments are called where a call is an object
UNKNOWN = "How this model's chat template writes calls is not known. Ask without `tools`."
ID = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_LENGTH = 9  # Mistral's templates refuse others


class Call(NamedTuple):
    """A call that the model made."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class CallFormat:
    """How a template writes a call: opening NAME middle ARGUMENTS closing."""

    opening: str
    middle: str
    closing: str

    @property
    def marker(self) -> str:
        """What tells a call from other text; nothing where a call begins with its JSON."""
        return re.split(r"[\[{]+\s*\"", self.opening)[0].strip()

    @property
    def tail(self) -> str:
        """What stands behind the JSON."""
        return re.sub(r"^[\s}\]]+", "", self.closing).strip()

    @property
    def is_object(self) -> bool:
        """Whether the name stands in the JSON too."""
        return self.opening.rstrip().endswith('"')


def with_tools(style: PromptStyle, functions: Sequence[Function]) -> ChatTemplate:
    """Return the style that also tells the model of functions.

    Raises:
        UserError: The style has no place for them.
    """
    way = "Ask without `tools`, or serve a model whose chat template knows them."
    if not isinstance(style, ChatTemplate):
        raise UserError(f"This model's prompt style cannot tell it of functions. {way}")
    tools = [{"type": "function", "function": _as_told(function)} for function in functions]
    told = ChatTemplate(style.template, style.special_tokens, style.variables | {"tools": tools})
    if told.render([QUESTION], True) == style.render([QUESTION], True):
        raise UserError(f"This model's chat template does not tell it of functions. {way}")
    return told


def _as_told(function: Function) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"name": function.name, "description": function.description or "", "parameters": parameters}


def call_format(told: ChatTemplate) -> CallFormat:
    """Return how a template writes calls.

    Args:
        told: The template, told of functions.

    Raises:
        UserError: It does not write them, or in a way that is not known.
    """
    function = {"name": NAME, "arguments": ARGUMENTS}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00000", "function": function}]}
    plain, text = (told.render([QUESTION, message], False)[0] for message in (ANSWER, call))
    start = plain.rindex("answer") if "answer" in plain else 0
    if text[:start] != plain[:start]:
        start = len(commonprefix((text, plain)))
    end = plain[plain.rindex("answer") + len("answer") :] if "answer" in plain else ""
    written = text[start:].removesuffix(end)
    found = re.search(r"\{\s*\"probe\":\s*1\s*\}", written)
    named = written.rfind(NAME, 0, found.start()) if found else -1
    if found is None or named < 0:
        raise UserError(UNKNOWN)
    form = CallFormat(written[:named], written[named + len(NAME) : found.start()], written[found.end() :])
    if not form.is_object and not form.marker:
        raise UserError("This model's chat template writes calls so that they cannot be told from text. Ask without `tools`.")
    return form


def special_tokens(tokenizer: Tokenizer, form: CallFormat) -> dict[int, str]:
    """Return the special tokens around calls: they must be seen in answers, where others are not.

    Raises:
        UserError: There are some within calls, so that other text would be full of them.
    """
    if any(i in tokenizer.special_ids for i in tokenizer.ids(form.middle)):
        raise UserError(UNKNOWN)
    ids = tokenizer.ids(form.opening) + tokenizer.ids(form.closing)
    return {i: tokenizer.text(i) or "" for i in ids if i in tokenizer.special_ids}


def forcing_grammar(tokenizer: Tokenizer, form: CallFormat, functions: Sequence[Function]) -> str:
    """Return the grammar, in llguidance's Lark, of exactly one call of one of these functions.

    Raises:
        UserError: The schema of a function's arguments cannot be used.
    """
    rules = [f"start: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        before, after = _literal(tokenizer, form.opening + function.name + form.middle), _literal(tokenizer, form.closing)
        schema = schema_text({"type": "object", **(function.parameters or {})})
        rules.append(f"call_{i}: {before} %json {schema} {after}".rstrip())
    return "\n".join(rules)


def _literal(tokenizer: Tokenizer, text: str) -> str:
    """Return a text in Lark's notation, in which special tokens stand by their numbers."""
    parts, position = [], 0
    for token, (start, end) in zip(*tokenizer.offsets(text, inside=True), strict=True):
        if token in tokenizer.special_ids:
            parts += [json.dumps(text[position:start])] * (start > position) + [f"<[{token}]>"]
            position = end
    if position < len(text):
        parts.append(json.dumps(text[position:]))
    return " ".join(parts)


class CallReader:
    """Keeps calls out of the text of an answer, and returns them at its end. What looks like a call and is none stays text.

    Args:
        form: How calls are written.
        names: The functions there are.
        is_single: Whether only the first call counts.
    """

    def __init__(self, form: CallFormat, names: Iterable[str], is_single: bool = False) -> None:
        self.form, self.names, self.is_single = form, set(names), is_single
        self._held = ""  # what may be a call, or white space before one
        self._tokens: list[Scored] = []  # whose text is held
        self._n_shown = 0
        self._is_call: bool | None = None  # None while it is not known whether there is one

    def push(self, piece: Piece) -> Piece:
        """Take a piece of the answer and return what is certain to be no call."""
        self._held += piece.text
        self._tokens += piece.tokens
        n_safe = len(self._held[: self._n_safe()].rstrip()) if self._is_call is not False else len(self._held)
        return self._show(n_safe)

    def _n_safe(self) -> int:
        """Return how many of the characters held stand before a call."""
        marker = self.form.marker
        if marker:
            at = self._held.find(marker)
            self._is_call = True if at >= 0 else None
            most = min(len(marker) - 1, len(self._held))
            return at if at >= 0 else len(self._held) - next((n for n in range(most, 0, -1) if self._held.endswith(marker[:n])), 0)
        if self._is_call is None and self._held.strip():
            self._is_call = self._held.lstrip().startswith(("{", "["))
        return 0 if self._is_call is not False else len(self._held)

    def _show(self, n: int) -> Piece:
        text, self._held = self._held[:n], self._held[n:]
        self._n_shown += n
        last = self._n_shown if self._held else float("inf")
        n_tokens = next((i for i, scored in enumerate(self._tokens) if scored.start >= last), len(self._tokens))
        tokens, self._tokens[:n_tokens] = self._tokens[:n_tokens], []
        return Piece(text, tokens)

    def finish(self) -> tuple[Piece, list[Call]]:
        """Return the rest of the text, and the calls."""
        calls, n_read = self._read(self._held) if self._is_call else ([], 0)
        if not calls:
            return self._show(len(self._held)), []
        self._tokens = []
        return Piece(self._held[n_read:].rstrip(), []), calls[:1] if self.is_single else calls

    def _read(self, text: str) -> tuple[list[Call], int]:
        """Return the calls that a text begins with, and where the last one ends."""
        form = self.form
        name = "" if form.is_object else f"(?P<name>[\\w.-]+){re.escape(form.middle.rstrip())}"
        opening = re.compile(rf"\s*+{re.escape(form.marker)}\s*+{name}\s*+(?=[\[{{])")  # `*+`: else long white space takes minutes
        tail = re.compile(rf"\s*+(?:{re.escape(form.tail)})?\s*+[;,]?")
        calls: list[Call] = []
        position = 0
        while match := opening.match(text, position):
            try:
                value, end = DECODER.raw_decode(text, match.end())
            except (ValueError, RecursionError):
                break
            found = value if isinstance(value, list) else [value]
            if not form.is_object:
                found = [{"name": match["name"], KEYS[0]: value} for value in found]
            new = [self._call(value) for value in found]
            if None in new or not new:
                break
            calls += filter(None, new)
            position = tail.match(text, end).end()
        return calls, position

    def _call(self, value: Any) -> Call | None:
        """Return the call that an object is, or None if it is none of a known function."""
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in self.names:
            return None
        arguments = next((value[key] for key in KEYS if key in value), None)
        return Call(new_id(), name, _json(arguments)) if isinstance(arguments, dict) else None


def new_id() -> str:
    """Return what a call is named by."""
    return "".join(secrets.choice(ID) for _ in range(ID_LENGTH))


def _json(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    if not isfinite(value := float(number)):  # as of 1e999, which could not be written again
        _refuse(number)
    return value


DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_finite)
