"""Resizing, cropping and normalising the frames of a clip.

    (T, H, W, 3) uint8 --> crop_frames --> (T, h, w, 3) uint8 --> batch --> normalise --> model

`plain` is ours. Each of the others reproduces the official code of one model family, down to the
interpolation kernel and the rounding of crop positions. All frames of a clip get the same
transform.
"""

import functools
import math

import numpy as np
import torch
from torchvision.transforms import v2


def _as_planes(video):
    """uint8 (T, H, W, 3) array -> uint8 (T, 3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)


def resize(video, size, how):
    """Resize uint8 (T, H, W, 3) to (h, w) pixels.

    how  "area" (bilinear) and "bicubic" (Pillow's kernel) are antialiased; "bilinear" and "nearest"
         are not, as in OpenCV
    """
    if tuple(video.shape[1:3]) == tuple(size):
        return video
    planes = _as_planes(video)
    if how in ("area", "bicubic"):
        kernel = v2.InterpolationMode.BICUBIC if how == "bicubic" else v2.InterpolationMode.BILINEAR
        planes = v2.functional.resize(planes, list(size), kernel, antialias=True)
    else:
        options = {} if how == "nearest" else {"align_corners": False}
        planes = torch.nn.functional.interpolate(planes.float(), size=tuple(size), mode=how,
                                                 **options)
        planes = planes.round().clamp(0, 255).byte()
    return planes.permute(0, 2, 3, 1).numpy()


def _cover(video, size, how):
    """Resize just enough to cover (h, w), keeping the aspect; for a square: the short side."""
    (H, W), (h, w) = video.shape[1:3], size
    covering = (h, max(w, int(W * h / H))) if h * W >= w * H else (max(h, int(H * w / W)), w)
    return resize(video, covering, how)


def _window(video, size, crop=0, crops=1, rounding=int):
    """Crop (h, w): the centre, or crop number `crop` of `crops` from one end to the other."""
    share = crop / (crops - 1) if crops > 1 else 0.5
    top, left = (rounding(share * (side - wanted))
                 for side, wanted in zip(video.shape[1:3], size))
    return video[:, top:top + size[0], left:left + size[1]]


def _random_window(video, size, rng):
    top, left = (int(rng.integers(side - wanted + 1))
                 for side, wanted in zip(video.shape[1:3], size))
    return video[:, top:top + size[0], left:left + size[1]]


def _random_area(video, size, rng, area, flip, how="area"):
    """A random crop, resized to `size`, the same for all frames.

    The crop has a share of the area from `area` to 1. Its aspect is 3/4 to 4/3 times that of
    `size` (Going Deeper with Convolutions, Sec. 6, "Training Methodology"). With flip, it is
    mirrored with probability 1/2.
    """
    kernel = v2.InterpolationMode.BICUBIC if how == "bicubic" else v2.InterpolationMode.BILINEAR
    aspect = size[1] / size[0]
    crop = v2.RandomResizedCrop(size, scale=(area, 1), ratio=(3 / 4 * aspect, 4 / 3 * aspect),
                                interpolation=kernel, antialias=True)
    return draw_with(rng, video, crop, v2.RandomHorizontalFlip(0.5 if flip else 0))


def draw_with(rng, video, *transforms):
    """Apply torchvision's random transforms to uint8 (T, H, W, 3), one draw for all frames.

    rng  numpy Generator that seeds the draws; torch's global generator does not change
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reset the generator of the accelerator.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return v2.Compose(transforms)(_as_planes(video)).permute(0, 2, 3, 1).numpy()


def _plain(video, size, rng, flip, area, crop, crops):
    if rng is None:
        return _window(video, size, crop, crops)
    return _random_area(video, size, rng, area or 0.5, flip)


def _multi_scale(video, size, rng, flip, area, crop, crops):
    # TSN's crop, which VideoMAE's pretraining uses. Each side is one of four fractions of the
    # largest box of this aspect. The two fractions are at most one step apart in the list. The crop
    # lies at one of 13 positions. The official code never mirrors, although the paper says that it
    # does for Kinetics.
    if rng is None:
        return _window(_cover(video, size, "area"), size, crop, crops)
    H, W = video.shape[1:3]
    box = (H, H * size[1] / size[0]) if H * size[1] <= W * size[0] else (W * size[0] / size[1], W)
    heights, widths = ([wanted if abs(side - wanted) < 3 else side for side in
                        (int(full * scale) for scale in (1, 0.875, 0.75, 0.66))]
                       for full, wanted in zip(box, size))
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    down, right = (H - h) // 4, (W - w) // 4
    positions = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2),
                 (1, 1), (1, 3), (3, 1), (3, 3)]
    row, column = positions[rng.integers(len(positions))]
    top, left = row * down, column * right
    return resize(video[:, top:top + h, left:left + w], size, "area")


def _fine_tuning(video, size, rng, flip, area, crop, crops, rounding=int):
    if rng is None:
        return _window(_cover(video, size, "bilinear"), size, crop, crops, rounding)
    return _random_area(video, size, rng, area or 0.08, flip)


def _squash(video, size, rng, flip, area, crop, crops):
    wide = resize(video, tuple(side * 8 // 7 for side in size), "bilinear")  # 256 for 224
    if rng is None:
        return _window(wide, size, crop, crops, round)
    return _random_window(wide, size, rng)


def _demo(video, size, rng, flip, area, crop, crops):
    resized = _cover(video, [side * 8 // 7 for side in size], "nearest")
    return _window(resized, size, crop, crops, round)


def _clip(video, size, rng, flip, area, crop, crops):
    if rng is None:
        return _window(_cover(video, size, "bicubic"), size, crop, crops, round)
    return _random_area(video, size, rng, area or 0.9, False, "bicubic")


def _square(video, size, rng, flip, area, crop, crops):
    return resize(video, size, "bilinear")


TRANSFORMS = {  # name -> (video, size, rng, flip, area, crop, crops) -> video; rng=None: evaluation
    "plain": _plain,  # ours: resized during decoding; random crops of 50-100 % of the area
    "videomae-pretrain": _multi_scale,
    "videomae": _fine_tuning,  # RandAugment and random erasing: see video/clips.py
    "uniformerv2": functools.partial(_fine_tuning, rounding=math.ceil),
    "internvideo": _squash,  # InternVideo-MM, downstream: changes the aspect
    "internvideo-demo": _demo,
    "clip": _clip,  # CLIP's evaluation; in training, InternVideo-MM's image-text batches
    "viclip": _square,
}


def crop_frames(name, video, size, rng=None, flip=True, area=None, crop=0, crops=1):
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3): resized and cropped by one of TRANSFORMS.

    size   (h, w) in pixels
    rng    numpy Generator for training; None for evaluation: crop number `crop` of `crops`, from
           one end of the longer side to the other
    flip   in training: mirror half of the clips, if the transform mirrors at all
    area   in training: smallest share of a frame that a random crop keeps; None = the transform's
           own
    """
    return TRANSFORMS[name](video, size, rng, flip, area, crop, crops)


def normalise(video, mean, std):
    """(B, T, H, W, 3), uint8 or float in [0, 255] -> float32 (B, 3, T, H, W).

    (video / 255 - mean) / std, on the device of the video. Batches are sent to the device as
    uint8, a quarter of the size of float32.

    mean, std  three numbers each, for red, green and blue, in units of [0, 1]; see the model's own
    """
    mean, std = (torch.tensor(numbers, device=video.device) for numbers in (mean, std))
    return (video / 255).sub_(mean).div_(std).permute(0, 4, 1, 2, 3)
