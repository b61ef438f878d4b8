"""Decoding: information about a video file, or a part of it, and any of its frames.

    path, Part --> open_video --> .info   (VideoInfo: size, frames, timestamps, keyframes)
                              --> .read   (T,) frame numbers or seconds --> (T, H, W, 3) uint8 RGB

Video files are unreliable. Headers count frames that do not exist, frame rates vary, edit lists
hide frames, timestamps repeat, and phones store frames rotated.

1. `open_video` returns a `Video`; for a folder of numbered pictures, a video.frames.PictureVideo.
   With a `Part`, its first frame has number 0 and time 0, and nothing outside it is returned.
2. `info` reads all packets, without decoding them, to find out when each frame is shown. If the
   part is in seconds and the file has an index, it reads only the packets of the part, from the
   last keyframe before it.
3. `read` seeks to the last keyframe before a wanted frame and decodes from there. It identifies
   frames by their timestamps, never by counting from the seek. The result equals that of decoding
   the whole file in order.
4. Where timestamps are missing, repeat or jump back (two joined files), frames are numbered in
   decoding order, at a constant rate. They can only be found by decoding from the start: `info`
   decodes the whole file once, and `read` decodes everything up to the last wanted frame.
5. Rotation, pixel aspect ratio and colour matrix are applied, so frames look as in a player.
6. Every error becomes a `DataError`: one line that names the file.

Speed on one core: sixteen frames at stride 4 of a 640x360 H.264 file take 70 to 125 ms. Over
eleven files of all kinds this is 1.3 times as fast as torchcodec and 1.4 times as fast as decord2
(tools/bench.py decode), because frames that no other frame depends on are skipped.
"""

import bisect
import dataclasses
import io
import itertools
import math
import os
import time

import numpy as np

from video.rows import TIME_TOLERANCE, DataError, Part

TIME_LIMIT = 60.0  # seconds, to open a file and for each request
MOST_PIXELS = 2**26  # per frame, 8192 x 8192: more means a broken header and could exhaust memory
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video")  # codecs whose decoder can skip single frames
WORTH_A_SEEK = 8  # frames that a seek to a later keyframe must save; a seek costs about as much
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")  # formats with an index of frames


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds out about the first video stream of a file, or about a part of it."""

    path: str
    width: int  # pixels as shown: square, after rotation
    height: int
    frames: int  # number of frames that are shown; edit lists may hide others
    duration: float  # seconds, from the start of the first frame to the end of the last
    fps: float  # frames per second, the average over the timestamps
    codec: str
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise from the stored to the shown frame
    timestamps: tuple  # (frames,) float, seconds since the first shown frame
    pts: tuple  # (frames,) int, the same in the stream's time base; empty if unusable
    keyframes: tuple  # int, numbers of frames at which decoding can start, ascending
    start_keyframe: int | None = None  # of a part: pts of the last keyframe up to its first frame
    frames_before: int = 0  # of a part without pts: number of frames of the file before it


def open_video(path, info=None, part=None, rate=25.0):
    """A `Video`; for a folder, a video.frames.PictureVideo with the same methods.

    path  of a file or of a folder of numbered pictures, or a `Bytes`
    info  the `VideoInfo` of the file, or of its part, if known
    part  a `Part`; None = the whole video
    rate  frames per second of a folder of pictures, which does not state its rate
    """
    if not isinstance(path, Bytes) and os.path.isdir(path):
        from video.frames import PictureVideo  # not at the top: frames.py imports this file
        return PictureVideo(path, info, part, rate)
    return Video(path, info, part)


class Video:
    """An open file: `with Video(path) as video:`, then video.info and video.read(numbers, size).

    path  of the file, or a `Bytes`: the content of a file in memory
    info  its `VideoInfo`, if known; with a part, that of the part
    part  the `Part` to which info, read, play and count refer; None = the whole file. A part is cut
          at the end of the file

    All methods share one opening of the file. `probe` and `read_clip` are for callers who need
    only one. Any error inside becomes a DataError that names the file.
    """

    def __init__(self, path, info=None, part=None):
        self.path = path if isinstance(path, Bytes) else str(path)
        self._info, self.part = info, part
        self._first = None  # first decoded frame of the file: its shape and time zero

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
            # Metadata may be in any encoding. PyAV before 19 fails if it is not UTF-8.
            old = int(av.__version__.split(".")[0]) < 19
            lenient = {"metadata_errors": "replace"} if old else {}
            self.container = av.open(source, timeout=TIME_LIMIT, **lenient)
        except (av.FFmpegError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self.path}: not a readable video ({reason})") from None
        # FFmpeg lists the cover picture of an audio file as a video stream.
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
            raise DataError(f"{self.path}: damaged, its header claims frames of {context.width} x "
                            f"{context.height} pixels")
        # Files are read in parallel. FFmpeg's own threads would cost 10-50 % more CPU.
        context.thread_count = 1
        # A converter with one thread. PyAV's default one has a thread pool. A forked worker process
        # would inherit the pool without its threads and wait for them forever.
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
                                f"stopped after {TIME_LIMIT:g} s")
            yield packet

    @property
    def info(self):
        """The file's `VideoInfo`, from the packets. If timestamps are usable, one frame is
        decoded.
        """
        if self._info is None:
            self._info = self._probe()
        return self._info

    def _bytes(self):
        if isinstance(self.path, Bytes):
            return len(self.path.content)
        return os.path.getsize(self.path)

    def _probe(self):
        self._start_clock(self._bytes() / 2**20)  # the whole file is read: 1 s more per MiB
        seconds, fields = self._probe_part() or self._probe_all()
        if len(seconds) > 1:
            duration = seconds[-1] + (seconds[-1] - seconds[-2])
        else:
            duration = seconds[0] + 1 / self._rate()
        height, width, rotation = self._shape(self._first)
        return VideoInfo(str(self.path), width, height, len(seconds), duration,
                         len(seconds) / duration, self.context.codec.canonical_name, rotation,
                         tuple(seconds), **fields)

    def _rate(self):
        return float(self.stream.average_rate or self.stream.guessed_rate or 25)

    def _probe_all(self):
        """(seconds of each frame, fields of `VideoInfo` that locate the frames in the file)."""
        pts, keyframes, in_order = self._scan(self._packets())
        if self._first is None:
            raise DataError(f"{self.path}: no frame in its video stream can be decoded")
        if in_order:
            # Frames before the first one that decodes on its own are never shown.
            least = self._first.pts
            pts = sorted(p for p in pts if least is None or p >= least)
            seconds = self._seconds(pts)
        else:
            self._rewind()
            count = sum(len(packet.decode()) for packet in self._packets())
            if not count:
                raise DataError(f"{self.path}: no frame in its video stream is shown")
            seconds = [i / self._rate() for i in range(count)]
        first, last = 0, len(seconds)
        if self.part:
            end = seconds[-1] + 1 / self._rate()
            first, last = self.part.numbers(self.path, seconds, end)
        if in_order:
            return self._located(pts[first:last], keyframes)
        return seconds[:last - first], dict(pts=(), keyframes=(), frames_before=first)

    def _probe_part(self):
        """The result of `_probe_all`, from the packets around a part in seconds.

        None where these are not enough or contain no frame of the part.
        """
        part = self.part
        if (part is None or part.in_frames or not 0 <= part.start < part.end
                or self.container.format.name not in INDEXED):
            return None
        for packet in self._packets():
            self._first = next(iter(packet.decode()), None)
            if self._first is not None:
                break
        scanned = None
        if self._first is not None and self._first.pts is not None:
            zero, time_base = self._first.pts, self.stream.time_base
            start, end = (zero + max(0.0, second - TIME_TOLERANCE) / float(time_base)
                          for second in part[:2])
            packets = self._seek(math.ceil(start))
            if packets:
                scanned = self._scan(packets, end + 1)
        if scanned and scanned[2]:
            pts = sorted(p for p in scanned[0] if p >= zero)
            seconds = self._seconds(pts, zero)
            first, last = (bisect.bisect_left(seconds, second - TIME_TOLERANCE)
                           for second in part[:2])
            if first < last:
                return self._located(pts[first:last], scanned[1])
        self._rewind()
        return None

    def _scan(self, packets, end=math.inf):
        """(pts of the frames to show, pts of keyframes, in_order) from packets.

        in_order is True where pts identify and order the frames reliably. The scan stops at time
        `end`, in the stream's time base.
        """
        pts, keyframes, last, in_order = [], [], -math.inf, True
        for packet in packets:
            if packet.size and packet.dts is not None:
                in_order &= last <= packet.dts
                last = packet.dts
                if last >= end:  # packets are in dts order, and none is shown before its dts
                    break
            if is_shown(packet, self.context.codec.canonical_name):
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
                if end < math.inf and None not in (packet.pts, packet.dts):
                    in_order &= packet.dts <= packet.pts
            if self._first is None:
                self._first = next(iter(packet.decode()), None)
        return pts, keyframes, in_order and None not in pts and 0 < len(pts) == len(set(pts))

    def _seconds(self, pts, zero=None):
        time_base, zero = self.stream.time_base, pts[0] if zero is None else zero
        return [(p - zero) * time_base.numerator / time_base.denominator for p in pts]

    def _located(self, pts, keyframes):
        """The result of `_probe_all` for frames with these pts."""
        number = {p: i for i, p in enumerate(pts)}
        start = max((p for p in keyframes if p <= pts[0]), default=None) if self.part else None
        keyframes = sorted(number[p] for p in keyframes if p in number)
        return self._seconds(pts), dict(pts=tuple(pts), keyframes=tuple(keyframes),
                                        start_keyframe=start)

    def _shape(self, first):
        """(height, width, rotation) with which a player shows the first frame."""
        quarter_turns = round(first.rotation / 90) % 4
        aspect = self.stream.sample_aspect_ratio or 1  # pixels of DVDs and phones may not be square
        height, width = first.height, max(1, round(first.width * aspect))
        if quarter_turns % 2:
            height, width = width, height
        if height * width > MOST_PIXELS:
            raise DataError(f"{self.path}: damaged, its header claims {width} x {height} pixels "
                            "after scaling")
        return height, width, 90 * quarter_turns

    def read(self, times_or_indices, size=None):
        """Frames as shown, upright: uint8 (T, H, W, 3) RGB; see `read_clip`."""
        info = self.info
        self._start_clock()
        numbers = frame_numbers(info, times_or_indices).tolist()
        frames, wanted = {}, sorted(set(numbers))
        for group in _groups(info, wanted):
            frames |= self._converted(self._packets_from(group[0]), group, size)
            if not frames.keys() >= set(group):  # the seek led past it
                self._rewind()
                frames |= self._converted(self._packets(), group, size)
            if not frames.keys() >= set(group):
                raise DataError(f"{self.path}: damaged, its frame {min(set(group) - set(frames))} "
                                f"of {info.frames} cannot be decoded")
        return np.stack([frames[number] for number in numbers])

    def first_frame(self, size=None):
        """The result of read([0], size)[0], without decoding again what `info` decoded."""
        self.info  # sets self._first, if info was not given
        if self.part or self._first is None:
            return self.read([0], size)[0]
        return self._convert(self._first, size)

    def play(self, size=None):
        """Yield every frame once, in order: uint8 (H, W, 3) RGB, one per entry of info.timestamps.

        No frame is kept, so a video may have any length. size and errors as in `read_clip`.
        """
        frames, number = self.info.frames, 0
        self._start_clock()
        for decoded_number, frame in self._all_frames():
            if decoded_number == number:  # otherwise an earlier frame is missing
                yield self._convert(frame, size)
                number += 1
                self._start_clock()  # the caller's time does not count
        if number < frames:
            raise DataError(f"{self.path}: damaged, only {number} of its {frames} frames "
                            "can be decoded")

    def count(self):
        """Decode all frames; return their number. DataError at the first damaged one."""
        self._start_clock(extra=self.info.duration)  # as long as playback takes
        if self.part:
            return sum(1 for _ in self._all_frames())
        self._rewind()
        return sum(len(packet.decode()) for packet in self._packets())

    def _seek(self, pts):
        """Packets from the last keyframe at or before a pts; None if a seek cannot find it."""
        target = pts
        for _ in range(2):
            try:
                self.container.seek(target, stream=self.stream)
            except (self.error, OverflowError):  # the time is out of range
                return None
            packets = self._packets()
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= pts:
                return itertools.chain([first], packets)
            if first is None or first.dts is None:
                return None
            target = first.dts - 1  # the index uses dts and led to a later keyframe: try before it
        return None

    def _rewind(self):
        # Reopen the file: formats without an index may not be able to seek to the start.
        self.container.close()
        self._open()

    def _packets_from(self, number):
        """Packets from which the frame with this number and all later ones can be decoded."""
        info, packets = self.info, None
        before = bisect.bisect_right(info.keyframes, number)
        key = info.pts[info.keyframes[before - 1]] if before else info.start_keyframe
        if key is not None:
            packets = self._seek(key)
        if packets is None:
            self._rewind()
            packets = self._packets()
        return packets

    def _all_frames(self):
        """Yield (number, frame) for all frames of `info`, in order."""
        numbers = range(self.info.frames)
        decoded = self._decode(self._packets_from(0), numbers)
        first = next(decoded, None)
        if first is None or first[0] != 0:  # the seek led past it
            self._rewind()
            return self._decode(self._packets(), numbers)
        return itertools.chain([first], decoded)

    def _decode(self, packets, numbers):
        """Yield (number, frame), once, for each of these frame numbers that the packets contain."""
        info, remaining, count = self.info, set(numbers), itertools.count(-self.info.frames_before)
        number_of = {info.pts[number]: number for number in numbers} if info.pts else None
        for packet in packets:
            # Skip unwanted frames on which no other frame depends.
            if number_of and info.codec in CAN_SKIP:
                skip = packet.size and packet.pts is not None and packet.pts not in number_of
                self.context.skip_frame = "NONREF" if skip else "DEFAULT"
            for frame in packet.decode():
                number = number_of.get(frame.pts) if number_of else next(count)
                if number in remaining:
                    remaining.remove(number)
                    yield number, frame
            if not remaining:
                break

    def _converted(self, packets, numbers, size):
        return {number: self._convert(frame, size)
                for number, frame in self._decode(packets, numbers)}

    def _convert(self, frame, size):
        # swscale resizes and converts in one pass, without a full-size RGB frame. It also applies
        # the colour matrix and range of any pixel format. Untagged colours are taken as BT.601.
        height, width = shown_size(self.info, size)
        turns = self.info.rotation // 90
        stored = (width, height) if turns % 2 else (height, width)
        picture = self.converter.reformat(frame, stored[1], stored[0], "rgb24", threads=1)
        return np.rot90(picture.to_ndarray(), turns)


class Bytes:
    """The content of a video file in memory, and its name in messages."""

    def __init__(self, name, content):
        self.name, self.content = name, content

    def __str__(self):
        return self.name


def probe(path):
    """The `VideoInfo` of a file.

    Raises DataError: no such file, not a video, no video stream, first frame damaged, too slow.
    """
    with Video(path) as video:
        return video.info


def read_clip(path, times_or_indices, size=None, info=None):
    """Frames of a video file as shown, upright: uint8 (T, H, W, 3) RGB, in the requested order.

    times_or_indices  (T,) integers: frame numbers in presentation order; or floats: seconds from
            the first frame, for the frame shown at that time. Repeats are allowed
    size    None = as shown; int = pixels of the short side, aspect kept; (H, W) = exactly this
    info    the file's `VideoInfo`, if known: saves reading its packets

    The result equals a selection from decoding the whole file. Raises DataError as `probe` does,
    and for a frame outside the video or damage that prevents decoding a wanted frame.
    """
    with Video(path, info) as video:
        return video.read(times_or_indices, size)


def is_shown(packet, codec):
    """True where a packet holds a frame to show.

    False for the empty packet at the end, for packets that an edit list discards, and for the
    hidden reference frames that VP8 and VP9 store in packets of their own.
    """
    if not packet.size or packet.is_discard:
        return False
    first, last = memoryview(packet)[0], memoryview(packet)[-1]
    if codec == "vp8":  # RFC 6386 Sec. 9.1, "Uncompressed Data Chunk": bit 4 is show_frame
        return bool(first & 0x10)
    if codec == "vp9" and last & 0xE0 != 0xC0:  # else a superframe, which contains one shown frame
        # VP9 specification Sec. 6.2, "Uncompressed header syntax": show_existing_frame and
        # show_frame are bits 3 and 1; in profile 3 (bits 5 and 4 both set), bits 2 and 0.
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


def frame_numbers(info, wanted):
    """Frame numbers or seconds, as in `read_clip` -> (T,) int. DataError if one is outside."""
    wanted = np.atleast_1d(np.asarray(wanted))
    if wanted.dtype.kind not in "iuf" or not wanted.size:
        raise DataError(f"{info.path}: frames must be numbers or seconds, not {wanted.tolist()}")
    in_seconds = wanted.dtype.kind == "f"
    end, unit = (info.duration, " s") if in_seconds else (info.frames, "")
    outside = wanted[~((wanted >= 0) & (wanted < end))]
    if outside.size:
        raise DataError(f"{info.path}: has {info.frames} frames in {info.duration:.3f} s, "
                        f"but the frame at {outside[0]}{unit} was requested (the first is 0)")
    if in_seconds:
        return np.searchsorted(info.timestamps, wanted + TIME_TOLERANCE, side="right") - 1
    return wanted


def _groups(info, wanted):
    """Groups of ascending frame numbers: a new group starts where a seek saves enough decoding."""
    groups, keyframes = [wanted[:1]], info.keyframes
    for previous, number in zip(wanted, wanted[1:]):
        count = bisect.bisect_right(keyframes, number)
        if count and keyframes[count - 1] - previous > WORTH_A_SEEK:
            groups.append([])
        groups[-1].append(number)
    return groups
