"""Recognition: which class a clip shows. Losses, metrics, evaluation.

    clip -> encoder -> logits (B, Y) -> a softmax for each question -> accuracy in percent

A data set asks one or several questions: files of one label each ask "label", the generated world
asks for motion, shape and colour at once. Logits and targets hold the answers of all questions side
by side, Y in all. `classes` is always {question: tuple of class names}, in that order.

A clip has one answer to most questions. To those in `several` it has any number, as in Charades:
each class then has a sigmoid of its own, and mAP takes the place of accuracy.

>>> classes = {"motion": ("left", "right"), "shape": ("ring", "star")}
>>> target = one_hot({"motion": torch.tensor([1]), "shape": torch.tensor([0])}, classes)
>>> target.tolist()
[[0.0, 1.0, 1.0, 0.0]]
>>> accuracies(split(target, classes), {"motion": torch.tensor([1]), "shape": torch.tensor([1])})
{'motion': 100.0, 'shape': 0.0, 'all_facts': 0.0}
"""

import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":  # `python tasks/recognition.py` finds the other files one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import clip_video
from engine import processes
from video import transforms

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

    Labels that are (B, answers) have a one for each answer already."""
    return torch.cat([F.one_hot(labels[question], len(names)).float()
                      if labels[question].ndim == 1 else labels[question].float()
                      for question, names in classes.items()], dim=1)


def cross_entropy(logits, target, classes, smoothing=0.0, several=(), weight=None):
    """Sum over the questions of the mean cross entropies, in nats. logits, target (B, Y).

    For a question in `several` it is the mean of the binary ones of all classes, without smoothing.

    weight  (Y,) of the classes, see `class_weights`; None = all alike
    """
    weights = split(weight[None], classes) if weight is not None else {}
    loss, targets = 0, split(target, classes)
    for question, a in split(logits, classes).items():
        b, of_class = targets[question], weights[question][0] if weights else None
        loss = loss + (F.binary_cross_entropy_with_logits(a, b, pos_weight=of_class)
                       if question in several else
                       F.cross_entropy(a, b, of_class, label_smoothing=smoothing))
    return loss


def probabilities(logits, several=()):
    """{question: logits (B, answers)} -> the same as probabilities: a softmax, in `several` a
    sigmoid for each class."""
    return {question: x.sigmoid() if question in several else x.softmax(dim=1)
            for question, x in logits.items()}


def answers_in(target, classes, several=()):
    """(B, Y) -> {question: int64 (B,)}; in `several` (B, answers), a one for each answer."""
    return {question: x if question in several else x.argmax(dim=1)
            for question, x in split(target, classes).items()}


def accuracies(scores, answers):
    """{question: (B, answers)}, {question: int (B,) or (B, answers)} -> {name: percent}.

    One question: top 1 and top 5. Several: each of them, and "all_facts", the share of clips with
    all of them right. Where a clip may have several answers: mAP.
    """
    many = {name: 100 * mean_average_precision(scores[name], answers[name])
            for name in scores if answers[name].ndim == 2}
    right = {name: scores[name].argmax(dim=1) == answers[name]
             for name in scores if name not in many}
    (name, found), *others = scores.items()
    if not others:
        if many:
            return {"mAP": many[name]}
        five = (found.topk(min(5, found.shape[1])).indices == answers[name][:, None]).any(dim=1)
        return {"top1": percent(right[name]), "top5": percent(five)}
    numbers = {name: percent(hit) for name, hit in right.items()}
    if not many:
        numbers["all_facts"] = percent(torch.stack(list(right.values())).all(dim=0))
    return numbers | {f"{name}_mAP": value for name, value in many.items()}


def average_precision(scores, positive):
    """Mean precision at the score of each positive clip, in [0, 1]; nan where there is none.

    scores (B,), positive bool (B,). Clips with equal scores come at once: their order in the data
    does not matter."""
    ranked, wanted = scores.sort().values, scores[positive].sort().values
    found = len(wanted) - torch.searchsorted(wanted, wanted)  # positives with this score or more
    return float((found / (len(ranked) - torch.searchsorted(ranked, wanted))).mean())


def average_precisions(scores, target):
    """scores, target (B, answers) -> list of each class's average precision, nan without clips."""
    columns = zip(scores.T.contiguous(), target.T.bool())
    return [average_precision(*column) for column in columns]


def mean_average_precision(scores, target):
    """mAP, in [0, 1]: the mean over the classes that some clip has (Charades, arXiv 1604.01753)."""
    found = torch.tensor(average_precisions(scores, target))
    return float(found.nanmean())


def class_table(scores, answers, names):
    """What became of the clips of each class of one question: a list of dicts.

    "class", "clips", "right" and "accuracy" in percent, None without clips; where a clip may have
    several answers "class", "clips" and "AP" in percent.
    """
    if answers.ndim == 2:
        return [{"class": name, "clips": int(count), "AP": None if found != found else 100 * found}
                for name, count, found in zip(names, answers.sum(dim=0).tolist(),
                                              average_precisions(scores, answers))]
    hits = answers[scores.argmax(dim=1) == answers]
    clips, right = (torch.bincount(x, minlength=len(names)).tolist() for x in (answers, hits))
    return [{"class": name, "clips": n, "right": hit, "accuracy": 100 * hit / n if n else None}
            for name, n, hit in zip(names, clips, right)]


def mean_class_accuracies(tables):
    """{question: class_table} -> {"mean_class": percent}, the mean over the classes with clips; of
    several questions {"<question>_mean_class": percent}."""
    found = {}
    for question, rows in tables.items():
        values = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
        if values:
            name = "mean_class" if len(tables) == 1 else f"{question}_mean_class"
            found[name] = sum(values) / len(values)
    return found


# ------------------------------------------------------------------------------------------------
# Uneven classes


def class_weights(labels, classes):
    """Weights (Y,) with which rare classes count as much as frequent ones.

    A class with n of N clips weighs N / (n * classes with clips), so that the mean over all clips
    is 1; one without clips weighs 1. labels: {question: int64 (N,) or (N, answers)}
    """
    found = []
    for question, names in classes.items():
        x = labels[question]
        count = torch.bincount(x, minlength=len(names)) if x.ndim == 1 else x.sum(dim=0)
        weight = count.sum() / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))
        found.append(torch.where(count > 0, weight, 1.0))
    return torch.cat(found)


def clip_weights(labels, classes):
    """How often each of N clips is to be drawn, (N,) float64, sum 1, so that all classes come alike
    often. Of several questions or answers, the mean counts."""
    weights = split(class_weights(labels, classes)[None].double(), classes)
    found = 0
    for question, (weight,) in weights.items():
        x = labels[question]
        found = found + (weight[x] if x.ndim == 1 else torch.where(
            x.sum(dim=1) > 0, x.double() @ weight / x.sum(dim=1).clamp(min=1), 1.0))
    return found / found.sum()


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
    one very sure view cannot outvote the others; "sigmoid": the same where each class has a
    probability of its own; "logits": the mean of the logits (UniFormerV2 on Something-Something).
    """
    return (logits.softmax(dim=1) if form == "softmax" else
            logits.sigmoid() if form == "sigmoid" else logits).mean(dim=0)


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


def evaluate(predict, target_of, batches, classes, several=(), device="cpu"):
    """Loss and accuracies of a model on held-out batches.

    predict, target_of  functions of a batch -> logits (B, Y), target (B, Y)
    batches  dicts with "number", the place among all batches
    returns  {"loss": nats, accuracies in percent}, and what `finish` and pictures need:
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
    _, logits, targets, losses, names = zip(*processes.collect(rows, device))
    logits, targets = split(torch.cat(logits), classes), torch.cat(targets)
    answers = answers_in(targets, classes, several)
    tables = {question: class_table(logits[question], answers[question], classes[question])
              for question in classes}
    return {"loss": sum(losses) / len(targets)} | accuracies(logits, answers) | \
        mean_class_accuracies(tables) | {
            "confusion": confusion(logits, answers), "tables": tables, "answers": answers,
            "probabilities": probabilities(logits, several), "names": sum(names, [])}


def names_of(batch):
    """[(path, Part or None) of each clip]; generated ones have a number."""
    paths = batch.get("path") or [f"generated clip {i}" for i in batch["index"]]
    return list(zip(paths, batch.get("part") or [None] * len(paths)))


def confusion(scores, answers):
    """Counts (true class, predicted class), int64, of the first question; None where a clip may
    have several answers."""
    first = next(iter(scores))
    if answers[first].ndim == 2:
        return None
    pairs = answers[first].cpu(), scores[first].argmax(dim=1).cpu()
    counts = torch.zeros(scores[first].shape[1], scores[first].shape[1], dtype=torch.int64)
    return counts.index_put_(pairs, torch.tensor(1), accumulate=True)


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


if __name__ == "__main__":
    from tasks import predictions
    raise SystemExit(predictions.main())
