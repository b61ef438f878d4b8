"""Read and write weights strictly: a file fills a model completely, or it is refused.

Weights that silently do not load are the most expensive bug around pretrained video models. The
official loaders pass strict=False and print what they dropped; the network is then half random and
still runs. Here a file that does not fit is refused with the names of all tensors that are missing,
unknown or of another shape.

    file or dict --read--> {official name: tensor} --translate--> {our name: tensor} --fill--> model

1. `read` opens safetensors and torch files and never runs code from them. It removes the usual
   dictionaries around the tensors (ENVELOPES) and widens half precision. `places.py` knows where
   files lie; `pickles.py` takes tensors out of files that hold more.
2. A `Rule` names one of our tensors and the official tensors that it is made of. Each family of
   official files has a key map, a list of rules: `official.py`.
3. `fill` applies the rules. `export` applies them backwards, for other people's code.
4. `save` writes our own runs: model.safetensors with the configuration and a checksum in its
   header, and the same configuration as config.json.
5. A damaged file is refused: by that checksum, or by those of a torch file (`load`). A file is
   written in full or not at all (`write_aside`).

>>> import tempfile, pathlib
>>> model = torch.nn.Linear(2, 3)
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> save(folder, model, {"model": "Linear", "inputs": 2, "outputs": 3})
>>> tensors, config = read(folder)
>>> sorted(tensors), config["outputs"]
(['bias', 'weight'], 3)
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weights import places
from weights.pickles import is_program, take_out
from weights.places import WeightsError

# The keys of the dictionaries around the tensors; those of averages over the steps of a training.
# mmengine's "ema_state_dict" is none: it swaps the two, so its "state_dict" is the average.
ENVELOPES = ("model", "module", "state_dict", "model_state", "model_state_dict", "net")
AVERAGES = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Hugging Face remote code, compile

# What torch, safetensors, zipfile and pickle raise at a damaged file.
DAMAGE = (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError,
          OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
          AssertionError, struct.error, zlib.error)


# ------------------------------------------------------------------------------------------------
# Read


def read(source):
    """Tensors and configuration of a file, a folder or a dict of tensors.

    source   path of a .safetensors or torch file, or of a folder; with ::NAME behind it for a part
             (see places.py, unwrap); or {name: tensor}
    returns  ({name: tensor}, {configuration}); the latter is empty for files that are not ours.
             float16 and bfloat16 tensors come back as float32, which is exact.
    raises   WeightsError: no such file, not a file of weights, or one that needs to run code
    """
    if isinstance(source, dict):
        return unwrap(source, name_of(source)), {}
    path, wanted = places.find(source), places.split(source)[1]
    if not places.is_index(path):
        tensors, config = open_file(path)
        return unwrap(tensors, str(source), wanted), config
    tensors = {}
    for place, names in places.parts(path).items():
        held = open_file(place)[0]
        if lacking := [name for name in names if name not in held]:
            raise WeightsError(f"{place}: lacks what {path.name} says: {listed(lacking)}")
        tensors |= {name: held[name] for name in names}
    return unwrap(tensors, str(source), wanted), {}


def open_file(path):
    """(what one file holds, its configuration or {}). WeightsError."""
    config = {}
    try:
        places.check_kind(path)
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            tensors, config = read_safetensors(path)
        elif head[:2] == b"PK" and is_program(path):
            tensors = take_out(path)[0]
        else:
            tensors = load(path)
    except WeightsError:
        raise
    except pickle.UnpicklingError:
        if head[:2] != b"PK" and head[:1] != b"\x80":  # neither of torch's two formats
            raise WeightsError(f"{path}: not a file of weights") from None
        raise WeightsError(
            f"{path}: a pickle that holds more than tensors, so opening it could run code; take "
            f"the tensors out with: python -m weights {path} --convert NEW.safetensors") from None
    except DAMAGE as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "unreadable"
        raise WeightsError(f"{path}: not a readable file of weights ({reason})") from None
    return tensors, config


def read_safetensors(path):
    """({name: tensor}, {configuration}). ValueError where the checksum is wrong."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        notes = file.metadata() or {}
    text = notes.get("config", "")
    if "checksum" in notes and notes["checksum"] != checksum(tensors, text):
        raise ValueError("damaged: its checksum is wrong")
    config = json.loads(notes.get("config", "{}"))
    if not isinstance(config, dict):
        raise ValueError("its configuration is no JSON object")
    return tensors, config


def load(path):
    """What a torch file holds, on the CPU; nothing of it is executed.

    The file is an archive with a CRC-32 of every tensor. torch writes these and never compares
    them; here a flipped bit is an error.

    raises  whatever a damaged file makes torch or zipfile raise; ValueError for a wrong checksum
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            raise ValueError(f"damaged: the checksum of {wrong} is wrong")
    with open(path, "rb") as file:  # given a path, torch goes by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def checksum(tensors, text):
    """CRC-32 of {name: tensor} and a text, as eight hexadecimal digits."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def unwrap(tensors, name, part=""):
    """{name: tensor} without envelopes and without a prefix that every name shares.

    part  "" or what was asked for: the key of an envelope, or a prefix of the tensors' names. Of a
          file that holds weights and their average, the weights are taken else, which is said
    """
    for _ in range(len(ENVELOPES)):
        inner = [key for key in (part, *ENVELOPES, *AVERAGES) if isinstance(tensors, dict)
                 and isinstance(tensors.get(key), dict)]
        if not inner:
            break
        if inner[0] != part and inner[0] in ENVELOPES and inner[-1] in AVERAGES:
            say(f"{name}: holds {inner[0]!r} and an average over its training, {inner[-1]!r}; "
                f"{inner[0]!r} is taken; for the other write {name}::{inner[-1]}")
        check_whole(tensors, inner[0], name)
        tensors, part = tensors[inner[0]], "" if inner[0] == part else part
    if not isinstance(tensors, dict) or not tensors:
        raise WeightsError(f"{name}: holds no tensors")
    if part:
        tensors = within(tensors, part, name)
    others = [str(key) for key, value in tensors.items()
              if not isinstance(value, torch.Tensor) or not isinstance(key, str)]
    if others:
        raise WeightsError(f"{name}: expected tensors by name, found {listed(others)}")
    odd = [key for key, value in tensors.items()
           if value.layout != torch.strided or value.is_quantized or value.is_meta]
    if odd:
        raise WeightsError(f"{name}: sparse, quantised, or without their numbers: {listed(odd)}")
    while prefix := next((prefix for prefix in PREFIXES
                          if all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key[len(prefix):]: value for key, value in tensors.items()}
    return {key: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
            for key, value in tensors.items()}


def within(tensors, part, name):
    """The tensors whose names begin with `part` and a dot, without it. WeightsError: none."""
    prefix = part + "."
    found = {key[len(prefix):]: value for key, value in tensors.items()
             if str(key).startswith(prefix)}
    if not found:
        tops = dict.fromkeys(str(key).partition(".")[0] for key in tensors)
        raise WeightsError(f"{name}: has no part {part!r}; what it has begins with {listed(tops)}")
    return found


def check_whole(content, key, name):
    """WeightsError for states that DeepSpeed's ZeRO-3 has left without their numbers."""
    module = content[key]
    empty = [value for value in module.values()
             if isinstance(value, torch.Tensor) and not value.numel()]
    if "param_shapes" in content and (empty or not module):
        raise places.cut_up(name)


@functools.cache
def say(line):
    """Print a line once, however often a file is read."""
    print(line)


def part(tensors, config, name):
    """Of what `read` gave, the component `name`, where a run saved several under such prefixes.

    Returns its tensors without the prefix and its configuration; anything else as it is.
    """
    if not isinstance(config.get(name), dict):
        return tensors, config
    prefix = name + "."
    return {key[len(prefix):]: value for key, value in tensors.items()
            if key.startswith(prefix)}, config[name]


def name_of(source):
    """What messages call a source of weights."""
    return "the dict of weights" if isinstance(source, dict) else str(source)


def listed(names):
    """All the names, on one line."""
    return ", ".join(str(name) for name in names)


def fingerprint(source):
    """The first 16 digits of the SHA-256 of a file of weights, or of all files of a model."""
    digest = hashlib.sha256()
    for path in places.files(source):
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    digest.update(places.split(source)[1].encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Fill a model


@dataclass(frozen=True)
class Rule:
    """Our tensor `ours` is the official tensor `official`; several are stacked along dim 0.

    convert  official -> ours, for layouts that differ; None = as it is
    back     ours -> official, likewise
    """

    ours: str
    official: str | tuple
    convert: object = None
    back: object = None

    @property
    def sources(self):
        return (self.official,) if isinstance(self.official, str) else self.official


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

    rules   a key map; None = the names are ours already
    raises  WeightsError listing exactly the missing, unknown and misshapen tensors, by the names
            that the file uses
    """
    own = model.state_dict()
    rules = rules if rules is not None else [Rule(key, key) for key in own]
    ours, spoken, missing, unknown = translate(tensors, rules)
    shapes = [f"{spoken[key]} is {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
              for key, tensor in ours.items() if key in own and tensor.shape != own[key].shape]
    kinds = [f"{spoken[key]} is {tensor.dtype} instead of {own[key].dtype}"
             for key, tensor in ours.items() if key in own and other_kind(tensor, own[key])]
    unfilled = [key for key in own if key not in spoken]
    if unfilled:  # our own error, not the file's
        raise AssertionError(f"no rule fills {unfilled}")
    complaints = [f"{what}: {listed(keys)}" for what, keys in
                  (("missing", missing), ("unknown", unknown), ("wrong shape", shapes),
                   ("wrong kind", kinds)) if keys]
    if complaints:
        raise WeightsError(f"{name} does not fit {type(model).__name__}: " + "; ".join(complaints))
    model.load_state_dict(ours, strict=True)
    return model


def other_kind(tensor, own):
    """True where copying would round or drop numbers in silence. Whole numbers may be floats: a
    counter that was cast together with the weights."""
    return tensor.is_floating_point() != own.is_floating_point() and not (
        tensor.is_floating_point() and torch.equal(tensor, tensor.round()))


def export(model, rules):
    """The way back: {official name: tensor} of a model, by a key map that covers it."""
    own, found = model.state_dict(), {}
    assert {rule.ours for rule in rules} == set(own), "the key map leaves something out"
    for rule in rules:
        tensor = own[rule.ours].detach().cpu()
        assert (rule.convert is None) == (rule.back is None), f"no way back for {rule.ours}"
        tensor = rule.back(tensor) if rule.back else tensor
        pieces = tensor.chunk(len(rule.sources)) if len(rule.sources) > 1 else [tensor]
        found |= {name: piece.contiguous().clone()
                  for name, piece in zip(rule.sources, pieces, strict=True)}
    return found


# ------------------------------------------------------------------------------------------------
# Write


def write_aside(path, write):
    """Call write(temporary path), then put the result in place of `path` in one step.

    A reader, also after a power cut, finds the old file or the new one and never half of either.
    Where writing fails, as on a full disk, the half is removed and the old file stays: OSError.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        # torch and safetensors have exceptions of their own for what the system reported.
        reported = re.search(r"os error (\d+)", str(error))
        number = int(reported[1]) if reported else getattr(error.__context__, "errno", None)
        if number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(path)) from None
        raise
    settle(path.parent)


def write_torch(path, content):
    """torch.save, aside and renamed; `load` reads it. Tensors, numbers, strings, lists, dicts."""
    def write(aside):
        with open(aside, "wb") as file:
            torch.save(content, file)
    write_aside(path, write)


def settle(folder):
    """Flush the names in a folder to the disk, so that they survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(folder, model, config):
    """Write model.safetensors and config.json.

    model   a module, or its tensors
    config  plain JSON values, with "model" = the class
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model if isinstance(model, dict) else model.state_dict()
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    text = json.dumps(config, indent=1)
    notes = {"config": text, "checksum": checksum(tensors, text)}
    write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=notes))
    write_aside(folder / "config.json", lambda path: Path(path).write_text(text + "\n"))
