"""Videos stored as folders of numbered pictures, as in TSN, Jester, Something-Something V1.

    folder --> PictureVideo --> .info .read .play .count, as video.decoding.Video

1. The number at the end of a name orders the pictures: img_00001.jpg, 00001.jpg, frame_000123.png.
   Numbers may start anywhere and have any number of digits. Steps between numbers must be equal
   (0, 10, 20); a gap is an error.
2. If the names before the number differ, only pictures called img, image or frame are used.
   Optical flow (flow_x, flow_y) is thus left out. It is an error if none or several of these names
   exist.
3. Picture n, counted from 0, is shown at n / rate seconds. The folder does not state the rate.
4. Each picture is read as a video file of one frame, so rotation and colours are right. All
   pictures must have the size of the first.
"""

import os
import re

import numpy as np

from video.decoding import Video, VideoInfo, frame_numbers
from video.rows import DataError

NUMBERED = re.compile(r"(|[^.].*?)([0-9]+)\.(?:jpe?g|png|bmp|webp|tiff?|ppm)", re.IGNORECASE)
PICTURES = ("img", "image", "frame")  # preferred if a folder holds pictures of several names


def is_frames_folder(folder):
    """True where a folder contains numbered pictures that form a video. Only names are read.

    Two or more names must be equal up to the number. At least half of the numbers from the first
    to the last must exist, counted in the smallest step. Photos with large gaps are thus excluded.
    False where there is no such folder.
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
    """[(number, name), ...] of the pictures that form a video, ascending; may be empty.

    names   file names; names of other files are ignored
    folder  for messages
    raises  DataError where the pictures or their order are unclear: pictures of several kinds, a
            duplicate number, a gap
    """
    stems = _by_stem(names)
    if len(stems) > 1:
        frame_stems = [stem for stem in stems if stem.lower().rstrip("_- .") in PICTURES]
        if len(frame_stems) != 1:
            examples = ", ".join(f"{min(group)[1]}" for _, group in sorted(stems.items())[:3])
            raise DataError(f"{folder}: holds pictures of {len(stems)} kinds ({examples}): keep "
                            "one kind per folder, or name the frames img_00001.jpg and so on")
        stems = {frame_stems[0]: stems[frame_stems[0]]}
    pictures = sorted(numbered for group in stems.values() for numbered in group)
    steps = [after[0] - before[0] for before, after in zip(pictures, pictures[1:])]
    for (number, name), step in zip(pictures, steps):
        if step == 0:
            raise DataError(f"{folder}: has two pictures of number {number}, for example {name}")
        if step != min(steps):
            raise DataError(f"{folder}: picture {number + min(steps)} is missing after {name}")
    return pictures


def _by_stem(names):
    """{name before the number: [(number, name), ...]}"""
    stems = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match:
            stems.setdefault(match[1], []).append((int(match[2]), name))
    return stems


class PictureVideo:
    """A folder of numbered pictures with the methods of video.decoding.Video.

    info  its `VideoInfo`, if known; with a part, that of the part
    part  a video.decoding.Part; None = all. Frame numbers count the pictures from 0, whatever
          numbers their names have
    rate  frames per second

    Any error inside becomes a DataError that names the folder or the picture.
    """

    def __init__(self, path, info=None, part=None, rate=25.0):
        if not rate > 0:
            raise DataError(f"{path}: {rate} frames per second: give a rate above 0")
        self.path, self._info, self.part, self.rate = str(path), info, part, rate

    def __enter__(self):
        try:
            pictures = picture_numbers(os.listdir(self.path), self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not pictures:
            raise DataError(f"{self.path}: holds no numbered pictures, such as img_00001.jpg")
        first, last = 0, len(pictures)
        if self.part:
            seconds = [i / self.rate for i in range(last)]
            first, last = self.part.numbers(self.path, seconds, last / self.rate)
        self.pictures = [os.path.join(self.path, name) for _, name in pictures[first:last]]
        return self

    def __exit__(self, kind, error, trace):
        pass

    @property
    def info(self):
        """`VideoInfo` of the folder or part. Only the first picture is opened."""
        if self._info is None:
            with Video(self.pictures[0]) as picture:
                first, n = picture.info, len(self.pictures)
            self._info = VideoInfo(self.path, first.width, first.height, n, n / self.rate,
                                   self.rate, first.codec, first.rotation,
                                   tuple(i / self.rate for i in range(n)), (), tuple(range(n)))
        return self._info

    def read(self, times_or_indices, size=None):
        """Frames as shown, upright: uint8 (T, H, W, 3) RGB; see video.decoding.read_clip."""
        numbers = frame_numbers(self.info, times_or_indices).tolist()
        frames = {number: self._picture(number, size) for number in sorted(set(numbers))}
        return np.stack([frames[number] for number in numbers])

    def play(self, size=None):
        """Yield every frame once, in order: uint8 (H, W, 3) RGB."""
        for number in range(self.info.frames):
            yield self._picture(number, size)

    def count(self):
        """Decode all pictures; return their number. DataError at the first damaged one."""
        return sum(1 for _ in self.play())

    def _picture(self, number, size):
        path, info = self.pictures[number], self.info
        with Video(path) as picture:
            shape = picture.info
            if (shape.height, shape.width) != (info.height, info.width):
                raise DataError(f"{path}: has {shape.width} x {shape.height} pixels, but the first "
                                f"picture of its folder has {info.width} x {info.height}")
            return picture.first_frame(size)
