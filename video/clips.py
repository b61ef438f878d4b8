"""How one clip is read from a file: which frames, and how they are resized and cropped."""

import functools

import numpy as np
from torchvision.transforms import v2

from video.decoding import open_video
from video.loading import reading_file
from video.moving_shapes import height_width
from video.rows import DataError, check_part
from video.sampling import SAMPLINGS, choose_frames
from video.transforms import TRANSFORMS, crop_frames, draw_with

GREY = [124, 116, 104]  # the mean colour of ImageNet


class Clips:
    """Base class of data sets of files. `prepare` stores the settings; `clip` reads one file.

    video.files.VideoFiles and video.shards.VideoShards add the list of files.
    """

    def prepare(self, frames, size, stride=4, sampling="dense", train=True, seed=0, flip=True,
                transform="plain", area=None, operations=0, magnitude=7, erasing=0.0, views=None,
                frame_rate=25.0):
        """Store the settings. DataError where they are impossible.

        frames       T
        size         int or (H, W), pixels
        stride       frames from one chosen frame to the next, for dense sampling
        sampling     one of SAMPLINGS; "dense" and "segment" are ours, others follow official code
        train        True: window and crop are random, the same crop for all frames; with flip,
                     half of the
                     clips are mirrored. All draws are functions of (seed, index, epoch).
                     False: window and crop are centred, or see `views`
        transform    one of TRANSFORMS; "plain" is ours
        frame_rate   frames per second of folders of pictures, which do not state their rate

        With train=True:
        area         smallest share of a frame that a random crop keeps; None = the transform's own
        operations   RandAugment (arXiv 1909.13719): number of operations, drawn once per clip; 0 =
                     none
        magnitude    strength of RandAugment, 0 to 30
        erasing      probability of random erasing: a box turns grey, the same box in all frames

        With train=False:
        views        (clips, crops): number of clips along time, and of crops of each clip from one
                     end of
                     the longer side to the other. "video" is then uint8 (V, T, H, W, 3) with
                     V = 1 + clips * crops; the centre view is first
        """
        for what, name, known in (("sampling", sampling, SAMPLINGS),
                                  ("transform", transform, TRANSFORMS)):
            if name not in known:
                raise DataError(f"no {what} {name!r}: choose {', '.join(known)}")
        if frames < 1 or stride < 1 or seed < 0:
            raise DataError("clips need frames >= 1, stride >= 1 and seed >= 0, "
                            f"got frames={frames}, stride={stride}, seed={seed}")
        if not 0 < frame_rate < float("inf"):
            raise DataError(f"folders of pictures need frame_rate > 0, got {frame_rate}")
        self.frames, self.size, self.stride = frames, height_width(size), stride
        self.frame_rate = frame_rate
        self.sampling, self.transform, self.area = sampling, transform, area
        self.train, self.seed, self.flip, self.views = train, seed, flip, views
        self.before_crop = v2.RandAugment(operations, magnitude) if operations else None
        self.after_crop = v2.RandomErasing(erasing, value=GREY) if erasing else None

    def clip(self, path, key, part=None):
        """The clip of one file: uint8 (T, H, W, 3); with `views` uint8 (V, T, H, W, 3).

        path  of the file or folder of pictures, or a `video.decoding.Bytes`
        key   integers that seed the random draws of training; None for evaluation
        part  `video.decoding.Part`: all frames lie in it; None = the whole video
        """
        rng = None if key is None else np.random.default_rng(key)
        clips, crops = self.views if self.views and rng is None else (0, 0)
        with reading_file(path), open_video(path, None, part, self.frame_rate) as file:
            info = file.info
            check_part(part, info)
            choose = functools.partial(choose_frames, self.sampling, info.frames, self.frames,
                                       self.stride, fps=info.fps)
            numbers = [choose(rng=rng)] + [choose(view=(clip, clips)) for clip in range(clips)]
            frames = file.read(np.concatenate(numbers), self._decoded_size(info, rng))
        first, *others = np.split(frames, 1 + clips)
        if self.before_crop and rng:
            first = draw_with(rng, first, self.before_crop)
        first = crop_frames(self.transform, first, self.size, rng, self.flip, self.area)
        if self.after_crop and rng:
            first = draw_with(rng, first, self.after_crop)
        if not clips:
            return first
        return np.stack([first] + [
            crop_frames(self.transform, view, self.size, crop=crop, crops=crops)
            for view in others for crop in range(crops)])

    def _decoded_size(self, info, rng):
        """(H, W) to which the decoder resizes; None = no resizing.

        For "plain" it is the smallest size that covers the crop. Training frames are 8/7 times as
        large, as 256 is for 224, so that a random crop has room.
        """
        if self.transform != "plain":
            return None
        sides = info.height, info.width
        scale = max(wanted / side for wanted, side in zip(self.size, sides))
        scale *= 1 if rng is None else 8 / 7
        return tuple(max(round(side * scale), least) for side, least in zip(sides, self.size))


def one_clip(path, frames, size, sampling="segment", part=None):
    """uint8 (T, H, W, 3): the clip of a file that evaluation with the plain transform reads.

    Frames are resized to cover `size`, then the centre is cropped. "segment" spreads the frames
    over the whole video, or over its `part`.
    """
    clips = Clips()
    clips.prepare(frames, size, sampling=sampling, train=False)
    return clips.clip(path, None, part)
