"""Weights of neural networks: read and written strictly, from safe files.

files.py      read, fill a model, write; it knows no model
places.py     where files of weights lie, whole, in parts or in folders
hub.py        what Hugging Face writes beside its weights
pickles.py    take tensors out of a pickle without running it
runs.py       from a run of ours to its model
official.py   one reader of official files, and how a key map is written down
videomae.py, uniformerv2.py, clip.py, caption_decoder.py   the key map of each family
image_vit.py  an image model as the beginning of a video encoder
families.py   which models there are, and which family a file belongs to
encoders.py   `load_encoder`: either encoder out of whatever holds it
heads.py      an encoder with a head for other classes
tokenizer.py  text to token numbers and back
merging.py    the average of a model and of the CLIP that it grew from
__main__.py   `python -m weights FILE`

The modules of the families import the networks, so nothing here imports them.
"""

from weights.families import FAMILIES, MODELS, class_of, describe  # noqa: F401
from weights.files import (  # noqa: F401
    AVERAGES, DAMAGE, ENVELOPES, PREFIXES, Rule, WeightsError, checksum, export, fill, fingerprint,
    listed, load, name_of, part, read, save, settle, translate, unwrap, write_aside, write_torch)
from weights.hub import hub_clips, hub_config, hub_pixels  # noqa: F401
from weights.runs import build, load_run, rebuild  # noqa: F401
