"""Read and write weights so that nothing is lost, nothing is left over and nothing is guessed.

Why: the costliest bug around pretrained video models is weights that silently do not load. The
official loaders pass strict=False and print what they dropped; a network that is half random then
runs without complaint. Here a file either fills a model completely or is refused with the list of
names that are missing, unknown or of another shape.

    file or dict --read--> {official name: tensor} --translate--> {our name: tensor} --fill--> model

The idea, in steps:
1. `read` opens safetensors and torch files (never executing code from them), unwraps the usual
   dictionaries around them ("model", "module", "state_dict", "model_state") and widens half precision. The archives in
   which OpenAI published CLIP are programs; `TensorsOnly` takes their tensors out and runs nothing.
2. A component owns its key map: a list of `Rule`s, in network order, each naming one of our
   tensors and the official tensor(s) that it is made of. Reading the list teaches both layouts.
3. `fill` applies the rules, and accepts nothing missing, nothing left over and no other shape.
4. `describe` tells from the names alone which family a file belongs to, and who loads it.
5. `official` goes the other way, so that others can load what we train; `python weights.py RUN --official NEW`.
6. `save` writes our own runs: model.safetensors, which carries its configuration and a checksum in its
   header, and the same configuration as config.json for people and other programs.
7. What is damaged is refused: safetensors of ours by that checksum, torch files by the one they bring
   (`load`). What is written is there in full, or not at all (`write_aside`).

    python weights.py FILE                            what is it, and does it load?
    python weights.py FILE --convert NEW.safetensors  take the tensors out of a pickle that holds more
    python weights.py RUN --official NEW.pth          write a run under the official names

>>> import tempfile, pathlib
>>> model = torch.nn.Linear(2, 3)
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> save(folder, model, {"model": "Linear", "inputs": 2, "outputs": 3})
>>> tensors, config = read(folder)
>>> sorted(tensors), config["outputs"]
(['bias', 'weight'], 3)
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.errors import UserError

ENVELOPES = ("model", "module", "state_dict", "model_state")
PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Hugging Face remote code, compile


# What torch, safetensors, zipfile and pickle raise at a damaged file.
DAMAGE = (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, OSError, ValueError, LookupError,
          AttributeError, TypeError, ArithmeticError, AssertionError, struct.error, zlib.error)


class WeightsError(UserError):
    """A file of weights cannot be used; the message is one line and says why."""


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


class StandIn:
    """In place of what a pickle would build with code: keeps the state that it is given, and does nothing."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class TensorsOnly(pickle.Unpickler):
    """Reads the pickle inside a zip file that torch wrote, of torch.save or of TorchScript. It knows tensors and
    plain containers; whatever else the file names is a `StandIn`, noted in `strange`: never imported or called."""

    def __init__(self, archive):
        root = next((name[:-8] for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if root is None:
            raise ValueError("no data.pkl in the archive")
        super().__init__(archive.open(root + "data.pkl"), encoding="utf-8")
        self.archive, self.root, self.storages, self.strange = archive, root, {}, set()

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset).clone()
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if not module.startswith("__torch__"):  # TorchScript's own modules are containers
            self.strange.add(f"{module}.{name}")
        return type(name, (StandIn,), {})

    def persistent_load(self, key):
        _, dtype, number, _, count = key
        if number not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{number}"))
            self.storages[number] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[number]


STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


def take_out(path):
    """What a zip file of torch holds, without running anything: (dicts and tensors, {names of what was left out})."""
    with zipfile.ZipFile(path) as archive:
        reader = TensorsOnly(archive)
        found = reader.load()
    return (named(found) if isinstance(found, StandIn) else found), reader.strange


def named(module, prefix=""):
    """{name: tensor} of a TorchScript module, by the path of attributes that leads to each."""
    found = {}
    for key, value in (module.state if isinstance(module.state, dict) else {}).items():
        if isinstance(value, torch.Tensor):
            found[prefix + key] = value
        elif isinstance(value, StandIn):
            found |= named(value, f"{prefix}{key}.")
    return found


def is_program(path):
    """True for a TorchScript archive."""
    with zipfile.ZipFile(path) as archive:
        return any(re.match(r"[^/]+/code/", name) for name in archive.namelist())


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
    if os.path.isdir(path):
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin")
                 if os.path.exists(path / name)]
        if not found:
            raise WeightsError(f"{path}: this folder holds no model.safetensors; give a run's "
                               "folder or a file of weights")
        path = found[0]
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last where it cannot be a name at all
        hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))) and not os.path.exists(path.parent)
        raise WeightsError(f"{path}: no such file of weights" + hub * (
            f"; a Hugging Face id? Download it first: hf download {source} --local-dir FOLDER")) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):  # of a pipe one would wait for ever
        raise WeightsError(f"{path}: a folder, a pipe or a device in place of a file of weights")
    config = {}
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                notes = file.metadata() or {}
            if "checksum" in notes and notes["checksum"] != checksum(tensors, notes.get("config", "")):
                raise ValueError("damaged: its checksum is wrong")
            config = json.loads(notes.get("config", "{}"))
            if not isinstance(config, dict):
                raise ValueError("its configuration is no JSON object")
        elif head[:2] == b"PK" and is_program(path):
            tensors = take_out(path)[0]
        else:
            tensors = load(path)
    except pickle.UnpicklingError:
        if head[:2] != b"PK" and head[:1] != b"\x80":  # neither of torch's two formats
            raise WeightsError(f"{path}: not a file of weights") from None
        raise WeightsError(f"{path}: a pickle that holds more than tensors, so opening it could run code; take "
                           f"the tensors out with: python weights.py {path} --convert NEW.safetensors") from None
    except DAMAGE as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "unreadable"
        raise WeightsError(f"{path}: not a readable file of weights ({reason})") from None
    return unwrap(tensors, str(path)), config


def load(path):
    """What a torch file holds, on the CPU; it is not executed. The file is an archive that carries a CRC-32 of
    every tensor, which torch writes but does not look at: here a flipped bit is an error, not a number.

    raises  whatever a damaged file makes torch or zipfile raise; ValueError where a checksum is wrong
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


def hub_config(source):
    """What transformers wrote beside its weights, config.json of a folder; {} where there is none. WeightsError where it
    is no JSON object, or its counts of heads are none, also those of vision_config and text_config."""
    path = Path(source) / "config.json" if not isinstance(source, dict) else None
    if path is None or not os.path.isfile(path):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    parts = [found, *(found[key] for key in ("vision_config", "text_config") if found.get(key) is not None)] if isinstance(
        found, dict) else [found]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("hidden_act", ""), str):
            raise WeightsError(f"{path}: not a configuration as transformers writes it")
        for key in ("num_attention_heads", "decoder_num_attention_heads"):
            if part.get(key) is not None and (type(part[key]) is not int or part[key] < 1):
                raise WeightsError(f"{path}: {key} must be a whole number from 1 on, got {str(part[key])[:60]!r}")
    return found


def build(make, config, name):
    """make(config), a model; WeightsError where the configuration in the file `name` describes none."""
    try:
        return make(config)
    except WeightsError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise  # no fault of the file's
        raise WeightsError(f"{name}: its configuration describes no model that can be built ({type(error).__name__}: "
                           f"{str(error)[:120]})") from error


def activation(config, name, usual):
    """WeightsError where transformers' configuration (of the file `name`) asks for another activation than `usual`."""
    if config.get("hidden_act", usual) != usual:
        raise WeightsError(f"{name}: its config.json says hidden_act {config['hidden_act']!r}; only {usual!r} is known here")


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
    others = [str(key) for key, value in tensors.items() if not isinstance(value, torch.Tensor) or not isinstance(key, str)]
    if others:
        raise WeightsError(f"{name}: expected tensors by name, found {listed(others)}")
    odd = [key for key, value in tensors.items() if value.layout != torch.strided or value.is_quantized or value.is_meta]
    if odd:
        raise WeightsError(f"{name}: sparse, quantised, or without their numbers: {listed(odd)}")
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None):
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
    kinds = [f"{spoken[key]} is {tensor.dtype} instead of {own[key].dtype}" for key, tensor in ours.items()
             if key in own and tensor.is_floating_point() != own[key].is_floating_point()  # copying would round in silence
             and not (tensor.is_floating_point() and torch.equal(tensor, tensor.round()))]  # a counter, cast with the rest
    unfilled = [key for key in own if key not in spoken]
    if unfilled:  # our own mistake, not the file's
        raise AssertionError(f"no rule fills {unfilled}")
    complaints = [f"{what}: {listed(keys)}" for what, keys in
                  (("missing", missing), ("unknown", unknown), ("wrong shape", shapes), ("wrong kind", kinds)) if keys]
    if complaints:
        raise WeightsError(f"{name} does not fit {type(model).__name__}: " + "; ".join(complaints))
    model.load_state_dict(ours, strict=True)
    return model


def official(model, rules):
    """The other way round: {official name: tensor} of a model, by a key map that covers it."""
    own, found = model.state_dict(), {}
    assert {rule.ours for rule in rules} == set(own), "the key map leaves something out"
    for rule in rules:
        tensor = own[rule.ours].detach().cpu()
        assert (rule.convert is None) == (rule.back is None), f"no way back for {rule.ours}"
        tensor = rule.back(tensor) if rule.back else tensor
        pieces = tensor.chunk(len(rule.sources)) if len(rule.sources) > 1 else [tensor]
        found |= {name: piece.contiguous().clone() for name, piece in zip(rule.sources, pieces, strict=True)}
    return found


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
    reader, or a power cut, meets the old file or the new one and never half of either. Where
    writing fails, as on a full disk, the half is removed and the old file stays: OSError."""
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
        # torch and safetensors have exceptions of their own for what the system said.
        said = re.search(r"os error (\d+)", str(error))
        number = int(said[1]) if said else getattr(error.__context__, "errno", None)
        if number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(path)) from None
        raise
    settle(path.parent)


def write_torch(path, content):
    """torch.save, aside and renamed; `load` reads it. Tensors, numbers, strings, lists and dicts."""
    def write(aside):
        with open(aside, "wb") as file:
            torch.save(content, file)
    write_aside(path, write)


def settle(folder):
    """Names are on the disk too, not only in the system's memory."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(folder, model, config):
    """Write model.safetensors and config.json. model: a module, or its tensors; config: plain JSON values, with
    "model" = the class."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model if isinstance(model, dict) else model.state_dict()
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    text = json.dumps(config, indent=1)
    notes = {"config": text, "checksum": checksum(tensors, text)}
    write_aside(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=notes))
    write_aside(folder / "config.json", lambda path: Path(path).write_text(text + "\n"))


# ------------------------------------------------------------------------------------------------
# What is this file?

# family, what some name must look like (all of them), and who loads it; the first that fits is it.
FAMILIES = (
    ("VideoMAE, pretraining, of Hugging Face", (r"^videomae\.", r"^decoder\.decoder_layers\."), ("mae.VideoMAE",)),
    ("VideoMAE, classifier, of Hugging Face", (r"^videomae\.",), ("mae.VideoClassifier",)),
    ("VideoMAE, encoder, of Hugging Face", (r"^embeddings\.patch_embeddings\.", r"^encoder\.layer\."), ("mae.VideoClassifier",)),
    ("VideoMAE, pretraining", (r"^encoder\.patch_embed\.", r"^decoder\.blocks\."), ("mae.VideoMAE",)),
    ("VideoMAE, classifier", (r"^(backbone\.)?patch_embed\.proj\.", r"^(backbone\.)?blocks\.\d+\."), ("mae.VideoClassifier",)),
    ("ViCLIP", (r"^vision_encoder\.", r"^text_encoder\."), ("clip_video.VideoCLIP",)),
    ("CLIP, of Hugging Face", (r"^vision_model\.", r"^text_model\."), ("clip_video.VideoCLIP",)),
    ("InternVideo-MM with its caption decoder", (r"^clip\.visual\.", r"^caption_decoder\."),
     ("clip_video.VideoCLIP", "caption_decoder.CaptionDecoder")),
    ("InternVideo-MM", (r"^(clip\.)?visual\.transformer\.dec\.",), ("clip_video.VideoCLIP",)),
    ("CLIP, of OpenAI", (r"^visual\.transformer\.resblocks\.", r"^token_embedding\."), ("clip_video.VideoCLIP",)),
    ("InternVideo's caption decoder", (r"^(caption_decoder\.)?multimodal_layers\.",), ("caption_decoder.CaptionDecoder",)),
    ("UniFormerV2", (r"^(backbone\.)?transformer\.resblocks\.", r"^(backbone\.)?conv1\."), ("uniformerv2.UniFormerV2",)),
)


def describe(tensors):
    """(family, names of the classes that load it) of {official name: tensor}, or (None, ())."""
    for family, signs, loaders in FAMILIES:
        if all(any(re.search(sign, key) for key in tensors) for sign in signs):
            return family, loaders
    return None, ()


def convert(path, target):
    """Write the tensors of any file that `read` knows, or of a pickle with more in it, as safetensors; returns the
    target. Says on stderr what was left out. Raises WeightsError."""
    try:
        tensors = read(path)[0]
    except WeightsError as error:
        try:
            found, strange = take_out(path)
        except DAMAGE:
            raise error from None
        tensors = unwrap(found, str(path))
        print(f"warning: left out of {path}, and not run: {listed(sorted(strange))}", file=sys.stderr)
    write_aside(target, lambda aside: save_file({key: value.contiguous().clone() for key, value in tensors.items()}, aside))
    return target


# model of a run -> (class, key under which the official code looks for the tensors in a .pth file)
PUBLISHED = {"VideoMAE": ("mae.VideoMAE", "model"), "VideoClassifier": ("mae.VideoClassifier", "module"),
             "UniFormerV2": ("uniformerv2.UniFormerV2", "model_state"), "VideoCLIP": ("clip_video.VideoCLIP", None),
             "CaptionDecoder": ("caption_decoder.CaptionDecoder", None), "VideoText": ("caption_decoder.VideoText", "state_dict")}


def publish(source, target):
    """Write a run under official names; returns what to say of it. Raises WeightsError where these cannot hold it."""
    import importlib

    target = Path(target)
    if target.suffix not in (".safetensors", ".pth") or target.exists():
        raise WeightsError(f"--official {target}: must be a new file whose name ends in .safetensors or .pth")
    kind = read(source)[1].get("model")
    if not isinstance(kind, str) or kind not in PUBLISHED:
        raise WeightsError(f"{source}: holds {kind or 'no run of this project'}, for which there are no official names; there are "
                           f"for runs of {listed(PUBLISHED)}")
    module, name = PUBLISHED[kind][0].split(".")
    family = getattr(importlib.import_module(module), name)
    model = (family.from_run if kind == "VideoText" else family.from_official)(source)
    try:
        tensors, envelope = model.to_official(), PUBLISHED[kind][1]
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None
    if target.suffix == ".pth":
        write_torch(target, {envelope: tensors} if envelope else tensors)
    else:
        write_aside(target, lambda aside: save_file(tensors, aside))
    found = f"{target}: {len(tensors)} tensors of {kind} under official names, family: {describe(unwrap(tensors, str(target)))[0]}"
    unsaid = untold(model.config)
    return found + f"\nno name or shape says this, so tell whoever loads it: {'; '.join(unsaid)}" * bool(unsaid)


def untold(config):
    """What official files do not hold and official code assumes otherwise: list of words."""
    width, heads = (config.get("size", {}).get(key, 0) for key in ("width", "heads"))
    unsaid = [f"{heads} heads of {width // heads} in place of 64"] if heads and width != 64 * heads else []
    if config.get("model") == "UniFormerV2" and (set(config["mean"]), set(config["std"])) != ({0.45}, {0.225}):
        unsaid.append(f"pixels in [0, 1] are normalised with mean {config['mean']} and deviation {config['std']}")
    if {config.get("eps", 1e-6), config.get("head_eps", 1e-6)} != {1e-6}:
        unsaid.append(f"LayerNorm epsilons {config.get('eps')}, before the head {config.get('head_eps')}")
    return unsaid


def main(argv=None):
    """Say what a file of weights is, whether it loads, and with what; the exit code is 0, or 2 where it does not."""
    import argparse
    import importlib
    import inspect

    parser = argparse.ArgumentParser(description="What is in a file of weights, and who loads it?")
    parser.add_argument("file", help="a run's folder, or a file of weights")
    parser.add_argument("--convert", default="", help="write its tensors as .safetensors here; of a pickle that holds more "
                        "than tensors, what is more is left out, and nothing of it runs")
    parser.add_argument("--official", default="", help="write a run under the official names here: NEW.safetensors, or "
                        "NEW.pth in the envelope that the official code opens")
    parser.add_argument("--heads", type=int, default=0, help="of every attention, where the width is none of a published model")
    args = parser.parse_args(argv)
    try:
        if args.heads < 0:
            raise WeightsError(f"--heads {args.heads}: must be at least 1")
        source = args.file
        if args.convert:
            if Path(args.convert).suffix != ".safetensors" or Path(args.convert).exists():
                raise WeightsError(f"--convert {args.convert}: must be a new file whose name ends in .safetensors")
            source = convert(args.file, args.convert)
        if args.official:
            print(publish(source, args.official))
            return 0
        tensors, config = read(source)
        numbers = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
        print(f"{source}: {len(tensors)} tensors, {sum(value.numel() for value in tensors.values()) / 1e6:.2f} M numbers, "
              + ", ".join(f"{count} of {kind}" for kind, count in numbers.items()) + " (half precision is widened)")
        if config:
            print(f"a run of this project: {config.get('model', 'several models')}; give it to train.py as --weights {source}")
            print("sizes: " + json.dumps(config))
            return 0
        family, loaders = describe(tensors)
        if family is None:
            raise WeightsError(f"{source}: of no family known here; its names are like {listed(list(tensors)[:5])}")
        print(f"family: {family}")
        for loader in loaders:
            module, name = loader.split(".")
            loader_of = getattr(importlib.import_module(module), name).from_official
            heads = [key for key in inspect.signature(loader_of).parameters if key.endswith("heads") and args.heads
                     and module != "caption_decoder"]  # whose shapes tell
            model = loader_of(source, **dict.fromkeys(heads, args.heads))
            unused = [key for key in getattr(model, "unused", ()) if len(loaders) < 2 or not key.startswith("caption_decoder.")]
            print(f"loads{', to the last tensor' * (not unused)}: {loader}.from_official({str(source)!r})"
                  + f"; of no use there: {listed(unused)}" * bool(unused))
            print("sizes: " + json.dumps(model.config))
        return 0
    except (WeightsError, OSError, ValueError) as error:
        print(f"weights.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.modules["weights"] = sys.modules["__main__"]  # the models' WeightsError is the one that main catches
    raise SystemExit(main())
