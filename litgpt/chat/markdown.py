"""Markdown shown while it is written: each word once and for good, so nothing on the screen is ever painted again."""

import re
from collections.abc import Callable
from io import StringIO
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt.chat.inline import BOLD, CODE, DIM, ITALIC, STRIKE, UNDERLINE, Piece, pieces

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but new lines and tabs
BEFORE_IDEOGRAPHS = re.compile("(?=[\u3041-\u30fa\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003fffd])")  # a line may end there, too

UNDECIDED = re.compile(r"\s*(#{0,6}|[+>]|\d{1,9}[.)]?\s?|([-*_])\s*(\2\s*)*|`{1,2}|~{1,2}|(```|~~~|\|).*)")  # more than one kind of line
FENCE = re.compile(r"\s*(`{3,}|~{3,})[^`]*")
FENCE_END = re.compile(r"\s*(`*|~*)\s*")  # or what may become one
RULE = re.compile(r"\s*([-*_])\s*(\1\s*){2,}")
BEGINNING = re.compile(r"(\s*)(?:(#{1,6})\s+|([-*+])\s+|(\d{1,9}[.)])\s+|(>)\s?)?")
DELIMITER = re.compile(r"\s*:?-+:?\s*")
RICH = {BOLD: "bold", DIM: "dim", ITALIC: "italic", UNDERLINE: "underline", STRIKE: "strike", CODE: "cyan"}


def clean(text: str) -> str:
    """Return the text without what a terminal would obey instead of show."""
    return CONTROL.sub("", text)


class Plain:
    """Shows text as it is, or, in a terminal, without control characters."""

    def __init__(self, cleans: bool) -> None:
        self.cleans = cleans

    def push(self, text: str) -> str:
        """Take text and return what to write."""
        return clean(text) if self.cleans else text

    def flush(self) -> str:
        """Return what is still held back: nothing more will come."""
        return ""


class Paper:
    """Collects what to write; lines end between words, where the terminal does.

    Args:
        columns: Says how wide the terminal is now.
        column: How many cells of the first line are taken already.
        has_color: Whether colours may be used, beside bold and the like.
    """

    def __init__(self, columns: Callable[[], int], column: int, has_color: bool) -> None:
        self.columns, self.column, self.has_color = columns, column, has_color
        self.margin = Piece("")  # begins each further line of a paragraph
        self.gap, self.word, self.written = [], [], []  # spaces before a word, the word so far, and what is certain

    def put(self, piece: Piece) -> None:
        """Take text without line ends. Its last word waits for its end."""
        for part in re.findall(r" +|[^ ]+", piece.text):
            if part[0] == " ":
                self.end_word()
                self.gap.append(Piece(part, piece.style))
                continue
            for i, syllable in enumerate(BEFORE_IDEOGRAPHS.split(part)):
                if i:
                    self.end_word()
                if syllable:
                    self.word.append(Piece(syllable, piece.style))

    def end_word(self) -> None:
        """Write the word that waits."""
        if not self.word:
            return
        columns = self.columns()
        n_word, n_gap = (sum(cell_len(piece.text) for piece in part) for part in (self.word, self.gap))
        if self.column + n_gap + n_word > columns and self.column > cell_len(self.margin.text):
            self.end_line(is_paragraph=False)
            self.raw(self.margin)
            self.gap, n_gap = [], 0
        for style, run in groupby((*self.gap, *self.word), lambda piece: piece.style):
            self.raw(Piece("".join(piece.text for piece in run), style))
        self.column = (self.column - 1) % columns + 1  # the terminal breaks a word that is longer than a line
        self.gap, self.word = [], []

    def raw(self, piece: Piece) -> None:
        """Write text where the line stands, however long it is."""
        numbers = ";".join(number for number in piece.style if self.has_color or len(number) < 2)
        self.written.append(f"\x1b[{numbers}m{piece.text}\x1b[0m" if numbers and piece.text else piece.text)
        self.column += cell_len(piece.text)

    def end_line(self, is_paragraph: bool = True) -> None:
        """Begin a new line.

        Args:
            is_paragraph: Whether the paragraph ends with this line.
        """
        if is_paragraph:
            self.end_word()
            self.gap, self.margin = [], Piece("")
        self.written.append("\n")
        self.column = 0

    def take(self) -> str:
        """Return what was written since the last time."""
        text, self.written = "".join(self.written), []
        return text


class Markdown:
    """Shows Markdown line by line: headings, lists, quotes, code, tables, and what is emphasized within a line.

    What depends on what follows is held back until it is certain: the last word, an emphasis up to its end, a table.

    Args:
        columns: Says how wide the terminal is now.
        column: How many cells of the first line are taken already.
        has_color: Whether colours may be used.
        is_unicode: Whether the terminal shows more than ASCII.
    """

    def __init__(self, columns: Callable[[], int], column: int = 0, has_color: bool = True, is_unicode: bool = True) -> None:
        self.paper, self.has_color, self.is_unicode = Paper(columns, column, has_color), has_color, is_unicode
        self.line = ""  # what of the newest line is held back
        self.is_begun = False  # whether its kind is known
        self.style: tuple[str, ...] = ()  # of the whole line
        self.last = ""  # the character before `line`
        self.fence = ""  # what the code began with that we are in
        self.rows: list[str] = []  # of a table

    def push(self, text: str) -> str:
        """Take text and return what to write."""
        self.line += clean(text).replace("\t", "    ")
        while "\n" in self.line:
            line, _, self.line = self.line.partition("\n")
            self._advance(line, is_whole=True)
        self.line = self._advance(self.line, is_whole=False)
        return self.paper.take()

    def flush(self) -> str:
        """Return what is still held back: nothing more will come."""
        if self.line:
            self._advance(self.line, is_whole=True)
            self.line = ""
        self._end_table()
        self.paper.end_word()
        return self.paper.take().removesuffix("\n")

    def _advance(self, text: str, is_whole: bool) -> str:
        """Write what is certain of a line; return the rest."""
        if not self.is_begun:
            undecided = FENCE_END if self.fence else UNDECIDED
            if not is_whole and undecided.fullmatch(text):
                return text
            if is_whole and self._write_line(text):
                return ""
            text = text if self.fence else self._begin(text)
            self.is_begun = True
        if self.fence:
            self.paper.raw(Piece(text, (CODE,)))
            rest = ""
        else:
            certain, rest = pieces(text, is_whole, self.style, self.last)
            for piece in certain:
                self.paper.put(piece)
            self.last = text[: len(text) - len(rest)][-1:] or self.last
        if is_whole:
            self.paper.end_line()
            self.is_begun, self.style, self.last = False, (), ""
        return rest

    def _write_line(self, line: str) -> bool:
        """Write a line that is of one kind as a whole, and return whether it was."""
        if self.fence:
            is_end = FENCE_END.fullmatch(line) and line.strip().startswith(self.fence)
            self.fence = "" if is_end else self.fence
            return bool(is_end)
        if line.lstrip().startswith("|"):
            self.rows.append(line.strip())
            return True
        self._end_table()
        if RULE.fullmatch(line):
            self._own_line()
            self.paper.put(Piece(("─" if self.is_unicode else "-") * min(40, self.paper.columns()), (DIM,)))
            self.paper.end_line()
            return True
        if fence := FENCE.fullmatch(line):
            self._own_line()
            self.fence = fence[1]
            return True
        return False

    def _own_line(self) -> None:
        """End the line in which the answer began, which what is no plain text does not go on with."""
        if self.paper.column:
            self.paper.end_line()

    def _begin(self, text: str) -> str:
        """Write what a line begins with, and return the rest."""
        self._end_table()
        beginning = BEGINNING.match(text)
        indent, heading, bullet, number, quote = beginning.groups()
        if heading or bullet or number or quote:
            self._own_line()
        if heading:
            self.style = (BOLD, UNDERLINE) if len(heading) == 1 else (BOLD,)
        sign = ("• " if self.is_unicode else "- ") if bullet else f"{number} " if number else ""
        bar = ("│ " if self.is_unicode else "> ") if quote else ""
        self.paper.raw(Piece(indent + sign + bar, (DIM,) if quote else ()))
        if len(indent + sign) <= self.paper.columns() // 3:
            self.paper.margin = Piece(indent + " " * len(sign) + bar, (DIM,) if quote else ())
        return text[beginning.end() :]

    def _end_table(self) -> None:
        """Write the table whose rows were held back."""
        rows, self.rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in self.rows], []
        if not rows:
            return
        self._own_line()
        if len(rows) < 2 or not all(map(DELIMITER.fullmatch, rows[1])):
            for row in rows:
                self.paper.raw(Piece("| " + " | ".join(row) + " |"))
                self.paper.end_line()
            return
        aligned = {(True, True): "center", (False, True): "right"}
        table = Table(box=box.SIMPLE_HEAD if self.is_unicode else box.ASCII2, show_edge=False, pad_edge=False)
        for title, line in zip(rows[0], [*rows[1], *[""] * len(rows[0])], strict=False):
            table.add_column(_rich(title), justify=aligned.get((line.startswith(":"), line.endswith(":")), "left"))
        for row in rows[2:]:
            table.add_row(*map(_rich, row[: len(rows[0])]))
        console = Console(
            file=StringIO(), width=self.paper.columns(), force_terminal=True, color_system="standard", no_color=not self.has_color
        )
        console.print(table)
        self.paper.raw(Piece("\n".join(line.rstrip() for line in console.file.getvalue().splitlines())))
        self.paper.end_line()


def _rich(cell: str) -> Text:
    found, _ = pieces(cell.replace("\\|", "|"), True)
    return Text.assemble(*((text, " ".join(RICH[number] for number in style)) for text, style in found))
