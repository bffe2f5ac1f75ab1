"""How answers look: what the screen of a terminal shows is compared with what Markdown means."""

import random
import re

import pyte
import pytest
from rich.cells import cell_len

from litgpt.chat import terminal
from litgpt.chat.inline import LIMIT, pieces
from litgpt.chat.markdown import Markdown, Plain, clean

ESCAPE = re.compile("\x1b\\[[0-9;]*m")
PAGE = """Here is **bold *nested* text**, snake_case_name, 2 * 3, `code **x**` and [a link](http://a.b/c_d).

# Title
## Second *it*
* item
  - nested `x`
10. ten ***both*** ~~gone~~
> quoted

---
```python
def f(x):
    return x * 2  # **no**

~~~
```
| a | b **x** |
|---|:-:|
| 你好 | 2 |

你好世界你好世界你好世界你好世界你好世界，你好世界。 Unclosed **bold here
f(*args, **kwargs), \\*literal\\*
"""


def written(text, sizes=(1,), columns=50, **settings):
    """What is written if the text comes in pieces of these sizes, in turn."""
    page, place, i, out = Markdown(lambda: columns, **settings), 0, 0, []
    while place < len(text):
        out.append(page.push(text[place : place + sizes[i % len(sizes)]]))
        place, i = place + sizes[i % len(sizes)], i + 1
    return "".join([*out, page.flush()])


def shown(text, **settings):
    """The same, without styles."""
    return ESCAPE.sub("", written(text, **settings))


def screen(text, columns=50, lines=60):
    """What a terminal makes of it: each cell's character and style."""
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    cells = [[screen.buffer[row][column] for column in range(columns)] for row in range(lines)]
    return [[(cell.data, cell.bold, cell.italics, cell.underscore, cell.strikethrough, cell.fg) for cell in row] for row in cells]


def styled(text):
    """The pieces of a line as (text, styles)."""
    found, rest = pieces(text, True)
    assert rest == ""
    merged = []
    for piece in found:
        if merged and merged[-1][1] == piece.style:
            merged[-1] = (merged[-1][0] + piece.text, piece.style)
        elif piece.text:
            merged.append((piece.text, piece.style))
    return merged


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a **b** c", [("a ", ()), ("b", ("1",)), (" c", ())]),
        ("*a **b** c*", [("a ", ("3",)), ("b", ("3", "1")), (" c", ("3",))]),
        ("**a *b***", [("a ", ("1",)), ("b", ("1", "3"))]),
        ("***a***", [("a", ("1", "3"))]),
        ("_a_ __b__ ~~c~~", [("a", ("3",)), (" ", ()), ("b", ("1",)), (" ", ()), ("c", ("9",))]),
        ("`a*b*` ``c`d``", [("a*b*", ("36",)), (" ", ()), ("c`d", ("36",))]),
        ("[a](b) [c](c)", [("a", ("4",)), (" (b)", ("2",)), (" ", ()), ("c", ("4",))]),
    ],
)
def test_emphasis_becomes_a_style(line, expected):
    assert styled(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "2 * 3 * 4",
        "snake_case_name",
        "f(*args, **kwargs)",
        "**open",
        "`open",
        "a [b] c",
        "[a](b c)",
        "~x~",
        "****",
        "* a *",
        "\\(x\\)",
        "5 ** 2 ** 3",
    ],
)
def test_what_emphasizes_nothing_stays_as_it_is(line):
    assert styled(line) == [(line, ())]


def test_a_backslash_takes_the_meaning_from_a_mark():
    assert styled("\\*a\\* \\`b\\` \\_c\\_") == [("*a* `b` _c_", ())]


def test_what_the_screen_shows_does_not_depend_on_how_the_text_was_cut():
    whole = screen(written(PAGE, sizes=(len(PAGE),)))
    draw = random.Random(0)
    for _ in range(30):
        assert screen(written(PAGE, sizes=[draw.randint(1, 9) for _ in range(7)])) == whole


def test_random_marks_are_shown_alike_however_they_are_cut_and_no_word_is_lost():
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("ab  **__``~[]()\\\n#->1.") for _ in range(40))
        whole = written(text, sizes=(len(text),))
        assert screen(written(text, sizes=[draw.randint(1, 5) for _ in range(5)])) == screen(whole)
        if not re.search("^ *(```|~~~)", text, re.MULTILINE):  # behind these stands the code's language
            assert re.findall(r"[ab1]", ESCAPE.sub("", whole)) == re.findall(r"[ab1]", text)


def test_nothing_that_was_written_is_painted_again():
    assert set(re.findall("\x1b[^m]*m?", written(PAGE))) == set(ESCAPE.findall(written(PAGE)))


@pytest.mark.parametrize("columns", [1, 5, 12, 33, 200])
def test_no_line_of_words_is_wider_than_the_terminal(columns):
    text = " ".join(draw * n for n, draw in zip([1, 3, 4, 2, 5] * 20, "abcd你", strict=False))
    lines = shown(f"- {text}\n\n{text}", columns=columns).splitlines()
    assert all(cell_len(line) <= columns or " " not in line.strip(" •") for line in lines)
    assert "".join("".join(lines).split()).replace("•", "") == "".join(f"{text}{text}".split())


def test_lines_may_end_between_ideographs_but_not_before_a_full_stop():
    assert shown("你好世界你好", columns=8).splitlines() == ["你好世界", "你好"]
    assert shown("你好世界。", columns=8).splitlines() == ["你好世", "界。"]


def test_lists_and_quotes_hang():
    assert shown("- aaa bbb ccc\n1. aaa bbb ccc\n> aaa bbb ccc\n", columns=10).splitlines() == [
        "• aaa bbb",
        "  ccc",
        "1. aaa bbb",
        "   ccc",
        "│ aaa bbb",
        "│ ccc",
    ]


def test_an_answer_begins_beside_its_name_unless_it_is_no_plain_text():
    assert shown("Hello", column=10) == "Hello"
    for text in ("# Title", "- item", "```\ncode", "| a |\n|---|\n| b |", "---\n"):
        assert shown(text, column=10).startswith("\n")


def test_code_is_shown_as_it_is():
    code = "a *b*  # c\n\n  | x |\n- y\n"
    assert shown(f"```\n{code}```\nend") == f"{code}end"
    assert shown("~~~~\n```\n~~~\n~~~~\nend") == "```\n~~~\nend"


def test_code_is_shown_as_it_comes():
    page = Markdown(lambda: 80)
    page.push("```\n")
    assert ESCAPE.sub("", page.push("abc")) == "abc"


def test_tables_stand_in_columns_and_what_is_none_stays():
    assert shown("| a | b |\n|---|--:|\n| long | 1 |\n| x |\nend").splitlines() == ["a      b", "────────", "long   1", "x", "end"]
    assert shown("| a | b\nend") == "| a | b |\nend"
    assert shown("| a |\n|---|\n| b |") == "a\n─\nb"


def test_ascii_is_enough():
    assert shown(re.sub("[^\x00-\x7f]", "x", PAGE), is_unicode=False).isascii()


def test_without_color_only_colors_are_missing():
    codes = {number for code in ESCAPE.findall(written(PAGE, has_color=False)) for number in code[2:-1].split(";")}
    assert codes <= {"0", "1", "2", "3", "4", "9", ""} and "1" in codes


def test_words_are_shown_as_soon_as_they_end():
    page = Markdown(lambda: 80)
    assert [page.push(text) for text in ("Hello", " wor", "ld", " x")] == ["", "Hello", "", " world"]
    assert [page.push(text) for text in (" **y", "**", " z")] == [" x", "", " \x1b[1my\x1b[0m"]
    assert page.flush() == " z"


def test_an_emphasis_that_does_not_end_is_waited_for_only_so_long():
    page = Markdown(lambda: 80)
    assert page.push("**" + "word " * 100) == ""
    assert page.push("word " * (LIMIT // 5)).startswith("**word word")


def test_many_marks_take_no_long_time():
    for text in ("*a " * 3000, "a" + "`" * 3000, "[" * 3000, "**a *b " * 1500, "| " * 1000, "_" + "a_b" * 2000, "- " * 2000, "\\" * 3000):
        assert len(shown(text, sizes=(5,))) > 0


@pytest.mark.parametrize("page", [Markdown(lambda: 80), Plain(cleans=True)], ids=["markdown", "plain"])
def test_control_characters_do_not_reach_the_terminal(page):
    every = "".join(map(chr, [*range(32), *range(127, 160)]))
    out = page.push(f"a{every}b ") + page.flush()
    assert not [c for c in out if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert clean("a\x1bb\n\tc") == "ab\n\tc"


@pytest.mark.parametrize(
    ("kind", "is_terminal", "expected"),
    [("xterm-256color", True, True), ("dumb", True, False), (None, True, False), ("xterm-256color", False, False)],
)
def test_markdown_is_shown_where_the_terminal_can(kind, is_terminal, expected, monkeypatch):
    monkeypatch.setenv("TERM", kind) if kind else monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert terminal.shows_markdown() is expected


@pytest.mark.parametrize(("value", "has_color"), [("", True), ("1", False)])
def test_no_color_is_obeyed(value, has_color, monkeypatch):
    monkeypatch.setenv("NO_COLOR", value)
    page = terminal._page(markdown=True)
    assert ("36" in page.push("`code`\n")) is has_color
