"""The recipe by which a clip is taken of a file."""

import functools

import numpy as np
from torchvision.transforms import v2

from video.annotations import DataError
from video.decoding import Video
from video.loading import in_hand
from video.moving_shapes import height_width
from video.sampling import SAMPLINGS, choose_frames
from video.transforms import TRANSFORMS, crop_frames, draw_with

GREY = [124, 116, 104]  # the mean colour of ImageNet


class Clips:
    """What to take of each file; where files come from is for VideoFiles and VideoShards to say."""

    def prepare(self, frames, size, stride=4, sampling="dense", train=True, seed=0, flip=True, transform="plain",
                area=None, operations=0, magnitude=7, erasing=0.0, views=None):
        """Keep the recipe; DataError where it is impossible. Arguments as VideoFiles."""
        for what, name, known in (("sampling", sampling, SAMPLINGS), ("transform", transform, TRANSFORMS)):
            if name not in known:
                raise DataError(f"no {what} {name!r}: choose {', '.join(known)}")
        if frames < 1 or stride < 1 or seed < 0:
            raise DataError("clips need frames >= 1, stride >= 1 and seed >= 0, "
                            f"got frames={frames}, stride={stride}, seed={seed}")
        self.size, self.frames, self.stride, self.sampling = height_width(size), frames, stride, sampling
        self.transform, self.train, self.seed, self.flip, self.views = transform, train, seed, flip, views
        self.area, self.before = area, v2.RandAugment(operations, magnitude) if operations else None
        self.after = v2.RandomErasing(erasing, value=GREY) if erasing else None

    def clip(self, path, key):
        """The clip that training (key: numbers to seed it) or evaluation (None) takes of one file."""
        rng = None if key is None else np.random.default_rng(key)
        clips, crops = self.views if self.views and rng is None else (0, 0)
        with in_hand(path), Video(path) as file:
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
            first = draw_with(rng, first, self.before)
        first = crop_frames(self.transform, first, self.size, rng, self.flip, self.area)
        if self.after and rng:
            first = draw_with(rng, first, self.after)
        return first if not clips else np.stack([first] + [
            crop_frames(self.transform, part, self.size, crop=crop, crops=crops)
            for part in others for crop in range(crops)])


def one_clip(path, frames, size):
    """(T, H, W, 3) uint8: what evaluation with the plain transform sees of a file, `frames` spread over the video,
    resized to cover `size` and cut out of the middle."""
    clips = Clips()
    clips.prepare(frames, size, sampling="segment", train=False)
    return clips.clip(path, None)
