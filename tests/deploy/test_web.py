"""The chat page in a real Chromium: what a reader sees, types and hears, and what the page may never do."""

import json
import re
from collections.abc import Iterator

import pytest
from deploy.browser import Reader, Reply, chromium, scripted_server
from deploy.web_audit import CONTRASTS, NAMED_ROLES, SMALL_TARGETS, contrast

from litgpt.deploy.app import POLICY, WEB

SHOWPIECE = (
    "<think>Let me see.</think># Llamas\n\nThey *hum* and **eat** `hay` ([more](https://example.org)).\n\n1. one\n   - inner\n2. two\n\n"
    "```python\nprint('a line of code that is much too long for a narrow telephone, so that it has to be scrolled')\n```\n\n"
    "| Animal | Sound |\n|---|--:|\n| Llama | " + "hum" * 30 + " |\n\n> Patience.\n\n- [x] done\n\n" + "Donaudampfschifffahrt" * 12
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running_server() -> Iterator:
    with scripted_server() as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.forget()
    return running_server


@pytest.fixture
def read(browser, server) -> Iterator:
    """Open the page for a reader; at the end nothing may have gone wrong."""
    readers = []

    def opened(**options) -> Reader:
        readers.append(Reader(browser, server.address, **options))
        return readers[-1]

    yield opened
    complaints = [complaint for reader in readers for complaint in reader.complaints]
    for reader in readers:
        reader.context.close()
    assert not complaints


@pytest.fixture(scope="module")
def usual_reader(browser, running_server) -> Reader:
    return Reader(browser, running_server.address)


@pytest.fixture
def reader(usual_reader, server) -> Iterator[Reader]:
    """One reader for many tests, because opening a window takes longer than most of them."""
    usual_reader.open()
    yield usual_reader
    complaints, usual_reader.complaints = usual_reader.complaints, []
    assert not complaints


# ---- conversations ----


def test_an_answer_streams_into_the_page_and_tells_how_many_tokens_it_has(reader, server):
    server.replies.append(Reply("Grass, and **hay**. " * 10, pause=0.03))
    reader.ask("What do llamas eat?", waits=False)
    reader.until("document.querySelector('.answer')?.innerText.length > 20")
    assert reader.page.is_visible("#stop")
    assert reader.page.get_attribute(".answer", "aria-busy") == "true"
    reader.wait()
    assert reader.answers() == ["Grass, and hay. " * 9 + "Grass, and hay."]
    assert re.fullmatch(r"40 tokens · \d+ per second", reader.page.inner_text(".stats"))
    assert reader.page.inner_text("#announcer").startswith("Grass, and **hay**.")
    assert server.asked[0]["stream_options"] == {"include_usage": True}


def test_each_question_is_sent_with_all_that_was_said(reader, server):
    reader.ask("Hi")
    reader.ask("And then?")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grass and hay."}, {"role": "user", "content": "And then?"}]
    assert server.asked[1]["messages"] == said
    assert server.asked[1]["model"] == "llama"


def test_conversations_and_unsent_words_are_there_again_after_a_reload(reader):
    reader.ask("Hi")
    reader.page.click("#new")
    reader.ask("Another subject")
    reader.page.fill("#prompt", "half a sent")
    reader.page.reload()
    assert reader.conversations() == ["Another subject", "Hi"]
    assert reader.questions() == ["Another subject"]
    assert reader.page.input_value("#prompt") == "half a sent"
    reader.page.click("#conversations .row >> text=Hi")
    assert reader.questions() == ["Hi"]
    assert reader.answers() == ["Grass and hay."]
    assert reader.page.input_value("#prompt") == ""


def test_an_answer_goes_on_while_another_conversation_is_open(reader, server):
    server.replies.append(Reply("one two three four five six seven", pause=0.1))
    reader.ask("Count", waits=False)
    reader.page.click("#new")
    reader.ask("Hi")
    assert reader.answers() == ["Grass and hay."]
    reader.page.click("#conversations .row >> text=Count")
    reader.wait()
    assert reader.answers() == ["one two three four five six seven"]


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_keeps_what_came_and_ends_the_request(reader, server, way):
    server.replies.append(Reply("Once ", end="never"))
    reader.ask("Tell a story", waits=False)
    reader.until("document.querySelector('.answer')?.innerText.includes('and on and on')")
    reader.page.click("#stop") if way == "button" else reader.page.keyboard.press("Escape")
    reader.wait()
    assert reader.answers()[0].startswith("Once and on")
    assert reader.note() == "You stopped this answer."
    assert server.left.wait(5)


def test_another_answer_takes_the_place_of_the_last(reader, server):
    reader.ask("Hi")
    server.replies.append(Reply("Clover."))
    reader.page.click(".answer [data-action=again]")
    reader.wait()
    assert reader.answers() == ["Clover."]
    assert [len(body["messages"]) for body in server.asked] == [1, 1]


def test_an_answer_is_kept_where_the_attempt_at_another_fails(reader, server):
    reader.ask("Hi")
    server.replies.append(Reply(status=503, message="It is stopping."))
    reader.page.click(".answer [data-action=again]")
    reader.wait()
    assert reader.answers() == ["Grass and hay."]
    assert "It is stopping." in reader.page.inner_text("#toast")


def test_the_last_question_can_be_changed_and_nothing_typed_is_lost(reader, server):
    reader.ask("Hi")
    reader.ask("Waht?")
    reader.page.fill("#prompt", "another thought")
    reader.page.locator(".user").nth(1).hover()
    reader.page.locator("[data-action=edit]:visible").click()
    assert reader.page.input_value("#prompt") == "Waht?"
    reader.page.keyboard.press("Escape")
    assert reader.page.input_value("#prompt") == "another thought"
    reader.page.fill("#prompt", "")
    reader.page.press("#prompt", "ArrowUp")
    reader.ask("What?")
    assert reader.questions() == ["Hi", "What?"]
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["Hi", "Grass and hay.", "What?"]


def test_a_conversation_is_renamed_deleted_and_brought_back(reader):
    reader.ask("Hi")
    reader.page.click("#more")
    reader.page.click("#rename")
    reader.page.fill("#name-dialog input", "Of llamas")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("h1 >> text=Of llamas")
    assert reader.conversations() == ["Of llamas"]
    assert reader.page.title() == "Of llamas – LitGPT chat"
    reader.page.click("#more")
    reader.page.click("#delete")
    assert reader.conversations() == [] and reader.questions() == []
    reader.page.click("#undo")
    assert reader.conversations() == ["Of llamas"] and reader.questions() == ["Hi"]


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_deleted(reader, server):
    server.replies.append(Reply("Once ", end="never"))
    reader.ask("Tell a story", waits=False)
    reader.page.wait_for_selector(".answer")
    reader.page.hover("#conversations li")
    reader.page.click("#conversations [data-action=delete]")
    assert server.left.wait(5)
    reader.page.reload()
    assert reader.conversations() == []


@pytest.mark.parametrize(
    ("button", "name", "text"),
    [
        ("export-text", "What-do-llamas-eat.md", "# What do llamas eat?\n\n## You\n\nWhat do llamas eat?\n\n## Model\n\nGrass and hay.\n"),
        ("export-json", "What-do-llamas-eat.json", None),
    ],
)
def test_a_conversation_is_exported(reader, button, name, text):
    reader.ask("What do llamas eat?")
    reader.page.click("#more")
    with reader.page.expect_download() as download:
        reader.page.click(f"#{button}")
    written = download.value.path().read_text()
    assert download.value.suggested_filename == name
    if text is None:
        roles = [message["role"] for message in json.loads(written)["messages"]]
        assert roles == ["user", "assistant"]
    else:
        assert written == text


def test_two_tabs_show_the_same_conversations(reader):
    other = reader.context.new_page()
    other.goto(reader.address + "/")
    reader.ask("Hi")
    other.wait_for_selector("#conversations .row >> text=Hi")
    other.click("#conversations .row")
    reader.ask("Once more")
    other.wait_for_selector(".user .bubble >> text=Once more")
    other.close()


@pytest.mark.parametrize("fails", ["setItem", "getItem"])
def test_a_browser_that_keeps_nothing_still_converses(read, fails):
    reader = read()
    reader.context.add_init_script(f"Storage.prototype.{fails} = () => {{ throw new DOMException('no', 'QuotaExceededError'); }}")
    reader.page.reload()
    reader.ask("Hi")
    reader.ask("And then?")
    assert reader.answers() == ["Grass and hay."] * 2
    if fails == "setItem":
        assert "no room left" in reader.page.inner_text("#toast")


def test_what_is_kept_but_broken_is_left_alone(reader):
    reader.page.evaluate('localStorage.setItem(\'litgpt.conversation.x\', \'{"id": "x", "messages": 3}\')')
    reader.page.evaluate("localStorage.setItem('litgpt.settings', 'null')")
    reader.page.reload()
    reader.ask("Hi")
    assert reader.conversations() == ["Hi"]


# ---- settings ----


def test_only_what_is_set_is_sent(reader, server):
    reader.ask("Hi")
    assert sorted(server.asked[0]) == ["messages", "model", "stream", "stream_options"]
    reader.page.click("#open-settings")
    values = {"temperature": 0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 77, "seed": 5}
    for name, value in values.items():
        reader.page.fill(f"#settings [name={name}]", str(value))
    reader.page.fill("#settings [name=system]", "Be brief.")
    reader.page.click("#settings .filled")
    reader.page.select_option("#model", "pirate")
    reader.page.reload()
    reader.ask("And then?")
    sent = server.asked[1]
    assert {name: sent[name] for name in values} == values
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["model"] == "pirate"


def test_a_value_out_of_range_is_not_saved(reader):
    reader.page.click("#open-settings")
    reader.page.fill("#settings [name=top_p]", "1.5")
    reader.page.keyboard.press("Enter")
    assert reader.page.is_visible("#settings")
    assert reader.page.evaluate("document.activeElement.name") == "top_p"
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("localStorage.getItem('litgpt.settings')") is None


def test_the_theme_follows_the_system_until_it_is_chosen(read):
    reader = read(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = reader.page.evaluate(background)
    reader.page.click("#theme")
    light = reader.page.evaluate(background)
    reader.page.reload()
    assert dark != light == reader.page.evaluate(background)
    reader.page.emulate_media(color_scheme="light")
    reader.page.click("#theme")
    assert reader.page.evaluate(background) == dark


# ---- what goes wrong ----

BROKEN = "The connection broke off before the answer was complete. What had arrived is kept."
FAILURES = {
    "busy": (Reply(status=429, headers={"Retry-After": "7"}), "", "The server is busy. It asks to wait 7 seconds."),
    "stopping": (Reply(status=503, message="It is stopping."), "", "The server cannot answer now. It is stopping."),
    "a bug": (Reply(status=500, message="Sorry."), "", "The server failed (500). Sorry."),
    "too long": (Reply(status=400, message="The prompt is too long."), "", "The server refused this (400). The prompt is too long."),
    "no words": (Reply(""), "", "The answer is empty."),
    "a cut": (Reply("Once upon", end="cut", pause=0.1), "Once upon", BROKEN),
    "an error frame": (Reply("Once upon", end="error"), "Once upon", "The server broke off: The engine failed."),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_said_in_plain_words_and_can_be_tried_again(reader, server, case):
    reply, kept, words = FAILURES[case]
    server.replies.append(reply)
    reader.ask("Tell a story")
    assert reader.answers() == [kept]
    assert reader.note() == f"{words} Try again"
    assert words in reader.page.inner_text("#announcer")
    reader.page.click("text=Try again")
    reader.wait()
    assert reader.answers() == ["Grass and hay."]
    assert server.asked[0]["messages"] == server.asked[1]["messages"]


def test_without_a_network_the_question_is_kept(reader):
    reader.context.set_offline(True)
    reader.ask("Hi")
    assert reader.note().startswith("The server cannot be reached.")
    reader.context.set_offline(False)
    reader.ask("Are you there?")
    assert reader.questions() == ["Hi", "Are you there?"]
    assert reader.answers() == ["", "Grass and hay."]


def test_questions_that_no_answer_followed_are_sent_as_one(reader, server):
    server.replies.append(Reply(status=503))
    reader.ask("Hi")
    reader.ask("Hello?")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "Hi\n\nHello?"}]


def test_an_answer_that_the_limit_ended_says_so(reader, server):
    server.replies.append(Reply("Once upon", finish="length"))
    reader.ask("Tell a story")
    assert reader.note() == "The answer reached its token limit."


def test_an_answer_that_a_reload_interrupted_says_so(reader, server):
    server.replies.append(Reply("Once ", end="never"))
    reader.ask("Tell a story", waits=False)
    reader.until("document.querySelector('.answer')?.innerText.includes('and on')")
    reader.page.reload()
    assert reader.answers()[0].startswith("Once and on")
    assert reader.note() == "The page was closed before the answer was complete."


def test_a_missing_key_is_asked_for_and_the_question_goes_on(browser, server):
    server.key = "secret"
    reader = Reader(browser, server.address, waits=False)
    reader.page.wait_for_selector("#key-dialog[open]")
    assert reader.page.inner_text("#key-reason") == "This server asks for an API key."
    reader.page.keyboard.press("Escape")
    reader.ask("Hi", waits=False)
    reader.page.wait_for_selector("#key-dialog[open]")
    reader.page.fill("#key-dialog input", "wrong")
    reader.page.keyboard.press("Enter")
    reader.until("document.getElementById('key-reason').innerText == 'The server does not accept this API key.'")
    reader.page.wait_for_selector("#key-dialog[open]")
    reader.page.fill("#key-dialog input", "secret")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector(".answer >> text=Grass and hay.")
    assert reader.questions() == ["Hi"]
    assert server.asked[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert "secret" not in reader.page.evaluate("JSON.stringify(localStorage)")
    assert reader.complaints == []
    reader.context.close()


# ---- keyboard, eyes, ears, fingers ----


def test_enter_sends_and_shift_enter_begins_a_line(reader):
    reader.page.type("#prompt", "one")
    reader.page.keyboard.press("Shift+Enter")
    reader.page.keyboard.type("two")
    reader.page.keyboard.press("Enter")
    reader.wait()
    assert reader.questions() == ["one\ntwo"]
    assert reader.page.evaluate("document.activeElement.id") == "prompt"


def test_enter_that_ends_a_composition_does_not_send(reader):
    reader.page.fill("#prompt", "にほん")
    reader.page.eval_on_selector("#prompt", f"field => field.dispatchEvent({COMPOSED})")
    assert reader.page.input_value("#prompt") == "にほん"
    assert reader.questions() == []


def test_enter_during_an_answer_keeps_what_was_typed(reader, server):
    server.replies.append(Reply("Once ", end="never"))
    reader.ask("Tell a story", waits=False)
    reader.ask("And then?", waits=False)
    assert reader.page.input_value("#prompt") == "And then?"
    assert reader.questions() == ["Tell a story"]
    reader.page.keyboard.press("Escape")
    reader.wait()
    assert reader.page.input_value("#prompt") == "And then?"


FOCUSED = """() => {
  const now = document.activeElement;
  const style = getComputedStyle(now.id === 'prompt' ? now.parentElement : now);
  const showsFocus = style.outlineStyle !== 'none' || style.boxShadow.includes('0px 0px 0px 1px');
  return [now.id || now.dataset.action || now.className || now.tagName, showsFocus, now.checkVisibility({ opacityProperty: true })];
}"""
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
COMPOSED = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"


def test_everything_is_reached_by_tab_in_reading_order_and_shows_the_focus(reader, server):
    server.replies.append(Reply(SHOWPIECE))
    reader.ask("Show it")
    reader.page.focus(".skip")
    reached = ["skip"]
    for _ in range(40):
        reader.page.keyboard.press("Tab")
        reader.page.evaluate(SETTLED)  # what the focus scrolls to decides whether there is a button that leads to the end
        name, shows_focus, is_seen = reader.page.evaluate(FOCUSED)
        if name == "BODY":
            break
        reached.append(name)
        assert shows_focus and is_seen, name
    lists = ["skip", "new", "open", "delete", "open-settings", "theme"]
    order = [*lists, "model", "more", "edit", "copy-code", "table", "again", "prompt", "send"]
    assert [name for name in reached if name in order] == order


def test_the_skip_link_leads_to_the_message_field(reader):
    reader.page.focus(".skip")
    reader.page.keyboard.press("Enter")
    assert reader.page.evaluate("document.activeElement.id") == "prompt"


def test_code_and_answers_are_copied_as_they_were_written(read, server):
    reader = read(permissions=["clipboard-read", "clipboard-write"])
    server.replies.append(Reply("<think>hm</think>Use **this**:\n\n```python\nfor x in y:\n    print(x)\n```"))
    reader.ask("Code?")
    clipboard = "navigator.clipboard.readText()"
    reader.page.click("[data-action=copy-code]")
    reader.page.wait_for_selector(".code >> text=Copied")
    assert reader.page.evaluate(clipboard) == "for x in y:\n    print(x)"
    reader.page.click(".answer [data-action=copy]")
    reader.until("document.getElementById('announcer').innerText === 'Copied.'")
    assert reader.page.evaluate(clipboard) == "Use **this**:\n\n```python\nfor x in y:\n    print(x)\n```"


def test_the_page_scrolls_with_the_answer_until_the_reader_scrolls(reader, server):
    server.replies.append(Reply("a line\n\n" * 60, pause=0.01))
    reader.ask("Go", waits=False)
    reader.until("scroller.scrollTop > 100")
    reader.page.mouse.move(600, 400)
    reader.page.mouse.wheel(0, -5000)
    reader.page.wait_for_selector("#to-end:not([hidden])")
    reader.wait()
    assert reader.page.evaluate("scroller.scrollTop") < 100
    reader.page.click("#to-end")
    assert reader.page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") <= 1
    reader.page.mouse.wheel(0, -5000)
    reader.page.focus("#to-end:not([hidden])")
    reader.page.evaluate("scroller.scrollTop = scroller.scrollHeight")
    reader.page.wait_for_selector("#to-end", state="hidden")
    assert reader.page.evaluate("document.activeElement.id") == "prompt", "the focus does not get lost with the button"


def states(reader: Reader, server) -> Iterator[str]:
    """Bring the page into one state after the other, and yield their names."""
    yield "welcome"
    server.replies.extend([Reply(status=503), Reply(SHOWPIECE)])
    reader.ask("Hi")
    reader.ask("Show it")
    yield "conversation"
    if reader.page.is_visible("#open-menu"):
        reader.page.click("#open-menu")
        reader.page.wait_for_timeout(300)
        yield "list"
    reader.page.click("#open-settings")
    yield "settings"


WIDE = """() => [...document.querySelectorAll('html, #scroller, #messages, .message, #composer, header, dialog[open], #sidebar')]
    .filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.id || box.className || box.tagName)"""


@pytest.mark.parametrize("width", [320, 1280])
def test_no_width_needs_sideways_scrolling(read, server, width):
    reader = read(viewport={"width": width, "height": 640})
    for state in states(reader, server):
        for other in {320: [320, 390, 768], 1280: [1280, 960]}[width]:
            reader.page.set_viewport_size({"width": other, "height": 640})
            assert reader.page.evaluate(WIDE) == [], (state, other)
        reader.page.set_viewport_size({"width": width, "height": 640})


def test_fingers_hit_everything(read, server):
    reader = read(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    small = {state: reader.page.evaluate(SMALL_TARGETS) for state in states(reader, server)}
    assert small == {"welcome": [], "conversation": [], "list": [], "settings": []}


def test_the_list_slides_over_a_narrow_page_and_holds_the_focus(read):
    reader = read(viewport={"width": 320, "height": 640})
    reader.ask("Hi")
    assert not reader.page.is_visible("#new")
    reader.page.click("#open-menu")
    assert reader.page.evaluate("document.activeElement.id") == "close-menu"
    assert reader.page.evaluate("document.getElementById('stage').inert")
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("document.activeElement.id") == "open-menu"
    assert reader.page.evaluate("document.getElementById('sidebar').inert")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(read, server, scheme):
    reader = read(color_scheme=scheme)
    for state in states(reader, server):
        seen = reader.page.evaluate(CONTRASTS)
        assert len(seen) > 5
        assert [text for text, front, behind in seen if contrast(front, behind) < 4.5] == [], state


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fields_and_the_focus_stand_out_from_the_page(read, scheme):
    reader = read(color_scheme=scheme)
    colour = """name => { const probe = document.createElement('i'); document.body.append(probe); probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color; }"""
    colours = {name: reader.page.evaluate(colour, name) for name in ["page", "raised", "panel", "edge", "accent"]}
    assert all(contrast(colours[front], colours[behind]) >= 3 for front in ["edge", "accent"] for behind in ["page", "raised", "panel"])


@pytest.mark.parametrize("width", [320, 1280])
def test_everything_that_can_be_used_has_a_name(read, server, width):
    reader = read(viewport={"width": width, "height": 640})
    session = reader.context.new_cdp_session(reader.page)
    for state in states(reader, server):
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        used = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED_ROLES]
        assert len(used) > 3
        assert [node for node in used if not node["name"]["value"].strip()] == [], state


def test_the_page_has_its_landmarks_and_no_id_twice(reader):
    ids = reader.page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))
    landmarks = ["nav", "main", "h1", "header", "[role=log]"]
    count = "each => document.querySelectorAll(each).length"
    assert [reader.page.evaluate(count, landmark) for landmark in landmarks] == [1] * 5
    assert reader.page.get_attribute("html", "lang") == "en"
    names = ["for", "aria-labelledby", "aria-describedby", "aria-controls", "popovertarget"]
    pointed = "names => names.flatMap(name => [...document.querySelectorAll(`[${name}]`)].map(each => each.getAttribute(name)))"
    assert set(reader.page.evaluate(pointed, names)) <= set(ids)


# ---- the files ----


def test_the_page_needs_no_inline_code_and_no_other_server():
    html = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|(?:src|href)=[\"']?(?:https?:)?//", html)
    scripts = "".join(path.read_text() for path in WEB.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|https?://(?!www\.w3\.org)\w", scripts)
    assert not re.search(r"url\(|@import", (WEB / "chat.css").read_text())
    assert "unsafe" not in POLICY


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in WEB.iterdir()) < 80_000
    assert all(len(path.read_text().splitlines()) <= 400 for path in WEB.iterdir())
