"""One video file: what it holds, and any of its frames."""

import bisect
import dataclasses
import io
import itertools
import os
import time

import numpy as np

from video.annotations import DataError

TIME_LIMIT = 60.0  # seconds for opening a file, and again for each thing that is asked of it
MOST_PIXELS = 2**26  # of one frame, 8192 x 8192: more is a broken header, and would fill the memory
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video")  # decoders that leave out one frame and are none the worse
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

    path  of the file; or a `Bytes`, a file's content in memory

    Both come from one opening, so this is the way to look before choosing frames; `probe` and
    `read_clip` are for those who need only one of the two. Whatever goes wrong inside becomes a
    DataError that names the file.
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
            if is_shown(packet, codec):
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
        height, width = shown_size(self.info, size)
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


def is_shown(packet, codec):
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


def shown_size(info, size):
    """(H, W) in pixels; size as in `read_clip`."""
    if size is None:
        return info.height, info.width
    if np.ndim(size):
        return tuple(size)
    scale = size / min(info.height, info.width)
    return tuple(max(1, round(side * scale)) for side in (info.height, info.width))
