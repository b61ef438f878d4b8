"""A video that is a folder of numbered pictures, as TSN, Jester and Something-Something V1 keep it.

    folder --> PictureVideo --> .info .read .play .count, as video.decoding.Video

1. The number at the end of a name is the picture's place: img_00001.jpg, 00001.jpg,
   frame_000123.png. Numbers may start anywhere and have any number of digits. They may go up in
   steps (0, 10, 20), all of one size; a gap in them is an error.
2. Where the names before the number differ, the pictures called img, image or frame are taken: the
   flow_x and flow_y beside them are not pictures to look at. Without these it is an error.
3. Picture n is shown at n / rate seconds: the folder does not say at which rate it was written.
4. Each picture is read as a video file of one frame, so that rotation and colours are right.
   All have the size of the first.
"""

import os
import re

import numpy as np

from video.decoding import Video, VideoInfo, frame_numbers
from video.rows import DataError

NUMBERED = re.compile(r"(|[^.].*?)([0-9]+)\.(?:jpe?g|png|bmp|webp|tiff?|ppm)", re.IGNORECASE)
PICTURES = ("img", "image", "frame")  # names that are taken where there are others


def is_frames_folder(folder):
    """Whether a folder directly holds two or more numbered pictures whose names begin alike.

    Their numbers follow each other: at least half of those from the first to the last are there.
    Photos of a class, which have numbers with large gaps, are no frames. One look at the names; no
    picture is opened. False where there is no such folder.
    """
    try:
        stems = _by_stem(os.listdir(folder))
    except OSError:
        return False
    return any(_is_dense(sorted(number for number, _ in numbered)) for numbered in stems.values())


def _is_dense(numbers):
    steps = [after - before for before, after in zip(numbers, numbers[1:])]
    return bool(steps) and 2 * len(numbers) * max(min(steps), 1) > numbers[-1] - numbers[0]


def picture_numbers(names, folder="pictures"):
    """[(number, name), ...] of the pictures among file names that make a video, ascending.

    Other files are left out; the list may be empty. Raises DataError, which names the folder, where
    it is not clear which pictures or in which order: several kinds, a number twice, a gap.
    """
    stems = _by_stem(names)
    if len(stems) > 1:
        taken = [stem for stem in stems if stem.lower().rstrip("_- .") in PICTURES]
        if len(taken) != 1:
            some = ", ".join(f"{min(found)[1]}" for _, found in sorted(stems.items())[:3])
            raise DataError(f"{folder}: holds pictures of {len(stems)} kinds ({some}): keep one "
                            "kind in a folder, or name the frames img_00001.jpg and so on")
        stems = {taken[0]: stems[taken[0]]}
    found = sorted(numbered for some in stems.values() for numbered in some)
    steps = [after[0] - before[0] for before, after in zip(found, found[1:])]
    for (number, name), step in zip(found, steps):
        if step == 0:
            raise DataError(f"{folder}: has two pictures of number {number}, one is {name}")
        if step != min(steps):
            raise DataError(f"{folder}: picture {number + min(steps)} is missing after {name}")
    return found


def _by_stem(names):
    """{what stands before the number: [(number, name), ...]}"""
    stems = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match:
            stems.setdefault(match[1], []).append((int(match[2]), name))
    return stems


class PictureVideo:
    """A folder of numbered pictures with the methods of video.decoding.Video.

    info  its `VideoInfo`, if known; with a part, that of the part
    part  a video.decoding.Part; None = all. Frame numbers are places in order, the first is 0,
          whatever number its picture has
    rate  frames a second

    Any error inside becomes a DataError that names the folder or the picture.
    """

    def __init__(self, path, info=None, part=None, rate=25.0):
        if not rate > 0:
            raise DataError(f"{path}: {rate} frames a second: give a rate above 0")
        self.path, self._info, self.part, self.rate = str(path), info, part, rate

    def __enter__(self):
        try:
            found = picture_numbers(os.listdir(self.path), self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not found:
            raise DataError(f"{self.path}: holds no numbered pictures, such as img_00001.jpg")
        first, last = 0, len(found)
        if self.part:
            seconds = [i / self.rate for i in range(last)]
            first, last = self.part.numbers(self.path, seconds, last / self.rate)
        self.pictures = [os.path.join(self.path, name) for _, name in found[first:last]]
        return self

    def __exit__(self, kind, error, trace):
        pass

    @property
    def info(self):
        """Its `VideoInfo`. Only the first picture is opened."""
        if self._info is None:
            with Video(self.pictures[0]) as picture:
                first, n = picture.info, len(self.pictures)
            self._info = VideoInfo(self.path, first.width, first.height, n, n / self.rate,
                                   self.rate, first.codec, first.rotation,
                                   tuple(i / self.rate for i in range(n)), (), tuple(range(n)))
        return self._info

    def read(self, times_or_indices, size=None):
        """Frames as shown, upright: uint8 (T, H, W, 3) RGB; as video.decoding.read_clip."""
        numbers = frame_numbers(self.info, times_or_indices).tolist()
        frames = {number: self._picture(number, size) for number in sorted(set(numbers))}
        return np.stack([frames[number] for number in numbers])

    def play(self, size=None):
        """Yield every frame once, in order: uint8 (H, W, 3) RGB."""
        for number in range(self.info.frames):
            yield self._picture(number, size)

    def count(self):
        """Decode everything; the number of frames. DataError at the first damaged one."""
        return sum(1 for _ in self.play())

    def _picture(self, number, size):
        path, info = self.pictures[number], self.info
        with Video(path) as picture:
            found = picture.info
            if (found.height, found.width) != (info.height, info.width):
                raise DataError(f"{path}: has {found.width} x {found.height} pixels, but the first "
                                f"picture of its folder has {info.width} x {info.height}")
            return picture.first_frame(size)
