"""Renders the Jinja templates of checkpoints as transformers does, but so that a hostile one can do no harm.

Templates come from the internet. Jinja's immutable sandbox keeps them from our objects; here they also get a deadline, a limit on
what they write, and no way to make huge values: every loop and call checks the time, and what multiplies or nests is weighed before.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from litgpt.errors import UserError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 2**24
MAX_BITS = 4096  # of whole numbers
MAX_WORK = 2**28  # characters that are handled on the way, as in `{% set %}` blocks
WEIGHED = frozenset(
    "batch capitalize center e escape expandtabs forceescape format format_map indent join list ljust lower pprint replace rjust safe "
    "slice string striptags title tojson translate trim truncate upper urlencode urlize wordcount wordwrap xmlattr zfill".split()
)  # filters and methods that write a value out or make it longer

_budget: ContextVar["_Budget"] = ContextVar("_budget")


class TooMuch(UserError):
    """A template takes more time or space than one may. It is not worth another try."""


@dataclass
class _Budget:
    """What one rendering may still use."""

    deadline: float
    work: int = 0

    def spend(self, work: int = 0) -> None:
        """Stop the rendering when its time is over or its work too much."""
        if time.monotonic() > self.deadline:
            raise TooMuch(f"The chat template took longer than {MAX_SECONDS:g} seconds. It may loop forever; use another prompt style.")
        self.work += work
        if self.work > MAX_WORK:
            raise TooMuch("The chat template handles too much text. Use another prompt style.")


def render(template: str, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a template, and from where to where its `{% generation %}` blocks go.

    Args:
        template: The template.
        **variables: What it may use, as in `messages` and `add_generation_prompt`.

    Raises:
        TooMuch: The template takes too long or too much space.
        UserError: It is wrong or refuses the messages.
    """
    budget = _Budget(time.monotonic() + MAX_SECONDS)
    token = _budget.set(budget)
    try:
        compiled, mark = _compiled(template)
        chunks, length = [], 0
        for chunk in compiled.generate(**variables):
            budget.spend()
            chunks.append(chunk)
            length += len(chunk)
            _check_size(length)
        return _split_at_marks("".join(chunks), mark)
    except UserError:
        raise
    except Exception as error:  # whatever a template's code runs into
        raise UserError(f"The chat template cannot write these messages: {error or type(error).__name__}.") from None
    finally:
        _budget.reset(token)


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


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TooMuch(f"The chat template wrote more than {MAX_CHARACTERS} characters. Use another prompt style.")


def _ticking(items: Iterable, work: int) -> Iterator:
    """Look at the time before each item of a loop, and count the text that its body writes."""
    for item in items:
        _budget.get().spend(work)
        yield item


def _weight(value: Any) -> int:
    """Return how many characters a value has when written out, roughly; a list may hold itself many times over."""
    weight, stack = 0, [value]
    while stack:
        part = stack.pop()
        weight += len(part) if isinstance(part, str) else 8
        _check_size(weight)
        if isinstance(part, Namespace):
            raise UserError("The chat template writes a namespace. Use another prompt style.")
        if isinstance(part, dict):
            stack += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            stack += part
    return weight


def _check_call(name: str, value: Any, arguments: Iterable) -> None:
    """Refuse a call that could make something huge of a value."""
    _budget.get().spend()
    if name in WEIGHED:
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
        return [opening, nodes.Scope(body, lineno=line), closing]  # what is set inside ends with the block, as in transformers


class _Guards(NodeTransformer):
    """Puts checks into a parsed template, where the sandbox itself has none."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        """Let a loop look at the time."""
        self.generic_visit(node)
        work = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filtered(node.iter, "_ticking", nodes.Const(work))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        """Limit what `~` makes."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List) -> nodes.Filter:  # noqa: N802
        """Limit what nests."""
        self.generic_visit(node)
        return _filtered(node, "_weighed")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        """Limit what nests; the targets of a loop do not."""
        self.generic_visit(node)
        return _filtered(node, "_weighed") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers renders chat templates in, guarded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._finalized, **options)
        self.mark = f"\0{secrets.token_hex(8)}"
        self.filters["tojson"] = _tojson
        self.filters |= {name: _guarded(name, self.filters[name]) for name in WEIGHED & self.filters.keys()}
        self.filters["_ticking"] = jinja2.pass_context(lambda _, items, work: _ticking(items, work))
        self.filters["_joined"] = jinja2.pass_context(lambda _, values: "".join(map(str, values)) if _weight(values) else "")
        self.filters["_weighed"] = jinja2.pass_context(lambda _, value: value if _weight(value) else value)
        for name in ("lipsum", "cycler"):
            self.globals.pop(name)  # write as much as they are told to, at once
        self.filters["round"] = lambda value, precision=0, method="common": jinja2.filters.do_round(value, min(int(precision), 20), method)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    @staticmethod
    def _finalized(value: Any) -> Any:
        """Count what is written."""
        _budget.get().spend(_weight(value))
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Guards().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Calculate with limits."""
        _budget.get().spend()
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in "**" and left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > MAX_BITS:
            raise UserError("The chat template calculates with huge numbers. Use another prompt style.")
        if operator == "%":
            _check_format(left)
            _weight(right)
        if operator == "*" and not numbers:
            count = next((value for value in (left, right) if isinstance(value, int)), 1)
            _check_size(_weight(right if isinstance(left, int) else left) * max(count, 1))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            _check_size(len(result))
            _budget.get().spend(len(result))  # a loop could keep them all
        return result

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call with limits."""
        method = getattr(__obj, "__wrapped__", __obj)
        _check_call(getattr(method, "__name__", ""), getattr(method, "__self__", None), [*args, *kwargs.values()])
        if method is dict or method is Namespace:  # Jinja hands a call in a loop the loop's variables too
            _weight([*args, *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))])
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
            _budget.get().spend(len(result))
        return result
