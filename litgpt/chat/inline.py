"""What a line of Markdown emphasizes: text becomes pieces with a style, as soon as they are certain."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BOLD, DIM, ITALIC, UNDERLINE, STRIKE, CODE = "1", "2", "3", "4", "9", "36"  # numbers of ECMA-48's "select graphic rendition"
LIMIT = 1000  # characters that are held back for the end of an emphasis, at most
SPECIAL = re.compile(r"[\\`*_~\[]")
ESCAPABLE = set("\\`*_~#|<>[]") - set("\\[]")  # `\\` and `\[` are rather LaTeX's
MARKS = re.compile(r"\\.|`+|\*+|_+|~+", re.DOTALL)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]*)\)")
PART_OF_LINK = re.compile(r"\[[^\[\]]*(\](\([^()\s]*)?)?")
STYLES = {"*": {1: (ITALIC,), 2: (BOLD,), 3: (BOLD, ITALIC)}, "~": {2: (STRIKE,)}}
STYLES["_"] = STYLES["*"]


class Piece(NamedTuple):
    """Text of one style: the numbers that switch it on."""

    text: str
    style: tuple[str, ...] = ()


def pieces(text: str, is_whole: bool, style: tuple[str, ...] = (), before: str = "") -> tuple[list[Piece], str]:
    """Return the pieces of a line that are certain, and the rest, which depends on what follows.

    Args:
        text: The line, or what of it is there.
        is_whole: Whether nothing follows; then there is no rest.
        style: Of all pieces.
        before: The character that stands before the text.
    """
    found: list[Piece] = []
    place = 0
    while place < len(text):
        if (special := SPECIAL.search(text, place)) is None:
            found.append(Piece(text[place:], style))
            return found, ""
        if special.start() > place:
            found.append(Piece(text[place : special.start()], style))
        place = special.start()
        previous = text[place - 1] if place else before
        settled = _settled(text, place, previous, is_whole or len(text) - place > LIMIT, style)
        if settled is None:
            return found, text[place:]
        new, place = settled
        found += new
    return found, ""


def _settled(text: str, place: int, previous: str, is_whole: bool, style: tuple[str, ...]) -> tuple[list[Piece], int] | None:
    """Return the pieces of what a special character begins and where they end, or None if that is not certain yet."""
    mark = text[place]
    if mark == "\\":
        if place + 1 == len(text) and not is_whole:
            return None
        escapes = text[place + 1 : place + 2] in ESCAPABLE
        return [Piece(text[place + escapes : place + 1 + escapes], style)], place + 1 + escapes
    if mark == "[":
        return _link(text, place, is_whole, style)
    end = place + len(MARKS.match(text, place)[0])  # behind the run of marks
    n = end - place
    if end == len(text) and not is_whole:
        return None
    if mark == "`":
        if (close := _code_end(text, end, n, is_whole)) >= 0:
            inside = text[end:close]
            return [Piece(inside[1:-1] if re.fullmatch(r" .*\S.* ", inside) else inside, (*style, CODE))], close + n
    elif n in STYLES[mark] and _opens(mark, previous, text[end : end + 1]):
        if (close := _emphasis_end(text, end, mark, n, is_whole)) >= 0:
            return pieces(text[end:close], True, (*style, *STYLES[mark][n]), mark)[0], close + n
    else:
        return [Piece(text[place:end], style)], end
    return ([Piece(text[place:end], style)], end) if is_whole else None


def _link(text: str, place: int, is_whole: bool, style: tuple[str, ...]) -> tuple[list[Piece], int] | None:
    if link := LINK.match(text, place):
        shown, address = link.groups()
        seen = [] if address in ("", shown) else [Piece(f" ({address})", (*style, DIM))]
        return pieces(shown, True, (*style, UNDERLINE), "[")[0] + seen, link.end()
    if not is_whole and PART_OF_LINK.fullmatch(text, place):
        return None
    return [Piece("[", style)], place + 1


def _opens(mark: str, previous: str, following: str) -> bool:
    """Whether marks begin an emphasis: text follows at once, and a `_` does not stand inside a word."""
    return following.strip() != "" and not (mark == "_" and previous.isalnum())


def _code_end(text: str, start: int, n: int, is_whole: bool) -> int:
    """Return where the run of n backticks stands that ends code, or -1."""
    for run in re.compile("`+").finditer(text, start, start + LIMIT):
        if run.end() - run.start() == n and (is_whole or run.end() < len(text)):
            return run.start()
    return -1


def _emphasis_end(text: str, start: int, mark: str, n: int, is_whole: bool) -> int:
    """Return where the n marks stand that end an emphasis, or -1."""
    for first, last in _runs(text, start, mark, is_whole):
        closes = not text[first - 1].isspace() and not (mark == "_" and text[last : last + 1].isalnum())
        if closes and first > start and (last - first == n or last - first == 3):
            return last - n
    return -1


def _runs(text: str, start: int, mark: str, is_whole: bool) -> Iterator[tuple[int, int]]:
    """Yield the runs of a mark that are not in code and may not grow any more."""
    behind = start  # where code ends
    for found in MARKS.finditer(text, start, min(len(text), start + LIMIT)):
        if found.start() < behind:
            continue
        if found[0][0] == "`":
            close = _code_end(text, found.end(), len(found[0]), is_whole)
            if close < 0 and not is_whole:
                return  # the code may go on beyond an end of the emphasis
            behind = max(behind, close + len(found[0]))
        elif found[0][0] == mark and (is_whole or found.end() < len(text)):
            yield found.start(), found.end()
