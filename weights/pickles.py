"""Take the tensors out of a pickle without running code from it.

A torch file is a zip archive with one pickle, which describes the tensors, and one file of numbers
for each tensor. A pickle may name any function, and unpickling calls it. `TensorsOnly` builds only
tensors and plain containers. It replaces every other object by a `StandIn`, which does nothing.

    take_out(path) -> dicts and tensors, {names of the objects that were left out}

TorchScript archives, in which OpenAI published CLIP, contain programs. Their modules become
stand-ins that keep their attributes. `named` then finds every tensor by its path of attributes.
"""

import pickle
import re
import zipfile
from collections import OrderedDict

import torch

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
            "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class StandIn:
    """Replaces an object that a pickle would build by running code. It only stores its state."""

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
    """Reads the pickle inside a zip file that torch.save or TorchScript wrote.

    It builds only tensors and plain containers. Every other object becomes a `StandIn`: its code is
    not imported or called. The names of these objects are collected in `skipped`.
    """

    def __init__(self, archive):
        root = next((name[:-8] for name in archive.namelist()
                     if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if root is None:
            raise ValueError("no data.pkl in the archive")
        super().__init__(archive.open(root + "data.pkl"), encoding="utf-8")
        self.archive, self.root, self.storages, self.skipped = archive, root, {}, set()

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(
                size, stride, offset).clone()
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if not module.startswith("__torch__"):  # TorchScript's own modules are containers
            self.skipped.add(f"{module}.{name}")
        return type(name, (StandIn,), {})

    def persistent_load(self, key):
        _, dtype, number, _, count = key
        if number not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{number}"))
            self.storages[number] = (torch.frombuffer(raw, dtype=dtype) if raw
                                     else torch.empty(0, dtype=dtype))
        return self.storages[number]


def take_out(path):
    """The content of a torch file: (dicts and tensors, {names of the objects left out})."""
    with zipfile.ZipFile(path) as archive:
        reader = TensorsOnly(archive)
        content = reader.load()
    return (named(content) if isinstance(content, StandIn) else content), reader.skipped


def named(module, prefix=""):
    """{name: tensor} of a TorchScript module; a name is the path of attributes to the tensor."""
    tensors = {}
    for key, value in (module.state if isinstance(module.state, dict) else {}).items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        elif isinstance(value, StandIn):
            tensors |= named(value, f"{prefix}{key}.")
    return tensors


def is_program(path):
    """True for a TorchScript archive."""
    with zipfile.ZipFile(path) as archive:
        return any(re.match(r"[^/]+/code/", name) for name in archive.namelist())
