"""Temporal action localisation: find the start, the end and the class of actions in long videos.

Recognition assumes a clip that one action fills. Real videos last minutes, and most of the time
shows no action. InternVideo evaluates its features on this task (Sec. 4.3, with the detectors
ActionFormer and TCANet). The encoder is frozen. A small head reads its sequence of features.

    frames -> windows -> frozen encoder -> features (T', F) -> head -+-> scores (T', Y)
                                           one per step              +-> distances (T', 2)
    segments (start s, end s, score, label) <- soft-NMS <- decode <--+

1. `windows` and `slide` move the encoder over the frames, as tools/extract.py does. The feature of
   step i is computed from frames i * stride to i * stride + window - 1.
2. `Head` is anchor-free (AFSD, arXiv 2103.13137; ActionFormer, arXiv 2202.07925). For each step it
   predicts a score per class, and the distances to the start and the end of the segment.
3. `assign` makes the targets: only steps in the middle of a segment predict it (centre sampling).
   `head_loss` is the focal loss of the scores (arXiv 1708.02002) and the distance-IoU loss of the
   segments (arXiv 1911.08287).
4. `decode` turns predictions into segments. `soft_nms` (arXiv 1704.04503) lowers the score of
   segments that overlap a better one of the same class.
5. `mean_average_precision` is the official metric of ActivityNet and THUMOS14. `MeanSegments` is a
   trivial baseline that sees no video.
6. `stream` runs the head while features arrive, with bounded memory. A prediction depends on
   `margin` steps to either side, so the result equals that for the whole video at once.

Where we differ: ActionFormer uses windowed attention on six time scales, each for its own range of
segment lengths. Our head uses dilated convolutions on one scale. In ActionFormer steps within 1.5
of a segment's centre predict it; here it is a share of the segment's length. On ActivityNet,
ActionFormer averages its scores with those of a video classifier; we do not.

InternVideo's mAP: 71.58 on THUMOS14, 39.00 on ActivityNet 1.3, 17.57 on FineAction.

>>> head = Head(features=8, classes=3)
>>> scores, distances = head(torch.zeros(2, 50, 8))
>>> scores.shape, distances.shape, head.margin
(torch.Size([2, 50, 3]), torch.Size([2, 50, 2]), 16)
"""

import collections
import functools
import itertools
import math
import time
from dataclasses import dataclass

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
from video.features import Grid, read_features
from video.segments import read_segments
from video.transforms import normalise
from weights import encoders

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)  # of temporal IoU, as on THUMOS14


# ------------------------------------------------------------------------------------------------
# The head


class TimeBlock(nn.Module):
    """x = x + proj(gelu(conv(norm(x)))); the convolution spans three steps, `dilation` apart."""

    def __init__(self, width, dilation, drop):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.proj, self.drop = nn.Linear(width, width), Dropout(drop)

    def forward(self, x, inside):
        """x (B, T', D); inside (B, T', 1), 0 at padding. Padding then acts like the zeros that the
        convolution sees beyond the end of a video."""
        y = self.conv((self.norm(x) * inside).transpose(1, 2)).transpose(1, 2)
        return x + self.drop(self.proj(F.gelu(y)))


class Head(nn.Module):
    """Predicts for each step the class scores, and the distances to start and end of the segment.

    features  F, width of the encoder's features
    classes   Y
    width     D
    depth     blocks; the dilation doubles from one to the next
    drop      dropout in each block

    The head first normalises the features. `centre` and `spread` (F,) are their mean and standard
    deviation in the training set, see `measure`.
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
        # Every score starts at 0.01. With larger scores the many steps without an action would
        # dominate the first loss (focal loss, Sec. 4.1, Initialization).
        nn.init.constant_(self.score.bias, -math.log((1 - 0.01) / 0.01))

    @property
    def margin(self):
        """Steps to either side that a prediction depends on."""
        return 2 ** len(self.blocks)  # blocks: 1 + 2 + 4 + ...; last convolutions: 1

    def measure(self, features):
        """Set `centre` and `spread` to mean and standard deviation of features (steps, F)."""
        self.centre.copy_(features.mean(dim=0))
        self.spread.copy_(features.std(dim=0).clamp(min=1e-6))

    def forward(self, features, inside=None):
        """Predictions for each step.

        features  (B, T', F)
        inside    (B, T') bool, False = padding; None: no padding
        returns   logits (B, T', Y) and distances to start and end (B, T', 2), positive, in steps
        """
        inside = torch.ones(features.shape[:2], device=features.device) if inside is None \
            else inside.float()
        inside = inside[..., None]
        x = self.embed((features - self.centre) / self.spread)               # (B, T', D)
        for block in self.blocks:
            x = block(x, inside)
        x = (self.norm(x) * inside).transpose(1, 2)                          # (B, D, T')
        distances = self.distance(x).transpose(1, 2).clamp(-10, 10).exp()
        return self.score(x).transpose(1, 2), distances


def assign(count, segments, middle=0.6):
    """The targets of each step of a video.

    count     T'
    segments  (S, 3): start and end in steps, label
    middle    the steps in this share of a segment, around its centre, predict it; at least one
    returns   labels (T',) int64, -1 = none; distances to start and end (T', 2) float32, in steps

    A step in the middle of several segments predicts the shortest.
    """
    labels, distances = torch.full((count,), -1), torch.zeros(count, 2)
    steps = torch.arange(count, dtype=torch.float32)
    # The shortest segment comes last and overwrites the others.
    for start, end, label in sorted(segments, key=lambda s: s[0] - s[1]):
        centre, reach = (start + end) / 2, max(middle * (end - start) / 2, 0.5)
        chosen = (steps - centre).abs() <= reach
        # If a segment is shorter than a step, the nearest step may lie outside it.
        chosen &= (steps >= min(start, centre - 0.5)) & (steps <= max(end, centre + 0.5))
        labels[chosen] = int(label)
        distances[chosen] = torch.stack([steps - start, end - steps], dim=1)[chosen].clamp(min=0)
    return labels, distances


def focal_loss(logits, target, alpha=0.25, gamma=2.0):
    """Focal loss of each logit (arXiv 1708.02002, Sec. 3.2, Focal Loss Definition), in nats:

        - alpha_t (1 - p_t)**gamma log p_t,  p_t = predicted probability of the target

    logits, target  of the same shape; target 0 or 1
    alpha           weight of ones; zeros have 1 - alpha
    """
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # - log p_t
    balance = alpha * target + (1 - alpha) * (1 - target)
    return balance * (1 - (-error).exp()) ** gamma * error


def distance_iou_loss(distances, target):
    """Distance-IoU loss in one dimension (DIoU, arXiv 1911.08287, Sec. 3.2, Distance-IoU Loss):

        1 - IoU + (distance of the centres / length of the hull)**2

    The second term gives a gradient also where the segments do not overlap and IoU is 0.

    distances, target  (n, 2), distances from the same step to start and end, >= 0
    returns            (n,)
    """
    overlap = torch.minimum(distances, target).sum(dim=1)
    union = distances.sum(dim=1) + target.sum(dim=1) - overlap
    hull = torch.maximum(distances, target).sum(dim=1).clamp(min=1e-6)
    centres = ((distances - target) * distances.new_tensor([-0.5, 0.5])).sum(dim=1)
    return 1 - overlap / union.clamp(min=1e-6) + (centres / hull) ** 2


def head_loss(logits, distances, labels, target_distances, inside, count=None):
    """(focal loss of the scores, distance-IoU loss of the segments), each a scalar.

    logits                       (B, T', Y)
    distances, target_distances  (B, T', 2)
    labels                       (B, T') int64, -1 = none
    inside                       (B, T') bool, False = padding
    count                        what the sums are divided by; default: the number of steps with a
                                 label, at least 1
    """
    labelled = (labels >= 0) & inside
    count = labelled.sum().clamp(min=1) if count is None else count
    target = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * labelled[..., None]
    scores = (focal_loss(logits, target.float()) * inside[..., None]).sum() / count
    return scores, distance_iou_loss(distances[labelled], target_distances[labelled]).sum() / count


# ------------------------------------------------------------------------------------------------
# From predictions to segments


def clock(times):
    """Knots (steps, seconds) with which np.interp converts steps to seconds, or back.

    times  (T',) seconds of the steps. Before the first and after the last step, time continues with
           the median length of a step
    """
    length, far = float(np.median(np.diff(times))) if len(times) > 1 else 1.0, 1e6
    steps = np.arange(len(times), dtype=float)
    return (np.concatenate([[-far], steps, [steps[-1] + far]]),
            np.concatenate([[times[0] - far * length], times, [times[-1] + far * length]]))


def decode(scores, distances, first=0, least=0.01, most=500):
    """Predictions of the head -> candidates (n, 4): start and end in steps, score, label.

    scores     (T', Y) probabilities
    distances  (T', 2) in steps
    first      number of the first of these steps
    least      lowest score of a candidate that is kept
    most       largest number of candidates; the best are kept, in descending order
    """
    scores, distances = scores.double().cpu().numpy(), distances.double().cpu().numpy()
    step, label = np.nonzero(scores > least)
    candidates = np.stack([first + step - distances[step, 0], first + step + distances[step, 1],
                           scores[step, label], label], axis=1)
    return candidates[np.argsort(-candidates[:, 2], kind="stable")[:most]]


def in_seconds(candidates, times, duration):
    """Convert candidates (n, 4) from steps to seconds and clip them to the video's duration. Empty
    ones are dropped."""
    segments = candidates.copy()
    segments[:, :2] = np.interp(candidates[:, :2], *clock(times)).clip(0, duration)
    return segments[segments[:, 1] > segments[:, 0]]


def iou(a, b):
    """Temporal intersection over union of segments (start, end, ...): (n, 2+), (m, 2+) -> (n, m).

    >>> iou(np.array([[0.0, 4.0]]), np.array([[2.0, 6.0], [4.0, 5.0]])).round(3)
    array([[0.333, 0.   ]])
    """
    overlap = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    overlap = overlap.clip(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - overlap
    return overlap / np.maximum(union, 1e-9)


def soft_nms(candidates, sigma=0.5, least=0.001, most=200):
    """Gaussian soft-NMS (arXiv 1704.04503, Sec. 3, Soft-NMS).

    Repeat: take the best candidate, and multiply the scores of the others of its class by
    exp(-IoU**2 / sigma).

    candidates  (n, 4): start, end, score, label
    sigma       larger values suppress less
    least       candidates whose score falls to this or below are dropped
    most        number of segments that are kept; None = all
    returns     (n, 4), the best first

    Candidates that do not overlap cannot affect each other. Each group of overlapping candidates is
    therefore handled separately. The cost grows linearly with the length of the video.

    >>> soft_nms(np.array([[0, 4, 0.9, 1], [0, 4, 0.8, 1], [7, 9, 0.5, 1]])).round(3)[:, 2]
    array([0.9  , 0.5  , 0.108])
    """
    kept = [np.empty((0, 4))]
    for label in np.unique(candidates[:, 3]):
        group = candidates[candidates[:, 3] == label]
        group = group[np.argsort(group[:, 0], kind="stable")]
        last_end = np.maximum.accumulate(group[:, 1])
        for rest in np.split(group.copy(), np.flatnonzero(group[1:, 0] >= last_end[:-1]) + 1):
            while len(rest):
                best = rest[:, 2].argmax()
                if rest[best, 2] <= least:
                    break
                kept.append(rest[best:best + 1].copy())
                rest = np.delete(rest, best, axis=0)
                rest[:, 2] *= np.exp(-iou(kept[-1], rest)[0] ** 2 / sigma)
    kept = np.concatenate(kept)
    return kept[np.argsort(-kept[:, 2], kind="stable")][:most]


def clearest(segments, least=0.2):
    """Select the segments to draw: score at least `least`, IoU below 0.5 with every better one of
    any class.

    segments  (n, 4), the best first
    """
    kept = segments[:0]
    for row in segments[segments[:, 2] >= least]:
        if not (iou(row[None], kept) >= 0.5).any():
            kept = np.concatenate([kept, row[None]])
    return kept


# ------------------------------------------------------------------------------------------------
# The metric and the baseline


def mean_average_precision(truth, predictions, thresholds=THRESHOLDS):
    """The official metric of ActivityNet and THUMOS14 -> {tIoU: mAP}, in [0, 1].

    truth        for each video a list of (start, end, label)
    predictions  for each video an array (n, 4): start, end, score, label

    For each class, the predictions of all videos are visited in order of descending score. A
    prediction is correct if its IoU with a true segment of its video is at least tIoU, and no
    better prediction has matched that segment. Among several such segments it matches the one with
    the largest IoU. mAP is the mean of `average_precision` over the classes that occur.
    """
    values = {threshold: [] for threshold in thresholds}
    for label in sorted({segment[2] for segments in truth for segment in segments}):
        true = [np.array([s[:2] for s in segments if s[2] == label], float).reshape(-1, 2)
                for segments in truth]
        ranked = [(row[2], video, row[:2]) for video, rows in enumerate(predictions)
                  for row in rows[rows[:, 3] == label]]
        ranked.sort(key=lambda row: -row[0])
        correct = {threshold: np.zeros(len(ranked)) for threshold in thresholds}
        matched = {threshold: [set() for _ in true] for threshold in thresholds}
        for i, (_, video, segment) in enumerate(ranked):
            overlap = iou(segment[None], true[video])[0]
            for threshold in thresholds:
                for j in np.argsort(-overlap, kind="stable"):
                    if overlap[j] < threshold:
                        break
                    if j not in matched[threshold][video]:
                        matched[threshold][video].add(j)
                        correct[threshold][i] = 1
                        break
        for threshold in thresholds:
            values[threshold].append(average_precision(correct[threshold], sum(map(len, true))))
    return {threshold: float(np.mean(ap)) if ap else 0.0 for threshold, ap in values.items()}


def average_precision(correct, count):
    """Area under the interpolated precision-recall curve.

    The interpolated precision at a recall is the highest precision at that or any higher recall.

    correct  (n,) 0 or 1, in order of descending score
    count    number of true segments
    """
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best * correct).sum() / count)


class MeanSegments:
    """The trivial baseline: it predicts the mean segments of the training videos for every video.

    truth, durations  of the training videos: lists of (start, end, label), and seconds

    It predicts as many segments as a training video has on average. The r-th has the mean start and
    the mean end of all r-th segments in training, as shares of the duration. Each is predicted once
    for every class; the score is the class's share of the training segments.
    """

    def __init__(self, truth, durations):
        count = max(1, round(np.mean([len(segments) for segments in truth])))
        ranks = [[] for _ in range(count)]
        for segments, duration in zip(truth, durations):
            for rank, (start, end, _) in zip(ranks, sorted(segments)):
                rank.append((start / duration, end / duration))
        labels = collections.Counter(label for segments in truth for *_, label in segments)
        self.segments = np.array([
            (*np.mean(rank, axis=0), number / labels.total(), label) for rank in ranks if rank
            for label, number in labels.most_common()]).reshape(-1, 4)

    def __call__(self, duration):
        """Segments (n, 4) for a video of this duration in seconds."""
        return self.segments * np.array([duration, duration, 1, 1])


# ------------------------------------------------------------------------------------------------
# Videos of any length


def windows(frames, window, stride):
    """Yield windows of frames, (window, H, W, 3), one per `stride` frames.

    frames  an iterable of uint8 (H, W, 3); at most `window` of them are in memory

    A video shorter than a window is filled up with its last frame.
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
    """Seconds in the middle of each window, (T',), T' = max(frames - window, 0) // stride + 1.

    timestamps  (frames,) seconds at which each frame is shown
    """
    timestamps = np.asarray(timestamps, float)
    first = np.arange(0, max(len(timestamps) - window, 0) + 1, stride)
    return (timestamps[first] + timestamps[np.minimum(first + window, len(timestamps)) - 1]) / 2


def in_batches(items, size):
    """Lists of `size` items; the last one may be shorter."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def window_feature(encoder, video):
    """The feature of a window, for `slide` and tools/extract.py: video (B, C, T, H, W) -> (B, F).

    The masked encoder gives its mean token after the norm, an attentive probe what its query reads.
    The multimodal encoder gives its feature before the norm.
    """
    if encoder.config["model"] == "UniFormerV2":
        return encoder.encode(video)[0].float()
    return encoder.feature(video).float()


@torch.no_grad()
def slide(encoder, frames, stride, batch_size=16):
    """Yield features (b, F) while frames arrive, one for each window; see `windows`.

    encoder  in eval mode
    """
    device = next(encoder.parameters()).device
    for clips in in_batches(windows(frames, encoder.config["frames"], stride), batch_size):
        clips = torch.from_numpy(np.stack(clips)).to(device)                 # (B, T, H, W, C)
        yield window_feature(encoder, normalise(clips, encoder.mean, encoder.std))


@torch.no_grad()
def stream(head, features, chunk=256):
    """Run the head over features that arrive in pieces.

    features  an iterable of (b, F)
    yields    (first, scores (n, Y), distances (n, 2)) of steps first to first + n - 1, as
              probabilities and in steps. They equal those for the whole video at once

    In memory are at most chunk + 2 * head.margin features, and the newest piece.
    """
    # kept[0] is the feature of step `begin`. Predictions before step `done` have been yielded.
    margin, kept, begin, done = head.margin, None, 0, 0
    for piece in itertools.chain(features, [None]):
        if piece is not None:
            kept = piece if kept is None else torch.cat([kept, piece])
        while kept is not None:
            arrived = begin + len(kept)
            stop = min(done + chunk, arrived)
            if stop <= done or piece is not None and arrived < done + chunk + margin:
                break
            scores, distances = head(kept[None, :stop + margin - begin])
            part = slice(done - begin, stop - begin)
            yield done, scores[0, part].sigmoid(), distances[0, part]
            done = stop
            kept, begin = kept[max(done - margin - begin, 0):], max(done - margin, begin)


class Localiser(nn.Module):
    """A frozen encoder and a head: the model of a run of `localise`.

    encoder  mae.VideoClassifier or uniformerv2.UniFormerV2; None if the features came from files
    head     a `Head`
    names    class names, in label order
    stride   frames from one window to the next
    """

    def __init__(self, encoder, head, names, stride):
        super().__init__()
        self.encoder, self.head, self.names, self.stride = encoder, head, list(names), stride
        if encoder is not None:
            encoder.requires_grad_(False)
        self.config = {"model": "Localiser", "encoder": encoder and encoder.config,
                       "head": head.config, "names": self.names, "stride": stride}

    def train(self, mode=True):
        """Set the mode of the head. The encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def find(self, video, batch_size=16, tick=lambda: None):
        """Find the segments of a video.decoding.Video of any length.

        tick     called after every frame, for a progress bar
        returns  (n, 4): start s, end s, score, label; the best first
        """
        def frames():
            for frame in video.play(self.encoder.config["image_size"]):
                tick()
                yield frame

        return self.find_in(frames(), video.info.timestamps, video.info.duration, batch_size)

    def find_in(self, frames, timestamps, duration, batch_size=16):
        """As `find`, for an iterable of frames uint8 (H, W, 3).

        timestamps (T,) and duration are in seconds.
        """
        features = slide(self.encoder, frames, self.stride, batch_size)
        candidates = [decode(scores, distances, first)
                      for first, scores, distances in stream(self.head, features)]
        times = step_times(timestamps, self.encoder.config["frames"], self.stride)
        return soft_nms(in_seconds(np.concatenate(candidates), times, duration), most=None)

    @classmethod
    def from_run(cls, folder):
        """Load a run of `localise`, in eval mode. Raises WeightsError."""
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
    """Long videos. "video" of an item is its index, with which the stage looks up the features.

    items    for each video a dict with "features" (T', F), "times", "segments", "duration" and
             "path"; or a generated world, until `prepare` computes the features
    names    class names
    source   where the videos come from, for messages
    """

    def __init__(self, items, names, source):
        self.items, self.classes, self.source = items, {"label": tuple(names)}, source

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        number = index[0] if isinstance(index, tuple) else index
        return {"video": np.int64(number)}


def mean_ap(items, segments_of, prefix=""):
    """mAP in percent at each temporal IoU and on average. segments_of(item) -> its predictions."""
    values = mean_average_precision([item["segments"] for item in items],
                                    [segments_of(item) for item in items])
    values = {f"{prefix}mAP@{threshold:g}": 100 * value for threshold, value in values.items()}
    return values | {f"{prefix}mAP": float(np.mean(list(values.values())))}


@torch.no_grad()
def predict(head, item):
    """Predict the segments (n, 4) of one video from its features."""
    scores, distances = head(item["features"][None].to(next(head.parameters()).device))
    candidates = decode(scores[0].sigmoid(), distances[0])
    return soft_nms(in_seconds(candidates, item["times"], item["duration"]))


@dataclass
class Localisation(Stage, name="localise"):
    """Temporal action localisation: a small head on a frozen encoder's features.

    InternVideo, Sec. 4.3, temporal action localisation. The head follows AFSD and ActionFormer; the
    paper's values of flags are ActionFormer's. The videos are long generated ones, whose features
    are computed once, or real ones, whose features lie in files (tools/extract.py). Then, for one
    video: python tools/predict.py VIDEO --weights RUN"""

    data: str = flag("", "folder of features, with --annotations: .npz by tools/extract.py, or "
                     ".npy from elsewhere; default: long generated videos")
    val_data: str = flag("", "folder of features for evaluation; default: that of --data")
    weights: str = flag("", "the encoder: a run of mae, clip or classify, or an official file; or "
                        "a run of this stage. Optional with --data; with it the run can also "
                        "predict on videos")
    annotations: str = flag("", "JSON with the true segments of --data, in the format of "
                            "ActivityNet, HACS, FineAction or THUMOS14, see docs/formats.md",
                            group="clips")
    train_subset: str = flag("training", "subset of --annotations to train on; default on "
                             "THUMOS14: Validation", group="clips")
    val_subset: str = flag("validation", "subset of --annotations to evaluate on; default on "
                           "THUMOS14: Test", group="clips")
    videos: int = flag(300, "generated videos to train on", low=1, group="clips")
    eval_clips: int = flag(100, "generated videos per evaluation")
    stride: int = flag(4, "frames from one window to the next; .npz files of tools/extract.py "
                       "contain it", low=1, group="clips",
                       paper="VideoMAE V2: 4 on THUMOS14, 16 on FineAction")
    window: int = flag(0, "frames per feature of .npy files; 0 = --stride", low=0,
                       only="files", group="clips")
    rate: float = flag(0.0, "frames per second of the videos of .npy files; 0 = that of "
                       "--annotations", low=0, only="files", group="clips")
    steps: int = flag(400)
    batch_size: int = flag(16, "videos per step")
    lr: float = flag(2e-3, paper="1e-4")
    optimizer: str = flag("adamw")
    weight_decay: float = flag(0.05, paper="0.05")
    width: int = flag(128, "of the head", paper="512", low=1)
    depth: int = flag(4, "blocks of the head; each doubles the dilation", low=1, high=10)
    drop: float = flag(0.1, "dropout in the head", low=0, high=1)
    middle: float = flag(0.6, "share of a segment, around its centre, whose steps predict it",
                         low=0, high=1)
    length: int = flag(1024, "maximum steps of a video in training; longer videos give a random "
                       "part", paper="2304", low=8)

    @functools.cached_property
    def parts(self):
        """(the encoder or None, a trained Localiser or None) from --weights."""
        if bool(self.weights) and weights.read(self.weights)[1].get("model") == "Localiser":
            model = Localiser.from_run(self.weights)
            self.refuse_other(**{key: model.head.config[key]
                                 for key in ("width", "depth", "drop")})
            return model.encoder, model
        return encoders.load_encoder(self.weights) if self.weights else None, None

    def datasets(self):
        """Long videos: generated ones, or features from files with annotations."""
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
        """Features from files. UserError if they do not fit each other or --weights."""
        if not self.annotations:
            raise UserError("--annotations: --data is a folder of features; give the JSON file "
                            "with their true segments")
        encoder, model = self.parts
        annotation, names = read_segments(self.annotations), model and model.names
        print(f"--annotations {self.annotations}: {printable(annotation.summary())}")
        for name, subset in zip(("train_subset", "val_subset"), annotation.subsets):
            if name not in self.typed:
                setattr(self, name, subset)
        grid = Grid(self.stride if "stride" in self.typed else 0, self.window, self.rate)
        sets = []
        for folder, subset in ((self.data, self.train_subset),
                               (self.val_data or self.data, self.val_subset)):
            items, names, missing = read_features(folder, annotation.videos, subset, names, grid)
            absent = f"; the features of {len(missing)} are MISSING, e.g. " \
                     f"{printable(str(missing[0]))}" if missing else ""
            odd = [item["misfit"] for item in items if item["misfit"]]
            absent += f"; {len(odd)} do not fit the annotation, e.g. {printable(odd[0])}" \
                if odd else ""
            print(f"--data {folder}: {len(items)} videos of the subset {subset}, {len(names)} "
                  f"classes{absent}")
            sets.append(Videos(items, names, folder))
        self.check_features(sets)
        self.stride, self.eval_clips = sets[0].items[0]["stride"], len(sets[1])
        return sets

    def check_features(self, sets):
        """UserError if features were extracted in different ways, or do not fit a flag."""
        encoder, model = self.parts
        first = sets[0].items[0]
        for item in itertools.chain(*(part.items for part in sets)):
            if any(item[key] != first[key] for key in ("model", "window", "stride")) or \
                    item["features"].shape[1] != first["features"].shape[1]:
                raise UserError(f"--data: {item['path']} was extracted with another model, window "
                                f"or stride than {first['path']}")
        known = {"stride": first["stride"], "window": first["window"]} if first["model"] else {}
        for name, value in known.items():
            if name in self.typed and getattr(self, name) not in (0, value):
                raise UserError(f"--{name} {getattr(self, name)}: {first['path']} was extracted "
                                f"with a {name} of {value}; leave it out")
        if self.rate and first["model"]:
            raise UserError(f"--rate: {first['path']} has the times of its features; leave it out")
        if encoder is not None and model is None and not first["model"]:
            raise UserError(f"--weights {self.weights}: {first['path']} does not say which model "
                            "it was extracted with; leave --weights out")
        if encoder is not None and model is None and \
                weights.fingerprint(self.weights) != first["model"]:
            raise UserError(f"--weights {self.weights}: is not the model {first['model']} that the "
                            "features were extracted with")
        if model is not None and model.head.config["features"] != first["features"].shape[1]:
            raise UserError(f"--weights {self.weights}: was trained on features of "
                            f"{model.head.config['features']} numbers, {first['path']} has "
                            f"{first['features'].shape[1]}")

    def build(self, train_set):
        """The trained model of --weights, or a new head. The encoder is frozen."""
        encoder, model = self.parts
        names = list(train_set.classes["label"])
        if model is None:
            width = train_set.items[0]["features"].shape[1] if self.data else encoder.width
            head = Head(width, len(names), self.width, self.depth, self.drop)
            model = Localiser(encoder, head, names, self.stride)
        if model.names != names or model.stride != self.stride:
            raise UserError(f"--weights {self.weights}: was trained with other classes, or a "
                            f"stride of {model.stride}")
        return model

    def untrained(self):
        """A new head, if --weights is not a run of this stage."""
        return "" if self.parts[1] else "a new head"

    def prepare(self, model, train_set, held_out):
        """Compute the features of generated videos, and the true segments of all videos in steps.
        """
        sets = (train_set, held_out["val"])
        if not self.data:
            for part, items in zip(sets, self.features(model, sets)):
                part.items = items
        for item in itertools.chain(*(part.items for part in sets)):
            self.add_targets(item)
        if self.parts[1] is None:
            model.head.measure(torch.cat([item["features"] for item in train_set.items])
                               .to(self.device))
        self.baseline = MeanSegments([item["segments"] for item in train_set.items],
                                     [item["duration"] for item in train_set.items])
        return train_set

    def add_targets(self, item):
        """Add "steps" to an item, its segments in steps, and make its features a tensor."""
        item["features"] = torch.as_tensor(item["features"])
        item["steps"] = [(*np.interp(segment[:2], *clock(item["times"])[::-1]), segment[2])
                         for segment in item["segments"]]

    def example(self, model, train_set):
        """A batch of the first training video, with features."""
        item = train_set.items[0]
        if not self.data:
            item = self.item(model.encoder, item, 0)
        self.add_targets(item)
        return self.gather([item])

    def features(self, model, sets):
        """[items of each set] with the features of the encoder, kept on disk; see Stage.cached."""
        settings = {name: getattr(self, name) for name in
                    ("weights", "videos", "eval_clips", "stride", "seed", "precision")}
        return self.cached(settings, lambda: self.compute_features(model, sets))["sets"]

    def compute_features(self, model, sets):
        """{"sets": [items of each set]} of generated videos. The processes share the work."""
        encoder, stored, started = model.encoder.eval(), [], time.monotonic()
        counts = [len(part) for part in sets]
        with tqdm(total=sum(counts), desc="features", unit="video",
                  disable=processes.rank() > 0 or None) as bar:
            for part, count in zip(sets, counts):
                rows = []
                for i in range(processes.rank(), count, processes.world()):
                    rows.append((i, self.item(encoder, part.items[i], i)))
                    bar.update(processes.world())
                stored.append([item for _, item in processes.gather_rows(rows)])
        print(f"features of {sum(counts)} videos: {time.monotonic() - started:.0f} s")
        return {"sets": stored}

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
        """Make a padded batch of videos and targets. With `rng` a long video gives a random part of
        --length steps."""
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
        """Yield padded batches of random videos, a function of (seed, step)."""
        for step in range(first * self.accum, self.steps * self.accum):
            rng = generator(self.seed, "videos", step)
            rows, mine = processes.global_rows(self.batch_size)
            chosen = torch.randint(len(train_set), (rows,), generator=rng).tolist()
            # Every process makes the whole batch: padding and count are then the same everywhere.
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
        order, losses, segments = zip(*processes.gather_rows(rows))
        segments = dict(zip(order, segments))
        items = [held_out_set.items[i] | {"number": i} for i in order]
        return {"loss": float(np.mean(losses)), "items": held_out_set.items} | mean_ap(
            items, lambda item: segments[item["number"]])

    def finish(self, model, held_out, results):
        """Print a table of mAP with the baseline, and return the values of the baseline."""
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
        """How mAP is measured, for metrics.json."""
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
