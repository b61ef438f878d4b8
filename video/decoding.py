"""One video file: what it holds, and any of its frames.

Video files are unreliable. Headers promise frames that are not there, frame rates vary, edit lists
hide frames, and phones store pictures sideways.

    path --> Video.info   (VideoInfo: size, frames, timestamps, keyframes)
         --> Video.read   (T,) frame numbers or seconds --> (T, H, W, 3) uint8 RGB, upright

1. `info` reads all packets, without decoding them, to find out when each frame is shown.
2. `read` seeks to the last keyframe before a wanted frame and decodes from there. It identifies
   frames by their timestamps, never by counting from the seek. The result equals that of a full
   sequential decode.
3. Rotation, pixel aspect ratio and colour matrix are applied, so frames look as in a player.
4. Every fault becomes a `DataError`: one line that names the file.

Speed, one core: sixteen frames at stride 4 of a 640x360 H.264 file take 70 to 125 ms. Over eleven
files of all kinds this is 1.3 times as fast as torchcodec and 1.4 times as fast as decord2
(tools/bench.py decode), because frames that no other frame depends on are skipped.
"""

import bisect
import dataclasses
import io
import itertools
import os
import time

import numpy as np

from video.annotations import DataError

TIME_LIMIT = 60.0  # seconds for opening a file, and again for each request
MOST_PIXELS = 2**26  # of one frame, 8192 x 8192: more means a broken header and would fill memory
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video")  # decoders that can leave out single frames
WORTH_A_SEEK = 8  # frames that a jump to a later keyframe must save; a seek costs about as many


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` learns about the first video stream of a file."""

    path: str
    width: int  # pixels as shown: square, after rotation
    height: int
    frames: int  # that will be shown; edit lists may hide some
    duration: float  # seconds, from the start of the first frame to the end of the last
    fps: float  # frames per second, measured from the timestamps; an average where they vary
    codec: str
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise from the stored to the shown frame
    timestamps: tuple  # (frames,) float, seconds since the first shown frame
    pts: tuple  # (frames,) int, the same in the stream's time base; empty if the file has none
    keyframes: tuple  # int, numbers of the frames at which decoding can start, ascending


class Video:
    """An open file: `with Video(path) as video:`, then video.info and video.read(numbers, size).

    path  of the file, or a `Bytes`: the content of a file in memory
    info  its `VideoInfo`, if known

    Both use one opening of the file. `probe` and `read_clip` are for callers who need only one.
    Any error inside becomes a DataError that names the file.
    """

    def __init__(self, path, info=None):
        self.path = path if isinstance(path, Bytes) else str(path)
        self._info = info

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
            # Titles may be in any encoding. PyAV before 19 fails on those that are not UTF-8.
            old = int(av.__version__.split(".")[0]) < 19
            lenient = {"metadata_errors": "replace"} if old else {}
            self.container = av.open(source, timeout=TIME_LIMIT, **lenient)
        except (av.FFmpegError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self.path}: not a readable video ({reason})") from None
        # FFmpeg lists the cover picture of a sound file as a video stream.
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
            raise DataError(f"{self.path}: damaged, claims frames of {context.width} x "
                            f"{context.height} pixels")
        # One thread a file: clips are read in parallel, and FFmpeg's threads cost 10-50 % more CPU.
        context.thread_count = 1
        # A converter with one thread. PyAV's own has a thread pool. A forked worker process would
        # inherit the pool without its threads and wait for them for ever.
        self.converter = VideoReformatter()

    def __exit__(self, kind, error, trace):
        self.container.close()
        if kind is not None and issubclass(kind, (self.error, EOFError, MemoryError)):
            reason = getattr(error, "strerror", None) or kind.__name__
            raise DataError(f"{self.path}: damaged, cannot be decoded ({reason})") from None

    def _packets(self):
        for packet in self.container.demux(self.stream):
            if time.monotonic() > self.deadline:
                raise DataError(f"{self.path}: took too long to read; "
                                f"given up after {TIME_LIMIT:g} s")
            yield packet

    @property
    def info(self):
        """The file's `VideoInfo`, from the packets; only the first frame is decoded."""
        if self._info is None:
            self._info = self._probe()
        return self._info

    def _bytes(self):
        if isinstance(self.path, Bytes):
            return len(self.path.content)
        return os.path.getsize(self.path)

    def _probe(self):
        pts, keyframes, first = set(), set(), None
        self._start_clock(self._bytes() / 2**20)  # all of the file is read: 1 s more for each MiB
        codec = self.context.codec.canonical_name
        for packet in self._packets():
            if is_shown(packet, codec):
                pts.add(packet.pts)
                if packet.is_keyframe:
                    keyframes.add(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise DataError(f"{self.path}: no frame in its video stream can be decoded")
        rate = self.stream.average_rate or self.stream.guessed_rate or 25
        if None in pts or not pts:  # a raw stream without timestamps: count the frames
            self._rewind()
            count = sum(len(packet.decode()) for packet in self._packets())
            if not count:
                raise DataError(f"{self.path}: no frame in its video stream is to be shown")
            seconds, pts, keyframes = [float(i / rate) for i in range(count)], (), ()
            tail = float(1 / rate)
        else:
            clock = self.stream.time_base
            # Frames before the first one that decodes on its own are never shown.
            pts = tuple(sorted(p for p in pts if first.pts is None or p >= first.pts))
            number = {p: i for i, p in enumerate(pts)}
            keyframes = tuple(sorted(number[p] for p in keyframes if p in number))
            seconds = [(p - pts[0]) * clock.numerator / clock.denominator for p in pts]
            tail = seconds[-1] - seconds[-2] if len(seconds) > 1 else float(1 / rate)
        duration = seconds[-1] + tail
        height, width, rotation = self._shape(first)
        return VideoInfo(str(self.path), width, height, len(seconds), duration,
                         len(seconds) / duration, codec, rotation, tuple(seconds), pts, keyframes)

    def _shape(self, first):
        """(height, width, rotation) as a player shows the first frame."""
        quarter_turns = round(first.rotation / 90) % 4
        aspect = self.stream.sample_aspect_ratio or 1  # pixels of DVDs and phones may be wide
        height, width = first.height, max(1, round(first.width * aspect))
        if quarter_turns % 2:
            height, width = width, height
        if height * width > MOST_PIXELS:
            raise DataError(f"{self.path}: damaged, claims to be shown at {width} x {height} "
                            "pixels")
        return height, width, 90 * quarter_turns

    def read(self, times_or_indices, size=None):
        """Frames as shown, upright: uint8 (T, H, W, 3) RGB; arguments and errors as `read_clip`."""
        info = self.info
        self._start_clock()
        numbers = _frame_numbers(info, times_or_indices).tolist()
        frames, wanted = {}, sorted(set(numbers))
        for group in _groups(info, wanted):
            before = bisect.bisect_right(info.keyframes, group[0])
            if before:
                self._seek(info.keyframes[before - 1])
                frames |= self._decode(group, size)
            if not frames.keys() >= set(group):  # no keyframe, or the seek went too far
                self._rewind()
                frames |= self._decode(group, size)
            if not frames.keys() >= set(group):
                raise DataError(f"{self.path}: damaged, its frame {min(set(group) - set(frames))} "
                                f"of {info.frames} cannot be decoded")
        return np.stack([frames[number] for number in numbers])

    def play(self, size=None):
        """Yield every frame once, in order: uint8 (H, W, 3) RGB, one for each of info.timestamps.

        No frame is kept, so a video may have any length. size and errors as `read_clip`.
        """
        shown, number = frozenset(self.info.pts), 0
        self._rewind()
        for packet in self._packets():
            for frame in packet.decode():
                if number < self.info.frames and (not shown or frame.pts in shown):
                    yield self._convert(frame, size)
                    number += 1
            self._start_clock()  # the caller's time does not count
        if number < self.info.frames:
            raise DataError(f"{self.path}: damaged, of its {self.info.frames} frames {number} "
                            "can be decoded")

    def count(self):
        """Decode everything; the number of frames. DataError at the first damaged one."""
        self._start_clock(extra=self.info.duration)  # decoding slower than playback is too slow
        self._rewind()
        return sum(len(packet.decode()) for packet in self._packets())

    def _seek(self, number):
        self.container.seek(self.info.pts[number], stream=self.stream)

    def _rewind(self):
        # Open the file again: a format without an index may not be able to seek to its start.
        self.container.close()
        self._open()

    def _decode(self, numbers, size):
        """{number: uint8 (H, W, 3)} for those of the frame numbers that follow from here."""
        info, frames, count = self.info, {}, itertools.count()
        number_of = {info.pts[number]: number for number in numbers} if info.pts else None
        for packet in self._packets():
            # Skip frames that are not wanted and that no other frame depends on.
            if number_of and info.codec in CAN_SKIP:
                skip = packet.size and packet.pts is not None and packet.pts not in number_of
                self.context.skip_frame = "NONREF" if skip else "DEFAULT"
            for frame in packet.decode():
                number = number_of.get(frame.pts) if number_of else next(count)
                if number in numbers and number not in frames:
                    frames[number] = self._convert(frame, size)
            if len(frames) == len(numbers):
                break
        return frames

    def _convert(self, frame, size):
        # swscale resizes while it converts: one pass, no full-size RGB frame. It also applies the
        # colour matrix and range of any pixel format. Untagged colours count as BT.601.
        height, width = shown_size(self.info, size)
        turns = self.info.rotation // 90
        stored = (width, height) if turns % 2 else (height, width)
        picture = self.converter.reformat(frame, stored[1], stored[0], "rgb24", threads=1)
        return np.rot90(picture.to_ndarray(), turns)


class Bytes:
    """The content of a video file in memory, and the name for it in messages."""

    def __init__(self, name, content):
        self.name, self.content = name, content

    def __str__(self):
        return self.name


def probe(path):
    """A `VideoInfo`, from the packets; only the first frame is decoded.

    Raises DataError: no such file, not a video, no video stream, first frame broken, too slow.
    """
    with Video(path) as video:
        return video.info


def read_clip(path, times_or_indices, size=None, info=None):
    """Frames of a video file as shown, upright: uint8 (T, H, W, 3) RGB, in the requested order.

    times_or_indices  (T,) integers: frame numbers in presentation order; or floats: seconds from
            the first frame, giving the frame that is shown at that time. Repeats are allowed
    size    None = as shown, int = short side in pixels with the aspect kept, (H, W) = exactly that
    info    the file's `VideoInfo`, if known: saves a pass over its packets

    The result equals a selection from a full decode. Raises DataError as `probe`, for a frame
    outside the video, and for damage on the way to a wanted frame.
    """
    with Video(path, info) as video:
        return video.read(times_or_indices, size)


def is_shown(packet, codec):
    """Whether a packet holds a frame to show.

    False for the empty end mark, for packets that an edit list discards, and for the hidden
    reference frames that VP8 and VP9 store as packets of their own.
    """
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


def shown_size(info, size):
    """(H, W) in pixels; size as in `read_clip`."""
    if size is None:
        return info.height, info.width
    if np.ndim(size):
        return tuple(size)
    scale = size / min(info.height, info.width)
    return tuple(max(1, round(side * scale)) for side in (info.height, info.width))


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
    """Split ascending frame numbers where a jump to a later keyframe saves enough decoding."""
    groups, keys = [wanted[:1]], info.keyframes
    for last, number in zip(wanted, wanted[1:]):
        before = bisect.bisect_right(keys, number)
        if before and keys[before - 1] - last > WORTH_A_SEEK:
            groups.append([])
        groups[-1].append(number)
    return groups
