"""Read and write weights so that nothing is lost, nothing is left over and nothing is guessed.

Why: the costliest bug around pretrained video models is weights that silently do not load. The
official loaders pass strict=False and print what they dropped; a network that is half random then
runs without complaint. Here a file either fills a model completely or is refused with the list of
names that are missing, unknown or of another shape.

    file or dict --read--> {official name: tensor} --translate--> {our name: tensor} --fill--> model

The idea, in steps:
1. `read` opens safetensors and torch files (never executing code from them), unwraps the usual
   envelopes ("model", "module", "state_dict", "model_state") and widens half precision.
2. A component owns its key map: a list of `Rule`s, in network order, each naming one of our
   tensors and the official tensor(s) that it is made of. Reading the list teaches both layouts.
3. `fill` applies the rules and demands the balance.
4. `save` writes our own runs: model.safetensors, which carries its configuration in its header,
   and the same configuration as config.json for people and other programs.

>>> import tempfile, pathlib
>>> model = torch.nn.Linear(2, 3)
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> save(folder, model, {"model": "Linear", "inputs": 2, "outputs": 3})
>>> tensors, config = read(folder)
>>> sorted(tensors), config["outputs"]
(['bias', 'weight'], 3)
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ENVELOPES = ("model", "module", "state_dict", "model_state")
PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Hugging Face remote code, compile


class WeightsError(ValueError):
    """A file of weights cannot be used; the message is one line and says why."""


@dataclass(frozen=True)
class Rule:
    """Our tensor `ours` is the official tensor `official`; several are stacked along dim 0.

    convert  official -> ours, for layouts that differ; None = as it is
    """

    ours: str
    official: str | tuple
    convert: object = None

    @property
    def sources(self):
        return (self.official,) if isinstance(self.official, str) else self.official


def read(source):
    """Tensors and configuration of a file, a run folder or a dict of tensors.

    source   path of a .safetensors or torch file; a folder with model.safetensors or
             pytorch_model.bin; or {name: tensor}
    returns  ({name: tensor}, {configuration}); the latter is empty for files that are not ours.
             float16 and bfloat16 tensors come back as float32, which is exact.
    raises   WeightsError: no such file, not a file of weights, or one that needs to run code
    """
    if isinstance(source, dict):
        return unwrap(source, "the dict of weights"), {}
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin")
                 if (path / name).exists()]
        if not found:
            raise WeightsError(f"{path}: this folder holds no model.safetensors; give a run's "
                               "folder or a file of weights")
        path = found[0]
    if not path.exists():
        raise WeightsError(f"{path}: no such file of weights")
    config = {}
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                config = json.loads((file.metadata() or {}).get("config", "{}"))
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if head[:2] != b"PK" and head[:1] != b"\x80":  # neither of torch's two formats
            raise WeightsError(f"{path}: not a file of weights") from None
        raise WeightsError(f"{path}: a pickle that holds more than tensors, so opening it could run "
                           "code; save its state_dict as safetensors first") from None
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError,
            KeyError, AttributeError, TypeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "unreadable"
        raise WeightsError(f"{path}: not a readable file of weights ({reason})") from None
    return unwrap(tensors, str(path)), config


def unwrap(tensors, name):
    """{name: tensor} without envelopes and without a prefix that every name shares."""
    for _ in range(len(ENVELOPES)):
        inner = [key for key in ENVELOPES if isinstance(tensors, dict)
                 and isinstance(tensors.get(key), dict)]
        if not inner:
            break
        tensors = tensors[inner[0]]
    if not isinstance(tensors, dict) or not tensors:
        raise WeightsError(f"{name}: holds no tensors")
    others = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(f"{name}: expected tensors only, found {listed(others)}")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix):]: value for key, value in tensors.items()}
    return {key: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
            for key, value in tensors.items()}


def part(tensors, config, name):
    """Of what `read` gave, the component `name`, where a run saved several under such prefixes: its
    tensors without the prefix, and its configuration. Anything else comes back as it is."""
    if not isinstance(config.get(name), dict):
        return tensors, config
    prefix = name + "."
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}, config[name]


def translate(tensors, rules):
    """Official tensors under our names.

    returns ({our name: tensor}, {our name: official name(s) for messages}, [missing official],
             [official names that no rule mentions])
    """
    ours, spoken, missing, used = {}, {}, [], set()
    for rule in rules:
        used.update(rule.sources)
        absent = [key for key in rule.sources if key not in tensors]
        missing += absent
        spoken[rule.ours] = " + ".join(rule.sources)
        if not absent:
            pieces = [tensors[key] for key in rule.sources]
            tensor = torch.cat(pieces) if len({p.shape[1:] for p in pieces}) == 1 and \
                len(pieces) > 1 else pieces[0]
            ours[rule.ours] = rule.convert(tensor) if rule.convert else tensor
    return ours, spoken, missing, [key for key in tensors if key not in used]


def fill(model, tensors, rules=None, *, name="weights"):
    """Copy tensors into the model; every parameter and saved buffer is filled or nothing is.

    rules   the component's key map; None = the names are ours already
    raises  WeightsError listing exactly the missing, unknown and misshapen tensors, by the names
            that the file uses
    """
    own = model.state_dict()
    rules = rules if rules is not None else [Rule(key, key) for key in own]
    ours, spoken, missing, unknown = translate(tensors, rules)
    shapes = [f"{spoken[key]} is {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
              for key, tensor in ours.items() if key in own and tensor.shape != own[key].shape]
    unfilled = [key for key in own if key not in spoken]
    if unfilled:  # our own mistake, not the file's
        raise AssertionError(f"no rule fills {unfilled}")
    complaints = [f"{what}: {listed(keys)}" for what, keys in
                  (("missing", missing), ("unknown", unknown), ("wrong shape", shapes)) if keys]
    if complaints:
        raise WeightsError(f"{name} does not fit {type(model).__name__}: " + "; ".join(complaints))
    model.load_state_dict(ours, strict=True)
    return model


def listed(names):
    """All the names, on one line."""
    return ", ".join(str(name) for name in names)


def commonest(values):
    """The value that most tensors agree on, so that one misshapen tensor is named alone."""
    return Counter(values).most_common(1)[0][0]


def depth_of(tensors, prefix):
    """Number of blocks: one more than the largest index i in names that start with prefix + i."""
    found = [int(key[len(prefix):].split(".")[0]) for key in tensors
             if key.startswith(prefix) and key[len(prefix):].split(".")[0].isdigit()]
    return max(found) + 1 if found else 0


def shape_of(tensors, key, ndim, name="weights"):
    """Shape of a tensor that sizes are read from; WeightsError when it is missing or misshapen."""
    if key not in tensors:
        raise WeightsError(f"{name}: missing: {key}")
    if tensors[key].ndim != ndim:
        raise WeightsError(f"{name}: wrong shape: {key} has {tensors[key].ndim} dimensions, not {ndim}")
    return tuple(tensors[key].shape)


def fingerprint(source):
    """The first 16 digits of the SHA-256 of a file of weights, or of a run's model."""
    path = Path(source)
    if path.is_dir():
        path = next(path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists())
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def write_aside(path, write):
    """Call write(temporary path), then put the result in place of `path` in one step, so that a
    reader, or a power cut, meets the old file or the new one and never half of either."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    write(aside)
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def save(folder, model, config):
    """Write model.safetensors and config.json. config: plain JSON values, with "model" = the class."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    text = json.dumps(config, indent=1)
    write_aside(folder / "model.safetensors",
                lambda path: save_file(tensors, path, metadata={"config": text}))
    write_aside(folder / "config.json", lambda path: Path(path).write_text(text + "\n"))
