"""Read and write the weights of networks, strictly and without running code from files.

files.py      read a file, fill a model, write a file; knows no model
places.py     finds files of weights: whole, in parts, in folders
hub.py        reads the configurations of Hugging Face folders
pickles.py    takes tensors out of a pickle without running it
runs.py       loads the model of a run
official.py   reads official files, and defines the form of key maps
videomae.py, uniformerv2.py, clip.py, caption_decoder.py   the key map of each family
image_vit.py  turns an image model into the start of a video encoder
families.py   lists the models, and recognises the family of a file
encoders.py   `load_encoder`: an encoder from any file that contains one
heads.py      gives an encoder a head for other classes
tokenizer.py  converts text to token numbers and back
merging.py    averages a model with the CLIP that it grew from
__main__.py   `python -m weights FILE`

The modules of the families import the networks. This file therefore does not import them.
"""

from weights.families import FAMILIES, MODELS, class_of, describe  # noqa: F401
from weights.files import (  # noqa: F401
    AVERAGES, DAMAGE, ENVELOPES, PREFIXES, Rule, WeightsError, checksum, export, fill, fingerprint,
    listed, load, name_of, part, read, save, settle, translate, unwrap, write_atomically,
    write_torch)
from weights.hub import hub_clips, hub_config, hub_pixels  # noqa: F401
from weights.runs import build, load_run, rebuild  # noqa: F401
