"""Which frames of a video make a clip.

`dense` and `segment` are ours and follow the papers. The others reproduce the official code of one
family each, off-by-one behaviour included: a model that is evaluated on other frames than it was
trained on loses accuracy without any error message.

>>> segment_indices(100, 4)
array([12, 37, 62, 87])
"""

import numpy as np


def dense_indices(n, frames, stride, rng=None, view=(0, 1)):
    """(frames,) int: every stride-th of n frames, in a window of frames * stride.

    VideoMAE Sec. 3.3, "Temporal downsampling". With rng the window starts at random, without it is
    the centre. A short video repeats its last frame. view=(c, C) is clip c of C spread evenly from
    the first frame to the last (VideoMAE, multi-view test); of one clip, the centre.
    """
    spare = max(n - frames * stride, 0)
    clip, clips = view
    start = spare // 2 if clips == 1 else spare * clip // (clips - 1)
    start = start if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + stride * np.arange(frames), n - 1)


def segment_indices(n, frames, rng=None, view=(0, 1)):
    """(frames,) int: one of n frames from each of `frames` equal segments.

    TSN Sec. 3.1, "Temporal Segment Networks". With rng a random frame of each segment, without the
    middle one. view=(c, C) is clip c of C: at (c + 1) / (C + 1) of each segment (UniFormerV2's
    test).
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
    # As dense, but a short video repeats the last frame that the stride meets, not its last one.
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
    # The last frame of an interval is never drawn, unless it is the only one. There the original
    # code fails.
    first = np.minimum(edges[:-1], n - 1)
    return rng.integers(first, np.maximum(edges[1:] - 1, first + 1))


def _internvideo_demo(n, frames, stride, rng, view, fps):
    return np.linspace(0, n - 1, frames).astype(int)


def _retrieval(n, frames, stride, rng, view, fps):
    # One frame a second. The original masks what a short video lacks; we repeat its last frame.
    seconds = np.arange(0, n, max(1, round(fps)))
    if len(seconds) > frames:
        return seconds[np.linspace(0, len(seconds) - 1, frames).astype(int)]
    return np.pad(seconds, (0, frames - len(seconds)), mode="edge")


def _viclip(n, frames, stride, rng, view, fps):
    return np.minimum(max(1, n // frames) * np.arange(frames), n - 1)


SAMPLINGS = {  # name -> sampler; the comment says where the rule comes from
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

    n       frames of the video
    stride  frames from one to the next, where the sampler is dense
    rng     numpy Generator for training; None for evaluation
    view    (c, C) in evaluation: clip c of C
    fps     of the video, for samplers that count seconds
    """
    return np.asarray(SAMPLINGS[name](n, frames, stride, rng, view, fps))
