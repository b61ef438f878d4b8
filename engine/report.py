"""report.html: what a run did and learned, on one page that needs nothing beside it.

    metrics.json, log.jsonl, config.json, table.json --+
    *.png, *.gif --------------------------------------+--> write(folder) --> report.html

The idea, in steps:
1. `Record` reads what one run left. A file that is missing or odd is an empty one: a page with less
   on it, never a run that fails.
2. `engine.system` draws the four stages of InternVideo with this run's numbers in the boxes;
   `engine.page` has tables and lines; `Album` puts pictures into the page, as text, while there is
   room.
3. `sections` puts them in the order of the runs; `write` puts a page around them.

No script, no font and no picture comes from elsewhere: the page opens without a network and can be
sent by mail. It follows the reader's light or dark mode. All text of files and names is escaped.
No model is known here; the four stages of the paper are, by their names.
"""

import base64
import json
from pathlib import Path

import weights
from engine.page import (STYLE, chart, details, grid, is_number, millions, note, pairs, part, short,
                         text)
from engine.system import system

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

PICTURES = {  # kind_of the file: (heading, what to see there)
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


def content_of(path):
    """The text of a file; "" where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def dict_in(content):
    """The dict that JSON holds; {} where it holds none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Record:
    """What one run left in its folder: metrics, settings, config, lines of the log."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name or "run"
        self.metrics, self.config = (dict_in(content_of(self.folder / f"{name}.json"))
                                     for name in ("metrics", "config"))
        self.settings = part(self.metrics, "settings")
        self.stage = str(self.metrics.get("stage", "run"))
        rows = map(dict_in, content_of(self.folder / "log.jsonl").splitlines())
        self.lines = [row for row in rows if is_number(row.get("step"))]

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


# --------------------------------------------------------------------------------------------------
# Pieces of a page


class Album:
    """Pictures of a page, as text in it, while there is room."""

    def __init__(self):
        self.room = MOST_BYTES

    def picture(self, path, words):
        """A PNG or GIF -> (the image, lines that say what it shows: a GIF's comment, else words).

        Instead of the image a line, where there is none, or no room for it.
        """
        from PIL import Image  # late, as in engine/pictures.py
        try:
            with Image.open(path, formats=("PNG", "GIF")) as picture:
                (width, height), kind = picture.size, picture.format.lower()
                comment = picture.info.get("comment")
            content = path.read_bytes()
        except (OSError, ValueError, SyntaxError):
            return note(f"{path.name} is no picture that can be read"), [], 1
        if isinstance(comment, bytes) and comment:
            words = comment.decode("utf-8", "replace")
        if len(content) > self.room:
            return note(f"{path.name}, {len(content) / 1e6:.1f} MB, has no room on this page; it "
                        "lies beside it"), words.splitlines(), 1
        self.room -= len(content)
        data = base64.b64encode(content).decode()
        return (f'<img alt="{text(" ".join(words.splitlines()))}" width={width} height={height} '
                f'src="data:image/{kind};base64,{data}">', words.splitlines(), width / height)

    def of_kind(self, kind, paths):
        """Pictures of one kind under their heading. paths: [(name of the run or "", path)]"""
        heading, words = PICTURES.get(kind, (kind.replace("_", " "), ""))
        moving = paths[0][1].suffix == ".gif"
        found = [(name, *self.picture(path, f"{heading}: {words or path.name}"))
                 for name, path in paths]
        # What all clips say is said once.
        same = [line for line in found[0][2] if line.startswith("left to right")
                and all(line in lines for _, _, lines, _ in found)]
        shown = []
        for name, image, lines, _ in found:
            below = [name] * bool(name) + [line for line in lines if moving and line not in same]
            shown.append(
                "<figure>" + (image if moving else f"<div class=scroll tabindex=0>{image}</div>")
                + "<figcaption>" * bool(below) + "".join(f"<p>{text(line)}</p>" for line in below)
                + "</figcaption>" * bool(below) + "</figure>")
        style = ("strips" if found[0][3] > 2 else "clips") if moving else \
            "stills several" if found[1:] else "stills"
        said = "; ".join([words, *same] if words else same)
        return (f"<h3>{text(heading)}</h3>" + note(f"{said[:1].upper()}{said[1:]}.") * bool(said)
                + f'<div class="{style}">{"".join(shown)}</div>')

    def show(self, runs):
        """All pictures of runs, in the order of PICTURES."""
        found = {}
        for run in runs:
            moving = sorted(run.folder.glob("*.gif"))
            # Clips that move are better than the same as strips; lines are drawn from the log.
            others = {kind_of(path) for path in moving} | {"loss", "gates", "table"}
            for path in moving + [path for path in sorted(run.folder.glob("*.png"))
                                  if kind_of(path) not in others]:
                found.setdefault(kind_of(path), []).append((run.name if runs[1:] else "", path))
        order = [kind for kind in PICTURES if kind in found]
        order += [kind for kind in found if kind not in PICTURES]
        return "".join(self.of_kind(kind, found[kind]) for kind in order)


def kind_of(path):
    """The name of a picture without its number: captions_3.gif -> "captions"."""
    return path.stem.rstrip("0123456789").rstrip("_") or path.stem


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
    body = [(text(name), [text(f"{value:.1f}" if isinstance(value, float) else short(value))
                          for value in (row.get(column, "–") for column in columns)])
            for name, row in rows.items()]
    return ("<section id=table><h2>What each encoder knows, and both together</h2>"
            + note(table.get("protocol", "")) + grid("accuracies", columns, body, best)
            + note("All facts: motion, shape and colour right in one clip. Unseen: pairs of shape "
                   "and colour that no training clip has. From scratch: the masked encoder's "
                   "network, trained on labels only. Late fusion: the mean of both encoders' "
                   "probabilities. The best of each column is bold.") + "</section>")


ACCURACIES = {"val_all_facts": "all facts", "unseen_all_facts": "all facts, unseen pairs",
              "val_top1": "top 1", "val_top5": "top 5", "val_mAP": "mAP",
              "val_accuracy": "answers right", "val_t2v_R@1": "sentences find their clip",
              "val_captions_all_three": "captions right",
              "val_zero_shot_all_facts": "all facts, zero-shot"}


def charts(runs):
    """Losses and accuracies over steps, and gates and shares where the log has them."""
    drawn = []
    for run in runs:
        lines = [("training", "train", run.points("loss")), ("held out", "held",
                                                             run.points("val_loss")),
                 ("trivial baseline", "trivial", run.points("val_trivial_loss"))]
        drawn.append(chart(f"{run.name}: loss" if runs[1:] else "Loss", lines))
    for title, word, names in (("Accuracy in percent", "", ACCURACIES),
                               ("Tanh of each gate; 0 is closed", "gate_", {}),
                               ("Share of each score", "share_", {})):
        for run in runs:
            keys = names or {key: key.removeprefix(word) for key in sorted(run.last(word))}
            lines = [(name, run.points(key)) for key, name in keys.items() if run.points(key)]
            drawn.append(chart(f"{run.name}: {title.lower()}" if runs[1:] else title,
                               [(name, f"c{i % 8}", points)
                                for i, (name, points) in enumerate(lines)]))
    return f"<div class=charts>{''.join(drawn)}</div>" if any(drawn) else ""


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
            once[key.replace("_", " ")] = short(value)
    columns = {start: name for start, name in columns.items()
               if any(start in row for row in rows.values())}
    table = grid("all numbers", columns.values(),
                 [(text(name.replace("_", " ")), [text(row.get(start, "")) for start in columns])
                  for name, row in rows.items()]) if rows else ""
    return table + (pairs(once) if once else "")


def particulars(run):
    """Numbers, protocol, settings and bad files of a run, behind a click."""
    bad = part(run.metrics, "bad_files")
    bodies = {"Numbers": attempt(numbers, run),
              "What was measured": pairs(part(run.metrics, "protocol")),
              "Settings": pairs({name.replace("_", "-"): value  # as the flags are typed
                                 for name, value in run.settings.items()}),
              f"{len(bad):,} files that could not be read" + ", the first 100" * (len(bad) > 100):
                  pairs(dict(list(bad.items())[:100]))}
    body = "".join(f"<h4>{title}</h4>{body}" for title, body in bodies.items()
                   if body not in ("", pairs({})))
    return details(f"{run.name}: all numbers and settings", body) if body else ""


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
    return ("<section id=times><h2>Time and memory</h2>"
            + grid("time and memory", ["steps", "parameters", "trained", "clips/s",
                                       "waits for clips", "memory, MiB", "seconds"], rows)
            + note("Speed is the median of the log, memory its peak."
                   + " A run after others counts their memory too." * (len(runs) > 1))
            + "</section>")


def attempt(build, *args):
    """What build(*args) returns; where files are odd, a line that says so."""
    try:
        return build(*args)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError,
            ValueError) as error:
        return note(f"This part could not be drawn: {type(error).__name__}, {error}")


def sections(runs):
    """One part of the page for each stage, in the order in which the runs were made."""
    album, by_stage = Album(), {}
    for run in runs:
        by_stage.setdefault(run.stage, []).append(run)
    for place, (stage, group) in enumerate(by_stage.items(), 1):
        number, title, words = STAGES.get(stage, ("", stage.capitalize(), ""))
        yield f"stage-{place}", title, (
            f'<section id=stage-{place} class="s-{stage if stage in STAGES else "data"}"><h2>'
            + f"<span class=number>{number}</span> " * bool(number) + f"{text(title)}</h2>"
            + f"<p>{words}</p>" * bool(words) + attempt(charts, group)
            + attempt(album.show, group) + "".join(attempt(particulars, run) for run in group)
            + "</section>")


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
    links = [("system", "The system")] * bool(drawn) + [("table", "The table")] * bool(rows) \
        + [(anchor, name) for anchor, name, _ in stages] + [("times", "Time and memory")]
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

    Prints and returns its path; or says why it could not be written, which is no error: None.
    """
    folder = Path(folder)
    runs = [Record(folder / name) for name in names] or [Record(folder)]
    title = "minInternVideo: " + ("the default run" if names else f"the run {runs[0].name}")
    path = folder / "report.html"
    try:
        content = page(runs, dict_in(content_of(folder / "table.json")), title)
        weights.write_aside(path, lambda aside: Path(aside).write_text(content, encoding="utf-8"))
    except OSError as error:
        print(f"{path} was not written: {error.strerror or error}")
        return None
    print(f"one page of it all: {path}")
    return path
