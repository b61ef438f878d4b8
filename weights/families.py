"""Which models there are, and which family a file of official weights belongs to.

The tables hold names. The modules behind them are imported when they are needed, so that reading a
file of weights imports no network.
"""

import importlib
import re

from weights.files import WeightsError, listed, say

# "model" of a configuration -> its module, and the key under which the family's own code
# looks for the tensors in a .pth file (None: it looks for none).
MODELS = {
    "VideoMAE": ("mae", "model"),
    "VideoClassifier": ("mae", "module"),
    "UniFormerV2": ("uniformerv2", "model_state"),
    "VideoCLIP": ("clip_video", None),
    "CaptionDecoder": ("caption_decoder", None),
    "VideoText": ("caption_decoder", "state_dict"),
    "AttentiveProbe": ("tasks.probes", None),
    "DividedVideoMAE": ("variants.divided_attention", None),
    "DividedVideoClassifier": ("variants.divided_attention", None),
}

# (family, regular expressions of which each must fit some name, models that load it): the first row
# that fits is the family.
FAMILIES = (
    ("VideoMAE, pretraining, of Hugging Face",
     (r"^videomae\.", r"^decoder\.decoder_layers\."), ("VideoMAE",)),
    ("VideoMAE, classifier, of Hugging Face", (r"^videomae\.",), ("VideoClassifier",)),
    ("ViT of images, of Hugging Face",
     (r"^(vit\.)?embeddings\.cls_token$", r"^(vit\.)?encoder\.layer\."), ("VideoClassifier",)),
    ("ViT of images, of timm",
     (r"^(backbone\.)?cls_token$", r"^(backbone\.)?patch_embed\.proj\.",
      r"^(backbone\.)?blocks\.\d+\."), ("VideoClassifier",)),
    ("VideoMAE, encoder, of Hugging Face",
     (r"^embeddings\.patch_embeddings\.", r"^encoder\.layer\."), ("VideoClassifier",)),
    ("VideoMAE, pretraining",
     (r"^encoder\.patch_embed\.", r"^decoder\.blocks\."), ("VideoMAE",)),
    ("VideoMAE, classifier",
     (r"^(backbone\.)?patch_embed\.proj\.", r"^(backbone\.)?blocks\.\d+\."), ("VideoClassifier",)),
    ("VideoMAE, classifier, of mmaction2",
     (r"^backbone\.patch_embed\.projection\.", r"^backbone\.blocks\.\d+\.mlp\.layers\."),
     ("VideoClassifier",)),
    ("ViCLIP", (r"^vision_encoder\.", r"^text_encoder\."), ("VideoCLIP",)),
    ("CLIP, of Hugging Face", (r"^vision_model\.", r"^text_model\."), ("VideoCLIP",)),
    ("InternVideo-MM with its caption decoder",
     (r"^clip\.visual\.", r"^caption_decoder\."), ("VideoCLIP", "CaptionDecoder")),
    ("InternVideo-MM", (r"^(clip\.)?visual\.transformer\.dec\.",), ("VideoCLIP",)),
    ("CLIP, of OpenAI",
     (r"^visual\.transformer\.resblocks\.", r"^token_embedding\."), ("VideoCLIP",)),
    ("InternVideo's caption decoder",
     (r"^(caption_decoder\.)?multimodal_layers\.",), ("CaptionDecoder",)),
    ("UniFormerV2, of mmaction2",
     (r"^(backbone\.)?transformer\.resblocks\.", r"^(backbone\.)?transformer\.norm\."),
     ("UniFormerV2",)),
    ("UniFormerV2",
     (r"^(backbone\.)?transformer\.resblocks\.", r"^(backbone\.)?conv1\.",
      r"^(backbone\.)?transformer\.dec\."), ("UniFormerV2",)),
)


def describe(tensors):
    """(family, names of the models that load it) of {official name: tensor}, or (None, ())."""
    row = recognised(tensors)
    if row is None and len(inner := inside(tensors)) == 1:
        row = recognised(below(tensors, inner[0]))
    return (row[0], row[2]) if row else (None, ())


def recognised(tensors):
    """The row of FAMILIES that fits these names, or None."""
    return next((row for row in FAMILIES if all(
        any(re.search(sign, key) for key in tensors) for sign in row[1])), None)


def below(tensors, prefix):
    """The tensors under a prefix, without it."""
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def inside(tensors):
    """Prefixes of at most three parts under which there is a network of a family, as Lightning
    writes what a module calls `net` or `model.encoder`. None of them lies inside another."""
    prefixes = dict.fromkeys(".".join(key.split(".")[:n]) + "." for n in (1, 2, 3)
                             for key in tensors if key.count(".") >= n)
    found = []
    for prefix in prefixes:
        if not prefix.startswith(tuple(found)) and recognised(below(tensors, prefix)):
            found.append(prefix)
    return found


def bare(tensors, name):
    """The tensors of the one network in a file, without the prefix that somebody's own module has
    put before its names, which is said; as they are where they need none.

    raises  WeightsError: several networks, as a student and its teacher
    """
    if recognised(tensors):
        return tensors
    found = inside(tensors)
    if not found:
        return tensors
    if len(found) > 1:
        ways = ", ".join(f"{name}::{prefix[:-1]}" for prefix in found)
        raise WeightsError(f"{name}: holds {len(found)} networks; choose one: {ways}")
    others = dict.fromkeys(key.split(".")[0] for key in tensors if not key.startswith(found[0]))
    if others:
        say(f"{name}: the network under {found[0]!r} is read; left aside: {listed(others)}")
    return below(tensors, found[0])


def class_of(model):
    """The class of a model by its name in MODELS."""
    package = __name__.removesuffix("weights.families")  # "", or that of a copy: tools/borrow.py
    return getattr(importlib.import_module(package + MODELS[model][0]), model)
