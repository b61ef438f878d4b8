"""Frame sampling: which frames of a video make a clip.

`dense` and `segment` are ours and follow the papers. Each of the others reproduces the official
code of one model family, including its off-by-one errors. A model loses accuracy, without an error
message, if evaluation samples frames by another rule than training did.

>>> segment_indices(100, 4)
array([12, 37, 62, 87])
"""

import numpy as np


def dense_indices(n, frames, stride, rng=None, view=(0, 1)):
    """(frames,) int: every stride-th of n frames, in a window of frames * stride.

    VideoMAE Sec. 3.3, "Temporal downsampling". The window starts at a random frame with rng;
    without rng it is the centre of the video. A short video repeats its last frame. view=(c, C):
    clip c of C windows, evenly spaced from the first frame to the last (VideoMAE's multi-view
    test). A single window is the centre one.
    """
    spare = max(n - frames * stride, 0)
    clip, clips = view
    start = spare // 2 if clips == 1 else spare * clip // (clips - 1)
    start = start if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + stride * np.arange(frames), n - 1)


def segment_indices(n, frames, rng=None, view=(0, 1)):
    """(frames,) int: one of n frames from each of `frames` equal segments.

    TSN Sec. 3.1, "Temporal Segment Networks". With rng: a random frame of each segment; without:
    the middle one. view=(c, C): clip c of C takes the frame at (c + 1) / (C + 1) of each segment,
    as in UniFormerV2's test.
    """
    clip, clips = view
    edges = np.arange(frames + 1) * n // frames
    first, last = edges[:-1], np.maximum(edges[1:] - 1, edges[:-1])
    if rng is not None:
        return rng.integers(first, last + 1)
    return first + (last - first) * (clip + 1) // (clips + 1)


# The official samplers. All have one signature:
# (n, frames, stride, rng, view, fps) -> (frames,) int; rng=None means test.


def _mae_pretrain(n, frames, stride, rng, view, fps):
    # As dense, but a short video repeats the last frame on the stride, not its last frame.
    dense = dense_indices(n, frames, stride, rng, view)
    return dense if n >= frames * stride else np.minimum(dense, (n - 1) // stride * stride)


def _mae_dense(n, frames, stride, rng, view, fps):
    clip, clips = view
    span = frames * stride
    if rng is None and clips > 1:
        every = np.arange(0, n, stride)
        every = np.pad(every, (0, max(frames - len(every), 0)), mode="edge")
        start = int(clip * (len(every) - frames) / (clips - 1))
        return every[start:start + frames]
    if n <= span:
        return np.minimum(np.pad(np.linspace(0, n, n // stride), (0, frames))[:frames]
                          + n * (np.arange(frames) >= n // stride), n - 1).astype(int)
    end = (n + span) // 2 if rng is None else int(rng.integers(span, n))
    # The spacing is 64/15, not 4.
    return np.minimum(np.linspace(end - span, end, frames).astype(int), end - 1)


def _mae_segment(n, frames, stride, rng, view, fps):
    clip, clips = view
    if rng is None:
        ticks = n / frames * (np.arange(clips)[:, None] / clips + np.arange(frames))
        return np.sort(ticks.astype(int).ravel())[clip::clips]
    length = n // frames
    if length:
        return length * np.arange(frames) + rng.integers(length, size=frames)
    return np.zeros(frames, int)


def _uniformer(n, frames, stride, rng, view, fps):
    clip, clips = view
    segment = (n - 1) / frames
    edges = np.round(segment * np.arange(frames + 1)).astype(int)
    if rng is None:
        return edges[:-1] + int(segment / (clips + 1) * (clip + 1))
    return rng.integers(edges[:-1], edges[1:] + 1)


def _internvideo(n, frames, stride, rng, view, fps):
    edges = np.linspace(0, n, frames + 1).astype(int)
    if rng is None:
        return np.clip((edges[:-1] + edges[1:] - 1) // 2, 0, n - 1)
    # The last frame of an interval is never drawn, except from an interval of one frame. The
    # original code fails on those.
    first = np.minimum(edges[:-1], n - 1)
    return rng.integers(first, np.maximum(edges[1:] - 1, first + 1))


def _internvideo_demo(n, frames, stride, rng, view, fps):
    return np.linspace(0, n - 1, frames).astype(int)


def _retrieval(n, frames, stride, rng, view, fps):
    # One frame per second. The original masks missing frames; we repeat the last frame.
    seconds = np.arange(0, n, max(1, round(fps)))
    if len(seconds) > frames:
        return seconds[np.linspace(0, len(seconds) - 1, frames).astype(int)]
    return np.pad(seconds, (0, frames - len(seconds)), mode="edge")


def _viclip(n, frames, stride, rng, view, fps):
    return np.minimum(max(1, n // frames) * np.arange(frames), n - 1)


SAMPLINGS = {  # name -> sampler; each comment names the source of the rule
    "dense": lambda n, frames, stride, rng, view, fps: dense_indices(n, frames, stride, rng, view),
    "segment": lambda n, frames, stride, rng, view, fps: segment_indices(n, frames, rng, view),
    "videomae-pretrain": _mae_pretrain,  # VideoMAE, masked pretraining
    "videomae-dense": _mae_dense,  # VideoMAE fine-tuned on Kinetics
    "videomae-segment": _mae_segment,  # VideoMAE fine-tuned on Something-Something V2
    "uniformerv2": _uniformer,  # UniFormerV2, sparse
    "internvideo": _internvideo,  # InternVideo-MM, downstream
    "internvideo-demo": _internvideo_demo,  # InternVideo-MM, demo: no randomness
    "retrieval": _retrieval,  # CLIP4Clip
    "viclip": _viclip,  # ViCLIP, demo: no randomness
}


def choose_frames(name, n, frames, stride=4, rng=None, view=(0, 1), fps=25.0):
    """(frames,) int in [0, n): the frame numbers of a clip, by one of SAMPLINGS.

    n       number of frames in the video
    stride  frames from one chosen frame to the next, for dense samplers
    rng     numpy Generator for training; None for evaluation
    view    (c, C) in evaluation: clip c of C
    fps     frames per second of the video, for samplers that count seconds
    """
    return np.asarray(SAMPLINGS[name](n, frames, stride, rng, view, fps))
