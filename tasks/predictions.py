"""What a classifier says of each clip: printed, as a table, as a picture.

    python tasks/recognition.py VIDEO ... --weights RUN
    python tasks/recognition.py FOLDER --weights RUN --out runs/said

prints the likeliest classes of each file. VIDEO may also be a folder or a list, with labels or
without. RUN is a run of `classify` or `fuse`, or an official classifier. Clips have as many frames
and pixels as the model was made for, cut out as in the run's own evaluation.

With --out it writes predictions.csv and predictions.png. Runs of `classify` and `fuse` write the
same table about their held-out clips. Its columns: path; part, where a clip is a part of a video,
as `start-end` in seconds (`frames start-end` in frames); true; class1, p1, ... class5, p5: the
likeliest classes and their probabilities. Where there are several questions, the last eleven come
once for each, and begin with its name, as shape_true. A clip with several true classes has them
joined by ";".
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import torch

import data
import fusion
import weights
from engine import machine, pictures
from engine.errors import UserError, printable
from tasks import class_names, recognition
from tasks.probes import AttentiveProbe
from video.sampling import SAMPLINGS
from video.transforms import TRANSFORMS, normalise
from weights import encoders

TOP = 5  # classes in the table
DRAWN = 20  # clips in a picture

# ------------------------------------------------------------------------------------------------
# The table


def likeliest(probabilities, names, top=TOP):
    """probabilities (B, answers) -> for each clip [(name, probability), ...], the highest first."""
    best = map(torch.Tensor.tolist, probabilities.topk(min(top, len(names)), dim=1))
    return [[(names[i], share) for share, i in zip(*clip)] for clip in zip(*best)]


def rows_of(found, classes):
    """Rows of the table: (path, part, {question: (true classes, likeliest)}).

    found  "names", "answers" and "probabilities", see recognition.evaluate
    """
    said = {question: zip(true_names(found["answers"][question], names),
                          likeliest(found["probabilities"][question], names))
            for question, names in classes.items()}
    return [(path, part, {question: next(rows) for question, rows in said.items()})
            for path, part in found["names"]]


def true_names(labels, names):
    """Labels int (B,), -1 = none, or (B, answers) with a one for each -> a list of names for each
    clip."""
    if labels.ndim == 2:
        return [[names[j] for j in row.nonzero()[:, 0].tolist()] for row in labels.cpu()]
    return [[names[i]] if i >= 0 else [] for i in labels.tolist()]


def write(path, rows, classes):
    """Write rows as predictions.csv."""
    alone = len(classes) == 1
    columns, count = ["path", "part"], {}
    for question, names in classes.items():
        count[question] = min(TOP, len(names))
        begin = "" if alone else f"{question}_"
        columns += [f"{begin}true"] + [f"{begin}{word}{place}" for place in
                                       range(1, count[question] + 1) for word in ("class", "p")]

    def fill(aside):
        with open(aside, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            for name, part, said in rows:
                cells = [name, spelled(part)]
                for true, best in said.values():
                    cells.append(";".join(true))
                    for label, share in best:
                        cells += [label, f"{share:.4f}"]
                table.writerow(cells)
    weights.write_aside(path, fill)


def spelled(part):
    """A part in seconds as "12.5-20", in frames as "frames 12-20"; None -> ""."""
    if part is None:
        return ""
    return "frames " * part.in_frames + f"{part.start:g}-{part.end:g}"


# ------------------------------------------------------------------------------------------------
# Any classifier


class Classifier:
    """A trained classifier, out of whatever holds one.

    source  a run of `classify` or `fuse`, or an official file
    raises  WeightsError; UserError where it has no classifier

    model                 in eval mode
    encoder               the one inside, which may be `model` itself; None where there are two
    classes, several      {question: names}, numbers where nothing tells names; see class_names
    frames, size          T, (H, W) of its clips
    """

    def __init__(self, source, device="cpu"):
        kind = weights.read(source)[1].get("model")
        load = {"InternVideo": fusion.InternVideo.from_run,
                "AttentiveProbe": AttentiveProbe.from_run}.get(kind)
        count = None if load else encoders.made_for(source)[2]
        if count == 0:
            raise UserError(f"{source}: has no classifier; train one: train.py classify "
                            "--weights ...")
        self.model = (load or encoders.load_encoder)(source).to(device).eval()
        self.fused, self.device = kind == "InternVideo", device
        parts = [self.model.masked, *self.model.multimodal] if self.fused else \
            [getattr(self.model, "encoder", self.model) if load else self.model]
        self.encoder = None if self.fused else parts[0]
        self.frames = max(part.config["frames"] for part in parts)
        self.size = fusion.largest(parts)
        count = (parts[0] if self.fused else self.model).config["classes"]
        names, self.several = class_names.read(source, count)
        self.classes = names or {"class": tuple(map(str, range(count)))}

    def scores(self, clip):
        """uint8 (B, T, H, W, 3) -> logits (B, Y)"""
        clip = torch.as_tensor(clip).to(self.device)
        return self.model(clip if self.fused else
                          normalise(clip, self.model.mean, self.model.std)).float()

    def probabilities(self, logits):
        """Logits (B, Y) -> {question: (B, answers)}, on the CPU."""
        return recognition.probabilities(recognition.split(logits.cpu(), self.classes),
                                         self.several)


def print_likeliest(probabilities, classes, top, who=""):
    """A line for each question: the likeliest answers of one clip {question: (1, answers)}."""
    for question, names in classes.items():
        best, = likeliest(probabilities[question], names, top)
        print(f"{who}{question:8s} " + ", ".join(f"{name} {share:.0%}" for name, share in best))


# ------------------------------------------------------------------------------------------------
# The command


def recipe_of(source):
    """How a run cuts out its clips in evaluation: {"sampling", "transform", "stride",
    "frame_rate"}."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    settings = {}
    if (folder / "metrics.json").exists():
        try:
            settings = json.loads((folder / "metrics.json").read_text())["settings"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder / 'metrics.json'}: not what a run writes ({error})") from None
    return {"sampling": settings.get("sampling", "segment"),
            "transform": settings.get("transform", "plain"),
            "stride": settings.get("sampling_rate", 4),
            "frame_rate": settings.get("frame_rate", 25.0)}


def predict(classifier, source, recipe, batch_size):
    """Rows of the table for all clips of a source, and their clips: yields (row, clip (T, H, W, 3),
    []), and at the end (None, None, [(path, reason) of each that cannot be read])."""
    clips = data.open_clips(source, classifier.frames, classifier.size, train=False, **recipe)
    for batch in data.held_out(clips, None, batch_size):
        said = classifier.probabilities(classifier.scores(batch["video"]))
        names, count = recognition.names_of(batch), len(batch["video"])
        # True classes have the names that the data set gives them.
        true = {question: true_names(batch["labels"][question], clips.classes[question])
                for question in clips.classes if question in batch["labels"]}
        best = {question: zip(true.get(question, [[]] * count), likeliest(said[question], known))
                for question, known in classifier.classes.items()}
        for (path, part), clip in zip(names, batch["video"].numpy()):
            yield (path, part, {question: next(rows) for question, rows in best.items()}), clip, []
        yield None, None, batch["bad"]


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="recognition.py", description="Which class a trained "
                                     "model sees in each video.")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a video, a folder or a list")
    parser.add_argument("--weights", required=True, metavar="RUN", help="a run of classify or "
                        "fuse, or an official classifier")
    parser.add_argument("--out", default="", metavar="FOLDER", help="write predictions.csv and "
                        f"predictions.png, with the first {DRAWN} clips, here")
    parser.add_argument("--sampling", choices=tuple(SAMPLINGS), help="which frames; default: as "
                        "the run evaluates, of official files segment")
    parser.add_argument("--transform", choices=tuple(TRANSFORMS), help="how they are cropped; "
                        "default: as the run evaluates, of official files plain")
    parser.add_argument("--top", type=int, default=TOP,
                        help=f"classes to print, at most {TOP} (default: {TOP})")
    parser.add_argument("--eval-batch", type=int, default=8, help="clips at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@torch.no_grad()
def run(args):
    """Print, and write where --out says so. Returns the exit code: 0, or 1 where a file cannot be
    read."""
    if not 1 <= args.top <= TOP or args.eval_batch < 1:
        raise UserError(f"--top {args.top}, --eval-batch {args.eval_batch}: must be at least 1, "
                        f"--top at most {TOP}")
    classifier = Classifier(args.weights, machine.choose_device(args.device))
    recipe = recipe_of(args.weights)
    recipe |= {key: getattr(args, key) for key in ("sampling", "transform") if getattr(args, key)}
    rows, shown, unreadable = [], [], []
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for source in args.videos:
        for row, clip, bad in predict(classifier, source, recipe, args.eval_batch):
            unreadable += bad
            if row is None:
                continue
            rows.append(row)
            shown += [clip] * (len(shown) < DRAWN)
            print(printable(line_of(row, args.top)))
    for path, reason in unreadable:
        print(f"not readable: {printable(reason)}", file=sys.stderr)
    if args.out:
        write(Path(args.out) / "predictions.csv", rows, classifier.classes)
        pictures.predictions(shown, list(map(answers_of, rows[:DRAWN])),
                             Path(args.out) / "predictions.png")
        print(f"written: {args.out}/predictions.csv, {args.out}/predictions.png")
    return 1 if unreadable else 0


def answers_of(row):
    """A row of the table for a picture: (title, {question: [(name, probability), ...]})."""
    path, part, said = row
    title = " ".join([Path(path).name, *[f"{spelled(part)} s"] * (part is not None)])
    true = "; ".join(name for names, _ in said.values() for name in names)
    return title + f" (true: {true})" * bool(true), {name: best for name, (_, best) in said.items()}


def line_of(row, top):
    """A row of the table, as it is printed."""
    path, part, said = row
    answers = [f"{question}: " * (len(said) > 1)
               + ", ".join(f"{name} {share:.0%}" for name, share in best[:top])
               for question, (_, best) in said.items()]
    place = f" {spelled(part)} s" if part is not None else ""
    return f"{path}{place}  " + "; ".join(answers)


def main(argv=None):
    """The command. Returns the exit code: 0, 1 where a file cannot be read, 2 for a mistake."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:  # UserError is a ValueError
        print(f"recognition.py: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
