"""Recognition: which class a clip shows. Metrics, a probe, and what stages with labels share.

    clip -> encoder -> logits (B, Y) -> a softmax for each question -> accuracy in percent

A data set asks one or several questions: files of one label each ask "label", the generated world
asks for motion, shape and colour at once. Logits and targets hold the answers of all questions side
by side, Y in all. `classes` is always {question: tuple of class names}, in that order.

>>> classes = {"motion": ("left", "right"), "shape": ("ring", "star")}
>>> target = one_hot({"motion": torch.tensor([1]), "shape": torch.tensor([0])}, classes)
>>> target.tolist()
[[0.0, 1.0, 1.0, 0.0]]
>>> accuracies(split(target, classes), {"motion": torch.tensor([1]), "shape": torch.tensor([1])})
{'motion': 100.0, 'shape': 0.0, 'all_facts': 0.0}
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import weights
from attention import Attention
from engine import pictures, processes
from engine.errors import UserError
from engine.stage import Stage, flag
from video import sampling, transforms
from weights import encoders

# ------------------------------------------------------------------------------------------------
# Metrics


def size(classes):
    """Y, the number of answers to all questions."""
    return sum(map(len, classes.values()))


def split(x, classes):
    """(B, Y) -> the part of each question: {question: (B, answers)}."""
    return dict(zip(classes, x.split([len(names) for names in classes.values()], dim=1)))


def one_hot(labels, classes):
    """{question: int64 (B,)} -> (B, Y) float: a one at the right answer to each question.

    Raises UserError where a clip has no label, -1.
    """
    if any((labels[question] < 0).any() for question in classes):
        raise UserError("a video without a label")
    return torch.cat([F.one_hot(labels[question], len(names)).float()
                      for question, names in classes.items()], dim=1)


def cross_entropy(logits, target, classes, smoothing=0.0):
    """Sum over the questions of the mean cross entropies, in nats. logits, target (B, Y)."""
    return sum(F.cross_entropy(a, b, label_smoothing=smoothing) for a, b in
               zip(split(logits, classes).values(), split(target, classes).values()))


def accuracies(logits, answers):
    """{question: (B, answers)}, {question: int (B,)} -> {name: percent}.

    One question, "label": top 1 and top 5. Several: each of them, and "all_facts", the share of
    clips with all of them right.
    """
    right = {name: logits[name].argmax(dim=1) == answers[name] for name in logits}
    if list(logits) == ["label"]:
        likeliest = logits["label"].topk(min(5, logits["label"].shape[1])).indices
        five = (likeliest == answers["label"][:, None]).any(dim=1)
        return {"top1": percent(right["label"]), "top5": percent(five)}
    all_right = torch.stack(list(right.values())).all(dim=0)
    return {name: percent(hit) for name, hit in right.items()} | {"all_facts": percent(all_right)}


def percent(hits):
    """bool (B,) -> float"""
    return 100 * float(hits.float().mean())


def auroc(known, unknown):
    """Area under the ROC curve: how often a known clip (n,) scores above an unknown one (m,).

    Ties count half. Returns a float in [0, 1]; 0.5 is chance.
    """
    above = (known[:, None] > unknown).double() + 0.5 * (known[:, None] == unknown).double()
    return float(above.mean())


def merge_views(logits, form="softmax"):
    """Scores of several views of one video (n, Y) -> (Y,).

    "softmax": the mean of their probabilities (VideoMAE, Sec. 4; UniFormerV2 on Kinetics), so that
    one very sure view cannot outvote the others; "logits": the mean of the logits (UniFormerV2 on
    Something-Something).
    """
    return (logits.softmax(dim=1) if form == "softmax" else logits).mean(dim=0)


def evaluate(predict, batches, classes, device="cpu"):
    """Loss and accuracies of a model on held-out batches.

    predict  function of a batch -> logits (B, Y)
    batches  dicts with "labels" {question: int64 (B,)} and "number", the place among all batches
    returns  {"loss": nats, accuracies in percent}, and two tensors about the first question for
             pictures and for open sets: "confusion", int64 counts (true class, predicted class), and
             "confidence" (clips,), the largest probability of each clip
    """
    rows = []
    for batch in batches:
        logits = predict(batch)
        target = one_hot(batch["labels"], classes).to(logits.device)
        loss = float(cross_entropy(logits, target, classes)) * len(target)
        rows.append((batch["number"], logits, target, loss))
    _, logits, targets, losses = zip(*processes.collect(rows, device))
    logits, targets = split(torch.cat(logits), classes), split(torch.cat(targets), classes)
    answers = {question: target.argmax(dim=1) for question, target in targets.items()}
    first, names = next(iter(classes.items()))
    pairs = answers[first].cpu(), logits[first].argmax(dim=1).cpu()
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    return {"loss": sum(losses) / len(answers[first])} | accuracies(logits, answers) | {
        "confusion": confusion.index_put_(pairs, torch.tensor(1), accumulate=True),
        "confidence": logits[first].softmax(dim=1).amax(dim=1)}


# ------------------------------------------------------------------------------------------------
# A probe


class AttentiveProbe(torch.nn.Module):
    """One query attends to a frozen encoder's tokens; a linear layer names the class.

    The attentive probe of V-JEPA (arXiv 2404.08471, Sec. 3.2), for encoders whose mean token was
    never trained to represent the clip.

    encoder  either encoder; its own head is not used
    classes  Y
    """

    def __init__(self, encoder, classes, heads):
        super().__init__()
        self.encoder, self.mean, self.std = encoder, encoder.mean, encoder.std
        self.config = {"model": "AttentiveProbe", "encoder": encoder.config, "classes": classes,
                       "heads": heads}
        self.query = torch.nn.Parameter(torch.randn(1, 1, encoder.width) * encoder.width**-0.5)
        self.norm = torch.nn.LayerNorm(encoder.width)
        self.attn = Attention(encoder.width, heads, context_width=encoder.width)
        self.head = torch.nn.Linear(encoder.width, classes)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(encoders.from_config(config["encoder"]), config["classes"], config["heads"])

    @classmethod
    def from_run(cls, folder):
        """Load a run of `classify --mode attentive`, in eval mode. Raises WeightsError."""
        return weights.load_run(cls, folder, "a run of `train.py classify --mode attentive`")

    def classify(self, tokens):
        """tokens (B, N, D) -> logits (B, Y)"""
        query = self.query.expand(len(tokens), -1, -1)
        return self.head(self.attn(query, keys_from=self.norm(tokens))[:, 0])

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)"""
        return self.classify(self.encoder.tokens(video))


# ------------------------------------------------------------------------------------------------
# What the stages with labels share


class LabelledStage(Stage):
    """Questions, their answers, accuracies. `classify` and `fuse` add a model and its loss."""

    num_frames: int = flag(8, "frames per clip", paper="16, UniFormerV2 8", low=1, high=10**4,
                           group="clips")
    input_size: int = flag(40, "height and width in pixels", paper="224", low=1, high=10**4,
                           group="clips")
    sampling_rate: int = flag(4, "with --sampling dense: a clip takes every n-th frame", paper="4",
                              low=1, group="clips")
    sampling: str = flag("segment", "dense = neighbouring frames, segment = spread over the video; "
                         "the others are those of the published models", only="files",
                         paper="videomae-dense, uniformerv2", choices=tuple(sampling.SAMPLINGS),
                         group="clips")
    transform: str = flag("plain", "how frames are resized and cropped; plain is ours, the others "
                          "are those of the published models", only="files",
                          paper="videomae, uniformerv2", choices=tuple(transforms.TRANSFORMS),
                          group="clips")
    flip: bool = flag(False, "mirror half of the training clips: not where labels know left from "
                      "right", only="files", group="clips")
    area: float = flag(0.0, "smallest share of a frame that a random crop keeps; 0 = as --transform "
                       "has it", only="files", paper="0.08", low=0, high=1, group="clips")
    rand_augment: int = flag(0, "RandAugment operations per clip; 0 = none", only="files", paper="4",
                             low=0, group="clips")
    magnitude: int = flag(7, "strength of RandAugment, of 30", only="files", paper="7", low=0,
                          high=30, group="clips")
    erasing: float = flag(0.0, "probability that a box of the clip turns grey", only="files",
                          paper="0.25, with noise", low=0, high=1, group="clips")
    repeats: int = flag(1, "clips of each video in a batch, each cut out anew", only="files",
                        paper="2", low=1, group="clips")
    train_clips: int = flag(0, "train on so many clips, over and over; 0 = all", low=0,
                            group="clips")
    test_clips: int = flag(1, "clips along time in the last evaluation", only="files",
                           paper="4 to 7; 2 on Something-Something", low=1, group="clips")
    test_crops: int = flag(1, "crops along the longer side of each of these clips", only="files",
                           paper="3", low=1, group="clips")
    merge_views: str = flag("softmax", "what is averaged over these views", only="files",
                            paper="softmax; logits on Something-Something",
                            choices=("softmax", "logits"), group="clips")
    test: int = flag(0, "at the end also measure so many clips of the test split, which no choice "
                     "has ever used", only="generated", low=0, group="clips")

    def datasets(self):
        """Open the data sets; UserError where they do not name two classes or more."""
        if self.batch_size % self.repeats:
            raise UserError(f"--batch-size {self.batch_size}: must be a multiple of --repeats "
                            f"{self.repeats}")
        train_set, held_out = self.open_sets(
            stride=self.sampling_rate, flip=self.flip, area=self.area or None,
            operations=self.rand_augment, magnitude=self.magnitude, erasing=self.erasing)
        if self.train_clips:
            train_set.first(self.train_clips)
        if size(train_set.classes) < 2:
            raise UserError(f"--data {self.data}: {size(train_set.classes)} classes; needs a folder "
                            "of class folders, or a list of `path label` lines, with two or more "
                            "(shards serve mae and clip)")
        self.classes = train_set.classes
        return train_set, held_out

    def target(self, batch):
        """(B, Y): a one at the right answer to each question."""
        if "target" in batch:
            return batch["target"]
        try:
            return one_hot(batch["labels"], self.classes).to(self.device)
        except UserError as error:
            missing = [path for path, label in zip(batch["path"], batch["labels"]["label"])
                       if label < 0]
            raise UserError(f"{self.data}: {error}: {missing[0]}") from None

    def batches(self, train_set, first):
        return super().batches(train_set, first, repeats=self.repeats)

    def evaluate(self, model, batches, dataset):
        """Loss and accuracies in percent."""
        return evaluate(lambda batch: self.logits(model, batch), batches, self.classes, self.device)

    def finish(self, model, held_out):
        """Accuracies over several views of each held-out video, in files."""
        if self.test_clips * self.test_crops == 1:
            return {}
        rows = []
        views = held_out["val"].with_views(self.test_clips, self.test_crops)
        for batch in self.held_out_batches(views, self.eval_clips, 1):
            video = batch["video"][0]                                    # (1 + views, T, H, W, 3)
            logits = [self.logits(model, {"video": part}) for part in video.split(self.eval_batch)]
            rows.append((batch["number"], torch.cat(logits), batch["labels"]["label"]))
        _, scores, answers = zip(*processes.collect(rows, self.device))
        answers = {"label": torch.cat([answer.to(self.device) for answer in answers])}
        several = f"{self.test_clips} x {self.test_crops} views"
        by_name = {"1 clip": [logits[0] for logits in scores],
                   several: [merge_views(logits[1:], self.merge_views) for logits in scores]}
        return {f"val_{name} ({kind})": value for kind, merged in by_name.items() for name, value
                in accuracies({"label": torch.stack(merged)}, answers).items()}

    def protocol(self, held_out):
        """How the accuracies are measured."""
        several = self.test_clips * self.test_crops > 1
        return self.clips_protocol(held_out) | {
            "questions": {question: len(names) for question, names in self.classes.items()},
            "measure": "top 1 and top 5" if "label" in self.classes else "each and all",
            "views": f"1; at the end also {self.test_clips} x {self.test_crops}, mean of "
                     f"{self.merge_views}" if several else "1"}

    def write_outputs(self, folder):
        """questions.json: the class names, in the order of the logits."""
        text = json.dumps({question: list(names) for question, names in self.classes.items()})
        weights.write_aside(Path(folder) / "questions.json",
                            lambda path: Path(path).write_text(text + "\n"))

    def pictures(self, model, batch, results, folder):
        """confusion.png: what the last evaluation took for what, of the first question."""
        first, names = next(iter(self.classes.items()))
        tables = {f"{first}, {name}": table for name, table in self.confusions(results).items()}
        pictures.confusion(tables, names, folder / "confusion.png")
        return [folder / "confusion.png"]

    def confusions(self, results):
        """{title: (Y, Y) counts} out of the results of the evaluation."""
        return {"held-out clips": results["val_confusion"]}
