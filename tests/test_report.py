"""The page that a run leaves: complete, self-contained, and nothing that a sample holds is more than text in it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from deploy.browser import chromium

from litgpt.report import MOST_EXAMPLES, MOST_POINTS, Answer, Scale, answers_in, number, points_of, smoothed, thinned, write_report

EVIL = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>&amp;\"$title"
VOID = {"meta", "img", "input", "br", "hr", "link"}
FACTS = {"model": "SmolLM2-135M", "parameters trained": "1,234 of 135,000,000", "machine": EVIL}
SETTINGS = {"train": {"max_steps": 12, "min_lr": None}, "data": {"init_args": {"path": EVIL}}, "precision": "32-true", EVIL: [0.9, 0.95]}
ANSWERS = [Answer(0, EVIL, ""), Answer(6, EVIL, "in between"), Answer(12, EVIL, EVIL)]


def rows(n: int = 12) -> list[dict]:
    """What a run logs."""
    made = [
        {"step": step, "loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3 * step, "tokens_per_second": 5e3, "memory": 1.25}
        for step in range(1, n + 1)
    ]
    return [{"step": 0, "val_loss": 4.0, "val_ppl": 54.6}, *made, {"step": n, "val_loss": 0.5}]


class Page(HTMLParser):
    """A page's tags and text; its tags have to be balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.tags, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "my <run>").mkdir()
    return tmp_path / "my <run>" / "report.html"


def written(path: Path, *args) -> Page:
    write_report(path, *args)
    return Page(path)


def test_a_page_shows_curves_facts_settings_and_answers(path):
    page = written(path, rows(), SETTINGS, FACTS, ANSWERS)
    text = " ".join(page.text)
    for words in ["my <run>", *FACTS, *FACTS.values(), "train.max_steps", "12", "null", "data.init_args.path", "[0.9, 0.95]", "32-true"]:
        assert words in text, words
    for words in ("Before training", "After step 12", "nothing", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory"):
        assert words in text, words
    assert "in between" not in text and "After step 6" not in text
    assert [path.name for path in path.parent.iterdir()] == ["report.html"]


def test_every_logged_value_is_a_point(path):
    lines = [line["points"].split() for line in written(path, rows(12), {}, {}).all("polyline")]
    assert [len(points) for points in lines] == [12, 2, 12, 12, 12, 12]  # loss and validation loss, then one line a chart
    places = [tuple(map(float, point.split(","))) for line in lines for point in line]
    assert all(0 <= x <= 440 and 0 <= y <= 240 for x, y in places)


def test_a_curve_falls_where_the_loss_does(path):
    loss, val_loss, *_ = [
        [tuple(map(float, point.split(","))) for point in line["points"].split()] for line in written(path, rows(), {}, {}).all("polyline")
    ]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in zip(loss, loss[1:], strict=False)), "down is larger in an image"
    assert val_loss[0][0] < loss[0][0] and val_loss[1][0] == loss[-1][0], "both curves of a chart share their axes"
    assert val_loss[0][1] < loss[0][1] < loss[-1][1]


def test_a_page_asks_for_nothing_outside_itself(path):
    page, source = written(path, rows(), SETTINGS, FACTS, ANSWERS), path.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"<script>.*</script>", "", source, flags=re.DOTALL))
    assert not page.all("link") and not page.all("img") and len(page.all("script")) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_runs_without_steps_answers_or_finite_values_have_a_page_too(path):
    assert "No step was logged." in " ".join(written(path, [], {}, {}).text)
    page = written(path, [{"step": 1, "loss": float("nan"), "memory": None}, {"step": 2, "loss": None, "grad_norm": math.inf}], {}, {})
    assert not page.all("svg")
    page = written(path, [{"step": 7, "loss": 2.0}], {}, {})
    assert len(page.all("svg")) == 1 and page.all("polyline")[0]["points"].count(",") == 1


def test_a_long_run_is_thinned_without_losing_a_peak(path):
    many = [{"step": step, "loss": 9.0 if step == 7_777 else 1 + step % 3 / 10} for step in range(1, 20_001)]
    raw, mean = written(path, many, {}, {}).all("polyline")
    assert "faint" in raw["class"] and "faint" not in mean["class"]
    assert len(raw["points"].split()) <= MOST_POINTS and path.stat().st_size < 60_000
    points = points_of(many, "loss")
    assert max(thinned(points), key=lambda point: point[1]) == (7_777, 9.0)
    assert thinned(points) == sorted(thinned(points)) and set(thinned(points)) <= set(points)
    assert [step for step, _ in smoothed(points)] == [step for step, _ in points] and max(smoothed(points))[1] < 1.2


def test_the_mean_of_a_line_is_the_line():
    points = [(step, 2.0 * step) for step in range(200)]
    assert smoothed(points)[20:-20] == points[20:-20]


def test_a_step_that_was_logged_twice_counts_once_as_it_was_last():
    assert points_of([{"step": 2, "loss": 1}, {"step": 1, "loss": 3}, {"step": 2, "loss": 5}, {"loss": 9}], "loss") == [(1, 3.0), (2, 5.0)]


@pytest.mark.parametrize("low, high", [(0, 1), (0.93, 1.07), (1e-6, 2e-4), (3, 40_000), (2, 2), (0, 0), (-3, 5), (1, 2)])
def test_ticks_are_few_round_and_inside(low, high):
    scale = Scale.over([low, high], 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8 and all(scale.low <= tick <= scale.high for tick in ticks)
    assert all(0 <= scale(tick) <= 100 for tick in ticks) and len({number(tick) for tick in ticks}) == len(ticks)


NUMBERS = [(0, "0"), (12345.6, "12,346"), (1.23456, "1.235"), (0.5, "0.5"), (-2e-5, "-2e-5"), (1.5e-4, "1.5e-4"), (0.0375, "0.0375")]


@pytest.mark.parametrize("value, text", NUMBERS)
def test_numbers_are_for_people(value, text):
    assert number(value) == text


def test_answers_are_read_from_what_was_logged():
    logged = [{"step": 0, "prompt": "p", "answer": "a"}, {"step": 1, "loss": 1.0}, {"step": 2, "prompt": "p", "answer": "b"}]
    assert answers_in(logged) == [Answer(0, "p", "a"), Answer(2, "p", "b")]


def test_only_the_last_prompts_are_shown(path):
    answers = [Answer(i, f"prompt {i}.", f"answer {i}") for i in range(30)]
    text = " ".join(written(path, [], {}, {}, answers).text)
    assert text.count("prompt ") == MOST_EXAMPLES and "prompt 29." in text and "prompt 2." not in text


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_without_complaint(browser, path, width, dark):
    write_report(path, rows(80), SETTINGS, FACTS, ANSWERS)
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme="dark" if dark else "light", has_touch=width < 600)
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("window.harmed") is None and not page.locator("img").count()
    assert page.evaluate("document.querySelector('polyline').points.length") == 80
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off on a small screen"
    background = json.loads("[" + re.search(r"\((.*)\)", page.evaluate("getComputedStyle(document.body).backgroundColor"))[1] + "]")
    assert (sum(background) < 300) == dark
    assert page.locator("svg").first.bounding_box()["width"] > 280
    box = page.locator("svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + 40)
    assert page.locator("output").first.inner_text().startswith("step 80: training 0.0")
    page.locator("svg").nth(2).scroll_into_view_if_needed()
    box = page.locator("svg").nth(2).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.05, box["y"] + 40)
    at, rate = page.locator("output").nth(2).inner_text().split(": ")
    assert at == "step 1" and float(rate) == pytest.approx(1e-3, abs=1e-5)
    page.mouse.move(1, 1)
    assert page.locator("output").first.inner_text() == "at the end: training 0.0375, validation 0.5"
    assert (complaints, requests) == ([], [path.as_uri()])
    context.close()
