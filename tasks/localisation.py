"""When does what happen? Temporal action localisation in videos of any length.

Why. Recognition is given a clip that someone cut so that one action fills it. Real videos run for minutes, most
of which shows nothing, and the question is where each action begins and ends. InternVideo measures its features
so (Sec. 4.3, temporal action localisation; the detector is ActionFormer, on HACS TCANet): the encoder stays
frozen, and a small network reads one feature after another. What is compared is what features know of time.

    frames --> windows --> frozen encoder --> features (T', F) --> head --+--> scores (T', Y)      is it class y now?
    one by one  of `window`                   a row per `stride`          +--> distances (T', 2)   steps to its start, end
                                                                               |
                              segments (start s, end s, score, label) <-- soft-NMS <-- decode

The idea, in steps.
1. `windows` and `slide` move the encoder over the frames, as tools/extract.py does: row i has seen the frames
   from i * stride to i * stride + window - 1.
2. `Head` is anchor-free (AFSD, arXiv 2103.13137; ActionFormer, arXiv 2202.07925): no list of candidate segments.
   Each step says which class is going on, and how far away its start and its end are.
3. `assign` makes the targets: only the steps in the middle of a segment are taught its class and its ends
   (centre sampling), for there both ends are seen equally well. `head_loss` is a pair of losses: the focal loss
   of the scores (arXiv 1708.02002), as nearly all steps show nothing, and one minus the distance-IoU (arXiv
   1911.08287) of the segments.
4. `decode` turns answers into segments; neighbouring steps name nearly the same one. `soft_nms` (arXiv
   1704.04503) lowers the score of whatever overlaps a better one of its class, and deletes nothing outright.
5. `mean_average_precision` is the official measure of ActivityNet and THUMOS: at a given temporal IoU each true
   segment may be found once, and the area under precision over recall counts. `MeanSegments` is the trivial
   baseline: it knows the training set's habits and looks at no video.
6. `stream` runs the head as features arrive. It consists of convolutions, so a step depends on `margin` steps to
   either side and no more: in pieces its answers are those for the whole, and frames and features take a
   fixed part of memory; only segments, a few numbers each, pile up.

Where we differ. ActionFormer reads with attention in windows, over a pyramid of six time scales, each with its
own range of lengths; ours reads with a few dilated convolutions at one scale, which suits actions whose lengths
differ by a factor of some ten, and streams exactly. ActionFormer's targets are the steps within 1.5 of a
segment's centre, at its scale; with one scale ours are a share of the segment's length. On ActivityNet it averages
its scores with those of a video classifier; we do not.

Numbers. InternVideo: mAP 71.58 on THUMOS14 (mean over tIoU 0.3 to 0.7), 39.00 on ActivityNet 1.3 (0.5 to 0.95),
17.57 on FineAction. The head of the default run has 0.3 M parameters and trains in seconds, on features that
take most of a minute; LOG.md has its numbers and those of the baseline.

    python localise.py VIDEO --weights RUN     segments of any video, as it streams by, and a picture

Try it:

>>> head = Head(features=8, classes=3)
>>> scores, distances = head(torch.zeros(2, 50, 8))
>>> scores.shape, distances.shape, head.margin
(torch.Size([2, 50, 3]), torch.Size([2, 50, 2]), 16)
>>> iou(np.array([[0.0, 4.0]]), np.array([[2.0, 6.0], [4.0, 5.0]])).round(3)
array([[0.333, 0.   ]])
>>> soft_nms(np.array([[0, 4, 0.9, 1], [0, 4, 0.8, 1], [7, 9, 0.5, 1]])).round(3)[:, 2]
array([0.9  , 0.5  , 0.108])
"""

import collections
import contextlib
import functools
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import weights
from attention import Dropout
from engine import pictures, processes
from engine.errors import UserError, printable
from engine.stage import Stage, flag, generator
from video import moving_shapes
from video.annotations import read_segments
from video.features import read_features
from weights import encoders

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)  # of temporal IoU, as on THUMOS14


# ------------------------------------------------------------------------------------------------
# The head


class TimeBlock(nn.Module):
    """x = x + proj(gelu(conv(norm(x)))), the convolution over three steps that are `dilation` apart."""

    def __init__(self, width, dilation, drop):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.proj, self.drop = nn.Linear(width, width), Dropout(drop)

    def forward(self, x, inside):
        """x (B, T', D); inside (B, T', 1), 0 where there is padding: it must look like the end of a video."""
        y = self.conv((self.norm(x) * inside).transpose(1, 2)).transpose(1, 2)
        return x + self.drop(self.proj(F.gelu(y)))


class Head(nn.Module):
    """What is going on at each step, and how far its ends are away.

    features   F, width of the encoder's features
    classes    Y
    width      D
    depth      blocks; the dilation doubles from one to the next
    drop       dropout in each block

    Features come as the encoder leaves them; `centre` and `spread` (F,), measured once on the training set by
    `measure`, make each of mean 0 and variance 1.
    """

    def __init__(self, features, classes, width=128, depth=4, drop=0.1):
        super().__init__()
        self.config = dict(features=features, classes=classes, width=width, depth=depth, drop=drop)
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(TimeBlock(width, 2**i, drop) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.score, self.distance = (nn.Conv1d(width, n, 3, padding=1) for n in (classes, 2))
        # At first every step says "nothing, surely": else the many empty steps drown the few others (focal loss,
        # Sec. 4.1, Initialization).
        nn.init.constant_(self.score.bias, -math.log((1 - 0.01) / 0.01))

    @property
    def margin(self):
        """Steps to either side that an answer depends on."""
        # 1 + 2 + 4 + ... of the blocks, and 1 of the last convolutions
        return 2 ** len(self.blocks)

    def measure(self, features):
        """Set centre and spread to those of features (steps, F)."""
        self.centre.copy_(features.mean(dim=0))
        self.spread.copy_(features.std(dim=0).clamp(min=1e-6))

    def forward(self, features, inside=None):
        """features (B, T', F), inside (B, T') bool, True = no padding; None: all ->
        logits (B, T', Y), distances to start and end (B, T', 2), in steps, positive"""
        inside = torch.ones(features.shape[:2],
                            device=features.device) if inside is None else inside.float()
        inside = inside[..., None]
        x = self.embed((features - self.centre) / self.spread)               # (B, T', D)
        for block in self.blocks:
            x = block(x, inside)
        x = (self.norm(x) * inside).transpose(1, 2)                          # (B, D, T')
        return self.score(x).transpose(1, 2), self.distance(x).transpose(1, 2).clamp(-10, 10).exp()


def assign(count, segments, middle=0.6):
    """What each step of a video should answer.

    count     T'
    segments  (S, 3): start and end in steps, label
    middle    share of a segment, around its centre, whose steps answer for it; at least the nearest step does
    returns   labels (T',) int64, -1 = none, and distances to start and end (T', 2) float32, in steps
    A step in the middle of several segments answers for the shortest.
    """
    labels, distances = torch.full((count,), -1), torch.zeros(count, 2)
    steps = torch.arange(count, dtype=torch.float32)
    for start, end, label in sorted(segments, key=lambda s: s[0] - s[1]):  # the shortest last
        centre, reach = (start + end) / 2, max(middle * (end - start) / 2, 0.5)
        chosen = (steps - centre).abs() <= reach
        # Where a segment is shorter than a step its nearest step may lie outside, and must still answer.
        chosen &= (steps >= min(start, centre - 0.5)) & (steps <= max(end, centre + 0.5))
        labels[chosen] = int(label)
        distances[chosen] = torch.stack([steps - start, end - steps], dim=1)[chosen].clamp(min=0)
    return labels, distances


def focal_loss(logits, target, alpha=0.25, gamma=2.0):
    """Focal loss for each logit (arXiv 1708.02002, Sec. 3.2, Focal Loss Definition), in nats:

        - alpha_t (1 - p_t)**gamma log p_t,  p_t = probability of what is true

    logits, target   alike in shape; target 0 or 1
    alpha            weight of ones; of zeros 1 - alpha
    """
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # - log p_t
    balance = alpha * target + (1 - alpha) * (1 - target)
    return balance * (1 - (-error).exp()) ** gamma * error


def distance_iou_loss(found, wanted):
    """1 - IoU + (distance of the centres / length of the hull)**2 of segments around the same step (DIoU, arXiv
    1911.08287, Sec. 3.2, Distance-IoU Loss, in one dimension): where two do not overlap, IoU alone has no slope.

    found, wanted   (n, 2), distances to start and end, >= 0
    returns         (n,)
    """
    overlap = torch.minimum(found, wanted).sum(dim=1)
    union = found.sum(dim=1) + wanted.sum(dim=1) - overlap
    hull = torch.maximum(found, wanted).sum(dim=1).clamp(min=1e-6)
    apart = ((found - wanted) * found.new_tensor([-0.5, 0.5])).sum(dim=1)
    return 1 - overlap / union.clamp(min=1e-6) + (apart / hull) ** 2


def head_loss(logits, distances, labels, wanted, inside, count=None):
    """(focal loss of the scores, distance-IoU loss of the segments), each over the number of answering steps.

    logits (B, T', Y); distances, wanted (B, T', 2); labels (B, T') int64, -1 = none; inside (B, T') bool
    count   what to divide by; default: the answering steps of this batch, at least 1
    """
    answering = (labels >= 0) & inside
    count = answering.sum().clamp(min=1) if count is None else count
    target = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * answering[..., None]
    scores = (focal_loss(logits, target.float()) * inside[..., None]).sum() / count
    return scores, distance_iou_loss(distances[answering], wanted[answering]).sum() / count


# ------------------------------------------------------------------------------------------------
# From answers to segments


def clock(times):
    """(steps, seconds): two lines of knots between which np.interp translates one into the other.

    times  (T',) seconds of the steps; beyond the first and the last, time goes on at the median pace
    """
    pace, far = float(np.median(np.diff(times))) if len(times) > 1 else 1.0, 1e6
    steps = np.arange(len(times), dtype=float)
    return (np.concatenate([[-far], steps, [steps[-1] + far]]),
            np.concatenate([[times[0] - far * pace], times, [times[-1] + far * pace]]))


def decode(scores, distances, first=0, least=0.01, most=500):
    """Answers of the head -> candidates (n, 4): start and end in steps, score, label; the best come first.

    scores     (T', Y) probabilities
    distances  (T', 2) in steps
    first      number of the first of these steps
    least      candidates with lower scores are dropped
    most       so many remain
    """
    scores, distances = scores.double().cpu().numpy(), distances.double().cpu().numpy()
    step, label = np.nonzero(scores > least)
    found = np.stack([first + step - distances[step, 0], first + step + distances[step, 1],
                      scores[step, label], label], 1)
    return found[np.argsort(-found[:, 2], kind="stable")[:most]]


def in_seconds(candidates, times, duration):
    """Candidates (n, 4) in steps -> in seconds, within the video; those of no length are dropped."""
    found = candidates.copy()
    found[:, :2] = np.interp(candidates[:, :2], *clock(times)).clip(0, duration)
    return found[found[:, 1] > found[:, 0]]


def iou(a, b):
    """Temporal intersection over union of segments a (n, 2+), b (m, 2+): start, end, ... -> (n, m)"""
    overlap = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    overlap = overlap.clip(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - overlap
    return overlap / np.maximum(union, 1e-9)


def soft_nms(candidates, sigma=0.5, least=0.001, most=200):
    """Gaussian soft-NMS (arXiv 1704.04503, Sec. 3, Soft-NMS): take the best candidate, multiply the score of every
    other one of its class by exp(-IoU**2 / sigma), and so on.

    candidates  (n, 4): start, end, score, label
    sigma       larger is milder; sigma -> 0 drops whatever overlaps
    least       where no score is higher, stop
    most        so many remain of a whole video
    returns     (n, 4), the best first

    Candidates that no chain of overlaps joins cannot touch each other's scores, so each such group is treated by
    itself, and the cost grows with the length of the video, not with its square.
    """
    kept = [np.empty((0, 4))]
    for label in np.unique(candidates[:, 3]):
        group = candidates[candidates[:, 3] == label]
        group = group[np.argsort(group[:, 0], kind="stable")]
        reached = np.maximum.accumulate(group[:, 1])
        for waiting in np.split(group.copy(), np.flatnonzero(group[1:, 0] >= reached[:-1]) + 1):
            while len(waiting):
                best = waiting[:, 2].argmax()
                if waiting[best, 2] <= least:
                    break
                kept.append(waiting[best:best + 1].copy())
                waiting = np.delete(waiting, best, axis=0)
                waiting[:, 2] *= np.exp(-iou(kept[-1], waiting)[0] ** 2 / sigma)
    kept = np.concatenate(kept)
    return kept[np.argsort(-kept[:, 2], kind="stable")][:most]


def clearest(found, least=0.2):
    """For a picture: of segments (n, 4), the best first, those of a score of at least `least` that no better one, of
    any class, overlaps by half."""
    kept = found[:0]
    for row in found[found[:, 2] >= least]:
        if not (iou(row[None], kept) >= 0.5).any():
            kept = np.concatenate([kept, row[None]])
    return kept


# ------------------------------------------------------------------------------------------------
# The measure, and the baseline


def mean_average_precision(truth, found, thresholds=THRESHOLDS):
    """The official measure of ActivityNet and THUMOS14 -> {tIoU: mAP}, in [0, 1].

    truth  for each video a list of (start, end, label)
    found  for each video an array (n, 4): start, end, score, label

    Class by class, the segments of all videos are taken by falling score. One that overlaps a true segment of its
    video, not yet taken by a better scored one, by tIoU or more is right and takes it (of several the one it
    overlaps most); any other is wrong. Average precision is the area under precision over recall, where
    precision at a recall is the best at that or any higher recall. mAP is the mean over classes that occur.
    """
    values = {threshold: [] for threshold in thresholds}
    for label in sorted({segment[2] for segments in truth for segment in segments}):
        true = [np.array([s[:2] for s in segments if s[2] == label], float).reshape(-1, 2)
                for segments in truth]
        said = [(row[2], video, row[:2]) for video,
                rows in enumerate(found) for row in rows[rows[:, 3] == label]]
        said.sort(key=lambda row: -row[0])
        right = {threshold: np.zeros(len(said)) for threshold in thresholds}
        taken = {threshold: [set() for _ in true] for threshold in thresholds}
        for i, (_, video, segment) in enumerate(said):
            overlap = iou(segment[None], true[video])[0]
            for threshold in thresholds:
                for j in np.argsort(-overlap, kind="stable"):
                    if overlap[j] < threshold:
                        break
                    if j not in taken[threshold][video]:
                        taken[threshold][video].add(j)
                        right[threshold][i] = 1
                        break
        for threshold in thresholds:
            values[threshold].append(average_precision(right[threshold], sum(map(len, true))))
    return {threshold: float(np.mean(ap)) if ap else 0.0 for threshold, ap in values.items()}


def average_precision(right, count):
    """right (n,) 0 or 1 by falling score, count of what there was to find -> interpolated average precision."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best * right).sum() / count)


class MeanSegments:
    """The trivial baseline: what one can say of a video without looking at it.

    truth, durations   of the training videos: lists of (start, end, label), and seconds

    It always says the same, as shares of the duration: as many segments as a training video has on average, the
    r-th of them at the mean start and mean end of the r-th segment of all training videos that have as many; and
    each of them once for every class, with the class's share of the training segments as its score, so the most
    frequent class comes first. To name that one alone would leave every other class with nothing.
    """

    def __init__(self, truth, durations):
        count = max(1, round(np.mean([len(segments) for segments in truth])))
        ranked = [[] for _ in range(count)]
        for segments, duration in zip(truth, durations):
            for rank, (start, end, _) in zip(ranked, sorted(segments)):
                rank.append((start / duration, end / duration))
        labels = collections.Counter(label for segments in truth for *_, label in segments)
        self.said = np.array([(*np.mean(rank, axis=0), number / labels.total(), label)
                              for rank in ranked if rank
                              for label, number in labels.most_common()]).reshape(-1, 4)

    def __call__(self, duration):
        """Segments (n, 4) of a video of so many seconds."""
        return self.said * np.array([duration, duration, 1, 1])


# ------------------------------------------------------------------------------------------------
# Videos of any length


def windows(frames, window, stride):
    """Slide over frames: yield (window, H, W, 3) at every `stride`-th; a shorter video repeats its last frame.

    frames  an iterable of uint8 (H, W, 3); no more than `window` of them are kept
    """
    kept, number = collections.deque(maxlen=window), 0
    for frame in frames:
        kept.append(frame)
        number += 1
        if number >= window and (number - window) % stride == 0:
            yield np.stack(kept)
    if 0 < number < window:
        yield np.stack([*kept, *[kept[-1]] * (window - number)])


def step_times(timestamps, window, stride):
    """Seconds in the middle of what each step has seen, (T',), T' = max(frames - window, 0) // stride + 1.

    timestamps   (frames,) seconds at which each frame is shown
    """
    timestamps = np.asarray(timestamps, float)
    first = np.arange(0, max(len(timestamps) - window, 0) + 1, stride)
    return (timestamps[first] + timestamps[np.minimum(first + window, len(timestamps)) - 1]) / 2


def in_batches(items, size):
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


@torch.no_grad()
def slide(encoder, frames, stride, batch_size=16):
    """Yield features (b, F) of frames as they come, by an encoder in eval mode, on its device; see `windows`."""
    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1, 1)
                 for x in (encoder.mean, encoder.std))
    for clips in in_batches(windows(frames, encoder.config["frames"], stride), batch_size):
        # (B, C, T, H, W)
        clips = torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3)
        clips = (clips / 255 - mean) / std
        # Of the multimodal encoder before the head's norm, as runs made before have it.
        yield (encoder.encode(clips)[0]
               if encoder.family == "multimodal" else encoder.feature(clips)).float()


@torch.no_grad()
def stream(head, features, chunk=256):
    """Run the head over features that come in pieces (b, F); yield (first, scores (n, Y), distances (n, 2)): the
    answers of steps first to first + n - 1, equal to those for the whole video at once.

    At most chunk + 2 head.margin rows, and a piece, are kept.
    """
    # kept[0] is step `begin`; steps before `done` are answered
    margin, kept, begin, done = head.margin, None, 0, 0
    for piece in itertools.chain(features, [None]):
        if piece is not None:
            kept = piece if kept is None else torch.cat([kept, piece])
        while kept is not None:
            there = begin + len(kept)
            last = min(done + chunk, there)
            if last <= done or piece is not None and there < done + chunk + margin:
                break
            scores, distances = head(kept[None, :last + margin - begin])
            yield done, scores[0, done - begin:last - begin].sigmoid(), distances[0,
                                                                                  done - begin:last - begin]
            done = last
            kept, begin = kept[max(done - margin - begin, 0):], max(done - margin, begin)


class Localiser(nn.Module):
    """An encoder, frozen, and a head: what a run of train.py's localise stage leaves.

    encoder  mae.VideoClassifier or uniformerv2.UniFormerV2; None where features came from files
    head     a `Head`
    names    of the classes, in label order
    stride   frames from one window to the next
    """

    def __init__(self, encoder, head, names, stride):
        super().__init__()
        self.encoder, self.head, self.names, self.stride = encoder, head, list(names), stride
        if encoder is not None:
            encoder.requires_grad_(False)
        self.config = {"model": "Localiser", "encoder": encoder and encoder.config,
                       "head": head.config,
                       "names": self.names, "stride": stride}

    def train(self, mode=True):
        """The encoder stays as it is, in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def find(self, video, batch_size=16, tick=lambda: None):
        """Segments of a Video of any length: (n, 4), start s, end s, score, label, the best first.

        tick  called at every frame
        """
        def frames():
            for frame in video.play(self.encoder.config["image_size"]):
                tick()
                yield frame

        return self.find_in(frames(), video.info.timestamps, video.info.duration, batch_size)

    def find_in(self, frames, timestamps, duration, batch_size=16):
        """The same of frames, uint8 (H, W, 3), as they come: timestamps (T,) and duration in seconds."""
        features = slide(self.encoder, frames, self.stride, batch_size)
        found = [decode(scores, distances, first) for first, scores,
                 distances in stream(self.head, features)]
        times = step_times(timestamps, self.encoder.config["frames"], self.stride)
        return soft_nms(in_seconds(np.concatenate(found), times, duration), most=None)

    @classmethod
    def from_run(cls, folder):
        """Load a run of the localise stage, in eval mode. WeightsError where it is none."""
        return weights.load_run(cls.from_config, folder, "Localiser", "localise")

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        part = config["encoder"]
        return cls(part and encoders.from_config(part), Head(**config["head"]), config["names"],
                   config["stride"])


# ------------------------------------------------------------------------------------------------
# Training the head


class Videos(torch.utils.data.Dataset):
    """Long videos as the stage needs them; an item's "video" is its number, for what looks them up.

    items      dicts with "features" (T', F), "times", "segments", "duration", "path"; or a `world`
               of generated videos, whose features are not computed yet
    classes    {"label": class names}
    """

    def __init__(self, items, names, source):
        self.items, self.classes, self.source = items, {"label": tuple(names)}, source

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        number = index[0] if isinstance(index, tuple) else index
        return {"video": np.int64(number)}


def mean_ap(items, segments_of, prefix=""):
    """mAP in percent of what `segments_of` predicts for each item, at each IoU and on average."""
    values = mean_average_precision([item["segments"] for item in items],
                                    [segments_of(item) for item in items])
    values = {f"{prefix}mAP@{threshold:g}": 100 * value for threshold, value in values.items()}
    return values | {f"{prefix}mAP": float(np.mean(list(values.values())))}


@torch.no_grad()
def predict(head, item):
    """The segments of one video, (n, 4), out of its features."""
    scores, distances = head(item["features"][None].to(next(head.parameters()).device))
    candidates = decode(scores[0].sigmoid(), distances[0])
    return soft_nms(in_seconds(candidates, item["times"], item["duration"]))


@dataclass
class Localisation(Stage, name="localise"):
    """What happens when, in long videos: a small head on a frozen encoder's features.

    InternVideo, Sec. 4.3, temporal action localisation; the head after AFSD and ActionFormer, the
    paper of the flags. On long generated videos, whose features are computed once; or on real ones,
    whose features tools/extract.py has computed. Then: python tools/predict.py VIDEO --weights RUN"""

    data: str = flag("",
                     "folder of .npz features by tools/extract.py, with --annotations; default: "
                     "long generated videos")
    val_data: str = flag("", "the same for evaluation; default: also in --data")
    weights: str = flag("",
                        "the encoder: a run of mae, clip or classify, or an official file; or a "
                        "run of this stage. With --data not needed, but kept in the run for videos")
    annotations: str = flag("",
                            "JSON in the form of ActivityNet: what happens when in the videos of "
                            "--data", group="clips")
    train_subset: str = flag("training", "subset of --annotations to train on",
                             paper="validation on THUMOS14", group="clips")
    val_subset: str = flag("validation", "subset to evaluate on, all of it",
                           paper="test on THUMOS14", group="clips")
    videos: int = flag(300, "generated videos to train on", low=1, group="clips")
    eval_clips: int = flag(100, "generated videos per evaluation")
    stride: int = flag(4, "frames from one window to the next", low=1, group="clips",
                       paper="VideoMAE V2: 4 on THUMOS14, 16 on FineAction")
    steps: int = flag(400)
    batch_size: int = flag(16, "videos per step")
    lr: float = flag(2e-3, paper="1e-4")
    optimizer: str = flag("adamw")
    weight_decay: float = flag(0.05, paper="0.05")
    width: int = flag(128, "of the head", paper="512", low=1)
    depth: int = flag(4, "blocks of the head; each doubles how far it sees", low=1, high=10)
    drop: float = flag(0.1, "dropout in the head", low=0, high=1)
    middle: float = flag(0.6, "share of a segment whose steps answer for it", low=0, high=1)
    length: int = flag(1024, "most steps of a video in training; of a longer one a random part",
                       paper="2304", low=8)

    @functools.cached_property
    def parts(self):
        """(the encoder or None, a finished Localiser or None), out of --weights."""
        if bool(self.weights) and weights.read(self.weights)[1].get("model") == "Localiser":
            model = Localiser.from_run(self.weights)
            return model.encoder, model
        return encoders.load_encoder(self.weights) if self.weights else None, None

    def datasets(self):
        """Long videos: generated ones, or features of files with their annotation."""
        train_set, val = self.open_files() if self.data else self.open_worlds()
        return train_set, {"val": val}

    def open_worlds(self):
        """Generated videos; `prepare` computes their features."""
        encoder = self.parts[0]
        if encoder is None:
            raise UserError("--weights: localise needs an encoder; give a run of mae, clip or "
                            "classify, or an official file")
        counts = {"train": self.videos, "val": self.eval_clips}
        worlds = {split: moving_shapes.LongShapes(split, encoder.config["image_size"], self.seed)
                  for split in counts}
        return [Videos([world] * counts[split], world.motions, "moving shapes")
                for split, world in worlds.items()]

    def open_files(self):
        """Features of files. UserError where they do not fit together, or to --weights."""
        if not self.annotations:
            raise UserError(
                "--annotations: --data is a folder of features; name the JSON that says "
                            "what happens when")
        encoder, model = self.parts
        rows, names = read_segments(self.annotations), model and model.names
        sets = []
        for folder, subset in ((self.data, self.train_subset),
                               (self.val_data or self.data, self.val_subset)):
            items, names, missing = read_features(folder, rows, subset, names)
            print(
                f"--data {folder}: {len(items)} videos of the subset {subset}, {len(names)} classes"
                  + (f"; the features of {len(missing)} are MISSING, e.g. "
                     f"{printable(str(missing[0]))}" if missing else ""))
            sets.append(Videos(items, names, folder))
        first = sets[0].items[0]
        for item in itertools.chain(*(part.items for part in sets)):
            if any(item[key] != first[key] for key in ("model", "window", "stride")) or \
                    item["features"].shape[1] != first["features"].shape[1]:
                raise UserError(
                    f"--data: {item['path']} was extracted with another model, window or "
                                f"stride than {first['path']}")
        if encoder is not None and model is None and \
                weights.fingerprint(self.weights) != first["model"]:
            raise UserError(f"--weights {self.weights}: is not the model {first['model']} that the "
                            "features were extracted with")
        self.stride, self.eval_clips = first["stride"], len(sets[1])
        return sets

    def build(self, train_set):
        """The finished model, or a new head; its encoder is frozen."""
        encoder, model = self.parts
        names = list(train_set.classes["label"])
        if model is None:
            width = train_set.items[0]["features"].shape[1] if self.data else encoder.width
            head = Head(width, len(names), self.width, self.depth, self.drop)
            model = Localiser(encoder, head, names, self.stride)
        if model.names != names or model.stride != self.stride:
            raise UserError(
                f"--weights {self.weights}: was trained with other classes, or a stride "
                            f"of {model.stride}")
        return model

    def prepare(self, model, train_set, held_out):
        """Features of generated videos, and the targets of all videos, in steps."""
        sets = (train_set, held_out["val"])
        if not self.data:
            for part, items in zip(sets, self.features(model, sets)):
                part.items = items
        for item in itertools.chain(*(part.items for part in sets)):
            item["features"] = torch.as_tensor(item["features"])
            item["steps"] = [(*np.interp(segment[:2], *clock(item["times"])[::-1]), segment[2])
                             for segment in item["segments"]]
        if self.parts[1] is None:
            model.head.measure(torch.cat([item["features"] for item in train_set.items])
                               .to(self.device))
        self.baseline = MeanSegments([item["segments"] for item in train_set.items],
                                     [item["duration"] for item in train_set.items])
        return train_set

    def features(self, model, sets):
        """[items of each set] with features of an eval-mode encoder, kept in --out/features.pt."""
        path = Path(self.out) / "features.pt"
        settings = {name: getattr(self, name) for name in
                    ("weights", "videos", "eval_clips", "stride", "seed", "precision")}
        if self.resume and path.exists():
            with contextlib.suppress(Exception):  # damaged, or of another recipe: computed again
                saved = weights.load(path)
                if saved["settings"] == settings:
                    return saved["sets"]
        encoder, stored, started = model.encoder.eval(), [], time.monotonic()
        counts = [1 if self.dry_run else len(part) for part in sets]
        with tqdm(total=sum(counts), desc="features", unit="video",
                  disable=processes.rank() > 0 or None) as bar:
            for part, count in zip(sets, counts):
                rows = []
                for i in range(processes.rank(), count, processes.world()):
                    rows.append((i, self.item(encoder, part.items[i], i)))
                    bar.update(processes.world())
                stored.append([item for _, item in processes.collect(rows)])
        if not self.dry_run and processes.rank() == 0:
            weights.write_torch(path, dict(sets=stored, settings=settings))
        print(f"features of {sum(counts)} videos: {time.monotonic() - started:.0f} s")
        return stored

    def item(self, encoder, world, i):
        """Generated video i, with features in place of its frames."""
        video = world[i]
        frames = video.pop("video")
        with self.autocast():
            features = torch.cat(list(slide(encoder, frames, self.stride, 64))).cpu()
        times = step_times(np.arange(len(frames)) / world.FPS, encoder.config["frames"],
                           self.stride)
        return video | {"features": features, "times": times.tolist()}

    def gather(self, items, rng=None):
        """Videos, or with rng a random part of each long one, as a padded batch with its targets."""
        parts = []
        for item in items:
            count = len(item["features"])
            labels, distances = assign(count, item["steps"], self.middle)
            first = int(torch.randint(max(count - self.length, 0) + 1, (), generator=rng)) \
                if rng else 0
            part = slice(first, first + self.length if rng else count)
            inside = torch.ones(count, dtype=torch.bool)
            parts.append((item["features"][part], inside[part], labels[part], distances[part]))
        columns = zip(("features", "inside", "targets", "distances"), zip(*parts),
                      (0.0, False, -1, 0.0))
        return {name: nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=empty)
                .to(self.device) for name, column, empty in columns}

    def batches(self, train_set, first):
        """Padded batches of videos, drawn at random; a function of (seed, step)."""
        for step in range(first * self.accum, self.steps * self.accum):
            rng = generator(self.seed, "videos", step)
            rows, mine = processes.joined(self.batch_size)
            chosen = torch.randint(len(train_set), (rows,), generator=rng).tolist()
            # Of all processes: padded alike, counted together.
            batch = self.gather([train_set.items[i] for i in chosen], rng)
            count = ((batch["targets"] >= 0) & batch["inside"]).sum().clamp(min=1)
            yield {name: value[mine] for name, value in batch.items()} | {
                "count": count / processes.world()}

    def loss(self, model, batch, rng):
        """Focal loss of the scores and distance-IoU loss of the segments."""
        scores, distances = model.head(batch["features"], batch["inside"])
        parts = head_loss(scores, distances, batch["targets"], batch["distances"], batch["inside"],
                          batch.get("count"))
        return sum(parts), {"loss": sum(parts).detach(), "score_loss": parts[0].detach(),
                            "distance_loss": parts[1].detach()}

    def evaluate(self, model, batches, held_out_set):
        """Mean loss, and mAP in percent at each temporal IoU and on average."""
        rows = []
        for i in (i for batch in batches for i in batch["video"].tolist()):
            item = held_out_set.items[i]
            loss = float(self.loss(model, self.gather([item]), None)[0])
            rows.append((i, loss, predict(model.head, item)))
        order, losses, segments = zip(*processes.collect(rows))
        segments = dict(zip(order, segments))
        items = [held_out_set.items[i] | {"number": i} for i in order]
        return {"loss": float(np.mean(losses)), "items": held_out_set.items} | mean_ap(
            items, lambda item: segments[item["number"]])

    def finish(self, model, held_out, results):
        """The same of the baseline, and both as a table."""
        items = held_out["val"].items[:self.eval_clips]
        rows = {"localise": mean_ap(items, functools.partial(predict, model.head)),
                "mean segments": mean_ap(items, lambda item: self.baseline(item["duration"]),
                                         "mean_segments_")}
        print(f"{'mAP in percent at temporal IoU':32s}"
              + "".join(f"{t:>7g}" for t in THRESHOLDS) + "   mean")
        for name, values in rows.items():
            print(f"{name:32s}" + "".join(f"{value:7.1f}" for value in values.values()))
        return rows["mean segments"]

    def protocol(self, held_out):
        """How mAP is measured."""
        what = "videos of --data" if self.data else \
            "long videos of moving shapes, 14 motions, 8 frames a second"
        return {"videos": f"{self.eval_clips} held-out {what}",
                "features": f"one every {self.stride} frames, from a frozen encoder",
                "mAP": "Gaussian soft-NMS; interpolated AP as ActivityNet's, mean over classes, at "
                       "temporal IoU 0.3 to 0.7",
                "baseline": "sees no video and predicts the mean segments of the training videos, "
                            "for every class"}

    def pictures(self, model, batch, folder, results):
        """segments.png: true and predicted segments of some videos."""
        rows = []
        for i in batch["video"].tolist()[:4]:
            item, frames = results["val"]["items"][i], None
            if not self.data:
                world = moving_shapes.LongShapes("val", model.encoder.config["image_size"],
                                                 self.seed)
                frames = pictures.strip(world[i]["video"], 24)
            rows.append((item["path"], frames, item["duration"], item["segments"],
                         clearest(predict(model.head, item))))
        pictures.segments(rows, model.names, folder / "segments.png")
        return [folder / "segments.png"]
