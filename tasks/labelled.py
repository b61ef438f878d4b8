"""Base of the stages with labels. `classify` and `fuse` in train.py add a recipe and a model.

    data sets --> classes --> rows of the classifier head (class_names.py)
    logits --> losses, accuracies (recognition.py) --> metrics.json, predictions.csv, confusion.png
"""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import weights
from engine import pictures, processes
from engine.command_line import text_of
from engine.errors import UserError
from engine.frame_size import LARGEST, frame_size
from engine.stage import TEST_CLIPS, ClipStage, flag
from tasks import class_names, predictions
from tasks.probes import AttentiveProbe, feature_batches, stored_features
from tasks.recognition import (
    accuracies, answers_in, auroc, class_weights, clip_weights, cross_entropy, evaluate,
    merge_views, one_hot, number_of_answers, probabilities, split_by_question)
from weights import encoders


def mix(video, target, mixup, cutmix):
    """Apply Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) to a batch.

    video          (B, C, T, H, W)
    target         (B, Y)
    mixup, cutmix  alpha of each; 0 = never. At least one must be above 0
    returns        the mixed video and target

    The whole batch has one mixing share and one box, the same in all frames, as in VideoMAE's
    fine-tuning. Random numbers come from torch's global generator, which the training loop seeds.
    """
    forms = [form(alpha=alpha, num_classes=target.shape[1])
             for form, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    form = forms[int(torch.randint(len(forms), ()))]
    # Each clip is mixed with the one before it in the batch of all processes.
    video, target = (torch.cat([processes.previous_row(x), x]) for x in (video, target))
    mixed, target = form(tv_tensors.Video(video.transpose(1, 2)), target)
    return mixed.as_subclass(torch.Tensor).transpose(1, 2)[1:], target[1:]


@dataclass
class LabelledStage(ClipStage):
    """Class labels, accuracies and predictions. `classify` and `fuse` add a model and its loss."""

    num_frames: int = flag(8, paper="16, UniFormerV2 8")
    sampling_rate: int = flag(4, "with --sampling dense: a clip takes every n-th frame", low=1,
                              group="clips", paper="4")
    sampling: str = flag("segment", paper="videomae-dense, uniformerv2")
    transform: str = flag("plain", paper="videomae, uniformerv2")
    flip: bool = flag(False, "mirror half of the training clips; not for labels that depend on "
                      "left and right", only="files", group="clips")
    area: float = flag(0.0, "smallest share of a frame that a random crop keeps; 0 = that of "
                       "--transform", only="files", paper="0.08", low=0, high=1,
                       group="clips")
    rand_augment: int = flag(0, "RandAugment operations per clip; 0 = none", only="files", low=0,
                             paper="4", group="clips")
    magnitude: int = flag(7, "strength of RandAugment, 0 to 30", only="files", paper="7", low=0,
                          high=30, group="clips")
    erasing: float = flag(0.0, "probability that a box of the clip becomes grey", only="files",
                          paper="0.25, with noise", low=0, high=1, group="clips")
    repeats: int = flag(1, "clips of each video in a batch, each with its own frames and crop",
                        only="files", low=1, paper="2", group="clips")
    test_clips: int = flag(1, "views per video along time in the last evaluation", only="files",
                           low=1, paper="4 to 7; 2 on Something-Something", group="clips")
    test_crops: int = flag(1, "crops of each of these views, along the longer side", only="files",
                           low=1, paper="3", group="clips")
    merge_views: str = flag("softmax", "what is averaged over the views", only="files",
                            paper="softmax; logits on Something-Something",
                            choices=("softmax", "logits"), group="clips")
    test: int = TEST_CLIPS

    several = frozenset()  # questions to which a clip may have several answers
    balance = "none"  # a flag of `classify`

    def datasets(self):
        """Open the data sets. UserError if they have fewer than two classes."""
        if self.batch_size % self.repeats:
            raise UserError(f"--batch-size {self.batch_size}: must be a multiple of --repeats "
                            f"{self.repeats}")
        train_set, held_out = self.open_sets(
            stride=self.sampling_rate, flip=self.flip, area=self.area or None,
            operations=self.rand_augment, magnitude=self.magnitude, erasing=self.erasing)
        self.classes, self.several = train_set.classes, train_set.several
        if self.classes:
            self.choose_classes(train_set, held_out)
        if number_of_answers(self.classes) < 2:
            raise UserError(f"--data {self.data}: {number_of_answers(self.classes)} classes; give "
                            "a folder of class folders, or a list of `path label` lines, with at "
                            "least two classes (shards are for mae and clip)")
        return train_set, held_out

    def choose_classes(self, train_set, held_out):
        """Number the classes of all data sets in the order that the heads of the weights need, and
        set `rows`, the row of each class in each head. See tasks.class_names."""
        self.classes, self.rows = class_names.match(self.heads(), self.classes, not self.steps)
        for part in (train_set, *held_out.values()):
            for question, names in self.classes.items():
                if tuple(part.classes[question]) != tuple(names):
                    part.only(question, names)

    def heads(self):
        """The trained heads in the weights: a list of class_names.Head."""
        return []

    def untrained(self):
        """The untrained part that --steps 0 would evaluate, in words; "" = none."""
        if not self.rows:
            return "a network from scratch"
        known = all(rows is not None and None not in rows for rows in self.rows)
        return "" if known else f"a new head for {number_of_answers(self.classes)} classes"

    def target(self, batch):
        """(B, Y), with a one at the correct answer to each question."""
        if "target" in batch:
            return batch["target"]
        for question in self.classes:
            labels = batch["labels"].get(question)
            if labels is None or labels.ndim == 1 and (labels < 0).any():
                row = 0 if labels is None else int(labels.argmin())
                raise UserError(f"{self.data}: a video without a label: {batch['path'][row]}")
        return one_hot(batch["labels"], self.classes)

    def batches(self, train_set, first):
        """Micro-batches from step `first` on, with --repeats clips of each video."""
        return super().batches(train_set, first, repeats=self.repeats)

    def evaluate(self, model, batches, held_out_set):
        """Loss and accuracies in percent; see recognition.evaluate."""
        return evaluate(functools.partial(self.logits, model), self.target, batches, self.classes,
                        self.several, self.device)

    def finish(self, model, held_out, results):
        """Accuracies with several views of each held-out video, if --test-clips or --test-crops
        ask for them."""
        self.predicted = results["val"]
        if self.test_clips * self.test_crops == 1:
            return {}
        rows = []
        views = held_out["val"].with_views(self.test_clips, self.test_crops)
        for batch in self.held_out(views, self.eval_clips, 1):
            video = batch["video"][0]                                    # (1 + views, T, H, W, 3)
            logits = torch.cat([self.logits(model, {"video": part})
                                for part in video.split(self.eval_batch)])
            rows.append((batch["number"], logits, self.target(batch)))
        _, logits, targets = zip(*processes.gather_rows(rows, self.device))
        answers = answers_in(torch.cat(targets), self.classes, self.several)
        # {question: (1 + views, ...)} of each part
        views = [split_by_question(part, self.classes) for part in logits]
        single = {question: torch.stack([part[question][0] for part in views])
                  for question in self.classes}
        merged = {question: torch.stack([merge_views(part[question][1:], self.form(question))
                                         for part in views]) for question in self.classes}
        self.predicted = self.predicted | {"answers": answers, "probabilities": merged if
                                           self.merge_views == "softmax" else
                                           probabilities(merged, self.several)}
        by_name = {"1 clip": single, f"{self.test_clips} x {self.test_crops} views": merged}
        return {f"val_{name} ({kind})": value for kind, scores in by_name.items() for name, value
                in accuracies(scores, answers).items()}

    def form(self, question):
        """How `merge_views` merges the views for a question."""
        sigmoid = self.merge_views == "softmax" and question in self.several
        return "sigmoid" if sigmoid else self.merge_views

    def tables(self, results):
        """Results per class and question on each held-out set, for metrics.json."""
        return {f"{name}_classes": values["tables"] for name, values in results.items()
                if "tables" in values and name != "before"}

    def protocol(self, held_out):
        """How the accuracies are measured, for metrics.json."""
        several = f"; at the end also {self.test_clips} x {self.test_crops}, mean of " \
                  f"{self.merge_views}" if self.test_clips * self.test_crops > 1 else ""
        return self.clips_protocol(held_out) | {
            "classes": {question: len(names) for question, names in self.classes.items()},
            "accuracy": self.measures(),
            "views": "1" + several}

    def measures(self):
        """The metrics of these questions, in words."""
        alone = len(self.classes) == 1
        words = []
        if set(self.classes) - self.several:
            words = ["percent; top 1, top 5 and the mean over classes" if alone else
                     "percent; of each question, also the mean over its classes"
                     + ", and of all together" * (not self.several)]
        if self.several:
            words.append("mAP in percent: the mean over classes with clips of "
                         + ", ".join(sorted(self.several)))
        return "; ".join(words)

    def extras(self, folder):
        """questions.json: the class names, in the order of the logits; and predictions.csv."""
        class_names.write(folder, self.classes, self.several)
        rows = predictions.rows_of(self.predicted, self.classes)
        predictions.write(Path(folder) / "predictions.csv", rows, self.classes)

    def pictures(self, model, batch, folder, results):
        """confusion.png: the confusion matrix of the first question in the last evaluation."""
        first, names = next(iter(self.classes.items()))
        if first in self.several:
            return []
        tables = {f"{first}, {name}": table for name, table in self.confusions(results).items()}
        pictures.confusion(tables, names, folder / "confusion.png")
        return [folder / "confusion.png"]

    def confusions(self, results):
        """{title: (Y, Y) counts} from the results of the evaluations."""
        return {"held-out clips": results["val"]["confusion"]}


@dataclass
class ClassifierStage(LabelledStage):
    """Base of `classify`: probes of a frozen encoder and open-set recognition, besides
    fine-tuning."""

    num_frames: int = flag(0, "frames per clip; 0 = those of --weights; from scratch 8, on files "
                           "with a published --model its own", low=0)
    input_size: frame_size = flag(0, "height and width in pixels, or HxW, as 112x160; 0 = those of "
                                  "--weights; from scratch 40 on moving shapes and 112 on files, "
                                  "with a published --model its own", low=0, high=LARGEST)
    mode: str = flag("finetune", "finetune = train everything; on frozen features: probe = a "
                     "linear layer, attentive = a query that attends to the tokens, and a linear "
                     "layer",
                     choices=("finetune", "probe", "attentive"))
    head_rows: str = flag("", "a JSON list with the row of each class in the head of --weights, "
                          "such as VideoMAE V2's label_710to400.json; default: by class names; if "
                          "--weights have no names: the same rows if the numbers of classes are "
                          "equal, the first 400 of 710, else a new head")
    balance: str = flag("none", "make all classes count equally: loss = clips of rare classes have "
                        "a larger weight, sampler = they are drawn more often",
                        choices=("none", "loss", "sampler"), only="files")
    probe_clips: int = flag(2000, "with a probe: training clips whose features are computed; 0 = "
                            "all files of --data", low=0)
    standardise: bool = flag(False, "with --mode probe: give every feature mean 0 and variance 1 "
                             "over the training clips", paper="MAE: yes, by BatchNorm")
    unknown: str = flag("", "open-set recognition: classes (or motions) to leave out of training; "
                        "names separated by commas, or n for the last n; evaluation measures how "
                        "well they differ from the others", paper="UCF101 against HMDB51")

    def datasets(self):
        """As LabelledStage, with the defaults of --num-frames and --input-size, and --balance."""
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 1e-3:  # float32 cannot sample such a beta distribution
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0.001, or 0 for "
                                "none")
        if self.standardise and (self.mode != "probe" or self.ema or self.shard):
            raise UserError("--standardise: is for --mode probe, without --ema and --shard")
        frames, pixels = self.made_for[:2] if self.weights else self.default_clip_size()
        self.num_frames = self.num_frames or frames
        self.input_size = self.input_size or pixels
        train_set, held_out = super().datasets()
        self.class_weight = None
        if self.balance != "none":
            labels = {question: torch.as_tensor(train_set.labels_of(question))
                      for question in self.classes}
            if self.balance == "loss":
                self.class_weight = class_weights(labels, self.classes)
            else:
                train_set.weights = clip_weights(labels, self.classes).numpy()
        return train_set, held_out

    def choose_classes(self, train_set, held_out):
        """As LabelledStage. --unknown first sets some classes aside. --head-rows gives the row of
        each class instead of names."""
        if self.unknown:
            self.set_aside(train_set, held_out)
        if self.head_rows:
            self.rows = [self.rows_of_head()]
        else:
            super().choose_classes(train_set, held_out)

    @functools.cached_property
    def made_for(self):
        """(frames, pixels, rows of the head) of --weights."""
        return encoders.made_for(self.weights)

    def default_clip_size(self):
        """Default (frames, pixels) of a network from scratch."""
        return 8, 112 if self.data else 40

    def heads(self):
        """The head of --weights. An attentive probe that starts from an encoder has none."""
        if not self.weights:
            return []
        probe = weights.read(self.weights)[1].get("model") == "AttentiveProbe"
        count = self.made_for[2] if probe or self.mode != "attentive" else 0
        return [class_names.head_of("weights", self.weights, count)]

    def set_aside(self, train_set, held_out):
        """Remove the classes of --unknown from all data sets. held_out["val"].unknown is a data
        set of their held-out clips."""
        if self.test_clips * self.test_crops > 1:
            raise UserError("--unknown: is evaluated on one view of listed files; leave out "
                            "--test-clips, --test-crops, shards")
        question, names = next(iter(self.classes.items()))
        if question in self.several:
            raise UserError("--unknown: needs clips with one answer; these have several")
        unknown = names[max(len(names) - int(self.unknown), 0):] if self.unknown.isdecimal() else \
            tuple(dict.fromkeys(self.unknown.split(",")))
        known = tuple(name for name in names if name not in unknown)
        if set(unknown) - set(names) or not unknown or len(known) < 2:
            raise UserError(f"--unknown {self.unknown}: give some of {', '.join(names)}, or a "
                            "number n for the last n; at least two must remain")
        others = copy.copy(held_out["val"]).only(question, unknown)
        for part in (train_set, *held_out.values()):
            part.only(question, known)
        held_out["val"].unknown = others
        self.classes = train_set.classes

    def rows_of_head(self):
        """The numbers in --head-rows."""
        try:
            rows = json.loads(text_of(self.head_rows, "head-rows"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--head-rows {self.head_rows}: {error}") from None
        if not isinstance(rows, list) or not rows or not all(type(row) is int for row in rows):
            raise UserError(
                f"--head-rows {self.head_rows}: must hold a list of numbers, as [0, 2, 5]")
        return rows

    def probe_in_weights(self, classes):
        """The AttentiveProbe in --weights, or None. UserError if --mode is another one."""
        if not self.weights or weights.read(self.weights)[1].get("model") != "AttentiveProbe":
            return None
        if self.mode != "attentive":
            raise UserError(f"--weights {self.weights}: is an attentive probe; add --mode "
                            "attentive")
        return AttentiveProbe.from_run(self.weights).with_head(classes, rows=self.rows[0])

    def loss_of(self, logits, target, training):
        """Cross-entropy with the class weights of --balance loss, in training also with
        --smoothing. Evaluation uses the plain cross-entropy, see recognition.evaluate."""
        weight = self.class_weight
        return cross_entropy(logits, target, self.classes, self.smoothing if training else 0.0,
                             self.several, weight if weight is None else weight.to(logits.device))

    def training_mode(self, model):
        """Keep the encoder of a probe in eval mode: no dropout, no batch statistics."""
        model.train(self.mode == "finetune")

    def prepare(self, model, train_set, held_out):
        """The training set; for a probe the features of its clips, computed once."""
        if self.mode == "finetune" or not self.steps:
            return train_set
        return stored_features(self, model, train_set)

    def batches(self, train_set, first):
        """Clips; or, for a probe, stored features, drawn at random."""
        if self.mode == "finetune":
            return super().batches(train_set, first)
        return feature_batches(self, train_set, first)

    def evaluate(self, model, batches, dataset):
        """As LabelledStage. With --unknown also the AUROC, in percent, of separating known from
        unknown classes by the largest probability (arXiv 1610.02136, Sec. 3). InternVideo (Sec.
        4.3, open-set action recognition) uses evidential learning (DEAR, arXiv 2107.10161)."""
        results = super().evaluate(model, batches, dataset)
        others = getattr(dataset, "unknown", None)
        if others is None:
            return results
        question = next(iter(self.classes))
        confidence = torch.cat([
            split_by_question(self.logits(model, batch), self.classes)[question].softmax(dim=1)
            .amax(dim=1) for batch in self.held_out(others, self.eval_clips, self.eval_batch,
                                                    shared=False)])
        known = results["probabilities"][question].amax(dim=1)
        return results | {
            "unknown_auroc": 100 * auroc(known, confidence),
            "unknown_clips": len(confidence)}

    def protocol(self, held_out):
        """As LabelledStage, and how the AUROC is measured."""
        open_set = {"open set": f"trained without {self.unknown}; the AUROC compares the largest "
                                "probability of known and unknown clips; chance is 50"}
        return super().protocol(held_out) | (open_set if self.unknown else {})
