"""What the report's page is drawn with: style sheet, frame, and plots as inline SVG.

Colours are CSS variables, so that one drawing serves light and dark; every colour has a shape or a
word beside it. Texts are escaped here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from common.claims import Outcome

# Okabe and Ito, as in common/records.py; black is white in the dark.
STYLE = """
:root { --bg: #fff; --fg: #1b1b1b; --soft: #5c5c5c; --line: #d5d5d5; --panel: #f6f6f4;
  --band: #e4eef5; --held: #0072b2; --not-held: #b34700; --undecided: #6b6b6b;
  --bn: #0072b2; --gn: #b87d00; --sn: #000; --in: #00805d; --ln: #c25000; --x10: #b0578a; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181a; --fg: #e8e8e6; --soft: #a5a8ab;
  --line: #3c4043; --panel: #1f2225; --band: #1c3446; --held: #56b4e9; --not-held: #ff8c42;
  --undecided: #a5a8ab; --bn: #56b4e9; --gn: #e69f00; --sn: #fff; --in: #2fc598; --ln: #ff8c42;
  --x10: #e08fc0; } }
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1280px; padding: 1rem 1.25rem 3rem; background: var(--bg);
  color: var(--fg); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.25rem 0 .25rem; } .head h3 { margin: 0; }
p { margin: .4rem 0; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 2px; }
a:hover, a:focus-visible { text-decoration-thickness: 2px; }
:focus-visible { outline: 2px solid var(--held); outline-offset: 2px; }
.soft, figcaption, th { color: var(--soft); }
.small, figcaption, details { font-size: .875rem; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; align-items: start; margin: .75rem 0; }
.cards > * { flex: 1 1 300px; min-width: 0; } .cards > .not-run-yet { flex-basis: 100%; }
.cards section { background: var(--panel); border-top: 4px solid; border-radius: 3px;
  padding: .6rem .8rem; }
.cards section + section { margin-top: 1rem; } .cards > section + section { margin-top: 0; }
.cards h2 { margin: 0 0 .35rem; font-size: 1.1rem; }
.cards .count { font-size: 1.7rem; font-weight: 700; margin-right: .35rem; }
.cards .reason { font-weight: 400; }
.cards ul { list-style: none; margin: 0; padding: 0; font-size: .9rem; columns: 3 260px; }
.cards li { padding: .125rem 0; line-height: 1.3; break-inside: avoid; }
.cards li a { font-weight: 600; }
.held { border-color: var(--held) !important; } .held h2, .chip.held { color: var(--held); }
.not-held { border-color: var(--not-held) !important; }
.not-held h2, .chip.not-held { color: var(--not-held); }
.undecided, .not-run-yet { border-color: var(--undecided) !important; }
.undecided h2, .not-run-yet h2, .chip.undecided, .chip.not-run-yet { color: var(--undecided); }
.chip { border: 1.5px solid; border-radius: 1em; padding: .05em .6em; font-size: .875rem;
  font-weight: 600; white-space: nowrap; }
.claim { border-top: 1px solid var(--line); padding: 1rem 0; }
.head { display: flex; gap: .3rem .75rem; flex-wrap: wrap; align-items: baseline; }
.test { display: grid; grid-template-columns: minmax(0, 2.4fr) minmax(0, 2fr) minmax(0, 3.2fr)
  minmax(0, 1.7fr); gap: .25rem 1rem; padding: .4rem 0; border-top: 1px dotted var(--line);
  align-items: center; font-size: .9rem; }
.test.titles { border: 0; padding: .5rem 0 .1rem; color: var(--soft); }
.test > div > b.label { display: none; font-weight: 400; color: var(--soft); }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.number strong { font-size: 1.05rem; }
.paper { border-left: 3px double var(--line); padding-left: .75rem; align-self: stretch; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 1rem; margin: .75rem 0; }
.panels.wide { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; background: var(--panel); border-radius: 3px; padding: .5rem; min-width: 0; }
figure.published { background: none; border: 3px double var(--line); }
svg { display: block; width: 100%; height: auto; max-width: 520px;
  font: 11px system-ui, sans-serif; }
svg text { fill: var(--fg); } svg text.many { font-size: 9.5px; } svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--line); }
svg .band { fill: var(--band); } svg .border { stroke: var(--fg); stroke-dasharray: 3 2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line);
  font-weight: 400; white-space: nowrap; }
summary { cursor: pointer; padding: .15rem 0; }
@media (max-width: 760px) {
  body { padding: .75rem .75rem 2rem; }
  .test, .test.titles { grid-template-columns: 1fr; } .test.titles { display: none; }
  .test > div > b.label { display: inline; margin-right: .4rem; }
}
@media print {
  :root { --bg: #fff; --fg: #000; --soft: #444; --line: #bbb; --panel: #fff; --band: #e4eef5;
    --held: #0072b2; --not-held: #b34700; --undecided: #555; --bn: #0072b2; --gn: #b87d00;
    --sn: #000; --in: #00805d; --ln: #c25000; --x10: #b0578a; }
  body { font-size: 10pt; max-width: none; }
  .claim, figure { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { max-width: 100%; font-size: 7.5pt; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding-right: .35rem; }
}
"""
SIGNS = {"held": "✓", "not held": "✗", "undecided": "?", "not run yet": "○"}
SHAPES = ("circle", "square", "triangle", "diamond")
WIDTH = 360  # of every drawing, in its own units


def page(title: str, body: str) -> str:
    """A whole document that needs nothing else."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def css_class(name: str) -> str:
    return name.replace(": ", "-").replace(" ", "-")


def chip(name: str) -> str:
    """Where a claim stands, `undecided: runs missing`, with its verdict's sign and colour."""
    verdict = name.partition(": ")[0]
    return f'<span class="chip {css_class(verdict)}">{SIGNS[verdict]} {escape(name)}</span>'


def link(text: str, target: str) -> str:
    """A link to a file, by its path from the page."""
    return f'<a href="{escape(quote(target))}">{escape(text)}</a>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of HTML cells; the first row is the header, the first column a row's name."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in rows[0])
    lines = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows[1:]
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def signed(value: float, digits: int = 3) -> str:
    """+1.23 or −0.0456: `digits` significant ones, a true minus."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:+.{min(places, 4)}f}"
    return text.replace("-", "−")


def plain(value: float) -> str:
    """A tick's label."""
    return f"{value:.6g}".replace("-", "−")


# --- plots


@dataclass(frozen=True)
class Scale:
    """From values to positions along an axis; what lies beyond an end is at the end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers between the ends."""
        rough = (self.high - self.low) / count
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


class Axis:
    """A Scale around values, of their logarithms if `log`; `space`: its share left at the ends."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, log: bool, space: float = 0.06
    ):
        self.log = log
        places = [place for place in map(self.place, values) if math.isfinite(place)]
        low, high = min(places), max(places)
        room = space * (high - low) or (0.0 if high > low else 1.0)
        self.scale = Scale(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(value) if value > 0 else -math.inf  # at the low end

    def __call__(self, value: float) -> float:
        return self.scale(self.place(value))

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers between the ends."""
        if not self.log:
            return self.scale.ticks(count)
        decades = range(math.floor(self.scale.low), math.ceil(self.scale.high) + 1)
        every = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        ticks = [v for v in every if self.scale.low <= math.log10(v) <= self.scale.high]
        return ticks if len(ticks) <= 2 * count else [v for v in ticks if math.log10(v) % 1 == 0]


def drawing(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str = "axis", width: float = 1) -> str:
    return f'<line class="{css}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-width="{width}"/>'


def text(x: float, y: float, content: str, anchor: str = "middle", css: str = "") -> str:
    return f'<text class="{css}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def inside(x: float, y: float, content: str, css: str = "") -> str:
    """A text centred at x, or as near to it as it lies within the drawing."""
    half = 3.5 * len(content)  # of its width, 11 pixels high
    return text(round(min(max(x, half), WIDTH - half), 2), y, content, css=css)


def marker(shape: str, x: float, y: float, color: str, title: str = "", size: float = 4) -> str:
    """A filled mark with a tooltip."""
    outline = f'fill="var(--{color})"'
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{size}" {outline}>{inner}</circle>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    }[shape]
    points = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" {outline}>{inner}</polygon>'


def strip(outcome: Outcome, target: str) -> str:
    """A test's effect: a dot per seed, mean and intervals, and where the rule wants it (shaded).

    target: what the dots link to.
    """
    values, wanted = outcome.values, outcome.test.wanted
    if not values:
        return '<span class="soft">no seed yet</span>'
    ends = [0.0, *values.values(), *filter(math.isfinite, wanted), *(outcome.interval or ())]
    room = (max(ends) - min(ends)) or 1.0  # a corrected interval that is wider still is cut
    space = 0.08 * room
    wide = outcome.corrected or (min(ends), max(ends))
    low = min(ends) - min(max(0.0, min(ends) - wide[0]), room) - space
    high = max(ends) + min(max(0.0, wide[1] - max(ends)), room) + space
    scale = Scale(low, high, 8, WIDTH - 8)
    bottom, rows = 58, len(values)
    low, high = map(scale, wanted)
    parts = [f'<rect class="band" x="{low}" y="2" width="{high - low:.2f}" height="{bottom - 2}"/>']
    parts += [line(scale(x), 2, scale(x), bottom, "border") for x in wanted if math.isfinite(x)]
    parts += [line(8, bottom, WIDTH - 8, bottom)]
    for tick in scale.ticks(5):
        parts += [line(scale(tick), bottom, scale(tick), bottom + 4)]
        parts += [inside(scale(tick), bottom + 15, plain(tick), css="soft")]
    verdict = css_class(outcome.decided)
    for index, (seed, value) in enumerate(values.items()):
        y = round(8 + 24 * index / max(1, rows - 1), 1)
        dot = marker("circle", scale(value), y, verdict, f"seed {seed}: {signed(value)}", 3.2)
        parts.append(f'<a href="{escape(target)}">{dot}</a>')
    stroke = f'stroke="var(--{verdict})"'
    for span, width in ((outcome.corrected, 1.5), (outcome.interval, 5)):
        if span:
            parts.append(
                f'<line x1="{scale(span[0])}" x2="{scale(span[1])}" y1="45" y2="45" {stroke} '
                f'stroke-width="{width}"/>'
            )
    if outcome.interval:
        parts.append(marker("diamond", scale(outcome.mean), 45, "fg", "mean", 4.5))
    seeds = ", ".join(f"seed {seed} {signed(value)}" for seed, value in values.items())
    return drawing(76, f"{outcome.test.effect}: {seeds}", parts)


@dataclass(frozen=True)
class Point:
    """A mean with its interval; None where there is one value only, or a published figure."""

    value: float
    interval: tuple[float, float] | None = None
    seeds: int | None = None


def curves(
    series: Mapping[str, Mapping[str, Point]],
    labels: Mapping[str, str],
    colors: Mapping[str, str],
    categories: Sequence[str],
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
    joined: Sequence[tuple[str, ...]] = (),
) -> str:
    """Points with intervals over categories, one colour and shape for each series.

    joined: runs of categories whose points a line joins. low, high: the axis, if the data should
    not choose it; a point beyond is drawn at its end, with its figure.
    """
    points = [point for row in series.values() for point in row.values()]
    if not points:
        return '<p class="soft">no runs yet</p>'
    ends = [x for p in points for x in (p.value, *(p.interval or ()))]
    space = 0.06 * (max(ends) - min(ends)) or 1.0
    y = Scale(
        min(ends) - space if low is None else low,
        max(ends) + space if high is None else high,
        216,
        28,
    )
    step = (WIDTH - 44) / len(categories)
    x = {category: 40 + step * (index + 0.5) for index, category in enumerate(categories)}
    parts = grid(y, y.ticks(5))
    for category in categories:
        css = "soft many" if len(categories) > 6 else "soft"
        parts.append(text(round(x[category], 1), 232, labels.get(category, category), css=css))
    for index, (name, row) in enumerate(series.items()):
        color, shape = colors[name], SHAPES[index % len(SHAPES)]
        shift = (index - (len(series) - 1) / 2) * min(6.0, step / (len(series) + 1))
        at = {c: (round(x[c] + shift, 1), point) for c, point in row.items() if c in x}
        for run in joined or (tuple(categories),):
            path = " ".join(f"{at[c][0]},{y(at[c][1].value)}" for c in run if c in at)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="var(--{color})" '
                f'stroke-width="1.5" stroke-opacity=".55"/>'
            )
        for category, (place_x, point) in at.items():
            title = f"{labels.get(name, name)}, {labels.get(category, category)}: {point.value:.3g}"
            if point.interval:
                ends = [y(end) for end in point.interval]
                parts.append(
                    f'<line x1="{place_x}" x2="{place_x}" y1="{ends[0]}" y2="{ends[1]}" '
                    f'stroke="var(--{color})" stroke-width="1.6"/>'
                )
                title += " [{:.3g}, {:.3g}]".format(*point.interval)
            title += f", n = {point.seeds}" if point.seeds else ""
            if not y.low <= point.value <= y.high:
                off = f"{'↓' if point.value < y.low else '↑'} {point.value:.3g}"
                parts.append(text(place_x + 8, y(point.value) - 3, off, "start"))
            parts.append(marker(shape, place_x, y(point.value), color, title))
    names = [(labels[n], colors[n], SHAPES[k % len(SHAPES)]) for k, n in enumerate(series)]
    return drawing(240, label, [*parts, *legend(names)])


def grid(y: Scale, ticks: Sequence[float], unit: float = 1.0) -> list[str]:
    """Horizontal lines of a plot with their figures, `unit` of the values each."""
    parts = []
    for tick in ticks:
        parts += [line(40, y(tick), WIDTH - 4, y(tick), "grid")]
        parts += [text(35, y(tick) + 4, plain(tick / unit), "end", "soft")]
    return parts


def legend(names: Sequence[tuple[str, str, str]]) -> list[str]:
    """(name, colour, shape) of every series in a row above a plot."""
    parts, place = [], 44.0
    for name, color, shape in names:
        parts += [marker(shape, place, 10, color), text(place + 8, 14, name, "start")]
        place += 24 + 6.3 * len(name)
    return parts


def lines(
    series: Mapping[str, Mapping[float, Point]],
    labels: Mapping[str, str],
    colors: Mapping[str, str],
    *,
    label: str,
    unit: str,
    seeds: Mapping[str, Sequence[Mapping[float, float]]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    scale: float = 1.0,
    border: float | None = None,
) -> str:
    """Points with intervals over numbers, joined; each name of `labels` has a shape of its own.

    unit: of the x axis. seeds: every seed's own line, thin. scale: of the y axis's figures, what
    their 1 is worth. border: a value to mark.
    """
    points = [point for row in series.values() for point in row.values()]
    if not points:
        return '<p class="soft">no runs yet</p>'
    shapes = {name: SHAPES[index % len(SHAPES)] for index, name in enumerate(labels)}
    thin = seeds or {}
    values = [x for p in points for x in (p.value, *(p.interval or ()))]
    values += [v for rows in thin.values() for row in rows for v in row.values()]
    values += [border] if border is not None else []
    places = [x for row in series.values() for x in row]
    y = Axis(values, 216, 28, log_y)
    x = Axis(places, 46, WIDTH - 20, log_x, space=0)
    parts = grid(y, y.ticks(5), scale)
    for tick in x.ticks(6):
        parts += [line(x(tick), 216, x(tick), 220), text(x(tick), 232, plain(tick), css="soft")]
    parts += [line(40, 216, WIDTH - 4, 216), text(WIDTH - 4, 246, unit, "end", "soft")]
    if border is not None:
        parts.append(line(40, y(border), WIDTH - 4, y(border), "border"))
    for name, row in series.items():
        color, shape = f"var(--{colors[name]})", shapes[name]
        for own in thin.get(name, ()):
            parts.append(_polyline([(x(a), y(b)) for a, b in own.items()], color, 0.8, 0.4))
        parts.append(_polyline([(x(a), y(p.value)) for a, p in row.items()], color, 1.6, 0.8))
        for place, point in row.items():
            title = f"{labels[name]}, {plain(place)} {unit}: {point.value / scale:.4g}"
            if point.interval:
                low, high = point.interval
                title += f" [{low / scale:.4g}, {high / scale:.4g}]"
                parts.append(
                    f'<line x1="{x(place)}" x2="{x(place)}" y1="{y(low)}" y2="{y(high)}" '
                    f'stroke="{color}" stroke-width="1.4"/>'
                )
            parts.append(marker(shape, x(place), y(point.value), colors[name], title, 3))
    names = [(labels[name], colors[name], shapes[name]) for name in series]
    return drawing(250, label, [*parts, *legend(names)])


def _polyline(points: Sequence[tuple[float, float]], color: str, width: float, opacity: float):
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )
