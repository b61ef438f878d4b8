"""Read the configurations of Hugging Face folders: config.json and preprocessor_config.json.

They contain what shapes of tensors cannot show: the number of heads, the length and size of clips,
and the normalisation of pixels. They are read only for a folder, or for a file with one of the
names that the libraries write. A file with another name may belong to another model.
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
    """(path, JSON object) of the first of these files that lies beside the weights, or (None, {}).
    """
    path = places.split(source)[0] if not isinstance(source, dict) else None
    if path is None or not os.path.isdir(path) and path.name not in places.MODEL_FILES:
        return None, {}
    folder = path if os.path.isdir(path) else path.parent
    path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if path is None:
        return None, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise malformed(path)
    return path, content


def malformed(path):
    """The error for a file that is not a configuration."""
    return WeightsError(f"{path}: not a configuration as transformers writes it")


def hub_config(source):
    """The content of config.json; {} if there is none.

    raises  WeightsError: not a JSON object, or a field of the wrong type. The parts vision_config
            and text_config are checked, too
    """
    path, config = beside(source, "config.json")
    parts = [config] + [config[key] for key in ("vision_config", "text_config")
                        if config.get(key) is not None]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("hidden_act", ""), str):
            raise malformed(path)
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
    return config


def whole(value):
    """True for a whole number from 1 on."""
    return type(value) is int and value >= 1


def sides(value):
    """[H, W] of one number or two, else None."""
    pair = [value] * 2 if whole(value) else value
    return pair if isinstance(pair, list) and len(pair) == 2 and all(map(whole, pair)) else None


def hub_clips(source):
    """The clips of the folder's model: {"num_frames": T, "input_size": [H, W]}, without what the
    folder does not contain. WeightsError if its two files disagree."""
    config = hub_config(source)
    if "model" in config or "vision_config" in config:  # a run of ours; CLIP: shapes show its size
        return {}
    clips = {"num_frames": config.get("num_frames"), "input_size": sides(config.get("image_size"))}
    path, preprocessor = beside(source, *PREPROCESSORS)
    key = "crop_size" if preprocessor.get(
        "do_center_crop", "crop_size" in preprocessor) else "size"
    size = preprocessor.get(key)
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")),
                size.get("width", size.get("shortest_edge"))]
    size = sides(size)
    if size and clips["input_size"] not in (None, size):
        raise WeightsError(f"{path}: prepares frames of {size[0]} x {size[1]} pixels, and the "
                           "config.json beside it says {} x {}; correct the wrong one"
                           .format(*clips["input_size"]))
    clips["input_size"] = clips["input_size"] or size
    return {key: value for key, value in clips.items() if value}


def hub_pixels(source):
    """(mean, std) that normalise pixels in [0, 1], as lists with one number per channel. None if
    the folder does not contain them. WeightsError if it describes another kind of normalisation."""
    path, settings = beside(source, *PREPROCESSORS)
    keys = ("image_mean", "image_std")
    if path is None:  # timm keeps everything in one file
        path, settings = beside(source, "config.json")
        settings, keys = settings.get("pretrained_cfg") or {}, ("mean", "std")
    if not isinstance(settings, dict):
        raise malformed(path)
    factor = settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_rescale", True) or settings.get("offset") or not (
            isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3)):
        raise WeightsError(f"{path}: its model normalises pixels that are not in [0, 1]; only "
                           "models for pixels in [0, 1] can be read here")
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    mean, std = (settings.get(key) for key in keys)
    if mean is None and std is None:
        return None
    for value in (mean, std):
        if not isinstance(value, list) or not value or not all(
                type(x) in (int, float) and math.isfinite(x) for x in value):
            raise WeightsError(f"{path}: {keys[0]} and {keys[1]} must be lists of numbers, got "
                               f"{str(value)[:60]!r}")
    if len(mean) != len(std) or min(std) <= 0:
        raise WeightsError(f"{path}: {keys[0]} and {keys[1]} must have the same length, and "
                           "deviations must be above 0")
    return mean, std
