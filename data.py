"""A door to real video files: which frames of which files make a batch.

Why. Video files lie. Headers promise frames that are not there, rates vary, edit lists hide frames, cameras
are held sideways; and every published model was trained with its own rule of which frames to take. A model
that is fed others than it was trained on loses points that nobody can find again, in silence.

    file -> Video.info -> choose_frames -> Video.read -> crop_frames -> (T, H, W, 3) uint8
                                                                         `VideoFiles[index]`

The idea in steps.
1. A `Video` finds out when each frame is shown, then seeks to the last keyframe before a wanted one
   and decodes from there. Frames are known by their time, never by counting. Rotation, the shape of
   pixels and the matrix of colours are applied.
2. `choose_frames` takes, by `dense` (the default of stage one), every 4th frame, from a random start in training
   and from the middle in evaluation; by `segment` (of the other stages), one frame of each of T equal parts, a
   random one in training and the middle one in evaluation; or, by name, as the official code of each family
   does. So does `crop_frames` with what it cuts out.
   annotations.py knows which files there are, and what is said of them.
3. `batches` and `held_out` collate files, or clips of moving_shapes.py. Step k holds the same clips for any
   number of workers and after any resume, because each draw is a function of (seed, index, epoch); tar
   shards (`VideoShards`) are the exception, and say so. `normalise` makes of the bytes what a model takes.

Where we differ. The official loaders put *another random video* in place of a corrupt one, even in
evaluation (VideoMAE kinetics.py:118); here training names what it skipped, and evaluation never
substitutes. VideoMAE fine-tuning spreads 16 frames over 64 with spacing 64/15; we use the exact
stride of its pretraining. InternVideo's segment sampling never draws the last frame of a segment;
ours can. The official rules are there by name: `--sampling videomae-dense` is that of VideoMAE's
fine-tuning, and so on.

Numbers, one core: sixteen frames at stride 4 of a 640x360 h264 file take 70 to 125 ms; over
eleven files of all kinds, 1.3 times the speed of torchcodec and 1.4 times that of decord2
(tools/bench.py decode, where both are installed; ours skips frames that nothing depends on).
torchcodec, an option, is faster by a fifth where there is nothing to skip: VP8, whose decoder cannot, and
MPEG-4 files in which every frame depends on the one before. It needs FFmpeg's libraries.

    python data.py PATH                 checks a data set: bad files and why, statistics, a sheet of pictures
    python data.py PATH --cache DIR     writes small copies, for epochs that cost a fraction

Try it:

>>> segment_indices(100, 4)
array([12, 37, 62, 87])
"""

import bisect
import collections
import contextlib
import copy
import dataclasses
import fractions
import functools
import io
import itertools
import json
import math
import multiprocessing.util
import os
import random
import re
import signal
import struct
import sys
import tarfile
import threading
import time
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from video import annotations, moving_shapes
from video.annotations import DataError
from video.clip_set import ClipSet
from video.moving_shapes import height_width
from engine.errors import printable


# ------------------------------------------------------------------------------- one video file

TIME_LIMIT = 60.0  # seconds for opening a file, and again for each thing that is asked of it
MOST_PIXELS = 2**26  # of one frame, 8192 x 8192: more is a broken header, and would fill the memory
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video")  # decoders that leave out one frame and are none the worse
DECODERS = ("pyav", "torchcodec")  # the first is exact for every file and most often the faster one
WORTH_A_SEEK = 8  # frames that a jump to a later keyframe must spare; seeking costs about as many


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` learns about the first video stream of a file."""

    path: str
    width: int  # pixels, as shown: square ones, after the rotation
    height: int
    frames: int  # that will be shown; edit lists may hide some
    duration: float  # seconds, from the first frame's start to the last one's end
    fps: float  # frames per second, measured from the timestamps; an average where they vary
    codec: str
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise from the stored to the shown frame
    timestamps: tuple  # (frames,) float, seconds since the first shown frame
    pts: tuple  # (frames,) int, the same in the stream's own clock; empty if the file has none
    keyframes: tuple  # int, numbers of the frames at which decoding can start, ascending


class Video:
    """`with Video(path) as video:` one open file: video.info, and video.read(times_or_indices, size).

    path     of the file; or a `Bytes`, a file's content in memory
    decoder  one of DECODERS, for `read`. torchcodec's frames are checked to be those of the right time; what it
             would show otherwise (pixels that are not square, hidden frames) is refused

    Both come from one opening, so this is the way to look before choosing frames; `probe` and
    `read_clip` are for those who need only one of the two. Whatever goes wrong inside becomes a
    DataError that names the file.
    """

    def __init__(self, path, info=None, decoder="pyav"):
        self.path = path if isinstance(path, Bytes) else str(path)
        self._info, self.decoder = info, decoder

    def __enter__(self):
        self._start_clock()
        self._open()
        return self

    def _start_clock(self, extra=0):
        self.deadline = time.monotonic() + TIME_LIMIT + extra

    def _open(self):
        try:
            import av
            from av.stream import Disposition
            from av.video.reformatter import VideoReformatter
        except ImportError:
            raise DataError("reading video files needs PyAV: pip install av") from None
        self.error = av.FFmpegError
        if not isinstance(self.path, Bytes) and not os.path.isfile(self.path):
            raise DataError(f"{self.path}: no such file")
        source = io.BytesIO(self.path.content) if isinstance(self.path, Bytes) else self.path
        try:
            # Titles may be in any encoding; PyAV minds until version 19.
            lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
            self.container = av.open(source, timeout=TIME_LIMIT, **lenient)
        except (av.FFmpegError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self.path}: not a readable video ({reason})") from None
        # A cover picture in a sound file is a video stream to FFmpeg, and none to anybody else.
        pictures = [stream for stream in self.container.streams.video
                    if not stream.disposition & Disposition.attached_pic]
        self.stream = next(iter(pictures), None)
        if self.stream is None or self.stream.codec_context is None:
            self.container.close()
            what = "no video stream" if self.stream is None else "no decoder for its video stream"
            raise DataError(f"{self.path}: {what}")
        context = self.context = self.stream.codec_context
        if context.width * context.height > MOST_PIXELS:
            self.container.close()
            raise DataError(f"{self.path}: damaged, claims frames of {context.width} x {context.height} pixels")
        # One thread a file: clips are read in parallel, and FFmpeg's own threads cost 10-50 % CPU.
        context.thread_count = 1
        # A converter of our own with one thread: PyAV keeps one with a pool, which a worker process
        # forked from here would inherit without its threads, and wait for them for ever.
        self.converter = VideoReformatter()

    def __exit__(self, kind, error, trace):
        self.container.close()
        if kind is not None and issubclass(kind, (self.error, EOFError, MemoryError)):
            reason = getattr(error, "strerror", None) or kind.__name__
            raise DataError(f"{self.path}: damaged, cannot be decoded ({reason})") from None

    def _packets(self):
        for packet in self.container.demux(self.stream):
            if time.monotonic() > self.deadline:
                raise DataError(f"{self.path}: took too long to read; given up after {TIME_LIMIT:g} s")
            yield packet

    @property
    def info(self):
        """The file's `VideoInfo`, from the packets alone; only the first frame is decoded."""
        if self._info is None:
            self._info = self._probe()
        return self._info

    def _bytes(self):
        return len(self.path.content) if isinstance(self.path, Bytes) else os.path.getsize(self.path)

    def _probe(self):
        pts, keyframes, first = set(), set(), None
        self._start_clock(self._bytes() / 2**20)  # all of it is read: a second more for each MiB
        codec = self.context.codec.canonical_name
        for packet in self._packets():
            if _is_shown(packet, codec):
                pts.add(packet.pts)
                if packet.is_keyframe:
                    keyframes.add(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise DataError(f"{self.path}: no frame in its video stream can be decoded")
        clock, rate = self.stream.time_base, self.stream.average_rate or self.stream.guessed_rate or 25
        if None in pts or not pts:  # a raw stream: nothing but counting the frames is left
            self._rewind()
            count = sum(len(packet.decode()) for packet in self._packets())
            seconds, pts, keyframes, tail = [float(i / rate) for i in range(count)], (), (), float(1 / rate)
            if not count:
                raise DataError(f"{self.path}: no frame in its video stream is to be shown")
        else:
            # What was cut off before the first picture that needs no other is never shown.
            pts = tuple(sorted(p for p in pts if first.pts is None or p >= first.pts))
            number = {p: i for i, p in enumerate(pts)}
            keyframes = tuple(sorted(number[p] for p in keyframes if p in number))
            seconds = [(p - pts[0]) * clock.numerator / clock.denominator for p in pts]
            tail = seconds[-1] - seconds[-2] if len(seconds) > 1 else float(1 / rate)
        duration = seconds[-1] + tail
        quarter_turns = round(first.rotation / 90) % 4
        # Pixels that are wider than high, as DVDs and phones have them, are shown wider.
        aspect = self.stream.sample_aspect_ratio or 1
        height, width = (first.height, max(1, round(first.width * aspect)))[:: -1 if quarter_turns % 2 else 1]
        if height * width > MOST_PIXELS:
            raise DataError(f"{self.path}: damaged, claims to be shown at {width} x {height} pixels")
        return VideoInfo(str(self.path), width, height, len(seconds), duration, len(seconds) / duration,
                         codec, 90 * quarter_turns, tuple(seconds), pts, keyframes)

    def read(self, times_or_indices, size=None):
        """Frames as shown, upright: uint8 (T, H, W, 3) RGB; arguments and errors as `read_clip`."""
        info = self.info
        self._start_clock()
        numbers = _frame_numbers(info, times_or_indices).tolist()
        if self.decoder == "torchcodec":
            return self._read_with_torchcodec(numbers, size)
        found, wanted = {}, sorted(set(numbers))
        for group in _groups(info, wanted):
            before = bisect.bisect_right(info.keyframes, group[0])
            if before:
                self._seek(info.keyframes[before - 1])
                found |= self._decode(group, size)
            if not found.keys() >= set(group):  # no keyframe, or the seek came out too late
                self._rewind()
                found |= self._decode(group, size)
            if not found.keys() >= set(group):
                raise DataError(f"{self.path}: damaged, its frame {min(set(group) - set(found))} of "
                                f"{info.frames} cannot be decoded")
        return np.stack([found[number] for number in numbers])

    def _read_with_torchcodec(self, numbers, size):
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            raise DataError("the decoder torchcodec needs its package (pip install torchcodec) and FFmpeg's "
                            f"libraries: {str(error).strip().splitlines()[0]}") from None
        source = self.path.content if isinstance(self.path, Bytes) else self.path
        try:
            batch = VideoDecoder(source, stream_index=self.stream.index,
                                 num_ffmpeg_threads=1).get_frames_at(numbers)
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}: torchcodec cannot decode it ({str(error).strip().splitlines()[-1][:100]}); "
                            "leave --decoder away") from None
        info, clock = self.info, self.stream.time_base
        moments = torch.tensor([float(info.pts[n] * clock) for n in numbers] if info.pts else batch.pts_seconds)
        if batch.data.shape[2:] != (info.height, info.width) or (batch.pts_seconds - moments).abs().max() > 1e-3:
            raise DataError(f"{self.path}: torchcodec shows other frames, or another shape of them, than a player; "
                            "leave --decoder away")
        return _resize(batch.data.permute(0, 2, 3, 1).numpy(), _shown_size(info, size), "area")

    def play(self, size=None):
        """Yield every frame in order, once, uint8 (H, W, 3) RGB, and keep none: for videos of any length. size and
        errors as `read_clip`; one frame for each of info.timestamps."""
        shown, number = frozenset(self.info.pts), 0
        self._rewind()
        for packet in self._packets():
            for frame in packet.decode():
                if number < self.info.frames and (not shown or frame.pts in shown):
                    yield self._convert(frame, size)
                    number += 1
            self._start_clock()  # however long the caller takes with a frame
        if number < self.info.frames:
            raise DataError(f"{self.path}: damaged, of its {self.info.frames} frames {number} can be decoded")

    def count(self):
        """Decode everything; the number of frames. Raises DataError at the first that is damaged."""
        self._start_clock(extra=self.info.duration)  # slower than it plays is too slow
        self._rewind()
        return sum(len(packet.decode()) for packet in self._packets())

    def frames(self, size=None):
        """All frames in order, one in memory at a time: yields uint8 (H, W, 3), size as in `read_clip`."""
        self._start_clock(extra=10 * self.info.duration)  # whoever looks at them may take time for it
        self._rewind()
        shown = set(self.info.pts)
        for packet in self._packets():
            for frame in packet.decode():
                if not shown or frame.pts in shown:
                    yield self._convert(frame, size)

    def _seek(self, number):
        self.container.seek(self.info.pts[number], stream=self.stream)

    def _rewind(self):
        # Opened anew: a format without an index may not find its way back to the beginning.
        self.container.close()
        self._open()

    def _decode(self, numbers, size):
        """{number: uint8 (H, W, 3)} for those of the frame numbers that are met from here on."""
        info, found, count = self.info, {}, itertools.count()
        place = {info.pts[number]: number for number in numbers} if info.pts else None
        for packet in self._packets():
            # Frames that no other needs are not decoded, unless they are wanted themselves.
            if place and info.codec in CAN_SKIP:
                needless = packet.size and packet.pts is not None and packet.pts not in place
                self.context.skip_frame = "NONREF" if needless else "DEFAULT"
            for frame in packet.decode():
                number = place.get(frame.pts) if place else next(count)
                if number in numbers and number not in found:
                    found[number] = self._convert(frame, size)
            if len(found) == len(numbers):
                break
        return found

    def _convert(self, frame, size):
        # Resized by swscale while it converts: one pass, and no full-size RGB frame. It also knows
        # matrix and range of the colours, of any pixel format; untagged ones count as BT.601.
        height, width = _shown_size(self.info, size)
        turns = self.info.rotation // 90
        stored = (width, height) if turns % 2 else (height, width)
        picture = self.converter.reformat(frame, stored[1], stored[0], "rgb24", threads=1)
        return np.rot90(picture.to_ndarray(), turns)


class Bytes:
    """The content of a video file in memory, and the name to call it by in messages."""

    def __init__(self, name, content):
        self.name, self.content = name, content

    def __str__(self):
        return self.name


def probe(path):
    """A `VideoInfo`, from the packets alone; only the first frame is decoded.

    Raises DataError (no such file, not a video, no video stream, first frame broken, too slow).
    """
    with Video(path) as video:
        return video.info


def _is_shown(packet, codec):
    """Whether a packet holds a frame to show: not the empty end mark, nor discarded by an edit
    list, nor one of the reference frames that VP8 and VP9 store but hide."""
    if not packet.size or packet.is_discard:
        return False
    first, last = memoryview(packet)[0], memoryview(packet)[-1]
    if codec == "vp8":  # RFC 6386 Sec. 9.1, "Uncompressed Data Chunk": bit 4 is show_frame
        return bool(first & 0x10)
    if codec == "vp9" and last & 0xE0 != 0xC0:  # else a superframe, of which one frame is shown
        # VP9 specification Sec. 6.2, "Uncompressed header syntax": show_existing_frame and
        # show_frame are bits 3 and 1, one place lower in profile 3 (bits 5 and 4 both set).
        return bool(first & (0x05 if first & 0x30 == 0x30 else 0x0A))
    return True


def read_clip(path, times_or_indices, size=None, info=None):
    """Frames of a video file as shown, upright: uint8 (T, H, W, 3) RGB, in the order asked for.

    times_or_indices  (T,) integers: frame numbers in presentation order, or floats: seconds from the first
            frame, giving the frame on show at that time; repeats are allowed
    size    None = as shown, int = short side in pixels with the aspect kept, (H, W) = exactly that
    info    the file's `VideoInfo`, if at hand: saves a second pass over its packets

    The result equals picking from a full decode: we seek to the last keyframe before the first
    wanted frame, then match frames by timestamp, never by counting from the seek. Wanted frames far
    apart are reached by a seek each, and frames that nothing depends on are skipped. Raises DataError
    (as `probe`; a frame outside the video; damage on the way to a wanted frame).
    """
    with Video(path, info) as video:
        return video.read(times_or_indices, size)


def one_clip(path, frames, size):
    """(T, H, W, 3) uint8: what evaluation with the plain transform sees of a file, `frames` spread over the video,
    resized to cover `size` and cut out of the middle."""
    clips = _Clips()
    clips.prepare(frames, size, sampling="segment", train=False)
    return clips.clip(path, None)


def _frame_numbers(info, wanted):
    wanted = np.atleast_1d(np.asarray(wanted))
    if wanted.dtype.kind not in "iuf" or not wanted.size:
        raise DataError(f"{info.path}: ask for frame numbers or seconds, not {wanted.tolist()}")
    in_seconds = wanted.dtype.kind == "f"
    end, unit = (info.duration, " s") if in_seconds else (info.frames, "")
    outside = wanted[~((wanted >= 0) & (wanted < end))]
    if outside.size:
        raise DataError(f"{info.path}: has {info.frames} frames in {info.duration:.3f} s, "
                        f"but the frame at {outside[0]}{unit} was asked for (the first is 0)")
    if in_seconds:
        # A microsecond of tolerance: 0.1 may lie a rounding error before the frame at 1/10 s.
        return np.searchsorted(info.timestamps, wanted + 1e-6, side="right") - 1
    return wanted


def _groups(info, wanted):
    """Split ascending frame numbers where jumping to a later keyframe spares enough decoding."""
    groups, keys = [wanted[:1]], info.keyframes
    for last, number in zip(wanted, wanted[1:]):
        before = bisect.bisect_right(keys, number)
        if before and keys[before - 1] - last > WORTH_A_SEEK:
            groups.append([])
        groups[-1].append(number)
    return groups


def _shown_size(info, size):
    """(H, W) in pixels; size as in `read_clip`."""
    if size is None:
        return info.height, info.width
    if np.ndim(size):
        return tuple(size)
    scale = size / min(info.height, info.width)
    return tuple(max(1, round(side * scale)) for side in (info.height, info.width))


# ------------------------------------------------------------------------------ choosing frames


def dense_indices(n, frames, stride, rng=None, view=(0, 1)):
    """(frames,) int: every stride-th of n frames, in a window of frames * stride (VideoMAE
    Sec. 3.3, "Temporal downsampling"). Random start with rng, the centre without; a short video
    repeats its last frame. view=(c, C) is clip c of C spread evenly from the first frame to the last
    (VideoMAE, multi-view test); of one, the centre."""
    spare = max(n - frames * stride, 0)
    clip, clips = view
    start = spare // 2 if clips == 1 else spare * clip // (clips - 1)
    start = start if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + stride * np.arange(frames), n - 1)


def segment_indices(n, frames, rng=None, view=(0, 1)):
    """(frames,) int: one of n frames from each of `frames` equal segments (TSN Sec. 3.1,
    "Temporal Segment Networks"): random within its segment with rng, the middle without.
    view=(c, C) is clip c of C: at (c + 1) / (C + 1) of each segment (UniFormerV2's test)."""
    clip, clips = view
    edges = np.arange(frames + 1) * n // frames
    first, last = edges[:-1], np.maximum(edges[1:] - 1, edges[:-1])
    return first + (last - first) * (clip + 1) // (clips + 1) if rng is None else rng.integers(first, last + 1)


# The official samplers, for those who want the official numbers. All are called alike:
# (n, frames, stride, rng, view, fps) -> (frames,) int; rng=None = test.


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
    return np.minimum(np.linspace(end - span, end, frames).astype(int), end - 1)  # spacing 64/15, not 4


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
    # The last frame of an interval is never drawn, unless it is the only one: there the original stops.
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


SAMPLINGS = {  # name -> sampler; in brackets where the rule comes from
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
    """(frames,) int in [0, n): which of a video's n frames a clip takes, by one of SAMPLINGS.

    stride  frames from one to the next, where the sampler is dense
    rng     numpy Generator for training; None for evaluation
    view    (c, C) in evaluation: clip c of C
    fps     of the video, for samplers that count seconds
    """
    return np.asarray(SAMPLINGS[name](n, frames, stride, rng, view, fps))


# ----------------------------------------------------------------------------- cropping frames


def _as_planes(video):
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)


def _resize(video, size, how):
    """uint8 (T, H, W, 3) resized to (h, w): "area" = bilinear over all pixels that a new one covers,
    "bicubic" the same with Pillow's kernel, "bilinear" and "nearest" of single pixels, as OpenCV."""
    if tuple(video.shape[1:3]) == tuple(size):
        return video
    planes = _as_planes(video)
    if how in ("area", "bicubic"):
        kernel = v2.InterpolationMode.BICUBIC if how == "bicubic" else v2.InterpolationMode.BILINEAR
        planes = v2.functional.resize(planes, list(size), kernel, antialias=True)
    else:
        options = {} if how == "nearest" else {"align_corners": False}
        planes = torch.nn.functional.interpolate(planes.float(), size=tuple(size), mode=how, **options)
        planes = planes.round().clamp(0, 255).byte()
    return planes.permute(0, 2, 3, 1).numpy()


def _short_side(video, size, how, least=int):
    """Resized so that the short side is `size` pixels; the long one rounded by `least`."""
    H, W = video.shape[1:3]
    long = least(max(H, W) * size / min(H, W))
    return _resize(video, (size, long) if H <= W else (long, size), how)


def _window(video, size, crop=0, crops=1, rounding=int):
    """The crop of (h, w): the centre, or number `crop` of `crops` from one end to the other."""
    share = crop / (crops - 1) if crops > 1 else 0.5
    top, left = (rounding(share * (side - wanted)) for side, wanted in zip(video.shape[1:3], size))
    return video[:, top:top + size[0], left:left + size[1]]


def _random_window(video, size, rng):
    top, left = (int(rng.integers(side - wanted + 1)) for side, wanted in zip(video.shape[1:3], size))
    return video[:, top:top + size[0], left:left + size[1]]


def _random_area(video, size, rng, area, flip, how="area"):
    """A random crop of `area` to all of the area and an aspect from 3/4 to 4/3, resized; mirrored by a fair
    coin with flip. The same for all frames (Going Deeper with Convolutions, Sec. 6, "Training Methodology")."""
    kernel = v2.InterpolationMode.BICUBIC if how == "bicubic" else v2.InterpolationMode.BILINEAR
    return _draw_with(rng, video, v2.RandomResizedCrop(size, scale=(area, 1), interpolation=kernel, antialias=True),
                      v2.RandomHorizontalFlip(0.5 if flip else 0))


def _draw_with(rng, video, *transforms):
    """uint8 (T, H, W, 3) through torchvision's random transforms, drawn by a numpy Generator, once for all frames."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reset the accelerator's generator as well.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return v2.Compose(transforms)(_as_planes(video)).permute(0, 2, 3, 1).numpy()


def _plain(video, size, rng, flip, area, crop, crops):
    return _window(video, size, crop, crops) if rng is None else _random_area(video, size, rng, area or 0.5, flip)


def _multi_scale(video, size, rng, flip, area, crop, crops):
    # TSN's crop, of which VideoMAE pretrains: sides from four fractions of the short one, not more than
    # one step apart, at one of 13 places. Never mirrored, whatever the paper says of Kinetics.
    if rng is None:
        return _window(_short_side(video, min(size), "area"), size, crop, crops)
    H, W = video.shape[1:3]
    sides = [int(min(H, W) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    heights, widths = ([wanted if abs(side - wanted) < 3 else side for side in sides] for wanted in size)
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    down, right = (H - h) // 4, (W - w) // 4
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    row, column = places[rng.integers(len(places))]
    top, left = row * down, column * right
    return _resize(video[:, top:top + h, left:left + w], size, "area")


def _fine_tuning(video, size, rng, flip, area, crop, crops, rounding=int):
    if rng is None:
        return _window(_short_side(video, min(size), "bilinear"), size, crop, crops, rounding)
    return _random_area(video, size, rng, area or 0.08, flip)


def _squash(video, size, rng, flip, area, crop, crops):
    wide = _resize(video, tuple(side * 8 // 7 for side in size), "bilinear")  # 256 for 224
    return _window(wide, size, crop, crops, round) if rng is None else _random_window(wide, size, rng)


def _demo(video, size, rng, flip, area, crop, crops):
    return _window(_short_side(video, min(size) * 8 // 7, "nearest"), size, crop, crops, round)


def _clip(video, size, rng, flip, area, crop, crops):
    if rng is None:
        return _window(_short_side(video, min(size), "bicubic"), size, crop, crops, round)
    return _random_area(video, size, rng, area or 0.9, False, "bicubic")


def _square(video, size, rng, flip, area, crop, crops):
    return _resize(video, size, "bilinear")


TRANSFORMS = {  # name -> (video, size, rng, flip, area, crop, crops) -> video; rng=None = test
    "plain": _plain,  # ours: resized while decoding; crops of 50-100 % of the area
    "videomae-pretrain": _multi_scale,
    "videomae": _fine_tuning,  # RandAugment and erasing: see VideoFiles
    "uniformerv2": functools.partial(_fine_tuning, rounding=math.ceil),
    "internvideo": _squash,  # InternVideo-MM, downstream: the aspect is lost
    "internvideo-demo": _demo,
    "clip": _clip,  # CLIP's preprocessing; in training the image-text batches of InternVideo-MM
    "viclip": _square,
}


def crop_frames(name, video, size, rng=None, flip=True, area=None, crop=0, crops=1):
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3): resized and cropped by one of TRANSFORMS.

    size   (h, w) in pixels
    rng    numpy Generator for training; None for evaluation: crop number `crop` of `crops`, from one
           end of the longer side to the other
    flip   in training, mirror half of the clips, where the recipe does
    area   in training, the smallest share of a frame that a random crop keeps; None = the recipe's
    """
    return TRANSFORMS[name](video, size, rng, flip, area, crop, crops)


# ---------------------------------------------------------------------------- many video files


_GREY = [124, 116, 104]  # the mean colour of ImageNet


def split_files(items, fraction=0.1, seed=0):
    """(training items, held-out items): a fixed random share of at least one file is held out.

    items   tuples that begin with a path; those of one path, its captions, stay together
    The seed is not the training seed, so that runs with different seeds share a validation set.
    A single file lands in both parts, as there is nothing else to do with it.
    """
    paths = list(dict.fromkeys(item[0] for item in items))
    if len(paths) < 2:
        return list(items), list(items)
    count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    held = {paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count].tolist()}
    return [item for item in items if item[0] not in held], [item for item in items if item[0] in held]


class _Clips:
    """What to take of each file; where files come from is for VideoFiles and VideoShards to say."""

    def prepare(self, frames, size, stride=4, sampling="dense", train=True, seed=0, flip=True, transform="plain",
                area=None, operations=0, magnitude=7, erasing=0.0, views=None, decoder="pyav"):
        """Keep the recipe; DataError where it is impossible. Arguments as VideoFiles."""
        for what, name, known in (("sampling", sampling, SAMPLINGS), ("transform", transform, TRANSFORMS),
                                  ("decoder", decoder, DECODERS)):
            if name not in known:
                raise DataError(f"no {what} {name!r}: choose {', '.join(known)}")
        if frames < 1 or stride < 1 or seed < 0:
            raise DataError("clips need frames >= 1, stride >= 1 and seed >= 0, "
                            f"got frames={frames}, stride={stride}, seed={seed}")
        self.size, self.frames, self.stride, self.sampling = height_width(size), frames, stride, sampling
        self.transform, self.train, self.seed, self.flip, self.views = transform, train, seed, flip, views
        self.decoder, self.area, self.before = decoder, area, v2.RandAugment(operations, magnitude) if operations else None
        self.after = v2.RandomErasing(erasing, value=_GREY) if erasing else None

    def clip(self, path, key):
        """The clip that training (key: numbers to seed it) or evaluation (None) takes of one file."""
        rng = None if key is None else np.random.default_rng(key)
        clips, crops = self.views if self.views and rng is None else (0, 0)
        with _in_hand(path), Video(path, decoder=self.decoder) as file:
            info = file.info
            choose = functools.partial(choose_frames, self.sampling, info.frames, self.frames, self.stride, fps=info.fps)
            numbers = [choose(rng=rng)] + [choose(view=(clip, clips)) for clip in range(clips)]
            size = None
            if self.transform == "plain":
                # Just large enough to cover the crop; with room for a random one, as 256 is for 224.
                scale = max(self.size[0] / info.height, self.size[1] / info.width)
                scale *= 1 if rng is None else 8 / 7
                size = tuple(max(round(side * scale), least) for side, least in
                             zip((info.height, info.width), self.size))
            first, *others = np.split(file.read(np.concatenate(numbers), size), 1 + clips)
        if self.before and rng:
            first = _draw_with(rng, first, self.before)
        first = crop_frames(self.transform, first, self.size, rng, self.flip, self.area)
        if self.after and rng:
            first = _draw_with(rng, first, self.after)
        return first if not clips else np.stack([first] + [
            crop_frames(self.transform, part, self.size, crop=crop, crops=crops)
            for part in others for crop in range(crops)])


class VideoFiles(_Clips, ClipSet):
    """Clips from video files, or from pictures, which are clips of one frame.

    source    whatever `annotations.read` knows: a folder, a list, a benchmark's own files
    frames    T
    size      int or (H, W), pixels
    stride    frames from one chosen frame to the next, where the sampling is dense
    sampling  one of SAMPLINGS; "dense" and "segment" are ours, the others reproduce official numbers
    transform  one of TRANSFORMS, likewise
    train     True: random window and crop and (with flip=True) mirroring, alike for all frames, a
              function of (seed, index, epoch); False: the centre of each, or `views`
    area      with train=True: the smallest share of a frame's area that a random crop keeps; None: the
              transform's own
    operations, magnitude   with train=True: RandAugment (arXiv 1909.13719), so many of its operations of a
              strength of 0 to 30, drawn once for a clip; 0 = none
    erasing   with train=True: probability that a box of the clip, the same in all frames, turns grey
    views     (clips, crops) with train=False: that many clips along time, and of each that many crops from
              end to end of the longer side. "video" is then uint8 (1 + clips * crops, T, H, W, 3), the one
              view in the centre of both first
    decoder   one of DECODERS, see `Video`
    part      "all", or "train" / "val": without / only the tenth that `split_files` holds out. Where
              the source brings a split of its own, that counts instead, and "all" means what it has
              for `train`
    classes   class names in label order, to read a validation list with the training set's labels

    self[index] and self[index, epoch] return
              {"video": uint8 (T, H, W, 3), or more with views, "labels": {"label": int} where the
               file has one, "path": str, "bad": [(path, reason), ...], and where the source has
               them "caption" and "captions" (all of the video, after `by_video`), "question",
               "answer": str and "candidates": tuple of str}
              A file that cannot be read is named in "bad". With train=True the next readable file
              takes its place. With train=False nothing does and "video" is None, so that an
              evaluation counts unreadable files and does not replace them.

    `classes` is {"label": names in label order}, or {} where the source has no labels. `captions` is
    None or parallel to `items`, which lists (path, label or None). `kind` says what the source is.
    Raises DataError if source is none of these, a label is unknown, or no file can be read.
    """

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all", classes=None,
                 **recipe):
        if part not in ("all", "train", "val"):
            raise DataError(f"no part {part!r}: choose all, train or val")
        self.prepare(frames, size, stride, sampling, train, **recipe)
        self.source, self.all_captions, self.recipe = str(source), None, recipe
        self.kind, rows, official = annotations.read(source)
        labels = [row.label for row in rows]
        names, number = annotations.number_labels(source, labels, classes or official)
        self.classes = {"label": tuple(names)} if names else {}
        if len({row.split for row in rows}) > 1:
            own = {"all": "train" if train else "val"}.get(part, part)
            rows = [row for row in rows if row.split == own]
            if not rows:
                raise DataError(f"{source}: gives some files a split, and none the split {own}")
            self.kind += f", its {own} split"
        elif part != "all":
            rows = split_files(rows)[part == "val"]
        self.rows = rows
        self.items = [(row.path, number.get(row.label)) for row in rows]
        self.captions = [row.caption for row in rows] if rows[0].caption is not None else None
        self.missing = [path for path in dict.fromkeys(row.path for row in rows) if not os.path.isfile(path)]
        if len(self.missing) == len({row.path for row in rows}):
            raise DataError(f"{source}: none of its {len(self.missing)} files exists, the first is "
                            f"{self.missing[0]}; paths are relative to the list's folder")

    def keep(self, places):
        """Keep the files at these places of the list alone. Returns self."""
        self.rows = [self.rows[i] for i in places]
        self.items = [self.items[i] for i in places]
        self.captions = self.captions and [self.captions[i] for i in places]
        return self

    def only(self, question, names):
        """Keep the files of these classes alone, numbered in this order. Returns self."""
        old = self.classes[question]
        self.keep([i for i, (_, label) in enumerate(self.items)
                   if label is not None and old[label] in names])
        if not self.items:
            raise DataError(f"{self.source}: no file of the classes {', '.join(names)}")
        self.items = [(path, names.index(old[label])) for path, label in self.items]
        self.classes = {question: tuple(names)}
        return self

    def first(self, count):
        """Keep `count` of the files, drawn at random but always the same. Returns self."""
        return self.keep(sorted(np.random.default_rng(0).permutation(len(self))[:count].tolist()))

    def by_video(self):
        """One item for each video: "captions" is a tuple of all its captions, "caption" the first.

        Nothing changes where there are no captions, or a choice among several. Returns self.
        """
        if not self.captions or self.rows[0].candidates:
            return self
        captions, first = {}, {}
        for i, row in enumerate(self.rows):
            captions.setdefault(row.path, []).append(row.caption)
            first.setdefault(row.path, i)
        self.all_captions = {path: tuple(texts) for path, texts in captions.items()}
        return self.keep(list(first.values()))

    def with_views(self, clips, crops):
        """A copy for evaluation of which each item has several views: see `views`."""
        views = copy.copy(self)
        views.views = (clips, crops)
        return views

    def training_captions(self):
        """All captions, for a vocabulary. DataError where there are none, or where one is empty."""
        if self.captions is None:
            return super().training_captions()
        for (path, _), caption in zip(self.items, self.captions):
            if not caption:
                raise DataError(f"{self.source}: the caption of {path} is empty")
        return list(self.captions)

    def training_questions(self):
        """All pairs (question, answer). DataError where one is missing."""
        if any(row.answer is None or not (row.question or "").strip() for row in self.rows):
            return super().training_questions()
        return [(row.question, row.answer) for row in self.rows]

    def __len__(self):
        return len(self.items)

    def summary(self):
        """One line for the user: kind, counts, classes, a sample, what is missing."""
        row, (path, label) = self.rows[0], self.items[0]
        videos = len({path for path, _ in self.items})
        names = self.classes.get("label", ())
        kinds = (f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 if names else "no labels")
        said = (f", {len(self):,} captions" if self.captions else
                f", {len(self):,} questions" if row.question else "")
        first = f"first {path}" + ("" if label is None else f" = {names[label]}") + (
            f" = {row.caption!r}" if row.caption else "")
        missing = f"; {len(self.missing):,} MISSING, e.g. {self.missing[0]}" if self.missing else ""
        return printable(f"{self.source}: {self.kind}: {videos:,} videos{said}, {kinds}, {first}{missing}")

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        index, bad = range(len(self))[index], []
        for place in range(index, index + (len(self) if self.train else 1)):
            place %= len(self)
            path, label = self.items[place]
            item = {"video": None, "labels": {} if label is None else {"label": label}, "path": path,
                    "bad": bad}
            item |= {key: getattr(self.rows[place], key) for key in ("caption", "question", "answer", "candidates")
                     if getattr(self.rows[place], key) is not None}
            if "caption" in item:
                item["captions"] = (self.all_captions or {}).get(path, (item["caption"],))
            try:
                item["video"] = self.clip(path, (self.seed, index, epoch) if self.train else None)
                return item
            except DataError as error:
                bad.append((path, str(error)))
        if self.train:
            raise DataError(f"{self.source}: none of its {len(self)} files can be read; "
                            f"{bad[0][1]}")
        return item


class VideoShards(_Clips, ClipSet):
    """Clips from tar shards in the WebDataset layout: k.mp4 with k.txt, k.json or k.cls beside it.

    source  one .tar, a pattern like clips-{000000..000123}.tar, or a folder of .tar files; the pattern
            may be a URL, as the `webdataset` package reads them (pip install webdataset)
    The rest as `VideoFiles`; labels are the numbers of .cls. "val" is every tenth shard, "train" the rest.

    Shards are for data too large to be listed, so training draws shards with replacement for ever, a
    shuffle buffer of 200 samples mixes what comes out, and a run is as long as its steps say, however
    the shards fall on processes and workers. A batch is a function of (seed, number of workers, step at
    which the run began): a resumed run draws new shards, it does not repeat the old ones. Evaluation
    reads its shards once, in order.

    `items` and `captions` list what the first shard holds, the held-out part all of its own: enough for
    a vocabulary and for `summary`. Raises DataError: no such shard, no video in it, package absent.
    """

    missing = ()

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all", classes=None,
                 **recipe):
        try:
            import webdataset
        except ImportError:
            raise DataError(f"{source}: tar shards are read by the webdataset package: pip install webdataset") from None
        shards = (sorted(map(str, Path(source).glob("*.tar"))) if os.path.isdir(source)
                  else webdataset.shardlists.expand_urls(str(source)))
        absent = [shard for shard in shards if ":" not in shard and not os.path.isfile(shard)]
        if absent or not shards:
            raise DataError(f"{source}: no such shard{': ' + absent[0] if absent else ''}")
        if part != "all":
            shards = [shard for shard, in split_files([(shard,) for shard in shards])[part == "val"]]
        self.prepare(frames, size, stride, sampling, train, **recipe)
        self.source, self.shards = str(source), shards
        known = [describe_sample(sample) for sample in self.samples(shards[:1] if train else shards)]
        if not known:
            raise DataError(f"{shards[0]}: no video in this shard")
        self.items = [(item["path"], item["labels"].get("label")) for item, _ in known]
        captions = [item.get("caption") for item, _ in known]
        self.captions = None if None in captions else captions

    def __len__(self):
        return len(self.items)

    def summary(self):
        """One line for the user: how many shards, and what is in the first."""
        said = f" = {self.captions[0]!r}" if self.captions else ""
        return printable(f"{self.source}: {len(self.shards):,} tar shards, {len(self):,} videos in "
                                     f"{'the first' if self.train else 'them'}, first {self.items[0][0]}{said}")

    def training_captions(self):
        """The captions of the first shard. DataError where one has none."""
        return self.captions or super().training_captions()

    def samples(self, shards, mix=None):
        """The raw samples of an iterable of shards, one after another; mix: a random.Random to shuffle by."""
        import webdataset
        stages = [lambda: ({"url": shard} for shard in shards), webdataset.tarfile_to_samples()]
        if mix is not None:
            stages.append(webdataset.shuffle(200, rng=mix))
        try:
            for sample in webdataset.DataPipeline(*stages):
                if describe_sample(sample):
                    yield sample
        except DataError:
            raise
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"{self.source}: a shard cannot be read ({error})") from None

    def stream(self, *key):
        """Items like those of VideoFiles: for ever and mixed by the numbers of `key`, or in evaluation once."""
        if not self.train:
            for item, content in map(describe_sample, self.samples(self.shards)):
                yield self.item(item, content, None)
            return
        rng = np.random.default_rng((self.seed, *key))
        endless = (self.shards[rng.integers(len(self.shards))] for _ in itertools.count())
        bad = []
        for count, sample in enumerate(self.samples(endless, random.Random(int(rng.integers(2**63))))):
            item = self.item(*describe_sample(sample), (self.seed, *key, count))
            bad += item["bad"]
            if len(bad) > 1000:
                raise DataError(f"{self.source}: a thousand samples in a row cannot be read; {bad[0][1]}")
            if item["video"] is not None:
                item["bad"], bad = bad, []
                yield item

    def item(self, item, content, key):
        item |= {"video": None, "bad": []}
        try:
            item["video"] = self.clip(Bytes(item["path"], content), key)
        except DataError as error:
            item["bad"].append((item["path"], str(error)))
        return item


def describe_sample(sample):
    """({"path", "label" and "caption" if there}, content of its video) of a WebDataset sample, or None."""
    video = next((key for key in sample if annotations.is_media(f"x.{key}")), None)
    if video is None:
        return None
    said = sample.get("txt", b"").decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        told = json.loads(sample.get("json", b"null")).get("caption")
        said = said or (told if isinstance(told, str) else "")
    label = sample.get("cls", b"-1").strip()
    if label.isdigit() and (len(label) > 18 or int(label) >= annotations.MOST_CLASSES):
        raise DataError(f"{sample['__url__']}/{sample['__key__']}.cls: {label[:20].decode()} is no class number; these are "
                        f"below {annotations.MOST_CLASSES:,}")
    item = {"path": f"{sample['__url__']}/{sample['__key__']}.{video}",
            "labels": {"label": int(label)} if label.isdigit() else {}}
    return item | ({"caption": said, "captions": (said,)} if said else {}), sample[video]


def open_clips(source, *args, **options):
    """VideoFiles, or VideoShards where the source is tar shards; arguments as theirs."""
    return (VideoShards if annotations.is_shards(source) else VideoFiles)(source, *args, **options)


def open_sets(source, held_out="", *, world="MovingShapes", frames, size, seed, motion_words=1.0,
              sampling="dense", stride=4, transform="plain", flip=True, **augment):
    """The training set and the held-out sets of a run: (train_set, {"val": ..., ...}).

    source    what --data names: a folder, a list ...; "" = generated clips
    held_out  what --val-data names; "" = a part of `source`
    world     which class of video.moving_shapes the generated clips are of; its HELD_OUT names their
              held-out sets, of which files have "val" alone
    augment   more for the training set, see VideoFiles; the rest too

    This is the one place that asks whether clips come from files: all data sets have one interface.
    """
    if not source:
        make = functools.partial(getattr(moving_shapes, world), frames=frames, size=size, seed=seed,
                                 motion_words=motion_words)
        train_set = make("train")
        sets = {split: make(split) for split in train_set.HELD_OUT}
        return train_set, sets
    options = dict(frames=frames, size=size, sampling=sampling, stride=stride, seed=seed, flip=flip,
                   transform=transform)
    train_set = open_clips(source, train=True, part="all" if held_out else "train", **options,
                           **augment)
    val = open_clips(held_out or source, train=False, classes=train_set.classes.get("label"),
                     part="all" if held_out else "val", **options)
    print(f"--data {train_set.summary()}")
    print(f"held out: {len(val)} files")
    return train_set, {"val": val}


class _Stream(torch.utils.data.IterableDataset):
    """The endless items of VideoShards, each worker's its own."""

    def __init__(self, shards, *key):
        self.shards, self.key = shards, key

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self.shards.stream(*self.key, worker.id if worker else 0)
        except DataError as error:
            yield error


def read_features(folder, segments, subset, classes=None):
    """Features of long videos, and what happens in them when.

    folder    of .npz files as tools/extract.py writes them, named by the ids of the annotation, also `v_` + id
    segments  what `annotations.read_segments` returns
    subset    the part to read, as the annotation calls it; capitals do not matter
    classes   names in label order; None: the sorted labels of this part
    returns   a list of {"features": float32 (T', F), "times": float64 (T',) s, "duration": s, "segments": list of
              (start s, end s, label), "path": str, "model": str, "window", "stride": int, frames}, the class names,
              and the ids of the videos whose features are missing
    raises    DataError: no such subset or folder, no features at all, a file that is none, an unknown label
    """
    folder, items, missing = Path(folder), [], []
    rows = {name: row for name, row in segments.items() if row.subset.lower() == subset.lower()}
    if not rows:
        known = ", ".join(sorted({row.subset for row in segments.values()}))
        raise DataError(f"no video of the subset {subset!r} in the annotation: it has {known}")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; it should hold the .npz files of tools/extract.py")
    classes = classes or sorted({label for row in rows.values() for *_, label in row.segments})
    files = {path.stem: path for path in sorted(folder.rglob("*.npz")) if os.path.isfile(path)}
    for name, row in rows.items():
        path = files.get(name) or files.get("v_" + name)
        if path is None:
            missing.append(name)
            continue
        unknown = {label for *_, label in row.segments} - set(classes)
        if unknown:
            raise DataError(f"{name}: label {sorted(unknown)[0]!r} is not among the {len(classes)} classes of training")
        try:
            with np.load(path) as file:  # never unpickles: an array of objects is a ValueError
                raw = {key: file[key] for key in ("feats", "timestamps", "duration", "model", "window", "stride")}
            kinds = "".join(raw[key].dtype.kind for key in raw)
            if not re.fullmatch("[fiu][fiu][fiu]U[iu][iu]", kinds):
                raise ValueError(f"numbers and words of the wrong kinds, {kinds}")
            item = {"features": raw["feats"].astype(np.float32), "times": raw["timestamps"].astype(float),
                    "duration": float(raw["duration"]), "model": str(raw["model"]), "window": int(raw["window"]),
                    "stride": int(raw["stride"])}
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError, OSError, EOFError, RuntimeError,
                SyntaxError, struct.error, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a file of tools/extract.py ({type(error).__name__})") from None
        if item["features"].ndim != 2:
            raise DataError(f"{path}: has {item['features'].ndim - 1} numbers a row, not one: extract with --pool all")
        if item["times"].shape != item["features"].shape[:1] or not item["features"].size or not (
                np.isfinite(item["features"]).all() and np.isfinite(item["times"]).all() and 0 < item["duration"] < math.inf
                and item["window"] > 0 and item["stride"] > 0):
            raise DataError(f"{path}: damaged: features and times of different lengths, or numbers that are none")
        items.append(item | {"path": str(path), "segments": [
            (start, end, classes.index(label)) for start, end, label in row.segments]})
    if not items:
        raise DataError(f"{folder}: has the features of none of the {len(rows)} videos, e.g. {missing[0]}.npz")
    return items, classes, missing


# ------------------------------------------------------------------------------------- batches


class _Carry(torch.utils.data.Dataset):
    """Pass a DataError on as a value: a DataLoader would bury its one line in a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(items):
    for item in items:
        if isinstance(item, DataError):
            return item
    good = [item for item in items if item["video"] is not None]
    batch = {key: [item[key] for item in good] for key in BATCH_LISTS if good and key in good[0]}
    questions = dict.fromkeys(question for item in good for question in item.get("labels", ()))
    batch["labels"] = {question: torch.tensor([item["labels"].get(question, -1) for item in good])
                       for question in questions}
    batch["bad"] = [entry for item in items for entry in item.get("bad", ())]
    batch["video"] = torch.from_numpy(np.stack([item["video"] for item in good])) if good else None
    return batch


# What a batch holds as lists, one entry for each clip, where the data set has it.
BATCH_LISTS = ("caption", "captions", "path", "facts", "index", "question", "answer", "candidates")


_desks = weakref.WeakSet()  # the desks of our workers: shared bytes (workers, 512), what each has in hand
_desk = None  # in a worker: its own


def _start_worker(number, desks=None):
    # Ctrl-C reaches every process of the terminal, and a scheduler may ask all of a job to end; only the parent should
    # answer, by stopping us.
    global _desk
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if desks is not None:
        _desk = desks[number]
        _note("")


def _note(path):
    if _desk is not None:
        text = f"{os.getpid()} {path}".encode("utf-8", "backslashreplace")[:_desk.numel()]
        _desk.copy_(torch.frombuffer(bytearray(text.ljust(_desk.numel(), b"\0")), dtype=torch.uint8))


@contextlib.contextmanager
def _in_hand(path):
    """While a worker reads a file: should it die, `dead_worker` knows which file that was."""
    _note(path)
    try:
        yield
    finally:
        _note("")


def dead_worker(error):
    """What a DataLoader says of a worker that died, or a pipe to it that broke -> one line that names the file it had in
    hand, or None where the error is another one."""
    found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed by signal: \w+|exited unexpectedly)",
                      str(error))
    notes = [_in_writing(desk) for desks in list(_desks) for desk in desks]
    if found:
        dead, how = found[1].split(", "), found[2]
    else:
        broken = isinstance(error, (ConnectionError, EOFError))
        numbers = [number for number, _ in notes if broken and number]
        for _ in range(40 if numbers else 0):  # a process closes its pipes a moment before it has ended
            if any(_has_ended(int(number)) for number in numbers):
                break
            time.sleep(0.05)
        dead, how = [number for number in numbers if _has_ended(int(number))], "has ended"
    if not dead:
        return None
    files = [printable(path) for number, path in notes if number in dead and path]
    return (f"a process that prepares clips (pid {', '.join(dead)}) {how}, with {', '.join(files) or 'no file'} in "
            "hand. Killed by nobody you know: out of memory, lower --workers; anything else: that file crashes the "
            "decoder, take it out")


def _in_writing(desk):
    """(process number, what it has in hand) of what `_note` wrote, as text; "" where there is nothing."""
    return bytes(desk.tolist()).rstrip(b"\0").decode("utf-8", "replace").partition(" ")[::2]


def _has_ended(number):
    """True for a child of ours that no longer runs, whether or not somebody has asked for its exit code."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return False
    try:
        return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # waited for already, or a child of the server that forks for us (Python 3.14)
        return not os.path.exists(f"/proc/{number}") if os.path.exists("/proc/self") else True


def _end(children):
    for child in children:
        if child.is_alive():
            child.kill()


def _load(dataset, plan, workers, **options):
    # The workers run one torch thread each: DataLoader sees to that. Its own generator, so that starting a loader does
    # not move the global one.
    if plan is not None:
        dataset, options = _Carry(dataset), {"batch_sampler": plan}
    desks = torch.zeros(workers, 512, dtype=torch.uint8).share_memory_() if workers else None
    if workers:
        _desks.add(desks)
    loader = torch.utils.data.DataLoader(
        dataset, collate_fn=_collate, num_workers=workers, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),  # so that the copy to the GPU need not be waited for
        worker_init_fn=functools.partial(_start_worker, desks=desks), **options)
    batches = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # torch tells of a dead worker from a signal handler, wherever the program then is: in the midst of writing a
        # checkpoint, or of reporting this very death. Here the next batch tells (torch looks every five seconds).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # They leave SIGTERM to us, and by SIGTERM DataLoader, and multiprocessing at the end of the program, would end one
    # that does not hear them, busy with a file that takes for ever.
    end = multiprocessing.util.Finalize(None, _end, (list(getattr(batches, "_workers", ())),), exitpriority=10)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # DataLoader asks them to end, and waits a while
        end()


class _Plan:
    """The indices of each step, computed as they are needed."""

    def __init__(self, dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats):
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.shuffle, self.rank, self.world, self.repeats = shuffle, rank, world, repeats

    def __len__(self):
        return max(self.steps - self.start, 0)

    def __iter__(self):
        order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.length))
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.length is None:
                yield list(places)
            else:
                turns = [(*divmod(place // self.repeats, self.length), place % self.repeats) for place in places]
                yield [(int(order(epoch)[i]) if self.shuffle else i, epoch * self.repeats + again)
                       for epoch, i, again in turns]


def normalise(video, mean, std):
    """uint8 (B, T, H, W, 3) -> float32 (B, 3, T, H, W), (video / 255 - mean) / std, on the device
    of the video: a batch travels as bytes, a quarter of the size.

    mean, std  three numbers each, of red, green, blue in [0, 1]; the model's file has its own
    """
    mean, std = (torch.tensor(numbers, device=video.device) for numbers in (mean, std))
    return video.float().div_(255).sub_(mean).div_(std).permute(0, 4, 1, 2, 3)


def batches(dataset, batch_size, seed, steps, start=0, workers=0, shuffle=True, rank=0, world=1, repeats=1):
    """Iterate over the batches of steps start .. steps - 1; batch k is a function of (seed, k).

    An endless dataset is read in order: step k holds indices k B to k B + B - 1. A finite one is
    read epoch after epoch, each in its own order drawn from (seed, epoch) unless shuffle=False; a
    batch may straddle two epochs, so that all have the same size. With `world` processes, the
    batches of all ranks at step k are together the batch of one process with batch size B * world.

    workers  processes that load ahead; 0 = load in this one
    repeats  clips of each file side by side, each cut out anew (repeated augmentation, arXiv 1901.09335, as
             VideoMAE uses it); finite datasets only
    yields   dict: "video" uint8 (B, T, H, W, 3), "labels" {question: int64 (B,)}, -1 = none, "bad"
             list of (path, reason), and lists such as "caption" and "path", see BATCH_LISTS
    Raises DataError where the dataset does, or if a batch has nothing but unreadable files.
    """
    shards = isinstance(dataset, VideoShards)
    if repeats > 1 and (shards or not hasattr(dataset, "__len__")):
        raise DataError(f"repeats={repeats}: an endless dataset has no need of the same clip twice")
    if shards:
        stream = _Stream(dataset, seed, start, rank)
        found = itertools.islice(_load(stream, None, workers, batch_size=batch_size), max(steps - start, 0))
    else:
        plan = _Plan(dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats)
        found = _load(dataset, plan, workers)
    for batch in found:
        if batch["video"] is None:
            raise DataError(f"a whole batch of unreadable files; {batch['bad'][0][1]}")
        yield batch


def spread(n, count):
    """Numbers of `count` of n items, evenly from the first on, rising; of all where there are no more."""
    return [i * n // min(n, count) for i in range(min(n, count))]


def held_out(dataset, count, batch_size, workers=0, rank=0, world=1):
    """Iterate over `count` items in order, once, as dicts like those of `batches`: the first ones of an endless
    dataset, of a finite one every n-th (`spread`), for lists come class by class.

    "number" counts the batches. Of several processes each gets every world-th of the same batches, so
    that together they see every item once, however many there are.

    The last batch may be smaller, and so may one with unreadable files: these are in "bad", so
    that evaluated + bad = count. No batch is empty. count=None means all of a finite dataset.
    Raises DataError if no item can be read; one of several processes then yields a last batch whose
    "video" is None, for others may have more luck.
    """
    if hasattr(dataset, "__len__"):
        count = len(dataset) if count is None else min(count, len(dataset))
    chosen = spread(len(dataset), count) if hasattr(dataset, "__len__") else range(count)
    plan = [list(chosen[first:first + batch_size]) for first in range(0, count, batch_size)]
    found = _load(dataset, plan[rank::world], workers)
    if isinstance(dataset, VideoShards):
        samples = itertools.islice(map(describe_sample, dataset.samples(dataset.shards)), count)
        parts = iter(lambda: list(itertools.islice(samples, batch_size)), [])
        found = (_collate([dataset.item(*sample, None) for sample in part])
                 for part in itertools.islice(parts, rank, None, world))
    waiting, bad = None, []  # one batch is held back: the last one also reports what follows it
    for number, batch in zip(itertools.count(rank, world), found):
        bad += batch["bad"]
        if batch["video"] is None:
            continue
        if waiting is not None:
            yield waiting
        waiting, bad, batch["bad"], batch["number"] = batch, [], bad, number
    if waiting is not None:
        waiting["bad"] += bad
        yield waiting
    elif world == 1:
        raise DataError(f"none of the {count} held-out clips can be read; {bad[0][1]}")
    elif bad:
        yield {"video": None, "bad": bad, "number": rank}


# ------------------------------------------------------------- checking a data set, small copies


def shrink(path, target, side=256):
    """Write a small copy of a video: H.264 in mp4, upright, of square pixels, its short side `side` pixels or
    the video's own if that is less. Frame n of the copy is frame n of the original, shown at the same time, and
    a keyframe comes every 12 frames, so that no clip is far from one. Written aside, then renamed; a copy that
    is there already stays. Raises DataError as `read_clip`."""
    import av
    from av.video.reformatter import VideoReformatter

    if Path(target).exists():
        return
    aside, ticks = f"{target}.{os.getpid()}.part", 90000  # a second, as in MPEG
    with Video(path) as video:
        info = video.info
        # Colours are stored for squares of two by two pixels.
        height, width = (2 * max(1, round(x / 2)) for x in _shown_size(info, min(side, info.height, info.width)))
        try:
            with av.open(aside, "w", format="mp4") as copy:
                stream = copy.add_stream("libx264", rate=max(1, round(info.fps)), options={"crf": "20", "g": "12"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1  # files are copied in parallel
                stream.codec_context.time_base = fractions.Fraction(1, ticks)
                converter = VideoReformatter()
                for seconds, picture in zip(info.timestamps, video.frames((height, width))):
                    frame = converter.reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
                                               format="yuv420p", threads=1)
                    frame.pts, frame.time_base = round(seconds * ticks), fractions.Fraction(1, ticks)
                    copy.mux(stream.encode(frame))
                copy.mux(stream.encode())
            os.replace(aside, target)
        finally:
            Path(aside).unlink(missing_ok=True)


class _Check(torch.utils.data.Dataset):
    """What is in each file: {"path", "bad": reason or None, "info", "picture"}; copies of the good ones."""

    def __init__(self, paths, copies=None, side=256):
        self.paths, self.copies, self.side = paths, copies, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        found = {"path": self.paths[index], "bad": None, "info": None, "picture": None}
        try:
            with Video(self.paths[index]) as video:
                found["info"] = video.info
                count = video.count()
                if count != video.info.frames:
                    raise DataError(f"{self.paths[index]}: has {video.info.frames} frames, of which {count} can be "
                                    "decoded")
                found["picture"] = video.read([count // 2], 96)[0]
            if self.copies:
                shrink(self.paths[index], self.copies[self.paths[index]], self.side)
        except DataError as error:
            found["bad"] = str(error)
        return found


def _as_it_is(item):
    return item


def copies_of(source, folder):
    """{path of each file that a source names: path of its copy in a folder}; names tell files of one name apart."""
    paths = dict.fromkeys(row.path for row in annotations.read(source).rows)
    return {path: str(Path(folder) / f"{Path(path).stem}-{zlib.crc32(os.path.abspath(path).encode()):08x}.mp4")
            for path in paths}


def check(source, workers=0, copies=None, side=256):
    """Decode every frame of every file that a source names.

    workers  processes; 0 = this one
    copies   None or, as `copies_of` gives them, where a small copy of each good file goes; see `shrink`
    side     of the copies, pixels
    yields   in order, a dict of "path": str, "bad": reason or None, "info": `VideoInfo` or None where no
             frame could be read, "picture": uint8 (h, w, 3) of its middle, short side 96 pixels, or None
    """
    paths = list(dict.fromkeys(row.path for row in annotations.read(source).rows))
    yield from torch.utils.data.DataLoader(
        _Check(paths, copies, side), batch_size=None, collate_fn=_as_it_is, num_workers=workers, worker_init_fn=_start_worker,
        generator=torch.Generator())


def statistics(infos):
    """Lines of text about many `VideoInfo`s: durations, frames, rates, sizes, codecs."""
    def spread(values, unit):
        values = np.array(values)
        return f"{values.min():.4g} to {values.max():.4g} {unit}, half of them below {np.median(values):.4g}"

    def most(values):
        counts = collections.Counter(values).most_common()
        more = f", {len(counts) - 6} more" if len(counts) > 6 else ""
        return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more

    hours = sum(info.duration for info in infos) / 3600
    turned, still = sum(info.rotation != 0 for info in infos), sum(info.frames == 1 for info in infos)
    return [f"duration   {spread([info.duration for info in infos], 's')}; {hours:.2f} hours in all",
            f"frames     {spread([info.frames for info in infos], 'frames')}; {still:,} files of one frame",
            f"rate       {spread([info.fps for info in infos], 'frames/s')}",
            f"size       {most([f'{info.width} x {info.height}' for info in infos])}; {turned:,} turned upright",
            f"codec      {most([info.codec for info in infos])}"]


def write_list(source, bad, path, copies=None):
    """Write what a source says of its readable files as JSON lines, which every stage reads.

    bad   paths to leave out
    path  of the new list; its entries are relative to its folder. Labels that the source numbers in an
          order of its own are written as numbers
    copies  None or {path: the path to write in its place}
    """
    found, folder = annotations.read(source), Path(path).resolve().parent
    number = {name: place for place, name in enumerate(found.classes or ())}
    with open(path, "w", encoding="utf-8") as file:
        for row in found.rows:
            if row.path not in bad:
                said = {key: value for key, value in row._asdict().items() if value is not None}
                said["path"] = os.path.relpath(Path(copies[row.path] if copies else row.path).resolve(), folder)
                if row.label in number:
                    said["label"] = number[row.label]
                if row.candidates:
                    said["answer"] = row.candidates.index(row.answer)
                file.write(json.dumps(said, ensure_ascii=False) + "\n")


def main(argv=None):
    """Check a data set. Returns the exit code: 0, 1 where files are bad, 2 for a user's mistake."""
    import argparse

    from tqdm import tqdm

    from engine import pictures

    parser = argparse.ArgumentParser(description="Check a data set.")
    parser.add_argument("path", help="folder or list, as --data of train.py")
    parser.add_argument("--out", default="runs/check", help="folder for the contact sheet (default: runs/check)")
    parser.add_argument("--fix-list", default="", help="write a list without the bad files here, a .jsonl")
    parser.add_argument("--cache", default="", help="write small copies of the good files into this folder, and beside "
                        "them list.jsonl for --data; what is there already stays")
    parser.add_argument("--short-side", type=int, default=256, help="of the copies, pixels (default: 256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    args = parser.parse_args(argv)
    try:
        if args.workers < 0 or args.fix_list and Path(args.fix_list).suffix != ".jsonl":
            raise DataError("--workers must be at least 0, and the name of --fix-list must end in .jsonl")
        if args.short_side < 16:
            raise DataError(f"--short-side {args.short_side}: give at least 16 pixels")
        if annotations.is_shards(args.path):
            raise DataError(f"{args.path}: tar shards are not checked; unpack one to look into it")
        files = VideoFiles(args.path, 1, 32, train=False)
        print(files.summary())
        count = len({row.path for row in annotations.read(args.path).rows})
        results, copies = [], None
        if args.cache:
            Path(args.cache).mkdir(parents=True, exist_ok=True)
            copies = copies_of(args.path, args.cache)
        for result in tqdm(check(args.path, args.workers, copies, args.short_side), total=count, unit="file", dynamic_ncols=True):
            results.append(result)
            if result["bad"]:
                tqdm.write(f"bad: {result['bad']}")
        bad = {result["path"] for result in results if result["bad"]}
        print(f"{count - len(bad):,} of {count:,} files are good")
        good = [result for result in results if not result["bad"]]
        if good:
            print("\n".join(statistics([result["info"] for result in good])))
            chosen = [good[i] for i in segment_indices(len(good), min(60, len(good)))]
            Path(args.out).mkdir(parents=True, exist_ok=True)
            pictures.sheet([result["picture"] for result in chosen], Path(args.out) / "sheet.png",
                       [Path(result["path"]).name[:24] for result in chosen], columns=10)
            print(f"wrote {args.out}/sheet.png")
        if args.cache and good:
            write_list(args.path, bad, Path(args.cache) / "list.jsonl", copies)
            sizes = [sum(os.path.getsize(path) for path in paths) / 2**20 for paths in zip(
                *((result["path"], copies[result["path"]]) for result in good))]
            print(f"wrote {args.cache}/list.jsonl: {sizes[0]:,.0f} MiB became {sizes[1]:,.0f} MiB")
        if args.fix_list:
            write_list(args.path, bad, args.fix_list)
            print(f"wrote {args.fix_list}")
        return int(bool(bad))
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
