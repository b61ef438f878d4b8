"""An image ViT, of timm or transformers, as the beginning of a video encoder.

    patch embedding   inflated over the frames of a tubelet, as CLIP's is in UniFormerV2: its
                      numbers in the middle frame, zeros around
    positions         the same in every time step; stretched for frames of another size
    biases            of queries and values; one of the keys moves all scores of a query alike
    last norm         before the head, on the mean of all tokens
    class token, its position, pooler and head   left behind

The names are in the tables of weights/videomae.py, which then reads what is left.
"""

import math
import re

import torch

import mae
from weights.files import WeightsError, listed, say

TUBELET = 2  # frames, as in all of VideoMAE
LEFT = r"(vit\.embeddings\.)?(cls|mask)_token|(vit\.pooler|head|classifier)\..*"


def is_image(tensors):
    """True for the names of an image ViT with a class token."""
    return any(re.fullmatch(r"(vit\.)?(embeddings\.)?cls_token", key) for key in tensors)


def inflate(file, frames, image_size):
    """Turn the tensors of an image ViT into those of a video encoder; says what becomes of them.

    file         weights.videomae.VideoMAEFile; its tensors change, `unused` names what is left
    frames       T; None = 16
    image_size   H = W or (H, W) in pixels; None = as the image model's
    returns      (T, (H, W)) of the position table
    raises       WeightsError: a tensor that this needs is missing or misshapen
    """
    embed, stored = file.spell("encoder.embed.weight"), file.spell("encoder.stored")
    patch = file.shape("encoder.embed.weight", 4)[-1]
    places = file.shape("encoder.stored", 3)[1] - 1
    side = math.isqrt(max(places, 0))
    if side < 1 or side * side != places:
        raise WeightsError(f"{file.name}: wrong shape: {stored} has {places} places besides the "
                           "class token, which is not a square")
    frames, image_size = frames or 16, image_size or side * patch
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    tensors = {key: x for key, x in file.tensors.items() if not re.fullmatch(LEFT, key)}
    file.unused = [key for key in file.tensors if key not in tensors]
    kernel = tensors[embed][:, :, None]                                      # (D, C, 1, p, p)
    tensors[embed] = torch.cat([torch.zeros_like(kernel), kernel], dim=2)    # zero, then as it was
    table = mae.resize_positions(tensors[stored][:, 1:], (1, side, side),
                                 (1, height // patch, width // patch))
    tensors[stored] = table.repeat(1, max(frames // TUBELET, 1), 1)
    for key in [key for key in tensors if key.endswith(("attn.qkv.bias", "attention.key.bias"))]:
        q_bias, _, v_bias = tensors.pop(key).chunk(3)
        if key.endswith("qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            tensors |= {stem + "q_bias": q_bias, stem + "v_bias": v_bias}
    file.tensors = tensors
    say(f"{file.name}: an image ViT. Its patch embedding is inflated over the {TUBELET} frames of "
        "a tubelet and its positions are repeated over time; left behind: "
        f"{listed(file.unused)}, and the biases of keys, which change no output. No accuracy on "
        "videos is to be expected before training")
    return frames, (height, width)
