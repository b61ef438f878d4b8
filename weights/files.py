"""Read and write weights strictly: a file fills a model completely, or it is refused.

Weights that silently fail to load are an expensive bug. The official loaders pass strict=False and
print what they dropped. The network then runs, although half of it is random. Here a file that does
not fit is an error. Its message names all tensors that are missing, unknown or of another shape.

    file or dict --read--> {official name: tensor} --translate--> {our name: tensor} --fill--> model

1. `read` opens safetensors and torch files and never runs code from them. It removes the usual
   dictionaries around the tensors (ENVELOPES) and converts half precision to float32. `places.py`
   finds files; `pickles.py` takes tensors out of files that contain other objects.
2. A `Rule` names one of our tensors and the official tensors that it is made of. Each family of
   official files has a key map, a list of rules, see `official.py`.
3. `fill` applies the rules. `export` applies them in reverse, for the official code.
4. `save` writes our own runs: model.safetensors with the configuration and a checksum in its
   header, and the same configuration as config.json.
5. Checksums detect damaged files: ours in safetensors, those of the zip archive in torch files
   (`load`). A file is written completely or not at all (`write_atomically`).

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

# Keys under which files keep the dictionary of tensors, and that of their average over training.
# mmengine's "ema_state_dict" is not among them: mmengine swaps the two, so its "state_dict" is the
# average.
ENVELOPES = ("model", "module", "state_dict", "model_state", "model_state_dict", "net")
AVERAGES = ("model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Hugging Face remote code, compile

# What torch, safetensors, zipfile and pickle may raise for a damaged file.
DAMAGE = (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError,
          OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
          AssertionError, struct.error, zlib.error)


# ------------------------------------------------------------------------------------------------
# Read


def read(source):
    """Tensors and configuration of a file, a folder or a dict of tensors.

    source   path of a .safetensors or torch file, or of a folder; with ::NAME at the end for a part
             (see places.py and `unwrap`); or {name: tensor}
    returns  ({name: tensor}, configuration), a dict that is empty for files that are not ours.
             float16 and bfloat16 tensors are returned as float32, which is exact
    raises   WeightsError: no such file, not a file of weights, or one that would run code
    """
    if isinstance(source, dict):
        return unwrap(source, name_of(source)), {}
    path, part_name = places.find(source), places.split(source)[1]
    if not places.is_index(path):
        tensors, config = open_file(path)
        return unwrap(tensors, str(source), part_name), config
    tensors = {}
    for file, names in places.parts(path).items():
        content = open_file(file)[0]
        if missing := [name for name in names if name not in content]:
            raise WeightsError(f"{file}: lacks tensors that {path.name} names: {listed(missing)}")
        tensors |= {name: content[name] for name in names}
    return unwrap(tensors, str(source), part_name), {}


def open_file(path):
    """(content of one file, its configuration or {}). Raises WeightsError."""
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
    """({name: tensor}, configuration). ValueError if the checksum is wrong."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    text = metadata.get("config", "")
    if "checksum" in metadata and metadata["checksum"] != checksum(tensors, text):
        raise ValueError("damaged: its checksum is wrong")
    config = json.loads(metadata.get("config", "{}"))
    if not isinstance(config, dict):
        raise ValueError("its configuration is no JSON object")
    return tensors, config


def load(path):
    """The content of a torch file, on the CPU. No code in it is executed.

    The file is an archive with a CRC-32 of every tensor. torch writes these checksums but does not
    verify them; this function does.

    raises  DAMAGE; ValueError for a wrong checksum
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
    """{name: tensor} without envelopes and without a prefix that all names share.

    part  "" or NAME of FILE::NAME: the key of an envelope, or a prefix of the tensors' names. If it
          is "" and a file has weights and their average, the weights are used and a line says so
    """
    for _ in range(len(ENVELOPES)):
        inner = [key for key in (part, *ENVELOPES, *AVERAGES) if isinstance(tensors, dict)
                 and isinstance(tensors.get(key), dict)]
        if not inner:
            break
        if inner[0] != part and inner[0] in ENVELOPES and inner[-1] in AVERAGES:
            print_once(f"{name}: holds {inner[0]!r} and an average over training, {inner[-1]!r}; "
                       f"{inner[0]!r} is used; for the average write {name}::{inner[-1]}")
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
    """The tensors whose names begin with `part` and a dot, without these. WeightsError if none."""
    prefix = part + "."
    selected = {key[len(prefix):]: value for key, value in tensors.items()
                if str(key).startswith(prefix)}
    if not selected:
        tops = dict.fromkeys(str(key).partition(".")[0] for key in tensors)
        raise WeightsError(f"{name}: has no part {part!r}; its names begin with {listed(tops)}")
    return selected


def check_whole(content, key, name):
    """WeightsError for a file of DeepSpeed's ZeRO-3, whose tensors are empty."""
    module = content[key]
    empty = [value for value in module.values()
             if isinstance(value, torch.Tensor) and not value.numel()]
    if "param_shapes" in content and (empty or not module):
        raise places.zero_3_error(name)


@functools.cache
def print_once(line):
    """Print a line only once, also if a file is read several times."""
    print(line)


def part(tensors, config, name):
    """Select one component of `tensors, config = read(...)` if a run saved several.

    Returns the tensors without the prefix `name` and the configuration of that component. A run or
    file without such a component is returned unchanged.
    """
    if not isinstance(config.get(name), dict):
        return tensors, config
    prefix = name + "."
    return {key[len(prefix):]: value for key, value in tensors.items()
            if key.startswith(prefix)}, config[name]


def name_of(source):
    """The name of a source of weights in messages."""
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
    """Our tensor `ours` comes from the official tensor `official`. Several are stacked along dim 0.

    convert  function official -> ours, for layouts that differ; None = unchanged
    back     function ours -> official, likewise
    """

    ours: str
    official: str | tuple
    convert: object = None
    back: object = None

    @property
    def sources(self):
        return (self.official,) if isinstance(self.official, str) else self.official


def translate(tensors, rules):
    """Rename and convert official tensors.

    returns  ({our name: tensor}, {our name: official name(s) for messages},
              [missing official names], [official names that no rule uses])
    """
    ours, official, missing, used = {}, {}, [], set()
    for rule in rules:
        used.update(rule.sources)
        absent = [key for key in rule.sources if key not in tensors]
        missing += absent
        official[rule.ours] = " + ".join(rule.sources)
        if not absent:
            pieces = [tensors[key] for key in rule.sources]
            tensor = torch.cat(pieces) if len({p.shape[1:] for p in pieces}) == 1 and \
                len(pieces) > 1 else pieces[0]
            ours[rule.ours] = rule.convert(tensor) if rule.convert else tensor
    return ours, official, missing, [key for key in tensors if key not in used]


def fill(model, tensors, rules=None, *, name="weights"):
    """Copy tensors into a model. Every parameter and saved buffer must be filled.

    rules   a key map; None = the names are already ours
    raises  WeightsError with the names, as in the file, of all tensors that are missing, unknown,
            or of another shape or dtype. The model is then unchanged
    """
    own = model.state_dict()
    rules = rules if rules is not None else [Rule(key, key) for key in own]
    ours, official, missing, unknown = translate(tensors, rules)
    shapes = [f"{official[key]} is {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
              for key, tensor in ours.items() if key in own and tensor.shape != own[key].shape]
    kinds = [f"{official[key]} is {tensor.dtype} instead of {own[key].dtype}"
             for key, tensor in ours.items() if key in own and other_kind(tensor, own[key])]
    unfilled = [key for key in own if key not in official]
    if unfilled:  # an error in the key map, not in the file
        raise AssertionError(f"no rule fills {unfilled}")
    faults = [f"{what}: {listed(keys)}" for what, keys in
              (("missing", missing), ("unknown", unknown), ("wrong shape", shapes),
               ("wrong kind", kinds)) if keys]
    if faults:
        raise WeightsError(f"{name} does not fit {type(model).__name__}: " + "; ".join(faults))
    model.load_state_dict(ours, strict=True)
    return model


def other_kind(tensor, own):
    """True if one is floating point and the other is not, so that copying could change numbers.

    A float tensor of whole numbers is accepted: a counter that was cast together with the weights.
    """
    return tensor.is_floating_point() != own.is_floating_point() and not (
        tensor.is_floating_point() and torch.equal(tensor, tensor.round()))


def export(model, rules):
    """The reverse of `fill`: {official name: tensor} of a model. The key map must cover all of it.
    """
    own, tensors = model.state_dict(), {}
    assert {rule.ours for rule in rules} == set(own), "the key map is not complete"
    for rule in rules:
        tensor = own[rule.ours].detach().cpu()
        assert (rule.convert is None) == (rule.back is None), f"no way back for {rule.ours}"
        tensor = rule.back(tensor) if rule.back else tensor
        pieces = tensor.chunk(len(rule.sources)) if len(rule.sources) > 1 else [tensor]
        tensors |= {name: piece.contiguous().clone()
                    for name, piece in zip(rule.sources, pieces, strict=True)}
    return tensors


# ------------------------------------------------------------------------------------------------
# Write


def write_atomically(path, write):
    """Call write(temporary path), then replace `path` with the result in one atomic step.

    A reader finds the complete old file or the complete new one, even after a power failure. If
    writing fails, for example on a full disk, the temporary file is removed and the old file stays.

    raises  OSError if the system reported the failure; other errors as `write` raised them
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
        # torch and safetensors report errors of the system with their own exceptions.
        reported = re.search(r"os error (\d+)", str(error))
        number = int(reported[1]) if reported else getattr(error.__context__, "errno", None)
        if number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(path)) from None
        raise
    settle(path.parent)


def write_torch(path, content):
    """torch.save by `write_atomically`. `load` reads tensors, numbers, strings, lists and dicts."""
    def write(aside):
        with open(aside, "wb") as file:
            torch.save(content, file)
    write_atomically(path, write)


def settle(folder):
    """Flush the file names of a folder to the disk, so that they survive a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(folder, model, config):
    """Write model.safetensors and config.json.

    model   a module, or its tensors
    config  plain JSON values, with "model" = the name of the class
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model if isinstance(model, dict) else model.state_dict()
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    text = json.dumps(config, indent=1)
    metadata = {"config": text, "checksum": checksum(tensors, text)}
    write_atomically(folder / "model.safetensors",
                lambda path: save_file(tensors, path, metadata=metadata))
    write_atomically(folder / "config.json", lambda path: Path(path).write_text(text + "\n"))
