"""The person at the terminal: what is typed, how answers are shown, and Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from time import perf_counter

from litgpt.chat.conversation import Conversation
from litgpt.chat.markdown import Markdown, Plain
from litgpt.errors import UserError
from litgpt.generate.run import note

ASK, REPLY, GO_ON = ">> Prompt: ", ">> Reply: ", ".. "
ENDS = ("", "!quit", "!exit", "/quit", "/exit")
SUBMIT = "!submit"  # ends a prompt of several lines
QUOTES = '"""'  # stand around a prompt of several lines


def shows_markdown() -> bool:
    """Whether standard output is a terminal that knows bold text."""
    kind = os.environ.get("TERM", "dumb" if os.name == "posix" else "")
    return sys.stdout.isatty() and kind not in ("dumb", "unknown")


def edit_lines() -> None:
    """Let `input` edit lines, remember them, and take a paste of several lines as one text, in a terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # not on Windows


def columns() -> int:
    """Return how wide the terminal is now."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


# Prompts


def read_prompt(is_multiline: bool) -> str:
    r"""Return what the person says: a line; several lines that end in `\` but the last; or several lines in triple quotes.

    Args:
        is_multiline: Whether a prompt goes on up to a line `!submit` instead.

    Raises:
        EOFError: There is nothing more to read.
    """
    line = input(ASK)
    if line.strip().lower() in ENDS or line.startswith("/"):
        return line
    if is_multiline:
        return _read_until_submit(line)
    if line.lstrip().startswith(QUOTES):
        return _read_quoted(line.lstrip().removeprefix(QUOTES))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        if (more := _read_more()) is None:
            break
        lines.append(more)
    return "\n".join(lines).rstrip("\n")


def _read_until_submit(line: str | None) -> str:
    lines = []
    while line is not None and line.strip().lower() != SUBMIT:
        if line.strip().lower() in ("!quit", "!exit"):
            return line
        lines.append(line)
        line = _read_more()
    return "\n".join(lines)


def _read_quoted(line: str | None) -> str:
    lines = []
    while line is not None and not line.rstrip().endswith(QUOTES):
        lines.append(line)
        line = _read_more()
    last = [] if line is None else [line.rstrip().removesuffix(QUOTES)]
    return "\n".join(lines + last).strip("\n")


def _read_more() -> str | None:
    """Return a further line of a prompt, or None at the end of input, where the next prompt ends the chat."""
    try:
        return input(GO_ON if sys.stdin.isatty() else "")
    except EOFError:
        return None


# Answers


def process_prompt(prompt: str, conversation: Conversation, markdown: bool = False) -> None:
    """Print the answer to a prompt while it is made. Ctrl-C stops it.

    Args:
        prompt: What the person says.
        conversation: What was said before; the turn is added to it.
        markdown: Whether to show headings, lists, bold text and the like as such.
    """
    with one_interrupt(conversation):
        print(REPLY, end="", flush=True)
        page = _page(markdown)
        try:
            with closing(conversation.answer(prompt)) as answer:
                for text in answer:
                    print(page.push(text), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except UserError as error:
            print(page.flush())
            note(str(error))
            return
        print(page.flush())
        _tell(conversation)


def _page(markdown: bool) -> Plain | Markdown:
    if not markdown:
        return Plain(cleans=sys.stdout.isatty())
    is_unicode = "utf" in (sys.stdout.encoding or "").lower()
    return Markdown(columns, len(REPLY), has_color=not os.environ.get("NO_COLOR"), is_unicode=is_unicode)


def _tell(conversation: Conversation) -> None:
    if (turn := conversation.turn) is None or turn.seconds == 0:  # stopped before it began
        return
    seconds, n = turn.seconds, turn.n_tokens
    note(f"Time for inference: {seconds:.2f} sec total, {n / seconds:.2f} tokens/sec, {n} tokens")
    if turn.answer.finish != "length":
        return
    if n >= conversation.max_new_tokens:
        note(f"The answer was cut after {n} tokens; --max_new_tokens allows for longer ones.")
    else:
        note(f"The answer was cut after {n} tokens, where the model's context of {conversation.context} tokens is full.")


@contextmanager
def one_interrupt(conversation: Conversation) -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt and note when, and ignore the next ones until what it stopped is tidied up."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):  # where it does not stop programs anyway
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        conversation.stopped_at = perf_counter()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
