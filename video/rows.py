"""What a list says about a clip: `Row`, and `Found`, the rows of one source.

Readers of formats (video/formats.py) make them, video/annotations.py finds their files, and
data.VideoFiles turns them into items.
"""

import bisect
import math
import os
from typing import NamedTuple

from engine.errors import UserError

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
IMAGE_SUFFIXES = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
LIKELY_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")  # preferred where a list tells an id alone

CLOSE = 1e-6  # seconds: 0.1 may lie a rounding error before the frame at 1/10 s


class DataError(UserError):
    """The user's data or request is wrong: one line with the fault, the file, and what to do."""


class Part(NamedTuple):
    """A part of a video, half-open [start, end)."""

    start: float
    end: float  # math.inf = to the end
    in_frames: bool = False  # True: frame numbers, in the order of presentation, the first is 0;
    #                          False: seconds from the first shown frame

    def __str__(self):
        what = "frames" if self.in_frames else "seconds"
        return f"{what} {self.start:g} to {'the end' if self.end == math.inf else f'{self.end:g}'}"

    def numbers(self, path, timestamps, duration):
        """(first, last): the frames of a video that lie in this part, half-open.

        A frame lies in a part in seconds if it appears in it. DataError where no frame does.

        path        for messages
        timestamps  (frames,) float, of the whole video; duration of it, seconds
        """
        if not 0 <= self.start < self.end:
            raise DataError(f"{path}: cannot take {self}: a part starts at 0 or later and ends "
                            "after its start")
        if self.in_frames:
            first, last = (math.ceil(min(x, len(timestamps))) for x in self[:2])
        else:
            first, last = (bisect.bisect_left(timestamps, x - CLOSE) for x in self[:2])
        if first == last:
            raise DataError(f"{path}: no frame in {self}; the video has {len(timestamps)} frames "
                            f"in {duration:.3f} s")
        return first, last


def check_part(part, info):
    """DataError where more than a tenth of a part lacks: its list may count otherwise.

    info  `VideoInfo` of the part, without what lies behind the end of the video
    """
    if part and part.end < math.inf:
        wanted, there = part.end - part.start, info.frames if part.in_frames else info.duration
        if wanted - there > 1 + 0.1 * wanted:
            raise DataError(f"{info.path}: of {part} only {there:.4g} are there; times in seconds "
                            "are called start and end, numbers of frames start_frame and end_frame")


class Row(NamedTuple):
    """One thing that a source says about one clip.

    Before the files are looked for, `path` is what the list says: a path, or a tuple of possible
    ones, likeliest first. One of these may be (path, part): the part holds for that file alone.
    Afterwards it is the path of a file, or of a folder of numbered pictures.
    """

    path: str | tuple
    label: str | tuple | dict | None = None  # as written; () or more where a clip may have
    #                                          several; {question: label} of several questions
    caption: str | None = None
    split: str | None = None  # "train" or "val", where the source tells; "val" also means test
    question: str | None = None
    answer: str | None = None  # the right answer in words
    candidates: tuple | None = None  # of answers in words, among them the right one
    part: Part | None = None  # None = the whole video
    frames_part: Part | None = None  # the same part in frames, for a folder of pictures

    @property
    def clip(self):
        """What tells clips apart: (path, part or None)."""
        return self.path, self.part


class Found(NamedTuple):
    """What `annotations.read` makes of a source."""

    kind: str  # in words, for the user
    rows: list  # of Row
    classes: list | dict | None = None  # names in the official order, where the source fixes one;
    #                                     {question: names} of several questions
    unused: tuple = ()  # columns, keys and files that nothing was made of
    notes: tuple = ()  # sentences for the user
    hint: str = ""  # where files of these names lie, if not where they are looked for


def is_media(name):
    """True for the name of a video or picture, judged by its suffix."""
    suffix = os.path.splitext(str(name).strip().strip('"'))[1].lower()
    return suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES
