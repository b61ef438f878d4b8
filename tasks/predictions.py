"""Print the most likely classes of each clip, and write them as a table and a picture.

    python tasks/recognition.py VIDEO ... --weights RUN
    python tasks/recognition.py FOLDER --weights RUN --out runs/predictions

VIDEO may also be a folder or a list, with or without labels. RUN is a run of `classify` or `fuse`,
or an official classifier. The model determines the number of frames and pixels of the clips. They
are sampled and cropped as in the run's own evaluation.

--out writes predictions.csv and predictions.png. Runs of `classify` and `fuse` write the same table
about their held-out clips. Its columns:

    path                         of the video
    part                         `start-end` in seconds, or `frames start-end`, if the clip is a
                                 part of a video
    true                         the true class; several are joined by ";"
    class1, p1, ... class5, p5   the most likely classes and their probabilities

If there are several questions, the last eleven columns are repeated for each question, and their
names begin with the question, as in shape_true.
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

TOP = 5  # classes per clip in the table
DRAWN = 20  # clips in the picture

# ------------------------------------------------------------------------------------------------
# The table


def likeliest(probabilities, names, top=TOP):
    """probabilities (B, answers) -> for each clip [(name, probability), ...], the highest first."""
    best = map(torch.Tensor.tolist, probabilities.topk(min(top, len(names)), dim=1))
    return [[(names[i], share) for share, i in zip(*clip)] for clip in zip(*best)]


def rows_of(results, classes):
    """Rows of the table: (path, part, {question: (true classes, likeliest classes)}).

    results  with "names", "answers" and "probabilities", see recognition.evaluate
    """
    columns = {question: zip(true_names(results["answers"][question], names),
                             likeliest(results["probabilities"][question], names))
               for question, names in classes.items()}
    return [(path, part, {question: next(rows) for question, rows in columns.items()})
            for path, part in results["names"]]


def true_names(labels, names):
    """Names of the true classes: a list for each clip.

    labels  int (B,), -1 = no label; or (B, answers) with a one for each true class
    """
    if labels.ndim == 2:
        return [[names[j] for j in row.nonzero()[:, 0].tolist()] for row in labels.cpu()]
    return [[names[i]] if i >= 0 else [] for i in labels.tolist()]


def write(path, rows, classes):
    """Write rows as predictions.csv."""
    alone = len(classes) == 1
    columns, count = ["path", "part"], {}
    for question, names in classes.items():
        count[question] = min(TOP, len(names))
        prefix = "" if alone else f"{question}_"
        columns += [f"{prefix}true"] + [f"{prefix}{word}{rank}" for rank in
                                        range(1, count[question] + 1) for word in ("class", "p")]

    def fill(aside):
        with open(aside, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            for name, part, answers in rows:
                cells = [name, spelled(part)]
                for true, best in answers.values():
                    cells.append(";".join(true))
                    for label, share in best:
                        cells += [label, f"{share:.4f}"]
                table.writerow(cells)
    weights.write_atomically(path, fill)


def spelled(part):
    """Part in seconds -> "12.5-20", part in frames -> "frames 12-20", None -> ""."""
    if part is None:
        return ""
    return "frames " * part.in_frames + f"{part.start:g}-{part.end:g}"


# ------------------------------------------------------------------------------------------------
# Any classifier


class Classifier:
    """A trained classifier from any run or file that has one.

    source  a run of `classify` or `fuse`, or an official file
    raises  WeightsError; UserError if there is no classifier in it

    Attributes:
    model            in eval mode
    encoder          the encoder, which may be `model` itself; None if there are two
    classes          {question: names}; the names are numbers if the weights have none
    several          questions that may have several answers, see class_names
    frames, size     T and (H, W) of its clips
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
        self.size = fusion.largest_image_size(parts)
        count = (parts[0] if self.fused else self.model).config["classes"]
        names, self.several = class_names.read(source, count)
        self.classes = names or {"class": tuple(map(str, range(count)))}

    def scores(self, clip):
        """uint8 (B, T, H, W, 3) -> logits (B, Y)"""
        clip = torch.as_tensor(clip).to(self.device)
        return self.model(clip if self.fused else
                          normalise(clip, self.model.mean, self.model.std)).float()

    def probabilities(self, logits):
        """Logits (B, Y) -> probabilities {question: (B, answers)}, on the CPU."""
        return recognition.probabilities(recognition.split_by_question(logits.cpu(), self.classes),
                                         self.several)


def print_likeliest(probabilities, classes, top, prefix=""):
    """Print a line for each question with the most likely answers about one clip.

    probabilities  {question: (1, answers)}
    prefix         text at the beginning of each line
    """
    for question, names in classes.items():
        best, = likeliest(probabilities[question], names, top)
        print(f"{prefix}{question:8s} " + ", ".join(f"{name} {share:.0%}" for name, share in best))


# ------------------------------------------------------------------------------------------------
# The command


def recipe_of(source):
    """How a run samples and crops its clips in evaluation: {"sampling", "transform", "stride",
    "frame_rate"}. Official files have no such record and get the defaults."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    settings = {}
    if (folder / "metrics.json").exists():
        try:
            settings = json.loads((folder / "metrics.json").read_text())["settings"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder / 'metrics.json'}: not written by a run ({error})") from None
    return {"sampling": settings.get("sampling", "segment"),
            "transform": settings.get("transform", "plain"),
            "stride": settings.get("sampling_rate", 4),
            "frame_rate": settings.get("frame_rate", 25.0)}


def predict(classifier, source, recipe, batch_size):
    """Classify all clips of a source.

    yields  (row, clip, []) for each clip: its row of the table and its frames (T, H, W, 3);
            (None, None, bad) after each batch: bad is [(path, reason), ...] of unreadable files
    """
    clips = data.open_clips(source, classifier.frames, classifier.size, train=False, **recipe)
    for batch in data.held_out(clips, None, batch_size):
        probabilities = classifier.probabilities(classifier.scores(batch["video"]))
        names, count = recognition.names_of(batch), len(batch["video"])
        # True classes have the names of the data set, which the classifier may not know.
        true = {question: true_names(batch["labels"][question], clips.classes[question])
                for question in clips.classes if question in batch["labels"]}
        best = {question: zip(true.get(question, [[]] * count),
                              likeliest(probabilities[question], known))
                for question, known in classifier.classes.items()}
        for (path, part), clip in zip(names, batch["video"].numpy()):
            yield (path, part, {question: next(rows) for question, rows in best.items()}), clip, []
        yield None, None, batch["bad"]


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="recognition.py", description="Print the classes that "
                                     "a trained model predicts for each video.")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a video, a folder or a list")
    parser.add_argument("--weights", required=True, metavar="RUN", help="a run of classify or "
                        "fuse, or an official classifier")
    parser.add_argument("--out", default="", metavar="FOLDER", help="write predictions.csv and "
                        f"predictions.png, with the first {DRAWN} clips, here")
    parser.add_argument("--sampling", choices=tuple(SAMPLINGS), help="how frames are chosen; "
                        "default: as in the run's evaluation; for official files segment")
    parser.add_argument("--transform", choices=tuple(TRANSFORMS), help="how frames are cropped; "
                        "default: as in the run's evaluation; for official files plain")
    parser.add_argument("--top", type=int, default=TOP,
                        help=f"classes to print, at most {TOP} (default: {TOP})")
    parser.add_argument("--eval-batch", type=int, default=8, help="clips at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@torch.no_grad()
def run(args):
    """Print the predictions, and write them to --out. Returns the exit code: 1 if a file cannot be
    read, else 0."""
    if not 1 <= args.top <= TOP or args.eval_batch < 1:
        raise UserError(f"--top {args.top}, --eval-batch {args.eval_batch}: must be at least 1, "
                        f"--top at most {TOP}")
    classifier = Classifier(args.weights, machine.choose_device(args.device))
    recipe = recipe_of(args.weights)
    recipe |= {key: getattr(args, key) for key in ("sampling", "transform") if getattr(args, key)}
    rows, drawn, unreadable = [], [], []
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for source in args.videos:
        for row, clip, failed in predict(classifier, source, recipe, args.eval_batch):
            unreadable += failed
            if row is None:
                continue
            rows.append(row)
            drawn += [clip] * (len(drawn) < DRAWN)
            print(printable(line_of(row, args.top)))
    for path, reason in unreadable:
        print(f"not readable: {printable(reason)}", file=sys.stderr)
    if args.out:
        write(Path(args.out) / "predictions.csv", rows, classifier.classes)
        pictures.predictions(drawn, list(map(answers_of, rows[:DRAWN])),
                             Path(args.out) / "predictions.png")
        print(f"written: {args.out}/predictions.csv, {args.out}/predictions.png")
    return 1 if unreadable else 0


def answers_of(row):
    """A row of the table as the picture shows it: (title, {question: [(name, probability), ...]}).
    """
    path, part, answers = row
    title = " ".join([Path(path).name, *[f"{spelled(part)} s"] * (part is not None)])
    true = "; ".join(name for names, _ in answers.values() for name in names)
    return (title + f" (true: {true})" * bool(true),
            {name: best for name, (_, best) in answers.items()})


def line_of(row, top):
    """A row of the table as it is printed."""
    path, part, answers = row
    texts = [f"{question}: " * (len(answers) > 1)
             + ", ".join(f"{name} {share:.0%}" for name, share in best[:top])
             for question, (_, best) in answers.items()]
    interval = f" {spelled(part)} s" if part is not None else ""
    return f"{path}{interval}  " + "; ".join(texts)


def main(argv=None):
    """The command. Returns the exit code: 0; 1 if a file cannot be read; 2 for a user's error."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:  # UserError is a ValueError
        print(f"recognition.py: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
