"""The rows of annotations: `Row`, one annotation of one clip, and `Listing`, the rows of a source.

Readers of formats (video/formats.py) create rows. video/annotations.py locates their files.
video/files.py turns rows into items of a data set.
"""

import bisect
import math
import os
from typing import NamedTuple

from engine.errors import UserError

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
IMAGE_SUFFIXES = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
LIKELY_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")  # preferred where a list gives only an id

TIME_TOLERANCE = 1e-6  # seconds; rounding may place 0.1 just before the frame shown at 1/10 s


class DataError(UserError):
    """The user's data or request is wrong. One line: the fault, the file, what to do."""


class Part(NamedTuple):
    """A part of a video, half-open [start, end)."""

    start: float
    end: float  # math.inf = to the end
    in_frames: bool = False  # True: frame numbers in presentation order, from 0 on;
    #                          False: seconds from the first shown frame

    def __str__(self):
        what = "frames" if self.in_frames else "seconds"
        return f"{what} {self.start:g} to {'the end' if self.end == math.inf else f'{self.end:g}'}"

    def numbers(self, path, timestamps, duration):
        """(first, last): the frame numbers of this part, half-open.

        A part in seconds contains the frames whose timestamps lie in it. DataError if there are
        none.

        path        for messages
        timestamps  (frames,) float, seconds, of the whole video
        duration    seconds, of the whole video; for messages
        """
        if not 0 <= self.start < self.end:
            raise DataError(f"{path}: cannot read {self}: a part must start at 0 or later "
                            "and end after its start")
        if self.in_frames:
            first, last = (math.ceil(min(x, len(timestamps))) for x in self[:2])
        else:
            first, last = (bisect.bisect_left(timestamps, x - TIME_TOLERANCE) for x in self[:2])
        if first == last:
            raise DataError(f"{path}: no frame in {self}; the video has {len(timestamps)} frames "
                            f"in {duration:.3f} s")
        return first, last


def check_part(part, info):
    """DataError if much of a part lies after the video's end: a tenth of it plus 1 s or 1 frame.

    The list probably uses another unit then. info is the `VideoInfo` of the part, which stops at
    the end of the video.
    """
    if part and part.end < math.inf:
        wanted, available = part.end - part.start, info.frames if part.in_frames else info.duration
        if wanted - available > 1 + 0.1 * wanted:
            raise DataError(f"{info.path}: of {part} only {available:.4g} exist; seconds need the "
                            "columns start and end, frame numbers start_frame and end_frame")


class Row(NamedTuple):
    """One annotation of one clip.

    Before files are located, `path` is what the list gives: a path, or a tuple of possible paths,
    most likely first. An entry of the tuple may be (path, part); that part then holds for this
    file only. After that, `path` is the path of a file or of a folder of numbered pictures.
    """

    path: str | tuple
    label: str | tuple | dict | None = None  # as written; a tuple if clips may have several
    #                                          labels; {question: label} for several questions
    caption: str | None = None
    split: str | None = None  # "train" or "val", if the source gives it; "val" includes test
    question: str | None = None
    answer: str | None = None  # the right answer in words
    candidates: tuple | None = None  # possible answers in words, including the right one
    part: Part | None = None  # None = the whole video
    frames_part: Part | None = None  # the same part in frame numbers, for a folder of pictures

    @property
    def clip(self):
        """(path, part or None): equal for all rows of the same clip."""
        return self.path, self.part


class Listing(NamedTuple):
    """The result of `annotations.read`: all rows of a source."""

    kind: str  # the format, in words for the user
    rows: list  # of Row
    classes: list | dict | None = None  # names in the official order, if the source has one;
    #                                     {question: names} for several questions
    unused: tuple = ()  # columns, keys and files that are not used
    notes: tuple = ()  # messages for the user
    hint: str = ""  # message: another folder that has files with these names


def is_media(name):
    """True for the name of a video or picture, judged by its suffix alone."""
    suffix = os.path.splitext(str(name).strip().strip('"'))[1].lower()
    return suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES
