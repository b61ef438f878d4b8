"""What Hugging Face's libraries write beside weights: config.json and preprocessor_config.json.

They tell what no shape of a tensor does: how many heads, for clips of which length and size, and
how pixels are normalised. Only files that lie under the names of the libraries have these beside
them; of a file of another name nothing is told.
"""

import json
import math
import os

from weights import places
from weights.places import WeightsError

NUMBERS = ("num_attention_heads", "decoder_num_attention_heads", "num_frames", "tubelet_size",
           "patch_size", "num_channels")
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


def beside(source, *names):
    """(path, JSON object) of the first of these files beside the weights, or (None, {})."""
    path = places.split(source)[0] if not isinstance(source, dict) else None
    if path is None or not os.path.isdir(path) and path.name not in places.MODEL_FILES:
        return None, {}
    folder = path if os.path.isdir(path) else path.parent
    path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if path is None:
        return None, {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise strange(path)
    return path, found


def strange(path):
    """The error for what no library writes."""
    return WeightsError(f"{path}: not a configuration as transformers writes it")


def hub_config(source):
    """The configuration, config.json; {} where there is none.

    raises  WeightsError: no JSON object, or a number that is none; also in its parts vision_config
            and text_config
    """
    path, found = beside(source, "config.json")
    parts = [found] + [found[key] for key in ("vision_config", "text_config")
                       if found.get(key) is not None]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("hidden_act", ""), str):
            raise strange(path)
        for key in NUMBERS:
            value = part.get(key)
            if value is not None and not whole(value):
                raise WeightsError(f"{path}: {key} must be a whole number from 1 on, "
                                   f"got {str(value)[:60]!r}")
        if (value := part.get("image_size")) is not None and not sides(value):
            raise WeightsError(f"{path}: image_size must be one or two whole numbers, "
                               f"got {str(value)[:60]!r}")
        eps = part.get("layer_norm_eps", 0)
        if type(eps) not in (int, float) or not 0 <= eps < 1:
            raise WeightsError(f"{path}: layer_norm_eps must be in [0, 1), got {str(eps)[:60]!r}")
    return found


def whole(value):
    """True for a whole number from 1 on."""
    return type(value) is int and value >= 1


def sides(value):
    """[H, W] of one number or two, else None."""
    pair = [value] * 2 if whole(value) else value
    return pair if isinstance(pair, list) and len(pair) == 2 and all(map(whole, pair)) else None


def hub_clips(source):
    """What the folder says of the clips that its model is for: {"num_frames": T, "input_size":
    [H, W]}, as far as it does. WeightsError where its two files differ."""
    config = hub_config(source)
    if "model" in config or "vision_config" in config:  # a run of ours; CLIP, whose shapes tell
        return {}
    found = {"num_frames": config.get("num_frames"), "input_size": sides(config.get("image_size"))}
    path, preparation = beside(source, *PREPROCESSORS)
    key = "crop_size" if preparation.get("do_center_crop", "crop_size" in preparation) else "size"
    size = preparation.get(key)
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")),
                size.get("width", size.get("shortest_edge"))]
    size = sides(size)
    if size and found["input_size"] not in (None, size):
        raise WeightsError(f"{path}: prepares frames of {size[0]} x {size[1]} pixels, and the "
                           "config.json beside it says {} x {}; correct the wrong one"
                           .format(*found["input_size"]))
    found["input_size"] = found["input_size"] or size
    return {key: value for key, value in found.items() if value}


def hub_pixels(source):
    """(mean, std) that normalise pixels in [0, 1], as lists of one number per channel, or None
    where the folder says nothing. WeightsError where it says something else than that."""
    path, told = beside(source, *PREPROCESSORS)
    keys = ("image_mean", "image_std")
    if path is None:  # timm has all in one file
        path, told = beside(source, "config.json")
        told, keys = told.get("pretrained_cfg") or {}, ("mean", "std")
    if not isinstance(told, dict):
        raise strange(path)
    factor = told.get("rescale_factor", 1 / 255)
    if not told.get("do_rescale", True) or told.get("offset") or not (
            isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3)):
        raise WeightsError(f"{path}: its model reads pixels that are not in [0, 1] before they are "
                           "normalised; only those can be read here")
    if not told.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    mean, std = (told.get(key) for key in keys)
    if mean is None and std is None:
        return None
    for value in (mean, std):
        if not isinstance(value, list) or not value or not all(
                type(x) in (int, float) and math.isfinite(x) for x in value):
            raise WeightsError(f"{path}: {keys[0]} and {keys[1]} must be lists of numbers, got "
                               f"{str(value)[:60]!r}")
    if len(mean) != len(std) or min(std) <= 0:
        raise WeightsError(f"{path}: {keys[0]} and {keys[1]} must be as long as each other, and "
                           "deviations above 0")
    return mean, std
