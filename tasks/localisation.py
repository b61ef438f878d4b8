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
1. `windows` and `look` slide the encoder over the frames, as tools/extract.py does: row i has seen the frames
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
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Dropout
from mae import VideoClassifier
from uniformerv2 import UniFormerV2
from weights import WeightsError

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
        return 2 ** len(self.blocks)  # 1 + 2 + 4 + ... of the blocks, and 1 of the last convolutions

    def measure(self, features):
        """Set centre and spread to those of features (steps, F)."""
        self.centre.copy_(features.mean(dim=0))
        self.spread.copy_(features.std(dim=0).clamp(min=1e-6))

    def forward(self, features, inside=None):
        """features (B, T', F), inside (B, T') bool, True = no padding; None: all ->
        logits (B, T', Y), distances to start and end (B, T', 2), in steps, positive"""
        inside = torch.ones(features.shape[:2], device=features.device) if inside is None else inside.float()
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
    found = np.stack([first + step - distances[step, 0], first + step + distances[step, 1], scores[step, label], label], 1)
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
        true = [np.array([s[:2] for s in segments if s[2] == label], float).reshape(-1, 2) for segments in truth]
        said = [(row[2], video, row[:2]) for video, rows in enumerate(found) for row in rows[rows[:, 3] == label]]
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
        self.said = np.array([(*np.mean(rank, axis=0), number / labels.total(), label) for rank in ranked if rank
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
def look(encoder, frames, stride, batch_size=16):
    """Yield features (b, F) of frames as they come, by an encoder in eval mode, on its device; see `windows`."""
    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (encoder.mean, encoder.std))
    for clips in in_batches(windows(frames, encoder.config["frames"], stride), batch_size):
        clips = torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        clips = (clips / 255 - mean) / std
        # Of the multimodal encoder before the head's norm, as runs made before have it.
        yield (encoder.encode(clips)[0] if encoder.family == "multimodal" else encoder.feature(clips)).float()


@torch.no_grad()
def stream(head, features, chunk=256):
    """Run the head over features that come in pieces (b, F); yield (first, scores (n, Y), distances (n, 2)): the
    answers of steps first to first + n - 1, equal to those for the whole video at once.

    At most chunk + 2 head.margin rows, and a piece, are kept.
    """
    margin, kept, begin, done = head.margin, None, 0, 0  # kept[0] is step `begin`; steps before `done` are answered
    for piece in itertools.chain(features, [None]):
        if piece is not None:
            kept = piece if kept is None else torch.cat([kept, piece])
        while kept is not None:
            there = begin + len(kept)
            last = min(done + chunk, there)
            if last <= done or piece is not None and there < done + chunk + margin:
                break
            scores, distances = head(kept[None, :last + margin - begin])
            yield done, scores[0, done - begin:last - begin].sigmoid(), distances[0, done - begin:last - begin]
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
        self.config = {"model": "Localiser", "encoder": encoder and encoder.config, "head": head.config,
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
        features = look(self.encoder, frames, self.stride, batch_size)
        found = [decode(scores, distances, first) for first, scores, distances in stream(self.head, features)]
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
        family = part and {"VideoClassifier": VideoClassifier, "UniFormerV2": UniFormerV2}[part["model"]]
        return cls(part and family.from_config(part), Head(**config["head"]), config["names"], config["stride"])


def main(argv=None):
    """`python localise.py`: the shapes, on a generated video. With VIDEO and --weights: its segments, as it streams by."""
    import argparse
    import sys
    from pathlib import Path

    from tqdm import tqdm

    from video.annotations import DataError
    from video.decoding import Video
    from video.sampling import segment_indices
    from video import moving_shapes
    from engine import pictures

    parser = argparse.ArgumentParser(description="What happens when, in a video of any length.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated one, and what is true of it")
    parser.add_argument("--weights", help="folder of a localise run; default: an untrained tiny model")
    parser.add_argument("--top", type=int, default=20, help="segments to print, by time")
    parser.add_argument("--least", type=float, default=0.2, help="lowest score of a segment to print, in [0, 1]")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time")
    parser.add_argument("--out", default="runs/localise.png", help="the same along the time axis; PNG")
    args = parser.parse_args(argv)
    try:
        if args.top < 1 or args.batch_size < 1:
            raise ValueError("--top and --batch-size must be at least 1")
        if args.video and not args.weights:
            raise ValueError("a video needs --weights, the folder of a localise run")
        torch.manual_seed(0)
        names = moving_shapes.LongShapes("test").motions
        model = Localiser.from_run(args.weights) if args.weights else Localiser(
            VideoClassifier("tiny", classes=0, frames=8, image_size=40), Head(96, len(names)), names, 4).eval()
        if model.encoder is None:
            raise ValueError(f"--weights {args.weights}: was trained on features from files and has no encoder to look at "
                             "a video; train it with --weights as well")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if args.video:
            with Video(args.video) as video:
                info, true = video.info, None
                shown = dict.fromkeys(segment_indices(info.frames, 12).tolist())
                with tqdm(total=info.frames, unit="frame", dynamic_ncols=True,
                          mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
                    found = model.find(video, args.batch_size, bar.update)
            name, frames, duration = args.video, info.frames, info.duration
        else:
            if list(model.names) != names:
                raise ValueError(f"--weights {args.weights}: knows other classes than the generated world; name a video")
            world = moving_shapes.LongShapes("test", model.encoder.config["image_size"])
            item = world[0]
            name, frames, duration, true = item["path"], len(item["video"]), item["duration"], item["segments"]
            explain(model, item, world.FPS)
            found = model.find_in(item["video"], np.arange(frames) / world.FPS, duration, args.batch_size)
            strip = pictures.strip(item["video"], 24)
        print(f"{name}: {duration:.1f} s, {frames} frames, a step every {model.stride} of them; "
              f"{len(found)} segments, {(found[:, 2] >= args.least).sum()} of them with a score of {args.least:g} or more")
        best = found[found[:, 2] >= args.least][:args.top]
        best = best[np.argsort(best[:, 0])]
        for start, end, score, label in best:
            print(f"{start:9.2f} s to {end:9.2f} s   {score:4.0%}  {model.names[int(label)]}")
        if args.video:  # after the segments are said: whatever the pictures cost, those are there
            with Video(args.video) as video:
                strip = np.concatenate(list(video.read(list(shown), 90)), axis=1)
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.segments([(Path(name).name, strip, duration, true, clearest(found, args.least))], model.names, path)
        print(f"drawn: {path}")
    except (WeightsError, DataError, ValueError, OSError) as error:
        print(f"localise.py: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def explain(model, item, rate):
    """Print what happens to a generated video (see moving_shapes.LongShapes) of `rate` frames a second, shape by shape."""
    window = model.encoder.config["frames"]
    features = torch.cat(list(look(model.encoder, item["video"], model.stride)))
    logits, distances = model.head(features[None])
    times = step_times(np.arange(len(item["video"])) / rate, window, model.stride)
    steps = [(*np.interp(segment[:2], *clock(times.tolist())[::-1]), segment[2]) for segment in item["segments"]]
    labels, _ = assign(len(features), steps)
    for name, letters, shape in (
            ("the video", "(T, H, W, 3)", item["video"].shape),
            (f"windows of {window} frames, one every {model.stride}: features", "(T', F)", features.shape),
            ("score of each class at each step", "(B, T', Y)", logits.shape),
            ("steps from there to start and end", "(B, T', 2)", distances.shape)):
        print(f"{name:52s} {letters:14s} {tuple(shape)}")
    print(f"{int((labels >= 0).sum())} of {len(labels)} steps answer for one of the {len(steps)} true segments:")
    for start, end, label in item["segments"]:
        print(f"{start:9.2f} s to {end:9.2f} s   {model.names[label]}")


if __name__ == "__main__":
    raise SystemExit(main())
