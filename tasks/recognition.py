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

import contextlib
import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import clip_video
import weights
from attention import Attention
from engine import pictures, processes
from engine.checkpoints import recipe_of
from engine.command_line import text_of
from engine.errors import UserError
from engine.stage import TEST_CLIPS, ClipStage, flag, generator
from tasks import class_names
from video import transforms
from weights import encoders, heads

# ------------------------------------------------------------------------------------------------
# Metrics


def size(classes):
    """Y, the number of answers to all questions."""
    return sum(map(len, classes.values()))


def split(x, classes):
    """(B, Y) -> the part of each question: {question: (B, answers)}."""
    return dict(zip(classes, x.split([len(names) for names in classes.values()], dim=1)))


def one_hot(labels, classes):
    """{question: int64 (B,)} -> (B, Y) float: a one at the right answer to each question."""
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


def late_fusion(scores, shares=None):
    """Average the probabilities of several separate models: a baseline for fusion.py.

    scores   a list of logits, each (B, Y), or (B, V, Y) with V views of each video. Views of one
             model are averaged first, so that a model with more views does not count more (the
             official script averages all views of all models at once)
    shares   one number per model, sum 1; None: equal
    returns  probabilities (B, Y)
    raises   ValueError: models that disagree about B or Y, or another number of shares
    """
    shares = [1 / max(1, len(scores))] * len(scores) if shares is None else shares
    if len(shares) != len(scores) or len({(len(score), score.shape[-1]) for score in scores}) != 1:
        shapes = ", ".join(str(tuple(score.shape)) for score in scores)
        raise ValueError(f"{len(shares)} shares for scores of {shapes}: one for each model, and "
                         "all models score the same videos and classes")
    each = [score.softmax(dim=-1) for score in scores]
    return sum(share * (p.mean(dim=1) if p.ndim == 3 else p) for share, p in zip(shares, each))


def best_weight(quality, steps=100):
    """The share w of the second model, among 0, 1/steps, ..., 1, with the highest quality(w) on
    validation data; of several, the one nearest to 0.5.

    >>> best_weight(lambda w: -(w - 0.3)**2)
    0.3
    """
    return max((i / steps for i in range(steps + 1)), key=lambda w: (quality(w), -abs(w - 0.5)))


def evaluate(predict, batches, classes, device="cpu"):
    """Loss and accuracies of a model on held-out batches.

    predict  function of a batch -> logits (B, Y)
    batches  dicts with "labels" {question: int64 (B,)} and "number", the place among all batches
    returns  {"loss": nats, accuracies in percent}, and two tensors about the first question:
             "confusion", int64 counts (true class, predicted class), and "confidence" (clips,), the
             largest probability of each clip
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


@torch.no_grad()
def evaluate_zero_shot(model, batches, bpe, sentences, *, combine="probabilities", context=None,
                       autocast=contextlib.nullcontext, device="cpu"):
    """Accuracy of classes that no one has trained: their sentences compete.

    model      clip_video.VideoCLIP, in eval mode
    batches    dicts with "video" uint8 (B, T, H, W, 3), "labels" {question: (B,)}, "number"
    sentences  {question: [[sentence of each class] for each prompt]}, see video.clip_set
    combine    see clip_video.zero_shot
    returns    {"zero_shot_" + name: percent}, see `accuracies`
    """
    texts = list(dict.fromkeys(text for prompts in sentences.values()
                               for row in prompts for text in row))
    with autocast():
        table = torch.cat([model.encode_text(bpe.encode(
            texts[i:i + 256], context or model.config["context"], trim=True)[0].to(device))
            for i in range(0, len(texts), 256)])
    table, place = F.normalize(table.float(), dim=-1), {text: i for i, text in enumerate(texts)}
    classes = {question: table[torch.tensor([[place[text] for text in row] for row in prompts])]
               for question, prompts in sentences.items()}               # (prompts, Y, E) each
    rows = []
    for batch in batches:
        with autocast():
            video = transforms.normalise(batch["video"], model.mean, model.std)
            features = model.encode_video(video)
        rows.append((batch["number"], features.float(), batch["labels"]))
    _, features, labels = zip(*processes.collect(rows, device))
    probabilities = {question: clip_video.zero_shot(
        torch.cat(features), sentences_of, model.logit_scale, combine)
                     for question, sentences_of in classes.items()}
    answers = {question: torch.cat([part[question].to(device) for part in labels])
               for question in classes}
    return {f"zero_shot_{name}": value
            for name, value in accuracies(probabilities, answers).items()}


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
        return weights.load_run(cls.from_config, folder, "AttentiveProbe",
                                "classify --mode attentive")

    @torch.no_grad()
    def with_head(self, classes, *, rows=None):
        """The same for Y classes. rows: which row of this head each class is, None = a new one."""
        new = type(self)(self.encoder, classes, self.config["heads"])
        new.query.copy_(self.query)
        for part in ("norm", "attn"):
            getattr(new, part).load_state_dict(getattr(self, part).state_dict())
        heads.copy_rows(new.head, self.head, rows or range(classes))
        return new

    def classify(self, tokens):
        """tokens (B, N, D) -> logits (B, Y)"""
        query = self.query.expand(len(tokens), -1, -1)
        return self.head(self.attn(query, keys_from=self.norm(tokens))[:, 0])

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)"""
        return self.classify(self.encoder.tokens(video))


def probe_of(model):
    """The trained part of a model in probe mode, as a function of frozen features -> logits."""
    return model.classify if isinstance(model, AttentiveProbe) else model.head


def freeze_all_but_the_probe(model):
    """Only the probe trains. Returns the model."""
    model.requires_grad_(False)
    attentive = isinstance(model, AttentiveProbe)
    for part in (model.head, *((model.query, model.norm, model.attn) if attentive else ())):
        part.requires_grad_(True)
    return model


def features_of(model, video, autocast):
    """Input of the probe: video (B, T, H, W, 3) uint8 -> (B, D), of an attentive one (B, N, D)."""
    video = transforms.normalise(video, model.mean, model.std)
    with autocast(), torch.no_grad():
        read = model.encoder.tokens if isinstance(model, AttentiveProbe) else model.feature
        return read(video).float()


def stored_features(stage, model, train_set):
    """(features bfloat16, targets) of the training clips, each seen once; see Stage.kept."""
    settings = recipe_of(stage) | {"weights": stage.weights, "precision": stage.precision}
    found = stage.kept(settings, lambda: compute_features(stage, model, train_set))
    return found["features"], found["targets"]


def compute_features(stage, model, train_set):
    """{"features": bfloat16, "targets"} of --probe-clips training clips."""
    finite = hasattr(train_set, "__len__")
    count = stage.probe_clips or (len(train_set) if finite else 2000)
    count = min(count, len(train_set)) if finite else count
    rows = []
    for batch in tqdm(stage.held_out(train_set, count, stage.eval_batch), desc="features",
                      unit="batch", total=-(-count // stage.eval_batch // processes.world()),
                      disable=processes.rank() > 0 or None):
        features = features_of(model.eval(), batch["video"], stage.autocast)
        rows.append((batch["number"], features.cpu(), stage.target(batch).cpu()))
    _, features, targets = zip(*processes.collect(rows))
    return {"features": torch.cat(features).to(torch.bfloat16), "targets": torch.cat(targets)}


def feature_batches(stage, stored, first):
    """Batches of stored features and their targets, drawn at random; a function of (seed, step)."""
    features, targets = stored
    for step in range(first * stage.accum, stage.steps * stage.accum):
        rows, mine = processes.joined(stage.batch_size)
        rng = generator(stage.seed, "probe", step)
        chosen = torch.randint(len(features), (rows,), generator=rng)[mine]
        yield {"features": features[chosen].float(), "target": targets[chosen]}


def mix(video, target, mixup, cutmix):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), with these alphas, 0 = none.

    One share and one box for a whole batch, alike in all frames, as VideoMAE fine-tunes. Draws from
    torch's global generator, which the loop has seeded. video (B, C, T, H, W), target (B, Y).
    """
    forms = [form(alpha=alpha, num_classes=target.shape[1])
             for form, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    form = forms[int(torch.randint(len(forms), ()))]
    # Each clip is mixed with the one before it in the joined batch, which may be another process's.
    video, target = (torch.cat([processes.row_before(x), x]) for x in (video, target))
    mixed, target = form(tv_tensors.Video(video.transpose(1, 2)), target)
    return mixed.as_subclass(torch.Tensor).transpose(1, 2)[1:], target[1:]


# ------------------------------------------------------------------------------------------------
# What the stages with labels share


@dataclass
class LabelledStage(ClipStage):
    """Questions, their answers, accuracies. `classify` and `fuse` add a model and its loss."""

    num_frames: int = flag(8, paper="16, UniFormerV2 8")
    sampling_rate: int = flag(4, "with --sampling dense: a clip takes every n-th frame", low=1,
                              group="clips", paper="4")
    sampling: str = flag("segment", paper="videomae-dense, uniformerv2")
    transform: str = flag("plain", paper="videomae, uniformerv2")
    flip: bool = flag(False, "mirror half of the training clips: not where labels know left from "
                      "right", only="files", group="clips")
    area: float = flag(0.0, "smallest share of a frame that a random crop keeps; 0 = as "
                       "--transform has it", only="files", paper="0.08", low=0, high=1,
                       group="clips")
    rand_augment: int = flag(0, "RandAugment operations per clip; 0 = none", only="files", low=0,
                             paper="4", group="clips")
    magnitude: int = flag(7, "strength of RandAugment, of 30", only="files", paper="7", low=0,
                          high=30, group="clips")
    erasing: float = flag(0.0, "probability that a box of the clip turns grey", only="files",
                          paper="0.25, with noise", low=0, high=1, group="clips")
    repeats: int = flag(1, "clips of each video in a batch, each cut out anew", only="files", low=1,
                        paper="2", group="clips")
    train_clips: int = flag(0, "train on so many clips, over and over; 0 = all", low=0,
                            group="clips")
    test_clips: int = flag(1, "clips along time in the last evaluation", only="files", low=1,
                           paper="4 to 7; 2 on Something-Something", group="clips")
    test_crops: int = flag(1, "crops along the longer side of each of these clips", only="files",
                           low=1, paper="3", group="clips")
    merge_views: str = flag("softmax", "what is averaged over these views", only="files",
                            paper="softmax; logits on Something-Something",
                            choices=("softmax", "logits"), group="clips")
    test: int = TEST_CLIPS

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
            raise UserError(f"--data {self.data}: {size(train_set.classes)} classes; needs a "
                            "folder of class folders, or a list of `path label` lines, with two or "
                            "more (shards serve mae and clip)")
        self.classes = train_set.classes
        self.choose_classes(train_set, held_out)
        return train_set, held_out

    def choose_classes(self, train_set, held_out):
        """Number the classes of all sets as the heads of the weights need them; `rows` says which
        row of each head they are. See tasks.class_names."""
        self.classes, self.rows = class_names.match(self.heads(), self.classes, not self.steps)
        for part in (train_set, *held_out.values()):
            for question, names in self.classes.items():
                if tuple(part.classes[question]) != tuple(names):
                    part.only(question, names)

    def heads(self):
        """The trained heads of the weights, as a list of class_names.Head."""
        return []

    def untrained(self):
        """What --steps 0 would measure though nothing has trained it; "" = nothing."""
        if not self.rows:
            return "a network from scratch"
        known = all(rows is not None and None not in rows for rows in self.rows)
        return "" if known else f"a new head for {size(self.classes)} classes"

    def target(self, batch):
        """(B, Y): a one at the right answer to each question."""
        if "target" in batch:
            return batch["target"]
        for question in self.classes:
            labels = batch["labels"].get(question)
            if labels is None or (labels < 0).any():
                place = 0 if labels is None else int(labels.argmin())
                raise UserError(f"{self.data}: a video without a label: {batch['path'][place]}")
        return one_hot(batch["labels"], self.classes)

    def batches(self, train_set, first):
        """Micro-batches from step `first` on, with --repeats clips of each video."""
        return super().batches(train_set, first, repeats=self.repeats)

    def evaluate(self, model, batches, held_out_set):
        """Loss and accuracies in percent; see `evaluate`."""
        return evaluate(functools.partial(self.logits, model), batches, self.classes, self.device)

    def finish(self, model, held_out, results):
        """Accuracies over several views of each held-out video, in files."""
        if self.test_clips * self.test_crops == 1:
            return {}
        rows = []
        views = held_out["val"].with_views(self.test_clips, self.test_crops)
        for batch in self.held_out(views, self.eval_clips, 1):
            video = batch["video"][0]                                    # (1 + views, T, H, W, 3)
            logits = [self.logits(model, {"video": part}) for part in video.split(self.eval_batch)]
            rows.append((batch["number"], torch.cat(logits), batch["labels"]["label"]))
        _, scores, answers = zip(*processes.collect(rows, self.device))
        answers = {"label": torch.cat(answers)}
        several = f"{self.test_clips} x {self.test_crops} views"
        by_name = {"1 clip": [logits[0] for logits in scores],
                   several: [merge_views(logits[1:], self.merge_views) for logits in scores]}
        return {f"val_{name} ({kind})": value for kind, merged in by_name.items() for name, value
                in accuracies({"label": torch.stack(merged)}, answers).items()}

    def protocol(self, held_out):
        """How the accuracies are measured."""
        several = f"; at the end also {self.test_clips} x {self.test_crops}, mean of " \
                  f"{self.merge_views}" if self.test_clips * self.test_crops > 1 else ""
        return self.clips_protocol(held_out) | {
            "classes": {question: len(names) for question, names in self.classes.items()},
            "accuracy": "percent; " + ("top 1 and top 5" if "label" in self.classes else
                                       "of each question, and of all together"),
            "views": "1" + several}

    def extras(self, folder):
        """questions.json: the class names, in the order of the logits."""
        class_names.write(folder, self.classes)

    def pictures(self, model, batch, folder, results):
        """confusion.png: what the last evaluation took for what, of the first question."""
        first, names = next(iter(self.classes.items()))
        tables = {f"{first}, {name}": table for name, table in self.confusions(results).items()}
        pictures.confusion(tables, names, folder / "confusion.png")
        return [folder / "confusion.png"]

    def confusions(self, results):
        """{title: (Y, Y) counts} out of the results of the evaluations."""
        return {"held-out clips": results["val"]["confusion"]}


@dataclass
class ClassifierStage(LabelledStage):
    """What `classify` has besides fine-tuning: probes of a frozen encoder, and open sets."""

    mode: str = flag("finetune", "finetune = train everything; probe = a linear layer, attentive = "
                     "a query that attends to the tokens, and a linear layer, on frozen features",
                     choices=("finetune", "probe", "attentive"))
    head_rows: str = flag("", "a JSON list: which row of the head of --weights each class is, as "
                          "VideoMAE V2's label_710to400.json; default: by the names of the "
                          "classes; where --weights tell none, the same where there are as many, "
                          "the first 400 of 710, else a new head")
    probe_clips: int = flag(2000, "with a probe: training clips whose features are computed; 0 = "
                            "all files of --data", low=0)
    unknown: str = flag("", "open-set recognition: classes (or motions) to leave out of training, "
                        "names with commas, or how many of the last; evaluation measures how well "
                        "they are told from the known", paper="UCF101 against HMDB51")

    def datasets(self):
        """As all stages with labels; with --unknown some classes are set aside."""
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 1e-3:  # a beta distribution that float32 cannot hold
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0.001, or 0 for "
                                "none")
        return super().datasets()

    def choose_classes(self, train_set, held_out):
        """As all stages with labels; with --unknown some classes are set aside, with --head-rows
        the user says which row of the head each class is."""
        if self.unknown:
            self.set_aside(train_set, held_out)
        if self.head_rows:
            self.rows = [self.rows_of_head()]
        else:
            super().choose_classes(train_set, held_out)

    def heads(self):
        """The head of --weights; none where an attentive probe is yet to be trained."""
        if not self.weights:
            return []
        probe = weights.read(self.weights)[1].get("model") == "AttentiveProbe"
        count = encoders.made_for(self.weights)[2] if probe or self.mode != "attentive" else 0
        return [class_names.head_of("weights", self.weights, count)]

    def set_aside(self, train_set, held_out):
        """Leave the classes of --unknown out; held_out["val"].unknown has their held-out clips."""
        if self.test_clips * self.test_crops > 1:
            raise UserError("--unknown: is evaluated on one view of listed files; leave out "
                            "--test-clips, --test-crops, shards")
        question, names = next(iter(self.classes.items()))
        unknown = names[max(len(names) - int(self.unknown), 0):] if self.unknown.isdecimal() else \
            tuple(dict.fromkeys(self.unknown.split(",")))
        known = tuple(name for name in names if name not in unknown)
        if set(unknown) - set(names) or not unknown or len(known) < 2:
            raise UserError(f"--unknown {self.unknown}: give some of {', '.join(names)}, or how "
                            "many of the last; two or more must remain")
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
        """The AttentiveProbe that --weights hold, or None. UserError where it does not fit."""
        if not self.weights or weights.read(self.weights)[1].get("model") != "AttentiveProbe":
            return None
        if self.mode != "attentive":
            raise UserError(f"--weights {self.weights}: is an attentive probe; add --mode "
                            "attentive")
        return AttentiveProbe.from_run(self.weights).with_head(classes, rows=self.rows[0])

    def training_mode(self, model):
        """A probe's encoder stays in eval mode: no dropout, no batch statistics."""
        model.train(self.mode == "finetune")

    def prepare(self, model, train_set, held_out):
        """For a probe: the features of the training clips, computed once."""
        if self.mode == "finetune" or not self.steps:
            return train_set
        return stored_features(self, model, train_set)

    def batches(self, train_set, first):
        """Clips; or, for a probe, stored features, drawn at random."""
        if self.mode == "finetune":
            return super().batches(train_set, first)
        return feature_batches(self, train_set, first)

    def evaluate(self, model, batches, dataset):
        """As all stages with labels. With --unknown also the AUROC, in percent, of telling known
        from unknown classes by the largest probability (arXiv 1610.02136, Sec. 3). InternVideo
        (Sec. 4.3, open-set action recognition) learns evidence instead (DEAR, arXiv 2107.10161)."""
        results = super().evaluate(model, batches, dataset)
        others = getattr(dataset, "unknown", None)
        if others is None:
            return results
        question = next(iter(self.classes))
        confidence = torch.cat([
            split(self.logits(model, batch), self.classes)[question].softmax(dim=1)
            .amax(dim=1) for batch in self.held_out(others, self.eval_clips, self.eval_batch,
                                                    shared=False)])
        return results | {
            "unknown_auroc": 100 * auroc(results["confidence"], confidence),
            "unknown_clips": len(confidence)}

    def protocol(self, held_out):
        """How the accuracies are measured."""
        open_set = {"open set": f"trained without {self.unknown}; the AUROC compares the largest "
                                "probability of known and unknown clips; chance is 50"}
        return super().protocol(held_out) | (open_set if self.unknown else {})
