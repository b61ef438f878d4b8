"""Parts of an HTML page for engine/report.py: text, tables, lists, charts and the style sheet.

The functions for parts return HTML. `text` escapes all text that comes from files and flags.
"""

import html
import math

from engine.pictures import falls_far, plain


def is_number(value):
    """True for an int or float with an absolute value below 1e300, so not inf and not NaN."""
    return type(value) in (int, float) and abs(value) < 1e300


def part(values, key):
    """The dict at a key of a dict; {} where there is none, or another type."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def text(value):
    """Any value as HTML text: escaped, with a dot for each control character."""
    return html.escape(plain(str(value)))


def short(value):
    """A number as short text: 1234 -> "1,234", 0.05713 -> "0.0571"."""
    if not is_number(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def millions(count):
    """A count in millions: 866112 -> "0.87 M"."""
    return f"{count / 1e6:.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def note(words):
    """A paragraph in small print."""
    return f"<p class=note>{text(words)}</p>"


def grid(label, head, rows, best=()):
    """A table that scrolls horizontally where the window is narrow.

    label  name of the table for screen readers
    head   names of the columns
    rows   [(name, cells)], already HTML
    best   set of (column, row) whose cells are bold
    """
    lines = [f"<tr><th scope=row>{name}</th>" + "".join(
        f"<td>{f'<strong>{cell}</strong>' if (j, i) in best else cell}</td>"
        for j, cell in enumerate(cells)) + "</tr>" for i, (name, cells) in enumerate(rows)]
    heads = "".join(f"<th scope=col>{text(name)}</th>" for name in head)
    return (f'<div class=scroll tabindex=0 role=region aria-label="{text(label)}"><table><thead>'
            f"<tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>")


def pairs(values):
    """A dict as a list of names and values."""
    return "<dl>" + "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(setting_text(value))}</dd></div>"
        for name, value in values.items()) + "</dl>"


def setting_text(value):
    """The value of a setting as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value == "" else value


def details(title, body):
    """A section that opens on a click."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def ticks(low, high, count=5):
    """Round numbers between low and high, at most count + 1, for the ticks of an axis."""
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20)
                if power * factor * count >= span)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low, high):
    """Powers of ten between low and high, with their multiples by 2 and 5 where these are few."""
    powers = [10**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    marks = [power * factor for power in powers for factor in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
    return marks if len(marks) <= 6 else [power for power in powers if low <= power <= high]


def thin(points, most=240):
    """Means of groups of neighbouring points, so that there are at most `most` points."""
    size = max(1, -(-len(points) // most))
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(values) for values in zip(*group)) for group in groups]


LEFT, RIGHT, TOP, BOTTOM = 44, 398, 10, 204  # area of the lines in a chart of 420 x 232


def chart(title, series, log=False):
    """A chart of lines over steps as SVG; "" where there are no points.

    series  [(name, CSS class in STYLE, [(step, value)])]
    log     True: the value axis is logarithmic where `falls_far`
    """
    series = [one for one in series if one[2]]
    if not series:
        return ""
    log = log and falls_far([value for _, _, points in series for _, value in points])
    series = [(name, style, thin(points)) for name, style, points in series]
    xs, ys = zip(*(point for _, _, points in series for point in points))
    scale = math.log10 if log else float
    first, end, low, high = min(0, *xs), max(1, *xs), scale(min(ys)), scale(max(ys))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1
    low, high = low - margin, high + margin

    def to_x(x):
        return LEFT + (RIGHT - LEFT) * (x - first) / (end - first)

    def to_y(y):
        return BOTTOM - (BOTTOM - TOP) * (scale(y) - low) / (high - low)

    drawn = [f'<path class=rule d="M{LEFT} {to_y(y):.1f}H{RIGHT}"/><text x="{LEFT - 7}" '
             f'y="{to_y(y) + 4:.1f}" text-anchor=end>{round(y, 9):g}</text>'
             for y in (log_ticks(10**low, 10**high) if log else ticks(low, high))]
    drawn += [f'<text x="{to_x(x):.1f}" y="{BOTTOM + 20}" text-anchor=middle>{x:,.0f}</text>'
              for x in ticks(first, end, 4)]
    for _, style, points in series:
        spots = [(f"{to_x(x):.1f}", f"{to_y(y):.1f}") for x, y in points]
        drawn.append(f'<path class="line {style}" d="M{"L".join(map(" ".join, spots))}"/>')
        if len(spots) < 12:
            drawn += [f'<circle class="dot {style}" cx="{x}" cy="{y}" r="3"/>' for x, y in spots]
    ends = "; ".join(f"{name} from {short(points[0][1])} to {short(points[-1][1])}"
                     for name, _, points in series)
    legend = "".join(f'<li class="{style}">{text(name)}</li>' for name, style, _ in series)
    return (f"<figure class=chart><figcaption>{text(title)}<ul class=legend>{legend}</ul>"
            '</figcaption><svg viewBox="0 0 420 232" role=img aria-label="'
            f'{text(f"{title}, over {end:,.0f} steps: {ends}")}">{"".join(drawn)}</svg></figure>')


# Colours of the system: blue = masked encoder, green = multimodal encoder, orange = cross-model
# attention, violet = classifiers.
STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #23272e;
  --soft: #666d78; --rule: #e3e1da; --blue: #2b6cb0; --green: #2f7d54; --violet: #6b4fa0;
  --orange: #b8651b; --grey: #5d6673; --red: #b5425f; --teal: #2b8a94; --olive: #8a7620;
  --tint: 9%; --accent: var(--grey) }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1c2026; --ink: #dfe3e8;
  --soft: #9aa3af; --rule: #2f353d; --blue: #7db4ee; --green: #78c79b; --violet: #b9a2e8;
  --orange: #eaa866; --grey: #a4adb9; --red: #ee8aa3; --teal: #6cc7d0; --olive: #cdb95c;
  --tint: 16% } }
.s-mae { --accent: var(--blue) } .s-clip { --accent: var(--green) }
.s-classify { --accent: var(--violet) } .s-fuse { --accent: var(--orange) }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 0 max(1rem, 3vw) 3rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere }
header { padding: 2.5rem 0 0 }
header p { margin: .4rem 0 1rem; color: var(--soft) }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem }
h3 { font-size: 1rem; margin: 2.2rem 0 .3rem }
h4 { font-size: .92rem; margin: 1.2rem 0 .3rem }
section { margin: 3.5rem 0 0; scroll-margin-top: 1rem }
section > p { max-width: 46rem; margin: 0 0 1rem }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0;
  padding: 0; font-size: .92rem }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em }
.number { display: inline-grid; place-items: center; width: 1.6rem; height: 1.6rem;
  border-radius: 50%; background: var(--accent); color: var(--page); font-size: .9rem }
.note, figcaption p { color: var(--soft); font-size: .875rem; margin: .3rem 0 }
section > .note { margin: .5rem 0 }
figure { margin: 0 }
.scroll { overflow-x: auto; max-width: 100% }
img { display: block; height: auto }
footer { margin-top: 4rem; color: var(--soft); font-size: .875rem }

.system svg { width: 100%; height: auto; font-size: 13.5px }
.system .tall { display: none }
.system text { text-anchor: middle; fill: var(--ink) }
.system .title { font-weight: 600; font-size: 14.5px }
.system .file { font: 12px ui-monospace, monospace; fill: var(--soft) }
.system .fact { fill: var(--accent) }
.system .s-data .fact { fill: var(--ink) }
.system rect { fill: color-mix(in srgb, var(--accent) var(--tint), var(--card));
  stroke: var(--accent) }
.system .badge { fill: var(--accent) }
.system .badge-text { fill: var(--page); font-weight: 700; font-size: 13px }
.system .off { opacity: .35 }
.system .arrow { fill: none; stroke: var(--soft); stroke-width: 1.4 }
.system .head { fill: var(--soft) }
.system .label { font-size: 12px; fill: var(--soft); paint-order: stroke; stroke: var(--page);
  stroke-width: 4px }
.system .label.number { fill: var(--ink) }

.charts { display: grid; gap: 1.6rem 2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.chart { display: flex; flex-direction: column; justify-content: space-between; min-width: 0 }
.chart figcaption { font-weight: 600; font-size: .92rem }
.chart svg { width: 100%; height: auto; display: block }
.chart text { fill: var(--soft); font-size: 13px }
.rule { stroke: var(--rule) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .1rem 0 .4rem;
  padding: 0; font-weight: 400; font-size: .82rem; color: var(--soft) }
.legend li::before { content: ""; display: inline-block; width: 1.1rem; margin-right: .4rem;
  vertical-align: .25em; border-top: 2.5px solid var(--line) }
.line { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round }
.dot { fill: var(--line) }
.train { --line: color-mix(in srgb, var(--soft) 65%, var(--page)) }
.held { --line: var(--accent) }
.trivial { --line: var(--ink); stroke-dasharray: 5 4 }
circle.trivial { display: none }
.legend .trivial::before { border-top-style: dashed }
.c0 { --line: var(--blue) } .c1 { --line: var(--green) } .c2 { --line: var(--orange) }
.c3 { --line: var(--violet) } .c4 { --line: var(--red) } .c5 { --line: var(--teal) }
.c6 { --line: var(--olive) } .c7 { --line: var(--grey) }

.clips, .strips { display: grid; gap: 1.5rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)) }
.strips { grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)) }
.clips img, .strips img { width: 100%; max-width: 34rem; border-radius: 6px;
  image-rendering: pixelated }
.clips img { max-width: 15rem }
.clips p:first-child, .strips p:first-child { color: var(--ink) }
.stills { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: .6rem 0 }
.stills figure { min-width: 0 }
.stills.several figure { flex: 0 1 calc(50% - .75rem); min-width: min(100%, 24rem) }
.stills .scroll { background: #fff; border-radius: 8px }
.stills img { width: auto; max-width: max(100%, 36rem) }
@media (prefers-color-scheme: dark) { .stills .scroll { filter: brightness(.9) } }

table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--rule);
  overflow-wrap: normal }
thead th { font-weight: 500; color: var(--soft); vertical-align: bottom }
tbody th { font-weight: 500; text-align: left; padding-left: 0; min-width: 8.5rem }
td strong { font-weight: 700 }
.bar { display: block; height: 3px; margin: 2px 0 0 auto; background: var(--grey);
  border-radius: 2px }
details { border-bottom: 1px solid var(--rule); padding: .5rem 0 }
:not(details) + details { border-top: 1px solid var(--rule); margin-top: 2rem }
summary { cursor: pointer; color: var(--soft); font-size: .92rem }
dl { columns: 19rem; column-gap: 2.5rem; font-size: .875rem; margin: .5rem 0 }
dl div { break-inside: avoid; display: flex; gap: 1rem; justify-content: space-between;
  border-bottom: 1px solid var(--rule); padding: .15rem 0 }
dt { color: var(--soft); flex: none; max-width: 50% }
dd { margin: 0; text-align: right; min-width: 0 }

@media (max-width: 46rem) {
  .system .wide { display: none }
  .system .tall { display: block; font-size: 11.5px }
  .system .tall .title { font-size: 12px }
  .system .tall .file, .system .tall .label { font-size: 11px }
  table { font-size: .82rem }
  th, td { padding: .35rem .5rem }
}
"""
