"""The page that a training run leaves: `report.html`, one file that asks for nothing outside itself."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from litgpt import names

TEMPLATE = Path(__file__).with_suffix(".html")
WIDTH, HEIGHT = 440, 240  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 28  # around its lines
MOST_POINTS = 500  # of a line; of more values, the highest and the lowest of neighbours are drawn
SMOOTHED = 50  # from so many points on, the mean of neighbours is drawn over the values
MOST_EXAMPLES = 10


class Chart(NamedTuple):
    """What is drawn together."""

    title: str
    lines: Mapping[str, str]  # the name of a logged value: what it is called
    is_noisy: bool = False


CHARTS = (
    Chart("Loss", {"loss": "training", "val_loss": "validation"}, is_noisy=True),
    Chart("Gradient norm", {"grad_norm": "gradient norm"}, is_noisy=True),
    Chart("Learning rate", {"learning_rate": "learning rate"}),
    Chart("Tokens per second", {"tokens_per_second": "tokens per second"}),
    Chart("Peak memory in GB", {"memory": "GB"}),
)


class Answer(NamedTuple):
    """What the model answered to a sample's instruction after a step; 0 is before training."""

    step: int
    prompt: str
    text: str


Point = tuple[float, float]


def write_report(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    facts: Mapping[str, str],
    answers: Sequence[Answer] = (),
) -> None:
    """Write the page.

    Args:
        path: The file, which is made anew.
        rows: What was logged, as `metrics.Journal` returns it.
        settings: The options of the run, which may be nested.
        facts: What it trained and what it took, by name.
        answers: To the same prompts before and after training, or at any other steps.
    """
    charts = [drawn for chart in CHARTS if (drawn := chart_of(chart, rows))]
    text = Template(TEMPLATE.read_text(encoding="utf-8"))
    script = text.template.split("<script>")[1].split("</script>")[0]
    page = text.substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # so that no other script can run
        title=escape(path.absolute().parent.name),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()),
        charts="".join(charts) or "<p>No step was logged.</p>",
        answers="".join(_examples(answers)),
        settings="".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _leaves(settings)),
    )
    partial = path.with_name(path.name + names.PARTIAL)
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def answers_in(rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Return the answers that were logged beside other values, as `step`, `prompt` and `answer`."""
    return [Answer(row["step"], row["prompt"], row["answer"]) for row in rows if {"step", "prompt", "answer"} <= row.keys()]


def _leaves(settings: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _examples(answers: Sequence[Answer]) -> Iterator[str]:
    """Yield each prompt with its first and its last answer."""
    by_prompt: dict[str, list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt, []).append(answer)
    for prompt, given in list(by_prompt.items())[-MOST_EXAMPLES:]:
        parts = [given[0], given[-1]] if len(given) > 1 else given
        headings = {step: "Before training" if step == 0 else f"After step {step:,}" for step, *_ in parts}
        shown = "".join(f"<div><h3>{headings[step]}</h3>{_text(text)}</div>" for step, _, text in parts)
        yield f'<article class="example"><h3>Prompt</h3>{_text(prompt)}<div class="pair">{shown}</div></article>'


def _text(text: str) -> str:
    return f"<blockquote>{escape(text) or '<i>nothing</i>'}</blockquote>"


# Charts


def points_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Return the steps at which a value was logged, each once, and the finite numbers it had there."""
    found = {row["step"]: row[name] for row in rows if "step" in row and isinstance(row.get(name), int | float)}
    return sorted((step, float(value)) for step, value in found.items() if math.isfinite(value))


def chart_of(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a figure, or nothing if none of its values was logged."""
    lines = {label: points for name, label in chart.lines.items() if (points := points_of(rows, name))}
    if not lines:
        return ""
    steps, values = zip(*(point for points in lines.values() for point in points), strict=True)
    x, y = Scale.over(steps, LEFT, WIDTH - RIGHT), Scale.over(values, HEIGHT - BOTTOM, TOP, margin=0.06)
    drawn = [_grid(x, y)]
    for i, points in enumerate(lines.values()):
        is_smoothed = chart.is_noisy and len(points) >= SMOOTHED
        drawn.append(_line(thinned(points), x, y, f"line c{i} {'faint' if is_smoothed else ''}"))
        drawn.append(_line(thinned(smoothed(points)), x, y, f"line c{i}") if is_smoothed else "")
    labels = list(lines) if len(chart.lines) > 1 else []
    legend = "".join(f'<span class="c{i}">{escape(label)}</span>' for i, label in enumerate(labels))
    last = "at the end: " + ", ".join(f"{label if labels else ''} {number(points[-1][1])}".strip() for label, points in lines.items())
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{chart.title}, {last}")}" '
        f'data-x="{x.as_text()}" data-y="{y.as_text()}">{"".join(drawn)}<path class="cursor"/></svg>'
    )
    caption = f"<figcaption><b>{escape(chart.title)}</b>{legend}<output>{escape(last)}</output></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


class Scale(NamedTuple):
    """A line from values to places."""

    low: float
    high: float
    start: float  # where the lowest value is drawn
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, margin: float = 0.0) -> "Scale":
        """Return the scale that shows all values, with a part of their range left free above and below."""
        low, high = min(values), max(values)
        free = margin * (high - low) or (0.0 if high > low else abs(high) / 10 or 1.0)
        return cls(low - free, high + free, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def as_text(self) -> str:
        """Return the four numbers, as the page's script reads them."""
        return f"{self.low!r} {self.high!r} {self.start} {self.end}"

    def ticks(self, wanted: int = 4) -> list[float]:
        """Return some round values inside, 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(rough))
        distance = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
        first, last = math.ceil(self.low / distance), math.floor(self.high / distance)
        return [i * distance for i in range(first, last + 1)]


def _grid(x: Scale, y: Scale) -> str:
    drawn = []
    for value in y.ticks():
        drawn.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" class="left">{number(value)}</text>')
    for value in x.ticks():
        if value == int(value):  # a step
            drawn.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 8}" class="below">{number(value)}</text>')
    return "".join(drawn)


def _line(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> str:
    places = " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in points)
    marks = "".join(f'<circle class="{kind}" cx="{x(step):.2f}" cy="{y(value):.2f}" r="2.5"/>' for step, value in points)
    return f'<polyline class="{kind}" points="{places}"/>{marks if len(points) <= 30 else ""}'


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most so many points: of neighbours the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    bounds = [len(points) * i // (most // 2) for i in range(most // 2 + 1)]
    groups = [points[start:end] for start, end in pairwise(bounds)]
    extremes = ({min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])} for group in groups)
    return [point for pair in extremes for point in sorted(pair)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return at each step the mean of the twentieth of all values that is nearest to it."""
    reach, sums = max(1, len(points) // 40), [0.0, *accumulate(value for _, value in points)]
    bounds = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(step, (sums[end] - sums[start]) / (end - start)) for (step, _), (start, end) in zip(points, bounds, strict=True)]


def number(value: float) -> str:
    """Return a number with four digits that count, for people: `12,345`, `1.235`, `2e-5`."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
