"""The models of this project, and the families of official files that they load.

The tables contain names only. Modules are imported when they are needed, so reading a file of
weights imports no network.
"""

import importlib
import re

from weights.files import WeightsError, listed, print_once

# "model" in a configuration -> its module, and the key of a .pth file under which the official code
# expects the tensors (None: it expects them without a key).
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

# (family, regular expressions, models that load it). A row fits if each expression matches some
# name; the first row that fits is the family.
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
    """(family, names of the models that load it) for {official name: tensor}, or (None, ())."""
    row = recognised(tensors)
    if row is None and len(inner := network_prefixes(tensors)) == 1:
        row = recognised(under_prefix(tensors, inner[0]))
    return (row[0], row[2]) if row else (None, ())


def recognised(tensors):
    """The row of FAMILIES that fits these names, or None."""
    return next((row for row in FAMILIES if all(
        any(re.search(pattern, key) for key in tensors) for pattern in row[1])), None)


def under_prefix(tensors, prefix):
    """The tensors whose names begin with a prefix, without that prefix."""
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def network_prefixes(tensors):
    """Prefixes of names, of at most three parts, under which there is a network of a family.

    Lightning, for example, writes names with the prefix `net.` or `model.encoder.`. No prefix in
    the result begins with another one.
    """
    prefixes = dict.fromkeys(".".join(key.split(".")[:n]) + "." for n in (1, 2, 3)
                             for key in tensors if key.count(".") >= n)
    kept = []
    for prefix in prefixes:
        if not prefix.startswith(tuple(kept)) and recognised(under_prefix(tensors, prefix)):
            kept.append(prefix)
    return kept


def without_prefix(tensors, name):
    """The tensors of the network in a file, without the prefix that another module added to them.

    Tensors that are left out are named in a printed line. A file in which no network is recognised
    is returned unchanged.

    raises  WeightsError: the file contains several networks, such as a student and its teacher
    """
    if recognised(tensors):
        return tensors
    prefixes = network_prefixes(tensors)
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        choices = ", ".join(f"{name}::{prefix[:-1]}" for prefix in prefixes)
        raise WeightsError(f"{name}: holds {len(prefixes)} networks; choose one: {choices}")
    others = dict.fromkeys(key.split(".")[0] for key in tensors if not key.startswith(prefixes[0]))
    if others:
        print_once(f"{name}: the network under {prefixes[0]!r} is read; not read: {listed(others)}")
    return under_prefix(tensors, prefixes[0])


def class_of(model):
    """The class of a model by its name in MODELS."""
    # "" here; "mypackage." in a copy made by tools/borrow.py
    package = __name__.removesuffix("weights.families")
    return getattr(importlib.import_module(package + MODELS[model][0]), model)
