"""report.html: one self-contained page about a run, with its numbers, charts and pictures.

    metrics.json, log.jsonl, config.json, table.json --+
    *.png, *.gif --------------------------------------+--> write(folder) --> report.html

The idea, in steps:
1. `Record` reads the files of one run. A missing or damaged file counts as empty, so the page has
   less on it, but the run does not fail.
2. `engine.system` draws the four stages of InternVideo with numbers of the runs in the boxes.
   `engine.page` makes tables and charts. `Album` embeds pictures up to a size limit.
3. `sections` makes one section for each stage, and `write` makes the page.

The page loads no script, font or picture, so it works without a network and can be sent by mail. It
follows the light or dark mode of the browser. All text from files and names is escaped. The code
depends on no model, only on the names of the four stages.
"""

import base64
import json
from pathlib import Path

import weights
from engine.page import (STYLE, chart, details, grid, is_number, millions, note, pairs, part, short,
                         text)
from engine.system import system

MOST_BYTES = 3_400_000  # of pictures on a page; base64 adds a third; the whole page has 5 MB

STAGES = {  # name: (number, title, description)
    "mae": ("1", "Masked video modelling",
            "A part of each clip is hidden. The encoder sees the rest, and a small decoder "
            "predicts the hidden pixels. No label and no sentence is used."),
    "clip": ("2", "Video and language",
             "Two encoders map videos and sentences into one vector space. There, a video and its "
             "sentence come close to each other. A decoder learns to write the sentence."),
    "classify": ("3", "Supervised post-pretraining",
                 "A pretrained encoder learns classes from labels, or a probe learns them from the "
                 "frozen encoder. The same network from scratch shows the effect of pretraining."),
    "fuse": ("4", "Cross-model interaction",
             "Both encoders are frozen. Tokens of one encoder attend to tokens of the other. Gates "
             "start closed. The scores of both encoders are summed with learned shares."),
}

PICTURES = {  # result of kind_of: (heading, description)
    "reconstruction": ("Reconstructions", "held-out clips, a part of each hidden, and the model's "
                       "reconstruction"),
    "captions": ("Captions", "held-out clips, the model's caption for each, and a reference "
                 "caption"),
    "answers": ("Answers", "held-out clips, the model's answers, and each question with its "
                "correct answer"),
    "retrieval": ("Retrieval", "each sentence, and the clips that are nearest to it; green: "
                  "correct"),
    "similarity": ("Similarity", "the cosine of each sentence (row) and each clip (column); pairs "
                   "are on the diagonal"),
    "attention": ("Attention of the caption decoder", "a row for each word that it writes; the "
                  "clip is bright where the word attends"),
    "confusion": ("Confusion", "rows are true classes, columns are predictions; correct ones are "
                  "on the diagonal"),
    "cross_attention": ("Cross-model attention",
                        "left: a token of the masked encoder, framed; right: the clip, bright "
                        "where this token attends in the multimodal encoder"),
    "segments": ("Segments", "true segments of long videos, and the predicted ones"),
}

# --------------------------------------------------------------------------------------------------
# The files of a run


def content_of(path):
    """The text of a file; "" where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def dict_in(content):
    """JSON text -> the dict in it; {} where it has none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Record:
    """The files of one run: metrics, settings, config, lines of the log."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name or "run"
        self.metrics, self.config = (dict_in(content_of(self.folder / f"{name}.json"))
                                     for name in ("metrics", "config"))
        self.settings = part(self.metrics, "settings")
        self.stage = str(self.metrics.get("stage", "run"))
        rows = map(dict_in, content_of(self.folder / "log.jsonl").splitlines())
        self.lines = [row for row in rows if is_number(row.get("step"))]

    def number(self, *keys):
        """The first of these keys of metrics.json that has a number -> that number, or None."""
        return next((self.metrics[key] for key in keys if is_number(self.metrics.get(key))), None)

    def points(self, key):
        """[(step, value)] of a key of the log."""
        return [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]

    def last(self, word):
        """{key: last value} for the keys of the log that start with `word`."""
        return {key: value for line in self.lines for key, value in line.items()
                if key.startswith(word) and is_number(value)}

    def accuracy(self):
        """The accuracy on held-out clips in percent, or None."""
        return self.number("val_all_facts", "val_top1", "val_mAP")


# --------------------------------------------------------------------------------------------------
# Pictures


class Album:
    """The pictures of a page. They are embedded until their size reaches MOST_BYTES."""

    def __init__(self):
        self.room = MOST_BYTES

    def picture(self, path, words):
        """A PNG or GIF -> (HTML of the image, lines of its description, width / height).

        The description is the comment of a GIF, otherwise `words`. A note replaces the image where
        the file is not readable or too large.
        """
        from PIL import Image  # imported when needed, as in engine/pictures.py
        try:
            with Image.open(path, formats=("PNG", "GIF")) as picture:
                (width, height), kind = picture.size, picture.format.lower()
                comment = picture.info.get("comment")
            content = path.read_bytes()
        except (OSError, ValueError, SyntaxError):
            return note(f"{path.name} is not a readable picture"), [], 1
        if isinstance(comment, bytes) and comment:
            words = comment.decode("utf-8", "replace")
        if len(content) > self.room:
            return note(f"{path.name}, {len(content) / 1e6:.1f} MB, is too large for this page; it "
                        "is in the same folder"), words.splitlines(), 1
        self.room -= len(content)
        data = base64.b64encode(content).decode()
        return (f'<img alt="{text(" ".join(words.splitlines()))}" width={width} height={height} '
                f'src="data:image/{kind};base64,{data}">', words.splitlines(), width / height)

    def of_kind(self, kind, paths):
        """All pictures of one kind, with a heading. paths: [(name of the run or "", path)]"""
        heading, words = PICTURES.get(kind, (kind.replace("_", " "), ""))
        moving = paths[0][1].suffix == ".gif"
        drawn = [(name, *self.picture(path, f"{heading}: {words or path.name}"))
                 for name, path in paths]
        # A line that all clips share is printed once, above them.
        same = [line for line in drawn[0][2] if line.startswith("left to right")
                and all(line in lines for _, _, lines, _ in drawn)]
        shown = []
        for name, image, lines, _ in drawn:
            below = [name] * bool(name) + [line for line in lines if moving and line not in same]
            shown.append(
                "<figure>" + (image if moving else f"<div class=scroll tabindex=0>{image}</div>")
                + "<figcaption>" * bool(below) + "".join(f"<p>{text(line)}</p>" for line in below)
                + "</figcaption>" * bool(below) + "</figure>")
        style = ("strips" if drawn[0][3] > 2 else "clips") if moving else \
            "stills several" if drawn[1:] else "stills"
        caption = "; ".join([words, *same] if words else same)
        return (f"<h3>{text(heading)}</h3>"
                + note(f"{caption[:1].upper()}{caption[1:]}.") * bool(caption)
                + f'<div class="{style}">{"".join(shown)}</div>')

    def show(self, runs):
        """All pictures of runs, in the order of PICTURES."""
        found = {}
        for run in runs:
            moving = sorted(run.folder.glob("*.gif"))
            # A GIF replaces the PNG of the same kind. Charts and tables are made from other files.
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
    """The table of the default run from table.json; "" where there is none."""
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
    return ("<section id=table><h2>Accuracy of each encoder, and of both together</h2>"
            + note(table.get("protocol", "")) + grid("accuracies", columns, body, best)
            + note("All facts: motion, shape and colour are all correct. Unseen: pairs of shape "
                   "and colour that no training clip has. From scratch: the masked encoder's "
                   "network, all of whose weights train on labels. Fine-tuned: the same network "
                   "after stage 1. In the other rows the encoders are frozen. Untrained: random "
                   "weights. Sentences: no labels, the sentences about each class compete. Late "
                   "fusion: the mean of both encoders' probabilities, or a weighted mean, tuned on "
                   "validation clips. The best of each column is bold.") + "</section>")


ACCURACIES = {"val_all_facts": "all facts", "unseen_all_facts": "all facts, unseen pairs",
              "val_top1": "top 1", "val_top5": "top 5", "val_mAP": "mAP",
              "val_accuracy": "answers right", "val_t2v_R@1": "sentences find their clip",
              "val_captions_shape": "captions with the shape",
              "val_zero_shot_all_facts": "all facts, zero-shot"}


def charts(runs):
    """Charts over steps: losses, accuracies, and gates and shares if the log has them."""
    drawn = []
    for run in runs:
        lines = [("training", "train", run.points("loss")), ("held out", "held",
                                                             run.points("val_loss")),
                 ("trivial baseline", "trivial", run.points("val_trivial_loss"))]
        drawn.append(chart(f"{run.name}: loss" if runs[1:] else "Loss", lines, log=True))
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
    """All numbers of metrics.json: a row for each name, a column for each held-out set."""
    columns = {"initial_val_": "held out, at the start", "val_": "held out",
               "initial_unseen_": "unseen, at the start", "unseen_": "unseen", "test_": "test"}
    rows, single_values = {}, {}
    for key, value in run.metrics.items():
        if key in FACTS or not isinstance(value, (int, float, str)):
            continue
        prefix = next((prefix for prefix in columns if key.startswith(prefix)), None)
        if prefix:
            rows.setdefault(key.removeprefix(prefix), {})[prefix] = short(value)
        else:
            single_values[key.replace("_", " ")] = short(value)
    columns = {prefix: name for prefix, name in columns.items()
               if any(prefix in row for row in rows.values())}
    table = grid("all numbers", columns.values(),
                 [(text(name.replace("_", " ")), [text(row.get(prefix, "")) for prefix in columns])
                  for name, row in rows.items()]) if rows else ""
    return table + (pairs(single_values) if single_values else "")


def run_details(run):
    """Numbers, protocol, settings and unreadable files of a run, shown on a click."""
    bad = part(run.metrics, "bad_files")
    bodies = {"Numbers": attempt(numbers, run),
              "Protocol": pairs(part(run.metrics, "protocol")),
              "Settings": pairs({name.replace("_", "-"): value  # as the flags are typed
                                 for name, value in run.settings.items()}),
              f"{len(bad):,} files that could not be read" + ", the first 100" * (len(bad) > 100):
                  pairs(dict(list(bad.items())[:100]))}
    body = "".join(f"<h4>{title}</h4>{body}" for title, body in bodies.items()
                   if body not in ("", pairs({})))
    return details(f"{run.name}: all numbers and settings", body) if body else ""


def times(runs):
    """A table of steps, parameters, speed, memory and seconds of each run."""
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
            + note("Speed is the median of the log; memory is the peak."
                   + " It includes earlier runs of the same process." * (len(runs) > 1))
            + "</section>")


def attempt(build, *args):
    """build(*args); or a note with the error, where files have unexpected contents."""
    try:
        return build(*args)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError,
            ValueError) as error:
        return note(f"This part could not be drawn: {type(error).__name__}, {error}")


def sections(runs):
    """Yield (id, title, HTML) of one section for each stage, in the order of the runs."""
    album, by_stage = Album(), {}
    for run in runs:
        by_stage.setdefault(run.stage, []).append(run)
    for place, (stage, group) in enumerate(by_stage.items(), 1):
        number, title, words = STAGES.get(stage, ("", stage.capitalize(), ""))
        yield f"stage-{place}", title, (
            f'<section id=stage-{place} class="s-{stage if stage in STAGES else "data"}"><h2>'
            + f"<span class=number>{number}</span> " * bool(number) + f"{text(title)}</h2>"
            + f"<p>{words}</p>" * bool(words) + attempt(charts, group)
            + attempt(album.show, group) + "".join(attempt(run_details, run) for run in group)
            + "</section>")


def page(runs, table, title):
    """The whole page as HTML."""
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
    """Write report.html into the folder of a run -> its path, or None.

    names  subfolders of `folder`: one page about the runs in all of them

    Prints the path. If the file cannot be written, prints the reason instead and returns None.
    """
    folder = Path(folder)
    runs = [Record(folder / name) for name in names] or [Record(folder)]
    title = "minInternVideo: " + ("the default run" if names else f"the run {runs[0].name}")
    path = folder / "report.html"
    try:
        content = page(runs, dict_in(content_of(folder / "table.json")), title)
        weights.write_atomically(path, lambda aside: Path(aside).write_text(content,
                                                                            encoding="utf-8"))
    except OSError as error:
        print(f"{path} was not written: {error.strerror or error}")
        return None
    print(f"report: {path}")
    return path
