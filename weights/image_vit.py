"""An image ViT, of timm or transformers, as the beginning of a video encoder.

Its tensors are brought under the names of a fine-tuned VideoMAE, which weights/videomae.py reads:

    patch embedding   inflated over the frames of a tubelet, as CLIP's is in UniFormerV2: its
                      numbers in the middle frame, zeros around
    positions         the same in every time step; stretched for frames of another size
    biases            of queries and values; one of the keys moves all scores of a query alike
    last norm         before the head, on the mean of all tokens
    class token, its position, pooler and head   left behind
"""

import re

import mae
import uniformerv2
from weights.files import WeightsError, listed, say

# transformers' names that VideoMAE has not: ours are those of timm.
HUGGING_FACE = ((r"^vit\.", "videomae."), (r"^(embeddings|encoder|layernorm|pooler)\.",
                                           r"videomae.\1."),
                (r"embeddings\.cls_token$", "cls_token"),
                (r"embeddings\.position_embeddings$", "pos_embed"), (r"^videomae\.(?=cls|pos)", ""),
                (r"^videomae\.layernorm\.", "fc_norm."))
TIMM = ((r"^norm\.", "fc_norm."), (r"\.ls([12])\.gamma$", r".gamma_\1"))
LEFT = r"cls_token|(videomae\.embeddings\.)?mask_token|(videomae\.pooler|head|classifier)\..*"


def is_image(tensors):
    """True for the names of an image ViT with a class token."""
    return any(re.fullmatch(r"(vit\.)?(embeddings\.)?cls_token", key) for key in tensors)


def inflated(tensors, name, *, tubelet, frames, image_size):
    """(tensors under VideoMAE's names, T, (H, W)), which says what became of them.

    tubelet      frames of a tubelet
    frames       T; None = 16
    image_size   H = W or (H, W) in pixels; None = as the image model's
    raises       WeightsError: a tensor that all this needs is missing or misshapen
    """
    kind = HUGGING_FACE if any("embeddings." in key for key in tensors) else TIMM
    found = {respelled(key, kind): value for key, value in tensors.items()}
    left = [key for key in tensors if re.fullmatch(LEFT, respelled(key, kind))]
    for key in left:
        del found[respelled(key, kind)]
    kernels = [key for key in found if re.search(r"patch_embed.*\.proj(ection)?\.weight$", key)]
    for key, dimensions in (*((key, 4) for key in kernels), ("pos_embed", 3)):
        if key not in found or found[key].ndim != dimensions:
            raise WeightsError(f"{name}: {key} is " + (
                f"{tuple(found[key].shape)}" if key in found else "missing")
                + f"; an image ViT has one of {dimensions} dimensions")
    for key in [key for key in found if key.endswith(("attn.qkv.bias", "attention.key.bias"))]:
        bias = found.pop(key)
        if key.endswith("qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            found[stem + "q_bias"], _, found[stem + "v_bias"] = bias.chunk(3)
    kernel = found[kernels[0]]
    found[kernels[0]] = uniformerv2.inflate(kernel, tubelet)
    table, patch = found["pos_embed"][:, 1:], kernel.shape[-1]
    side = round(table.shape[1]**0.5)
    if side * side != table.shape[1] or not side:
        raise WeightsError(f"{name}: pos_embed has {table.shape[1]} places besides the class "
                           "token, which is not a square")
    image_size = image_size or side * patch
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    frames, grid = frames or 16, (1, height // patch, width // patch)
    table = mae.resize_positions(table, (1, side, side), grid)
    found["pos_embed"] = table.repeat(1, max(frames // tubelet, 1), 1)
    say(f"{name}: an image ViT. Its patch embedding is inflated over the {tubelet} frames of a "
        "tubelet and its positions are repeated over time; left behind: "
        f"{listed(left)}, and the biases of keys, which change no output. No accuracy on videos is "
        "to be expected before training")
    return found, frames, (height, width)


def respelled(key, table):
    """The name that a fine-tuned VideoMAE has for it."""
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key
