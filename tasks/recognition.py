"""Recognition, the classification of clips: losses, metrics and evaluation.

    clip -> encoder -> logits (B, Y) -> a softmax for each question -> accuracy in percent

A data set has one or several questions. Files with one label each have the question "label". The
generated world has three: motion, shape and colour. Logits and targets contain the answers to all
questions, concatenated, Y in total. `classes` is always {question: tuple of class names}, in the
same order.

A clip usually has one answer to a question. To the questions in `several` it has any number of
answers, as in Charades. Each class then has its own sigmoid, and mAP replaces accuracy.

>>> classes = {"motion": ("left", "right"), "shape": ("ring", "star")}
>>> target = one_hot({"motion": torch.tensor([1]), "shape": torch.tensor([0])}, classes)
>>> target.tolist()
[[0.0, 1.0, 1.0, 0.0]]
>>> answers = {"motion": torch.tensor([1]), "shape": torch.tensor([1])}
>>> accuracies(split_by_question(target, classes), answers)
{'motion': 100.0, 'shape': 0.0, 'all_facts': 0.0}
"""

import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":  # for `python tasks/recognition.py`: the other files are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import clip_video
from engine import processes
from video import transforms

# ------------------------------------------------------------------------------------------------
# Metrics


def number_of_answers(classes):
    """Y, the total number of answers to all questions."""
    return sum(map(len, classes.values()))


def split_by_question(x, classes):
    """Split by question: (B, Y) -> {question: (B, answers)}."""
    return dict(zip(classes, x.split([len(names) for names in classes.values()], dim=1)))


def one_hot(labels, classes):
    """{question: int64 (B,)} -> (B, Y) float, with a one at the correct answer to each question.

    Labels (B, answers) already have a one for each answer."""
    return torch.cat([F.one_hot(labels[question], len(names)).float()
                      if labels[question].ndim == 1 else labels[question].float()
                      for question, names in classes.items()], dim=1)


def cross_entropy(logits, target, classes, smoothing=0.0, several=(), weight=None):
    """Sum over the questions of the mean cross-entropy, in nats.

    A question in `several` has the mean binary cross-entropy of its classes, without smoothing.

    logits, target  (B, Y)
    weight          (Y,), weights of the classes, see `class_weights`; None = equal
    """
    weights = split_by_question(weight[None], classes) if weight is not None else {}
    loss, targets = 0, split_by_question(target, classes)
    for question, x in split_by_question(logits, classes).items():
        y, class_weight = targets[question], weights[question][0] if weights else None
        loss = loss + (F.binary_cross_entropy_with_logits(x, y, pos_weight=class_weight)
                       if question in several else
                       F.cross_entropy(x, y, class_weight, label_smoothing=smoothing))
    return loss


def probabilities(logits, several=()):
    """{question: logits (B, answers)} -> {question: probabilities (B, answers)}.

    A softmax over the answers; for questions in `several` a sigmoid for each class."""
    return {question: x.sigmoid() if question in several else x.softmax(dim=1)
            for question, x in logits.items()}


def answers_in(target, classes, several=()):
    """The reverse of `one_hot`: (B, Y) -> {question: int64 (B,)}; for questions in `several`
    (B, answers), with a one for each answer."""
    return {question: x if question in several else x.argmax(dim=1)
            for question, x in split_by_question(target, classes).items()}


def accuracies(scores, answers):
    """{question: scores (B, answers)}, {question: int (B,) or (B, answers)} -> {name: percent}.

    One question gives "top1" and "top5". Several questions give the accuracy of each, and
    "all_facts", the share of clips with all questions correct. A question with answers
    (B, answers), where a clip may have several, gives mAP instead.
    """
    mean_ap = {name: 100 * mean_average_precision(scores[name], answers[name])
               for name in scores if answers[name].ndim == 2}
    correct = {name: scores[name].argmax(dim=1) == answers[name]
               for name in scores if name not in mean_ap}
    (name, first), *others = scores.items()
    if not others:
        if mean_ap:
            return {"mAP": mean_ap[name]}
        five = (first.topk(min(5, first.shape[1])).indices == answers[name][:, None]).any(dim=1)
        return {"top1": percent(correct[name]), "top5": percent(five)}
    numbers = {name: percent(hit) for name, hit in correct.items()}
    if not mean_ap:
        numbers["all_facts"] = percent(torch.stack(list(correct.values())).all(dim=0))
    return numbers | {f"{name}_mAP": value for name, value in mean_ap.items()}


def average_precision(scores, positive):
    """Mean over the positive clips of the precision at their score, in [0, 1]; nan without any.

    scores (B,), positive bool (B,). Clips with equal scores have the same rank, so the order of the
    data does not matter."""
    every, positives = scores.sort().values, scores[positive].sort().values
    # Numbers of positive clips, and of all clips, with this score or a higher one.
    hits = len(positives) - torch.searchsorted(positives, positives)
    return float((hits / (len(every) - torch.searchsorted(every, positives))).mean())


def average_precisions(scores, target):
    """scores, target (B, answers) -> list of the average precision of each class; nan for a class
    without clips."""
    columns = zip(scores.T.contiguous(), target.T.bool())
    return [average_precision(*column) for column in columns]


def mean_average_precision(scores, target):
    """mAP in [0, 1], the mean over the classes that have clips (Charades, arXiv 1604.01753)."""
    values = torch.tensor(average_precisions(scores, target))
    return float(values.nanmean())


def class_table(scores, answers, names):
    """Results of one question per class: a list of dicts.

    Their keys are "class", "clips", "right" (clips that were correct) and "accuracy" in percent. If
    a clip may have several answers, they are "class", "clips" and "AP" in percent. A class without
    clips has None for the percentage.
    """
    if answers.ndim == 2:
        return [{"class": name, "clips": int(count), "AP": None if ap != ap else 100 * ap}
                for name, count, ap in zip(names, answers.sum(dim=0).tolist(),
                                           average_precisions(scores, answers))]
    hits = answers[scores.argmax(dim=1) == answers]
    clips, right = (torch.bincount(x, minlength=len(names)).tolist() for x in (answers, hits))
    return [{"class": name, "clips": n, "right": hit, "accuracy": 100 * hit / n if n else None}
            for name, n, hit in zip(names, clips, right)]


def mean_class_accuracies(tables):
    """{question: class_table} -> {"mean_class": percent}, the mean over the classes with clips.

    Several questions give {"<question>_mean_class": percent}."""
    means = {}
    for question, rows in tables.items():
        values = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
        if values:
            name = "mean_class" if len(tables) == 1 else f"{question}_mean_class"
            means[name] = sum(values) / len(values)
    return means


# ------------------------------------------------------------------------------------------------
# Uneven classes


def class_weights(labels, classes):
    """Weights (Y,) with which all classes contribute equally to a loss.

    A class with n of N clips has the weight N / (n * classes with clips). The mean over all clips
    is then 1. A class without clips has the weight 1.

    labels  {question: int64 (N,) or (N, answers)}
    """
    weights = []
    for question, names in classes.items():
        x = labels[question]
        count = torch.bincount(x, minlength=len(names)) if x.ndim == 1 else x.sum(dim=0)
        weight = count.sum() / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))
        weights.append(torch.where(count > 0, weight, 1.0))
    return torch.cat(weights)


def clip_weights(labels, classes):
    """Probabilities (N,) float64 of drawing each clip, with which all classes are equally frequent.

    A clip with several questions or answers gets the mean of their weights."""
    weights = split_by_question(class_weights(labels, classes)[None].double(), classes)
    total = 0
    for question, (weight,) in weights.items():
        x = labels[question]
        total = total + (weight[x] if x.ndim == 1 else torch.where(
            x.sum(dim=1) > 0, x.double() @ weight / x.sum(dim=1).clamp(min=1), 1.0))
    return total / total.sum()


def percent(hits):
    """bool (B,) -> percent of True, float"""
    return 100 * float(hits.float().mean())


def auroc(known, unknown):
    """Area under the ROC curve: the probability that a known clip scores above an unknown one.

    known (n,), unknown (m,). Ties count half. Returns a float in [0, 1]; 0.5 is chance.
    """
    above = (known[:, None] > unknown).double() + 0.5 * (known[:, None] == unknown).double()
    return float(above.mean())


def merge_views(logits, form="softmax"):
    """Average the scores of several views of one video: logits (n, Y) -> (Y,).

    form  "softmax": the mean of the probabilities (VideoMAE, Sec. 4; UniFormerV2 on Kinetics). One
          view with very large logits cannot dominate it. "sigmoid": the same for questions with
          several answers. "logits": the mean of the logits (UniFormerV2 on Something-Something)
    """
    return (logits.softmax(dim=1) if form == "softmax" else
            logits.sigmoid() if form == "sigmoid" else logits).mean(dim=0)


def late_fusion(scores, shares=None):
    """Average the probabilities of several separate models: a baseline for fusion.py.

    scores   a list of logits, each (B, Y), or (B, V, Y) with V views of each video. The views of a
             model are averaged first, so the number of views does not change its share. (The
             official script averages all views of all models together)
    shares   one number per model, sum 1; None = equal
    returns  probabilities (B, Y)
    raises   ValueError: B or Y differ between models, or the number of shares is wrong
    """
    shares = [1 / max(1, len(scores))] * len(scores) if shares is None else shares
    if len(shares) != len(scores) or len({(len(score), score.shape[-1]) for score in scores}) != 1:
        shapes = ", ".join(str(tuple(score.shape)) for score in scores)
        raise ValueError(f"{len(shares)} shares for scores of {shapes}: one for each model, and "
                         "all models score the same videos and classes")
    probs = [score.softmax(dim=-1) for score in scores]
    return sum(share * (p.mean(dim=1) if p.ndim == 3 else p) for share, p in zip(shares, probs))


def best_weight(quality, steps=100):
    """The share w of the second model, among 0, 1/steps, ..., 1, with the highest quality(w).

    quality  function of w, measured on validation data. Among equal values the w nearest to 0.5
             is chosen

    >>> best_weight(lambda w: -(w - 0.3)**2)
    0.3
    """
    return max((i / steps for i in range(steps + 1)), key=lambda w: (quality(w), -abs(w - 0.5)))


def evaluate(predict, target_of, batches, classes, several=(), device="cpu"):
    """Loss and accuracies of a model on held-out batches.

    predict, target_of  functions of a batch -> logits (B, Y), target (B, Y)
    batches  dicts with "number", the index among all batches
    returns  {"loss": nats, accuracies in percent}, and for tables and pictures:
             "confusion", int64 counts (true class, predicted class) of the first question,
             "tables" {question: class_table}, "probabilities" {question: (clips, answers)},
             "answers", see `answers_in`, and "names" [(path, part or None) of each clip]
    """
    rows = []
    for batch in batches:
        logits, target = predict(batch), target_of(batch)
        target = target.to(logits.device)
        loss = float(cross_entropy(logits, target, classes, several=several)) * len(target)
        rows.append((batch["number"], logits, target, loss, names_of(batch)))
    _, logits, targets, losses, names = zip(*processes.gather_rows(rows, device))
    logits, targets = split_by_question(torch.cat(logits), classes), torch.cat(targets)
    answers = answers_in(targets, classes, several)
    tables = {question: class_table(logits[question], answers[question], classes[question])
              for question in classes}
    return {"loss": sum(losses) / len(targets)} | accuracies(logits, answers) | \
        mean_class_accuracies(tables) | {
            "confusion": confusion(logits, answers), "tables": tables, "answers": answers,
            "probabilities": probabilities(logits, several), "names": sum(names, [])}


def names_of(batch):
    """[(path, Part or None) of each clip]; a generated clip has its number instead of a path."""
    paths = batch.get("path") or [f"generated clip {i}" for i in batch["index"]]
    return list(zip(paths, batch.get("part") or [None] * len(paths)))


def confusion(scores, answers):
    """Counts (true class, predicted class), int64, of the first question; None if a clip may have
    several answers to it."""
    first = next(iter(scores))
    if answers[first].ndim == 2:
        return None
    pairs = answers[first].cpu(), scores[first].argmax(dim=1).cpu()
    counts = torch.zeros(scores[first].shape[1], scores[first].shape[1], dtype=torch.int64)
    return counts.index_put_(pairs, torch.tensor(1), accumulate=True)


@torch.no_grad()
def evaluate_zero_shot(model, batches, bpe, sentences, *, combine="probabilities", context=None,
                       autocast=contextlib.nullcontext, device="cpu"):
    """Accuracy of zero-shot classification: each clip gets the class with the nearest sentences.

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
    table, row_of = F.normalize(table.float(), dim=-1), {text: i for i, text in enumerate(texts)}
    classes = {question: table[torch.tensor([[row_of[text] for text in row] for row in prompts])]
               for question, prompts in sentences.items()}               # (prompts, Y, E) each
    rows = []
    for batch in batches:
        with autocast():
            video = transforms.normalise(batch["video"], model.mean, model.std)
            features = model.encode_video(video)
        rows.append((batch["number"], features.float(), batch["labels"]))
    _, features, labels = zip(*processes.gather_rows(rows, device))
    probabilities = {question: clip_video.zero_shot(
        torch.cat(features), sentences_of, model.logit_scale, combine)
                     for question, sentences_of in classes.items()}
    answers = {question: torch.cat([part[question].to(device) for part in labels])
               for question in classes}
    return {f"zero_shot_{name}": value
            for name, value in accuracies(probabilities, answers).items()}


if __name__ == "__main__":
    from tasks import predictions
    raise SystemExit(predictions.main())
