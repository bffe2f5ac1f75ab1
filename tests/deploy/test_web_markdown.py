"""The page's Markdown: as CommonMark reads it where models write it, never markup of the model's own, and quick whatever comes."""

import random
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from deploy.browser import chromium, scripted_server
from markdown_it import MarkdownIt

SHOW = """([text, steps]) => import('/web/markdown.js').then(({ Markdown }) => {
    const box = document.createElement('div'), markdown = new Markdown(box);
    for (const length of steps ?? []) markdown.show(text.slice(0, length));
    markdown.show(text);
    return box.innerHTML;
})"""
AS_COMMONMARK = """
# One
###### Six of `them` #
####### seven
#no space

a paragraph
of two lines

*a* **b** ***c*** _d_ __e__ *a **b** c* **a *b* c**
snake_case_name and 2 * 3 * 4, a*b*c, "**quoted**", (*in*), **bold**text, **no close, *nor here
****four**** and ** spaced ** and *a **b*
`code` ``a ` b`` ` pad ` `` ` `` `unclosed
\\*no\\* \\`no\\` \\# \\a \\\\ \\[no](x) `\\*`
[words](https://a.example/x) [*in* `it`](https://a.example/(y)) [t](<https://a.example/z> "title")
[unclosed](x y [brackets] only, ](x) and [a [b](https://b.example) c](x)
<https://auto.example/?q=1&r=2> 1 < 2 & 3 > 2 &amp; &lt;b&gt; `&amp;`
<b>bold</b> <img src=x onerror=alert(1)>
- one
- two
  goes on
- three

* other mark
+ yet another

1. one
2. two
   1. inner
   2. inner two
      - deeper

        with a paragraph
3. three

7) seven
8) eight

- loose

- list

- ```
  code in a list

  goes on
  ```
- after

> quoted
goes on
> > nested
>
> - list in it

```python
def f():

    return "*no*"
```

~~~
``` inside
~~~

````
```
````

***
---
_ _ _

Under
===

Lined
---

| a | b |
|---|:-:|
| 1 | *2* |
| `x \\| y` | \\| |
| short |

end\\
of it
"""
CASES = [case for case in re.split(r"\n\n(?=[^ ])", AS_COMMONMARK.strip("\n")) if case]
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x]( javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [y](file:///etc/passwd) [z](//evil.example) [w](/v1/models)",
    "![x](https://evil.example/pixel.png)",
    '<https://a.example/"onmouseover="alert(1)>',
    '[x](https://a.example/"onmouseover="alert(1))',
    '```"><script>alert(1)</script>\n</code></pre><script>\n```',
    "| <script> | <b> |\n|---|---|\n| <svg onload=alert(1)> | x |",
    "<style>*{display:none}</style><base href=https://evil.example>",
]
ALLOWED = set("h3 h4 h5 h6 p ul ol li blockquote hr pre code div span button table thead tbody tr th td a em strong del br input".split())
ALLOWED_ATTRIBUTES = set("dir class href target rel start type data-action tabindex role aria-label disabled checked".split())


@pytest.fixture(scope="module")
def page() -> Iterator:
    """A tab of the real page, with its policy."""
    with scripted_server() as server, chromium() as browser:
        tab = browser.new_page()
        tab.goto(server.address + "/")
        yield tab


class Tree(HTMLParser):
    """Reads HTML as a list of tags and words, without attributes but those that mean something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts, self.attributes = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        kept = [(name, value) for name, value in attributes if name in ("href", "start") and (name, value) != ("start", "1")]
        self.parts.append((tag, *kept))
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        self.parts.append("/" + tag)

    def handle_data(self, data: str) -> None:
        if self.parts and isinstance(self.parts[-1], list):
            self.parts[-1][0] += data
        else:
            self.parts.append([data])

    def tags(self) -> set[str]:
        return {part[0] for part in self.parts if isinstance(part, tuple)}


def without_layout(html: str) -> list:
    """Return what a renderer made, without white space between blocks and the two renderers' own dress."""
    html = re.sub(r'<div class="bar">.*?</div>|</?div[^>]*>', "", html)
    html = re.sub(r"<(/?)h(\d)", lambda match: f"<{match[1]}h{min(int(match[2]) + 2, 6)}" if "dir=" not in html else match[0], html)
    html = re.sub(r"\n?(</code></pre>)", r"\1", html)
    html = re.sub(r"(<br[^>]*>)\n|\n(?=</?(?:ul|ol|li|p|blockquote))", r"\1", html)
    return [
        part[0] if isinstance(part, list) else part for part in Tree(html).parts if not (isinstance(part, list) and not part[0].strip())
    ]


@pytest.fixture(scope="module")
def oracle() -> MarkdownIt:
    return MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])


@pytest.mark.parametrize("source", CASES)
def test_markdown_reads_as_commonmark_does(page, oracle, source):
    assert without_layout(page.evaluate(SHOW, [source, None])) == without_layout(oracle.render(source))


def random_text(draw: random.Random) -> str:
    """Return a text of pieces that mean something to Markdown, in an order that means nothing."""
    pieces = [
        "*",
        "**",
        "_",
        "`",
        "```",
        "~~~",
        "[",
        "](",
        ")",
        "!",
        "<",
        ">",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "    ",
        "# ",
        "|",
        "|--|",
        "\\",
        "$$",
        "~~",
        "\\(",
    ]
    words = ["word", " ", "http://a.b/c", "<script>", "javascript:x", "&lt;", "é🙂", '"', "'", "---", "\t", "[x] "]
    return "".join(draw.choice(pieces + words) for _ in range(draw.randint(1, 80)))


@pytest.mark.parametrize("source", HOSTILE)
def test_a_model_cannot_put_its_own_markup_into_the_page(page, source):
    tree = Tree(page.evaluate(SHOW, [source, None]))
    assert tree.tags() <= ALLOWED
    for tag, name, value in tree.attributes:
        assert name in ALLOWED_ATTRIBUTES
        assert name != "href" or value.startswith("https://")
        assert tag != "a" or name != "rel" or "noopener" in value


def test_random_texts_make_only_known_elements_and_keep_their_words(page):
    draw = random.Random(5)
    for source in [random_text(draw) for _ in range(300)]:
        html = page.evaluate(SHOW, [source, None])
        tree = Tree(html)
        assert tree.tags() <= ALLOWED, source
        assert {name for _, name, _ in tree.attributes} <= ALLOWED_ATTRIBUTES, source
        assert all(value.startswith(("http://", "https://")) for _, name, value in tree.attributes if name == "href"), source
        assert "".join(part[0] for part in tree.parts if isinstance(part, list)).count("é🙂") <= source.count("é🙂")


def test_a_text_that_grows_ends_as_the_whole_text(page):
    draw = random.Random(6)
    texts = [AS_COMMONMARK, *(random_text(draw) for _ in range(100))]
    for source in texts:
        steps = sorted(draw.randint(0, len(source)) for _ in range(20))
        assert page.evaluate(SHOW, [source, steps]) == page.evaluate(SHOW, [source, None]), source


def test_blocks_that_are_complete_are_not_made_again(page):
    kept = """() => import('/web/markdown.js').then(({ Markdown }) => {
        const box = document.createElement('div'), markdown = new Markdown(box);
        markdown.show('one\\n\\n- two\\n\\nthree');
        const before = [...box.children];
        markdown.show('one\\n\\n- two\\n\\nthree and four');
        return before.map((child, index) => child === box.children[index]);
    })"""
    assert page.evaluate(kept) == [True, True, False]


ENDLESS = [
    "*a ",
    "**a*",
    "_a* ",
    "`",
    "`a``",
    "[",
    "](",
    "[a](",
    "![",
    "<",
    "$$a",
    "\\(",
    "> ",
    ">",
    "- ",
    "1. ",
    "  ",
    "|",
    "| a ",
    "\n",
    "- a\n",
    "~~a",
]
ENDLESS += ["http://", "(http://a)", "# ", "[a](b ", "\n> ", "\n\n", "```\n", "a|b\n-|-\n", " - ", "*_~", "\\", "&", "((((", "[a](  "]


@pytest.mark.parametrize("piece", ENDLESS)
def test_no_text_keeps_the_page_busy(page, piece):
    source = piece * (60_000 // len(piece))
    started = time.monotonic()
    page.evaluate(SHOW, [source + "x", None])
    assert time.monotonic() - started < 2.5
