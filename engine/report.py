"""report.html: what a run did and learned, on one page that needs nothing beside it.

    metrics.json, log.jsonl, config.json, table.json --+
    *.png, *.gif --------------------------------------+--> write(folder) --> report.html

The idea, in steps:
1. `Record` reads what one run left. A file that is missing or odd is an empty one: a page with less
   on it, never a run that fails.
2. `system` draws the four stages of InternVideo with this run's numbers in the boxes; `chart` draws
   lines of the log; `Album` puts pictures into the page, as text, while there is room.
3. `sections` puts them in the order of the stages; `write` puts a page around them.

No script, no font and no picture comes from elsewhere: the page opens without a network and can be
sent by mail. It follows the reader's light or dark mode. All text of files and names is escaped.
A model is not known here, but the four stages of the paper are, by their names.
"""

import base64
import html
import json
import math
from pathlib import Path

import weights
from engine.pictures import plain

MOST_BYTES = 3_400_000  # of pictures on a page; as text they take a third more: 5 MB with the rest

STAGES = {  # name: (number, title, what happens in it)
    "mae": ("1", "Masked video modelling",
            "Most of each clip is hidden. The encoder sees the rest, and a small decoder predicts "
            "the pixels that are hidden. No label and no sentence is used."),
    "clip": ("2", "Video and language",
             "Two encoders turn videos and sentences into vectors of one space, where those that "
             "belong together come near each other. A decoder learns to write the sentence."),
    "classify": ("3", "Supervised post-pretraining",
                 "A pretrained encoder learns classes from labels. The same network from scratch "
                 "shows what the pretraining is worth."),
    "fuse": ("4", "Cross-model interaction",
             "Both encoders are frozen. Tokens of one attend to tokens of the other, behind gates "
             "that start closed, and the scores of both are summed with learned shares."),
}

PICTURES = {  # stem of the file, without a number: (heading, what to see there)
    "reconstruction": ("Reconstructions", "held-out clips, most of each hidden, and what the model "
                       "makes of it"),
    "captions": ("Captions", "held-out clips, what the model writes about each, and a true "
                 "sentence"),
    "answers": ("Answers", "held-out clips, what the model answers, and the question with its "
                "right answer"),
    "retrieval": ("Retrieval", "each sentence, and the clips that are nearest to it; green: the "
                  "clip that the sentence belongs to"),
    "similarity": ("Similarity", "the cosine of each sentence (row) and each clip (column); those "
                   "that belong together are on the diagonal"),
    "attention": ("Where the caption decoder looks", "a row for each word that it writes: the clip "
                  "is bright where the word attends"),
    "confusion": ("Confusion", "rows are true classes, columns are answers; right answers are on "
                  "the diagonal"),
    "looks": ("Where the bridge looks", "left a token of the masked encoder, framed; right the "
              "clip, bright where this token attends in the multimodal encoder"),
    "segments": ("Segments", "true segments of long videos, and those that the model finds"),
}

# --------------------------------------------------------------------------------------------------
# What a run left


def read_json(path):
    """The dict in a JSON file; {} where there is none."""
    try:
        found = json.loads(Path(path).read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_number(value):
    """True for a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def part(values, key):
    """The dict at a key of a dict; {} where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


class Record:
    """What one run left in its folder: metrics, settings, config, lines of the log."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name or "run"
        self.metrics, self.config = (read_json(self.folder / f"{name}.json")
                                     for name in ("metrics", "config"))
        self.settings, self.stage = part(self.metrics, "settings"), str(self.metrics.get("stage"))
        self.lines = []
        try:
            rows = (self.folder / "log.jsonl").read_text(errors="replace").splitlines()
        except OSError:
            rows = []
        for row in rows:
            try:
                line = json.loads(row)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and is_number(line.get("step")):
                self.lines.append(line)

    def number(self, *keys):
        """The first of these numbers of metrics.json that exists, or None."""
        return next((self.metrics[key] for key in keys if is_number(self.metrics.get(key))), None)

    def points(self, key):
        """[(step, value)] of a key of the log."""
        return [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]

    def last(self, word):
        """{key: its last value} of the keys of the log that start with a word."""
        return {key: value for line in self.lines for key, value in line.items()
                if key.startswith(word) and is_number(value)}

    def right(self):
        """Share of held-out clips answered right, in percent, or None."""
        return self.number("val_all_facts", "val_top1", "val_mAP")


def role(run):
    """Which part of the system a run trains: its stage, or for a classifier its encoder."""
    return run.settings.get("encoder") if run.stage == "classify" else run.stage


# --------------------------------------------------------------------------------------------------
# Pieces of a page


def text(value):
    """Any value as text of a page: escaped, without control characters."""
    return html.escape(plain(str(value)))


def short(value):
    """A number in few characters: 1,234 or 0.05713 -> 0.0571."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not is_number(value):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def millions(count):
    """866112 -> 0.87 M"""
    return f"{count / 1e6:.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def grid(head, rows, caption="", best=()):
    """A table; each row is (name, cells), and cells are text of a page already.

    best  {column: row} whose cell is printed bold
    """
    lines = [f"<tr><th scope=row>{name}</th>" + "".join(
        f"<td>{f'<strong>{cell}</strong>' if (j, i) in best else cell}</td>"
        for j, cell in enumerate(cells)) + "</tr>" for i, (name, cells) in enumerate(rows)]
    heads = "".join(f"<th scope=col>{text(name)}</th>" for name in head)
    return (f"<div class=scroll tabindex=0 role=region aria-label=\"{text(caption or head[0])}\">"
            f"<table>{f'<caption>{text(caption)}</caption>' if caption else ''}"
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>")


def pairs(values):
    """A dict as a list of names and values."""
    return "<dl>" + "".join(
        f"<div><dt>{text(str(name).replace('_', ' '))}</dt><dd>{text(said(value))}</dd></div>"
        for name, value in values.items()) + "</dl>"


def said(value):
    """A value of a setting in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return {True: "yes", False: "no", "": "–"}.get(value, value) \
        if isinstance(value, (bool, str)) else value


def details(title, body):
    """A part that opens on a click."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def ticks(low, high, count=4):
    """Round numbers between low and high, about `count` of them."""
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(points, most=240):
    """Neighbouring points averaged, until there are at most so many."""
    size = -(-len(points) // most)
    groups = [points[i:i + size] for i in range(0, len(points), max(size, 1))]
    return [tuple(sum(values) / len(values) for values in zip(*group)) for group in groups]


def chart(title, series, note=""):
    """Lines over steps as SVG; "" where there are no points.

    series  [(name, class for its style, [(step, value)])]
    """
    series = [(name, style, thin(points)) for name, style, points in series if points]
    if not series:
        return ""
    left, right, top, bottom = 44, 412, 10, 204  # of the plane, 420 x 232
    xs, ys = zip(*(point for _, _, points in series for point in points))
    first, end, low, high = min(0, *xs, 0), max(*xs, 1), min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    low, high = low - margin, high + margin

    def place(x, y):
        return (left + (right - left) * (x - first) / (end - first),
                bottom - (bottom - top) * (y - low) / (high - low))

    drawn = []
    for y in ticks(low, high):
        _, v = place(0, y)
        drawn.append(f'<path class=rule d="M{left} {v:.1f}H{right}"/><text x="{left - 6}" '
                     f'y="{v + 4:.1f}" text-anchor=end>{y:g}</text>'.replace(f">{y:g}<",
                                                                            f">{round(y, 9):g}<"))
    for x in ticks(first, end):
        u, _ = place(x, low)
        drawn.append(f'<text x="{u:.1f}" y="{bottom + 18}" text-anchor=middle>{x:,.0f}</text>')
    for _, style, points in series:
        spots = [place(*point) for point in points]
        line = "L".join(f"{u:.1f} {v:.1f}" for u, v in spots)
        drawn.append(f'<path class="line {style}" d="M{line}"/>')
        if style == "held" or len(spots) == 1:
            drawn += [f'<circle class="dot {style}" cx="{u:.1f}" cy="{v:.1f}" r="3"/>'
                      for u, v in spots]
    ends = "; ".join(f"{name} from {short(points[0][1])} to {short(points[-1][1])}"
                     for name, _, points in series)
    legend = "".join(f'<li class="{style}">{text(name)}</li>' for name, style, _ in series)
    return (f'<figure class=chart><figcaption>{text(title)}<ul class=legend>{legend}</ul>'
            f'</figcaption><svg viewBox="0 0 420 232" role=img aria-label="'
            f'{text(f"{title}, over {end:,.0f} steps: {ends}")}">{"".join(drawn)}</svg>'
            + f"<p class=note>{text(note)}</p>" * bool(note) + "</figure>")


class Album:
    """Pictures of a page, as text in it, while there is room."""

    def __init__(self, room=MOST_BYTES):
        self.room = room

    def figure(self, path, words="", prefix=""):
        """A PNG or GIF with words below it; a GIF's comment says what it shows."""
        from PIL import Image  # late, like matplotlib
        try:
            with Image.open(path) as picture:
                (width, height), kind = picture.size, picture.format
                comment = picture.info.get("comment", b"")
            content = path.read_bytes()
        except (OSError, ValueError, SyntaxError):
            return f"<p class=note>{text(path.name)}: not a picture that can be read</p>"
        if kind not in ("PNG", "GIF"):
            return f"<p class=note>{text(path.name)}: neither PNG nor GIF</p>"
        if len(content) > self.room:
            return (f"<p class=note>{text(path.name)}, {len(content) / 1e6:.1f} MB: no room on "
                    "this page; it lies beside it</p>")
        self.room -= len(content)
        if isinstance(comment, bytes) and comment:
            words = comment.decode("utf-8", "replace")
        below = "".join(f"<p>{text(line)}</p>" for line in (prefix + words).splitlines() if line)
        data = base64.b64encode(content).decode()
        return (f'<figure class="{kind.lower()}"><div class=scroll tabindex=0><img alt="'
                f'{text(" ".join((prefix + words).splitlines()))}" width={width} height={height} '
                f'src="data:image/{kind.lower()};base64,{data}"></div>'
                f"<figcaption>{below}</figcaption></figure>")

    def show(self, run, prefix=""):
        """All pictures of a run in the order of PICTURES, with headings."""
        found = {}
        for path in sorted(run.folder.glob("*.gif")) + sorted(run.folder.glob("*.png")):
            stem = path.stem.rstrip("0123456789").rstrip("_")
            # What moves is better than what stands still; lines are drawn from the log.
            still = path.suffix == ".png" and any(p.suffix == ".gif" for p in found.get(stem, []))
            if not still and stem not in ("loss", "gates", "table"):
                found.setdefault(stem, []).append(path)
        order = [stem for stem in PICTURES if stem in found]
        order += [stem for stem in found if stem not in PICTURES]
        parts = []
        for stem in order:
            heading, words = PICTURES.get(stem, (stem, ""))
            moving = found[stem][0].suffix == ".gif"
            shown = "".join(self.figure(path, words or path.name, prefix) for path in found[stem])
            note = f"<p class=note>{text(words[:1].upper() + words[1:])}.</p>"
            parts.append(f"<h3>{text(heading)}</h3>" + note * (moving and bool(words))
                         + f'<div class="{"clips" if moving else "stills"}">{shown}</div>')
        return "".join(parts)


# --------------------------------------------------------------------------------------------------
# The system, with the numbers of this run

# box: (title, file, colour, stage, place on a wide plane 1200 x 480, on a tall one 400 x 786);
# a place is x, y, width, height
BOXES = {
    "video": ("video", "data.py", "s-data", "", (0, 127, 140, 96), (20, 0, 170, 82)),
    "words": ("sentence", "data.py", "s-data", "", (0, 385, 140, 76), (270, 0, 130, 66)),
    "masked": ("masked encoder", "mae.py", "s-mae", "1", (240, 40, 210, 100),
               (0, 132, 128, 98)),
    "multimodal": ("multimodal encoder", "uniformerv2.py", "s-clip", "2", (240, 215, 210, 100),
                   (138, 132, 142, 98)),
    "text": ("text encoder", "clip_video.py", "s-clip", "2", (240, 373, 210, 100),
             (290, 132, 110, 98)),
    "decoder": ("predicts what is hidden", "mae.py", "s-mae", "1", (545, 8, 210, 98),
                (24, 284, 128, 104)),
    "masked head": ("classifier", "train.py classify", "s-mae", "3", (545, 122, 210, 98),
                    (0, 438, 138, 84)),
    "multimodal head": ("classifier", "train.py classify", "s-clip", "3", (545, 236, 210, 98),
                        (152, 438, 248, 84)),
    "pairs": ("pairs and captions", "caption_decoder.py", "s-clip", "2", (545, 358, 210, 116),
              (172, 284, 228, 104)),
    "bridge": ("cross-model attention", "fusion.py", "s-fuse", "4", (850, 165, 190, 116),
               (50, 572, 300, 84)),
    "score": ("fused score", "fusion.py", "s-fuse", "4", (1084, 174, 116, 98),
              (110, 702, 180, 84)),
}

# (label, from, to, path on the wide plane, place of the label there, the same on the tall one)
ARROWS = (
    ("pixels", "video", "masked", "M140 160C190 160 190 90 234 90", (193, 172),
     "M90 82C90 105 64 105 64 126", (122, 102)),
    ("", "video", "multimodal", "M140 190C190 190 190 265 234 265", None,
     "M155 82C155 105 209 105 209 126", None),
    ("words", "words", "text", "M140 423H234", (188, 414), "M345 66V126", (366, 92)),
    ("seen", "masked", "decoder", "M450 75C500 75 500 57 539 57", (492, 38),
     "M88 230V278", (114, 252)),
    ("masked tokens", "masked", "masked head", "M450 105C500 105 500 171 539 171", (478, 158),
     "M11 230V432", (46, 408)),
    ("multimodal tokens", "multimodal", "multimodal head", "M450 250C500 250 500 285 539 285",
     (500, 232), "M161 230V432", (206, 408)),
    ("video vector", "multimodal", "pairs", "M450 285C505 285 495 392 539 392", (472, 341),
     "M236 230V278", (258, 252)),
    ("text vector", "text", "pairs", "M450 426H539", (495, 444), "M345 230V278", (366, 252)),
    ("frozen", "masked head", "bridge", "M755 171C805 171 800 205 844 205", (806, 166),
     "M69 522C69 548 140 544 140 566", None),
    ("frozen", "multimodal head", "bridge", "M755 285C805 285 800 241 844 241", (806, 292),
     "M276 522C276 548 260 544 260 566", (200, 548)),
    ("scores", "bridge", "score", "M1040 223H1078", (1061, 198), "M200 656V696", (240, 674)),
)


def tokens(config):
    """(t, patches of a frame, width) of an encoder's tokens, from its config; () if not known."""
    size = part(config, "size")
    if not size or not is_number(config.get("frames")):
        return ()
    frames = config.get("tubelet", 1) * (2 if config.get("temporal_downsample") else 1)
    height, width = config["image_size"]
    return (config["frames"] // frames, height // size["patch"] * (width // size["patch"]),
            size["width"])


def product(*numbers):
    """28, 96 -> "28 × 96"; "" where one is missing."""
    return " × ".join(f"{n:,}" for n in numbers) if numbers and None not in numbers else ""


def of_size(config):
    """Depth and width of an encoder in words."""
    size = part(config, "size") or config
    return f"{size['depth']} blocks, width {size['width']}" if "depth" in size else ""


def percent(value, words):
    """In words; "" for None."""
    return "" if value is None else f"{value:.1f} % {words}"


def encoders_of(parts):
    """Configs of the masked and the multimodal encoder: of the first run that has one."""
    one = {name: run.config for name, run in parts.items()}
    fused = one.get("fuse", {})
    return (one.get("mae") or one.get("masked") or part(fused, "masked"),
            part(one.get("clip", {}), "clip") or one.get("multimodal")
            or next(iter(fused.get("multimodal", [])), {}))


def labels_of(parts):
    """{arrow: (shape in letters, the same in numbers)}"""
    masked, multimodal = encoders_of(parts)
    t, places, width = tokens(masked) or (None,) * 3
    seen, ratio = None, parts["mae"].settings.get("mask_ratio") if "mae" in parts else None
    if t and is_number(ratio):
        seen = t * (places - int(ratio * places))
    frames, shown, wide = tokens(multimodal) or (None,) * 3
    some = next((run.settings for run in parts.values()), {})
    clip = part(parts["clip"].config, "clip") if "clip" in parts else {}
    counts = {run.config.get("classes") or part(run.config, "masked").get("classes")
              for name, run in parts.items() if name in ("masked", "multimodal", "fuse")}
    classes = max((count for count in counts if is_number(count)), default=None)
    side = some.get("input_size") or None
    vector = product(clip.get("embedding"))
    return {"pixels": ("(3, T, H, W)", product(3, some.get("num_frames") or None, side, side)),
            "words": ("(L)", f"L ≤ {clip['context']}" if "context" in clip else ""),
            "seen": ("(Nv, D)", product(seen, width)),
            "masked tokens": ("(N, D)", product(t and t * places, width)),
            "multimodal tokens": ("(t, 1+S, D)", product(frames, shown and 1 + shown, wide)),
            "video vector": ("(E)", vector), "text vector": ("(E)", vector),
            "frozen": ("frozen", ""), "scores": ("2 × (Y)", product(classes and 2, classes))}


def facts_of(parts, table):
    """{box: lines}, the first of them the most important; only boxes of which a run tells."""
    masked, multimodal = encoders_of(parts)
    found = {"masked": [of_size(masked)], "multimodal": [of_size(multimodal)]}

    def right(name, row):
        value = part(part(table, "rows"), row).get("all facts")
        return percent(value if is_number(value) else parts[name].right(), "right")

    if run := parts.get("mae"):
        trivial = run.number("val_trivial_loss")
        found["masked"].append(f"{millions(run.number('parameters') or 0)} with decoder")
        found["decoder"] = [f"loss {short(run.number('val_loss'))}",
                            f"the mean costs {short(trivial)}" if trivial else ""]
    if run := parts.get("clip"):
        clip = part(run.config, "clip")
        text_size = clip.get("text_size")
        found["multimodal"].append(f"{millions(run.number('parameters') or 0)} in stage 2")
        found["text"] = [of_size(text_size) if isinstance(text_size, dict) else "",
                         f"{clip['vocabulary']:,} tokens" if "vocabulary" in clip else ""]
        found["words"] = [""]
        bleu = run.number("BLEU-4")
        found["pairs"] = [
            percent(run.number("val_t2v_R@1"), "find their clip"),
            percent(run.number("val_captions_all_three"), "captions right")
            or (f"BLEU-4 {bleu:.1f}" if bleu is not None else "")]
    for name in {"masked", "multimodal"} & parts.keys():
        found[f"{name} head"] = [right(name, f"{name} encoder")]
    if run := parts.get("fuse"):
        gates, shares = run.last("gate_"), run.last("share_")
        widest = max(map(abs, gates.values()), default=0)
        found["bridge"] = [f"{len(gates)} gates, up to {widest:.0%} open" if gates else "",
                           f"{millions(run.number('trained') or 0)} trained"]
        found["score"] = [right("fuse", "cross-model attention"),
                          "shares " + " : ".join(f"{100 * value:.0f}" for value in shares.values())
                          if shares else ""]
    some = next(iter(parts.values())).settings
    found["video"] = [f"{some['num_frames']} frames,", f"{some['input_size']} × "
                      f"{some['input_size']} pixels"] if some.get("num_frames") else []
    return {box: [line for line in lines if line] for box, lines in found.items()
            if any(lines) or box == "words"}


def plane(kind, facts, labels):
    """The system as SVG; kind "wide" or "tall"."""
    tall = kind == "tall"
    drawn = [f'<defs><marker id=head-{kind} viewBox="0 0 8 8" refX=6 refY=4 markerWidth=8 '
             'markerHeight=8 orient=auto><path class=head d="M0 0.5L7 4L0 7.5z"/></marker></defs>']
    for _, begin, end, wide_path, _, tall_path, _ in ARROWS:
        off = "" if begin in facts and end in facts else " off"
        drawn.append(f'<path class="arrow{off}" marker-end="url(#head-{kind})" '
                     f'd="{tall_path if tall else wide_path}"/>')
    for box, (title, file, colour, stage, wide_place, tall_place) in BOXES.items():
        x, y, w, h = tall_place if tall else wide_place
        known, middle = facts.get(box), x + w / 2
        words = [("title", title), ("file", file)] + [("fact", line) for line in known or ()]
        if tall and box == "decoder":
            words[0] = ("title", "predicts the rest")
        top = y + (h - 18 * len(words)) / 2 + 13.5
        body = "".join(f'<text class={style} x="{middle}" y="{top + 18 * i:.1f}">{text(line)}'
                       "</text>" for i, (style, line) in enumerate(words))
        number = f'<circle class=badge cx="{x + 4}" cy="{y + 4}" r="12"/><text class=badge-text ' \
                 f'x="{x + 4}" y="{y + 8.5}">{stage}</text>' if stage else ""
        drawn.append(f'<g class="{colour}{"" if known is not None else " off"}"><rect x="{x}" '
                     f'y="{y}" width="{w}" height="{h}" rx="9"/>{body}{number}</g>')
    for label, _, _, _, wide_place, _, tall_place in ARROWS:
        if place := tall_place if tall else wide_place:
            drawn += [f'<text class="label{" number" if i else ""}" x="{place[0]}" '
                      f'y="{place[1] + (27 if label == "words" and not tall else 15) * i}">'
                      f"{text(line)}</text>" for i, line in enumerate(labels[label]) if line]
    told = "; ".join(f"{BOXES[box][0]}: {', '.join(lines)}" for box, lines in facts.items()
                     if lines)
    return (f'<svg class={kind} viewBox="{"-9 -9 418 804" if tall else "-10 -5 1222 488"}" role=img '
            f'aria-label="{text(f"The system. {told}")}">{"".join(drawn)}</svg>')


def system(runs, table):
    """The picture of the whole; "" where no run is of one of its four stages."""
    parts = {}
    for run in runs:
        if run.stage in STAGES:
            parts.setdefault(role(run), run)
    if not parts:
        return ""
    facts, labels = facts_of(parts, table), labels_of(parts)
    return ("<section id=system><h2>The system</h2><figure class=system>"
            + plane("wide", facts, labels) + plane("tall", facts, labels)
            + "<figcaption><p>Numbers in circles are the four stages. Shapes on arrows are those "
            "of one clip: T frames of H × W pixels, N tokens of width D, of which Nv are seen; t "
            "steps of S patches and a class token; L words, E numbers of the common space, Y "
            "classes. What these runs do not tell is pale.</p></figcaption></figure></section>")


# --------------------------------------------------------------------------------------------------
# The parts of the page


def table_of(table):
    """table.json of the default run; "" where there is none."""
    rows = {name: row for name, row in part(table, "rows").items() if isinstance(row, dict)}
    if not rows:
        return ""
    columns = list(next(iter(rows.values())))
    best = {(j, i) for j, column in enumerate(columns) if column not in ("trained", "seconds")
            for i, row in enumerate(rows.values())
            if row.get(column) == max(other.get(column, 0) for other in rows.values())}
    body = [(text(name), [text(short(row.get(column, ""))) for column in columns])
            for name, row in rows.items()]
    return ("<section id=table><h2>What each encoder knows, and both together</h2>"
            + grid(["", *columns], body, str(table.get("protocol", "")), best)
            + "<p class=note>All facts: motion, shape and colour right in one clip. Unseen: pairs "
            "of shape and colour that no training clip has. From scratch: the masked encoder's "
            "network, trained on labels only. Late fusion: the mean of both encoders' "
            "probabilities. The best of each column is bold.</p></section>")


def charts(run, prefix):
    """Losses over steps, and gates and shares where the log has them."""
    drawn = [chart(f"{prefix}loss", [("training", "train", run.points("loss")),
                                     ("held out", "held", run.points("val_loss")),
                                     ("trivial baseline", "trivial",
                                      run.points("val_trivial_loss"))])]
    for word, title in (("gate_", "tanh of each gate; 0 is closed"), ("share_", "share of each "
                                                                      "score")):
        lines = [(key.removeprefix(word), f"c{i % 8}", run.points(key))
                 for i, key in enumerate(sorted(run.last(word)))]
        drawn.append(chart(prefix + title, lines))
    return "".join(drawn)


FACTS = ("stage", "step", "protocol", "parameters", "trained", "seconds", "processes", "bad_files",
         "settings")


def numbers(run):
    """All that was measured, a row for each name and a column for each held-out set."""
    columns = {"initial_val_": "held out, at the start", "val_": "held out",
               "initial_unseen_": "unseen, at the start", "unseen_": "unseen", "test_": "test"}
    rows, once = {}, {}
    for key, value in run.metrics.items():
        if key in FACTS or not isinstance(value, (int, float, str)):
            continue
        start = next((start for start in columns if key.startswith(start)), None)
        if start:
            rows.setdefault(key.removeprefix(start), {})[start] = short(value)
        else:
            once[key] = short(value)
    columns = {start: name for start, name in columns.items()
               if any(start in row for row in rows.values())}
    table = grid(["", *columns.values()],
                 [(text(name.replace("_", " ")), [text(row.get(start, "")) for start in columns])
                  for name, row in rows.items()]) if rows else ""
    return table + (pairs(once) if once else "")


def particulars(run):
    """Numbers, protocol, settings and bad files of a run, each behind a click."""
    parts = []
    for title, body in (("all numbers", numbers(run)),
                        ("what was measured", pairs(part(run.metrics, "protocol"))),
                        ("settings", pairs(run.settings)),
                        ("files that could not be read", pairs(part(run.metrics, "bad_files")))):
        if body and body != pairs({}):
            parts.append(details(f"{run.name}: {title}", body))
    return "".join(parts)


def times(runs):
    """Steps, parameters, speed, memory and seconds of each run."""
    seconds = [run.number("seconds") or 0 for run in runs]
    rows = []
    for run, spent in zip(runs, seconds):
        speeds, waits, memory = (sorted(value for _, value in run.points(key))
                                 for key in ("clips_per_s", "data_wait", "memory_mib"))
        bar = f'<span class=bar style="width:{100 * spent / (max(seconds) or 1):.0f}%"></span>'
        rows.append((text(run.name), [
            text(short(run.number("step") or 0)), text(millions(run.number("parameters") or 0)),
            text(millions(run.number("trained") or 0)),
            f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "–",
            f"{sum(waits) / len(waits):.0%}" if waits else "–",
            f"{memory[-1]:,.0f}" if memory else "–", f"{spent:,.0f}{bar}"]))
    note = " A run in the midst of others counts their memory too." * (len(runs) > 1)
    return ("<section id=times><h2>Time and memory</h2>"
            + grid(["", "steps", "parameters", "trained", "clips/s", "waits for clips",
                    "memory, MiB", "seconds"], rows)
            + f"<p class=note>Speed is the median of the log, memory its peak.{note}</p></section>")


def attempt(build, *args):
    """What build(*args) returns; where files are odd, a line that says so."""
    try:
        return build(*args)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError,
            ValueError) as error:
        return (f"<p class=note>This part could not be drawn: {text(type(error).__name__)}, "
                f"{text(error)}</p>")


def sections(runs):
    """One part of the page for each stage, in the order in which the runs were made."""
    album, by_stage = Album(), {}
    for run in runs:
        by_stage.setdefault(run.stage, []).append(run)
    for stage, group in by_stage.items():
        number, title, words = STAGES.get(stage, ("", stage.capitalize(), ""))
        prefix = ["" if len(group) == 1 else f"{run.name}: " for run in group]
        lines = "".join(attempt(charts, run, name) for run, name in zip(group, prefix))
        style = f"s-{stage}" if stage in STAGES else "s-data"
        anchor = f"stage-{list(by_stage).index(stage) + 1}"
        yield anchor, title, (
            f"<section id={anchor} class={style}><h2>"
            + f"<span class=number>{number}</span> " * bool(number) + f"{text(title)}</h2>"
            + f"<p>{words}</p>" * bool(words) + f"<div class=charts>{lines}</div>"
            + "".join(attempt(album.show, run, name) for run, name in zip(group, prefix))
            + "".join(attempt(particulars, run) for run in group) + "</section>")


def page(runs, table, title):
    """The whole page."""
    stages = list(sections(runs))
    some = next((run.settings for run in runs if run.settings), {})
    spent = sum(run.number("seconds") or 0 for run in runs)
    words = [f"{len(runs)} runs" if len(runs) > 1 else f"stage {runs[0].stage}",
             f"seed {some.get('seed', '–')}", str(some.get("device", "")),
             str(some.get("precision", "")),
             f"{spent:,.0f} seconds" if spent < 120 else f"{spent / 60:,.0f} minutes"]
    drawn, rows = attempt(system, runs, table), attempt(table_of, table)
    links = [("system", "system")] * bool(drawn) + [("table", "table")] * bool(rows) \
        + [(anchor, name) for anchor, name, _ in stages] + [("times", "time and memory")]
    nav = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name in links)
    return ('<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport '
            'content="width=device-width, initial-scale=1"><meta name=color-scheme content="light '
            'dark"><meta http-equiv=Content-Security-Policy content="default-src \'none\'; img-src '
            'data:; style-src \'unsafe-inline\'"><link rel=icon href="data:,">'
            f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><header><h1>"
            f"{text(title)}</h1><p>{text(', '.join(word for word in words if word))}</p><nav "
            f'aria-label="Parts of this page"><ul>{nav}</ul></nav></header>\n<main>{drawn}\n{rows}'
            + "\n".join(body for _, _, body in stages) + "\n" + attempt(times, runs)
            + "</main>\n<footer><p>Made by minInternVideo, after InternVideo (arXiv 2212.03191). "
            "This page is one file and loads nothing.</p></footer></body></html>\n")


def write(folder, names=()):
    """Write report.html into the folder of a run; with names, of the runs in these folders in it.

    Returns its path, or None where it could not be written: that is said, and is no error.
    """
    folder = Path(folder)
    runs = [Record(folder / name) for name in names] or [Record(folder)]
    title = "minInternVideo: " + ("the default run" if names else f"the run {runs[0].name}")
    path = folder / "report.html"
    try:
        content = page(runs, read_json(folder / "table.json"), title)
        weights.write_aside(path, lambda aside: Path(aside).write_text(content, encoding="utf-8"))
    except OSError as error:
        print(f"{path} was not written: {error.strerror or error}")
        return None
    return path


# The colours are those of the system's parts: blue the masked encoder, green the multimodal one,
# orange what is between them.
STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #23272e;
  --soft: #666d78; --rule: #e3e1da; --blue: #2b6cb0; --green: #2f7d54; --violet: #6b4fa0;
  --orange: #b8651b; --grey: #5d6673; --tint: 9%; --accent: var(--grey) }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1c2026; --ink: #dfe3e8;
  --soft: #9aa3af; --rule: #2f353d; --blue: #7db4ee; --green: #78c79b; --violet: #b9a2e8;
  --orange: #eaa866; --grey: #a4adb9; --tint: 16% } }
.s-mae { --accent: var(--blue) } .s-clip { --accent: var(--green) }
.s-classify { --accent: var(--violet) } .s-fuse { --accent: var(--orange) }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 0 max(1rem, 3vw) 3rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere }
header { padding: 2.5rem 0 0 } h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
header p { margin: .4rem 0 1rem; color: var(--soft) }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem } h3 { font-size: 1rem; margin: 2rem 0 .3rem }
section { margin: 3.5rem 0 0; scroll-margin-top: 1rem } section > p { max-width: 44rem; margin: 0 0 1rem }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0; padding: 0;
  font-size: .92rem }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em }
.number { display: inline-grid; place-items: center; width: 1.7rem; height: 1.7rem;
  border-radius: 50%; background: var(--accent); color: var(--page); font-size: .95rem }
.note, figcaption p { color: var(--soft); font-size: .875rem; margin: .3rem 0 }
figure { margin: 0 } figcaption p:first-child { color: var(--ink) }
.scroll { overflow-x: auto; max-width: 100% } img { display: block }
.system svg { width: 100%; height: auto; font-size: 13.5px } .system .tall { display: none }
.system text { text-anchor: middle; fill: var(--ink) } .system .title { font-weight: 600; font-size: 15px }
.system .file { font: 12px ui-monospace, monospace; fill: var(--soft) }
.system .fact { fill: var(--accent) } .system .s-data .fact { fill: var(--ink) }
.system rect { fill: color-mix(in srgb, var(--accent) var(--tint), var(--card)); stroke: var(--accent) }
.system .badge { fill: var(--accent) } .system .badge-text { fill: var(--page); font-weight: 700; font-size: 13px }
.system .off { opacity: .38 } .arrow { fill: none; stroke: var(--soft); stroke-width: 1.4 }
.head { fill: var(--soft) } .system .label { font-size: 12.5px; fill: var(--soft); paint-order: stroke;
  stroke: var(--page); stroke-width: 4px } .system .label.number { fill: var(--ink) }
.charts { display: grid; gap: 1.5rem 2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.chart figcaption { font-weight: 600; font-size: .92rem } .chart svg { width: 100%; height: auto }
.chart text { fill: var(--soft); font-size: 12px } .rule { stroke: var(--rule) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .1rem 0; padding: 0;
  font-weight: 400; font-size: .82rem; color: var(--soft) }
.legend li::before { content: ""; display: inline-block; width: 1.1rem; height: 0; margin-right: .4rem;
  vertical-align: .25em; border-top: 2.5px solid var(--line) }
.line { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round } .dot { fill: var(--line) }
.train { --line: color-mix(in srgb, var(--soft) 65%, var(--page)) } .held { --line: var(--accent) }
.trivial { --line: var(--ink); stroke-dasharray: 5 4 } .legend .trivial::before { border-top-style: dashed }
.c0 { --line: var(--blue) } .c1 { --line: var(--green) } .c2 { --line: var(--orange) } .c3 { --line: var(--violet) }
.c4 { --line: #c2496b } .c5 { --line: #3a9ca6 } .c6 { --line: #a08a2c } .c7 { --line: var(--grey) }
.clips { display: flex; flex-wrap: wrap; gap: 1.4rem 1.6rem; margin: .8rem 0 }
.gif img { height: auto; max-width: 100%; border-radius: 6px } .gif { max-width: 30rem }
.stills { display: grid; gap: 1.5rem } .png img { background: #fff; border-radius: 8px; height: auto;
  width: auto; max-width: max(100%, 38rem) } .png .scroll { border-radius: 8px }
@media (prefers-color-scheme: dark) { .png img { filter: brightness(.88) } }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .5rem }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); overflow-wrap: normal }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page) }
thead th { font-weight: 500; color: var(--soft); vertical-align: bottom } tbody th { font-weight: 500 }
td strong { font-weight: 700 } .bar { display: block; height: 3px; margin: 2px 0 0 auto; background: var(--blue); border-radius: 2px }
details { border-top: 1px solid var(--rule); padding: .5rem 0 } details:last-child { border-bottom: 1px solid var(--rule) }
.stills + details, .clips + details, .charts + details { margin-top: 2rem }
summary { cursor: pointer; color: var(--soft); font-size: .92rem } details > :not(summary) { margin: .8rem 0 }
dl { columns: 19rem; column-gap: 2.5rem; font-size: .875rem } dl div { break-inside: avoid; display: flex;
  gap: 1rem; justify-content: space-between; border-bottom: 1px solid var(--rule); padding: .15rem 0 }
dt { color: var(--soft); flex: 0 1 auto } dd { margin: 0; text-align: right; min-width: 40% }
footer { margin-top: 4rem; color: var(--soft); font-size: .875rem }
@media (max-width: 46rem) { .system .wide { display: none } .system .tall { display: block; font-size: 12.5px }
  .system .tall .title { font-size: 13px } .system .tall .file, .system .tall .label { font-size: 11.5px }
  table { font-size: .82rem } th, td { padding: .35rem .5rem } }
"""
