"""Turn an image ViT of timm or transformers into the start of a video encoder.

    patch embedding   inflated over the frames of a tubelet: the image weights in the middle frame,
                      zeros in the others
    positions         repeated in every time step; interpolated for frames of another size
    biases            those of queries and values are kept. A bias of keys adds the same number to
                      all scores of a query, so it is dropped
    last norm         moved before the head, on the mean of all tokens
    class token, its position, pooler and head   dropped

The key maps are tables in weights/videomae.py, which then loads the converted tensors.
"""

import math
import re

import torch

import mae
from weights.files import WeightsError, listed, print_once

TUBELET = 2  # frames, as in all VideoMAE models
DROPPED = r"(vit\.embeddings\.)?(cls|mask)_token|(vit\.pooler|head|classifier)\..*"


def is_image(tensors):
    """True if the tensors have the names of an image ViT with a class token."""
    return any(re.fullmatch(r"(vit\.)?(embeddings\.)?cls_token", key) for key in tensors)


def inflate(file, frames, image_size):
    """Convert the tensors of an image ViT to those of a video encoder. Prints what it did.

    file         weights.videomae.VideoMAEFile. Its `tensors` are replaced; its `unused` lists the
                 dropped tensors
    frames       T; None = 16
    image_size   H = W or (H, W) in pixels; None = that of the image model
    returns      (T, (H, W)) of the new position table
    raises       WeightsError: a necessary tensor is missing or has a wrong shape
    """
    embed, stored = file.spell("encoder.embed.weight"), file.spell("encoder.stored")
    patch = file.shape("encoder.embed.weight", 4)[-1]
    positions = file.shape("encoder.stored", 3)[1] - 1
    side = math.isqrt(max(positions, 0))
    if side < 1 or side * side != positions:
        raise WeightsError(f"{file.name}: wrong shape: {stored} has {positions} positions besides "
                           "the class token, which is not a square number")
    frames, image_size = frames or 16, image_size or side * patch
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    tensors = {key: x for key, x in file.tensors.items() if not re.fullmatch(DROPPED, key)}
    file.unused = [key for key in file.tensors if key not in tensors]
    kernel = tensors[embed][:, :, None]                                      # (D, C, 1, p, p)
    tensors[embed] = torch.cat([torch.zeros_like(kernel), kernel], dim=2)    # (D, C, 2, p, p)
    table = mae.resize_positions(tensors[stored][:, 1:], (1, side, side),
                                 (1, height // patch, width // patch))
    tensors[stored] = table.repeat(1, max(frames // TUBELET, 1), 1)
    for key in [key for key in tensors if key.endswith(("attn.qkv.bias", "attention.key.bias"))]:
        q_bias, _, v_bias = tensors.pop(key).chunk(3)
        if key.endswith("qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            tensors |= {stem + "q_bias": q_bias, stem + "v_bias": v_bias}
    file.tensors = tensors
    print_once(
        f"{file.name}: an image ViT. Its patch embedding is inflated over the {TUBELET} frames of "
        "a tubelet and its positions are repeated over time; not used: "
        f"{listed(file.unused)}, and the biases of keys, which change no output. Do not expect "
        "accuracy on videos before training")
    return frames, (height, width)
