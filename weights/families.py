"""Which models there are, and which family a file of official weights belongs to.

The tables hold names. The modules behind them are imported when they are needed, so that reading a
file of weights imports no network.
"""

import importlib
import re

# "model" of a configuration -> its module, and the key under which the family's own code
# looks for the tensors in a .pth file (None: it looks for none).
MODELS = {
    "VideoMAE": ("mae", "model"),
    "VideoClassifier": ("mae", "module"),
    "UniFormerV2": ("uniformerv2", "model_state"),
    "VideoCLIP": ("clip_video", None),
    "CaptionDecoder": ("caption_decoder", None),
    "VideoText": ("caption_decoder", "state_dict"),
    "DividedVideoMAE": ("variants.divided_attention", None),
    "DividedVideoClassifier": ("variants.divided_attention", None),
}

# (family, regular expressions of which each must fit some name, models that load it): the first row
# that fits is the family.
FAMILIES = (
    ("VideoMAE, pretraining, of Hugging Face",
     (r"^videomae\.", r"^decoder\.decoder_layers\."), ("VideoMAE",)),
    ("VideoMAE, classifier, of Hugging Face", (r"^videomae\.",), ("VideoClassifier",)),
    ("VideoMAE, encoder, of Hugging Face",
     (r"^embeddings\.patch_embeddings\.", r"^encoder\.layer\."), ("VideoClassifier",)),
    ("VideoMAE, pretraining",
     (r"^encoder\.patch_embed\.", r"^decoder\.blocks\."), ("VideoMAE",)),
    ("VideoMAE, classifier",
     (r"^(backbone\.)?patch_embed\.proj\.", r"^(backbone\.)?blocks\.\d+\."), ("VideoClassifier",)),
    ("ViCLIP", (r"^vision_encoder\.", r"^text_encoder\."), ("VideoCLIP",)),
    ("CLIP, of Hugging Face", (r"^vision_model\.", r"^text_model\."), ("VideoCLIP",)),
    ("InternVideo-MM with its caption decoder",
     (r"^clip\.visual\.", r"^caption_decoder\."), ("VideoCLIP", "CaptionDecoder")),
    ("InternVideo-MM", (r"^(clip\.)?visual\.transformer\.dec\.",), ("VideoCLIP",)),
    ("CLIP, of OpenAI",
     (r"^visual\.transformer\.resblocks\.", r"^token_embedding\."), ("VideoCLIP",)),
    ("InternVideo's caption decoder",
     (r"^(caption_decoder\.)?multimodal_layers\.",), ("CaptionDecoder",)),
    ("UniFormerV2",
     (r"^(backbone\.)?transformer\.resblocks\.", r"^(backbone\.)?conv1\."), ("UniFormerV2",)),
)


def describe(tensors):
    """(family, names of the models that load it) of {official name: tensor}, or (None, ())."""
    for family, signs, loaders in FAMILIES:
        if all(any(re.search(sign, key) for key in tensors) for sign in signs):
            return family, loaders
    return None, ()


def class_of(model):
    """The class of a model by its name in MODELS."""
    return getattr(importlib.import_module(MODELS[model][0]), model)
