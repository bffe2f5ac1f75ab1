"""Renders the Jinja templates of checkpoints as transformers does, but so that a hostile one can do no harm.

Templates come from the internet. Jinja's immutable sandbox keeps them from our objects; here they also get a deadline, a limit on
what they write, and no way to make huge values: every loop and call checks the time, and what multiplies is checked beforehand.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from litgpt.errors import UserError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 2**24
MAX_BITS = 4096  # of whole numbers
MULTIPLIERS = frozenset(
    "batch center expandtabs format format_map indent join list ljust pprint replace rjust slice string tojson translate truncate "
    "urlize wordwrap xmlattr zfill".split()
)  # filters and methods whose result may be far longer than what they are given

_deadline: ContextVar[float] = ContextVar("_deadline")


def render(template: str, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a template, and from where to where its `{% generation %}` blocks go.

    Args:
        template: The template.
        **variables: What it may use, as in `messages` and `add_generation_prompt`.

    Raises:
        UserError: The template is wrong, refuses the messages, or takes too long or too much space.
    """
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        compiled, mark = _compiled(template)
        chunks, length = [], 0
        for chunk in compiled.generate(**variables):
            _check_time()
            chunks.append(chunk)
            length += len(chunk)
            _check_size(length)
        return _split_at_marks("".join(chunks), mark)
    except UserError:
        raise
    except Exception as error:  # whatever a template's code runs into
        raise UserError(f"The chat template cannot write these messages: {error or type(error).__name__}.") from None
    finally:
        _deadline.reset(token)


@lru_cache(maxsize=32)
def _compiled(template: str) -> tuple[jinja2.Template, str]:
    """Return a compiled template, and the secret mark that it puts around generation blocks."""
    if len(template) > MAX_CHARACTERS // 16:
        raise UserError(f"The chat template is {len(template)} characters long, which is not a template.")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    return environment.from_string(template), environment.mark


def _split_at_marks(marked: str, mark: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without its marks, and the spans between an opening and a closing one."""
    text, spans, opened = "", [], []
    for part in re.split(f"({mark}[<>])", marked):
        if part == mark + "<":
            opened.append(len(text))
        elif part == mark + ">":
            spans.append((opened.pop(), len(text)))
        else:
            text += part
    return text, spans


def _check_time(*_: Any) -> None:
    if time.monotonic() > _deadline.get():
        raise UserError(f"The chat template took longer than {MAX_SECONDS:g} seconds. It may loop forever; use another prompt style.")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise UserError(f"The chat template wrote more than {MAX_CHARACTERS} characters. Use another prompt style.")


def _ticking(items: Iterable) -> Iterator:
    """Look at the time before each item of a loop."""
    for item in items:
        _check_time()
        yield item


def _weight(value: Any) -> int:
    """Return how many characters a value has when written out, roughly; a list may hold itself many times over."""
    weight, stack = 0, [value]
    while stack:
        part = stack.pop()
        weight += len(part) if isinstance(part, str) else 8
        _check_size(weight)
        if isinstance(part, dict):
            stack += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            stack += part
    return weight


def _check_call(name: str, value: Any, arguments: Iterable) -> None:
    """Refuse a call that could make something huge of a value."""
    _check_time()
    if name in MULTIPLIERS:
        factors = [a if isinstance(a, int) else _weight(a) if isinstance(a, (str, list, tuple)) else 1 for a in arguments]
        _check_size(_weight(value) * max([1, *factors]) // 16)  # many texts are replaced by shorter ones
        if name in ("format", "format_map"):
            _check_format(value)


def _check_format(template: Any) -> None:
    """Refuse a width of five digits or more, or one that is computed."""
    if isinstance(template, str) and re.search(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^}]*:[^}]*(\d{5}|\{)", template):
        raise UserError("The chat template asks for a very wide format. Use another prompt style.")


def _guarded(name: str, function: Callable) -> Callable:
    """Return a filter that is checked before it runs."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment comes before the value

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args[first], [*args[first + 1 :], *kwargs.values()])
        return function(*args, **kwargs)

    return guarded


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Write JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` blocks, which say what the assistant wrote; marks are put around them."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """Return the nodes of a block, between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.TemplateData(self.environment.mark + side)], lineno=line) for side in "<>")
        return [opening, *body, closing]


class _Guards(NodeTransformer):
    """Puts checks into a parsed template, where the sandbox itself has none."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        """Let a loop look at the time."""
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_ticking", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        """Limit what `~` makes."""
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, "_joined", [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers renders chat templates in, guarded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._finalized, **options)
        self.mark = f"\0{secrets.token_hex(8)}"
        self.filters["tojson"] = _tojson
        self.filters |= {name: _guarded(name, self.filters[name]) for name in MULTIPLIERS & self.filters.keys()}
        self.filters["_ticking"] = jinja2.pass_context(lambda _, items: _ticking(items))
        self.filters["_joined"] = jinja2.pass_context(lambda _, values: "".join(map(str, values)) if _weight(values) else "")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    @staticmethod
    def _finalized(value: Any) -> Any:
        """Check what is written."""
        _weight(value)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Guards().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Calculate with limits."""
        _check_time()
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in "**" and left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > MAX_BITS:
            raise UserError("The chat template calculates with huge numbers. Use another prompt style.")
        if operator == "%":
            _check_format(left)
        if operator == "*" and not numbers:
            count = next((value for value in (left, right) if isinstance(value, int)), 1)
            _check_size(_weight(right if isinstance(left, int) else left) * max(count, 1))
        result = super().call_binop(context, operator, left, right)
        _check_size(len(result) if isinstance(result, (str, list, tuple)) else 0)
        return result

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call with limits."""
        method = getattr(__obj, "__wrapped__", __obj)
        _check_call(getattr(method, "__name__", ""), getattr(method, "__self__", None), [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        _check_size(len(result) if isinstance(result, str) else 0)
        return result
