"""From what a user names to the files that hold the tensors.

    FILE              .safetensors, .pth, .pt, .bin, .ckpt, or the index of a model in parts
    FOLDER            a run; a Hugging Face folder, whole or in parts; what DeepSpeed wrote
    FILE::NAME        of what lies there, the part NAME: see `weights.unwrap`

Nothing here opens a pickle. What is plainly no file of weights is named as what it is.
"""

import json
import os
import re
import stat
from pathlib import Path

from engine.errors import UserError, printable

# In a folder, in this order.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
               "pytorch_model.bin.index.json")
# What DeepSpeed calls a model's states, and what it calls them where ZeRO-3 has cut up each tensor.
DEEPSPEED, ZERO_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"

# What a download may leave in place of a file of weights: (how it begins, what it is and what to
# do).
OTHERS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch that with git lfs "
     "pull, or download it with hf download"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype\s+)?html", "a web page in place of a file "
     "of weights: its address leads to a page or wants a login; download the file itself"),
    (rb"\s*<(\?xml|Error)", "a server's XML message in place of a file of weights: the address is "
     "wrong, has expired or is not public; download the file anew"),
    (rb"$", "an empty file: the download did not work; fetch it anew"),
)


class WeightsError(UserError):
    """A file of weights cannot be used; the message is one line and says why."""


def split(source):
    """(path, name) of FILE::NAME; name is "" without one, or where a file is really called so."""
    path, _, name = str(source).rpartition("::")
    if not path or not name or os.path.exists(source):
        return Path(source), ""
    return Path(path), name


def find(source):
    """Path of the file, or of the index of the files, that `source` names. WeightsError."""
    path = split(source)[0]
    if os.path.isdir(path):
        found = [path / name for name in MODEL_FILES if os.path.exists(path / name)]
        path = found[0] if found else deepspeed(path)
    if path.name.startswith("zero_pp_rank_"):
        raise cut_up(path)
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: not a name
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not os.path.exists(path.parent)
        hint = (f"; a Hugging Face id? Download it first: hf download {source} --local-dir FOLDER"
                if hub else "")
        raise WeightsError(f"{path}: no such file of weights" + hint) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):  # reading a pipe would wait for ever
        raise WeightsError(f"{path}: a folder, a pipe or a device in place of a file of weights")
    return path


def deepspeed(folder):
    """The newest file of states in a folder of DeepSpeed, or in that of one of its checkpoints."""
    places, latest = [folder], folder / "latest"
    if latest.is_file():
        places.append(folder / latest.read_text(errors="replace").strip()[:200].rpartition("/")[2])
    else:
        steps = {folder / name: int(step[1]) for name in os.listdir(folder)
                 if (step := re.fullmatch(r"(?:global_step|checkpoint-)(\d{1,18})", name))}
        places += sorted(steps, key=steps.get, reverse=True)
    for place in places:
        if (place / DEEPSPEED).exists():
            if others := sorted(place.glob("mp_rank_0[1-9]_model_states.pt")):
                raise WeightsError(f"{place}: a model in parts, of which {others[0].name} is one: "
                                   "DeepSpeed's tensor parallelism; join them where it was trained")
            return place / DEEPSPEED
        if (place / ZERO_3).exists():
            raise cut_up(place / ZERO_3)
    if latest.is_file():
        raise WeightsError(f"{latest}: names {places[-1].name}, where there is no {DEEPSPEED}")
    raise WeightsError(f"{folder}: this folder holds no model.safetensors; give a run's folder or "
                       "a file of weights")


def cut_up(path):
    """The error for states of ZeRO-3, of which no process has a whole tensor."""
    return WeightsError(
        f"{path}: DeepSpeed's ZeRO-3 keeps each tensor in pieces, and none is whole in here; make "
        "whole ones with the script that it left in the folder above, run there: "
        "python zero_to_fp32.py . whole")


def is_index(path):
    """True for the index of a model in parts."""
    return Path(path).name.endswith(".index.json")


def parts(path):
    """{path of a part: [names of its tensors]} of an index. WeightsError; a part that lacks is
    named."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name in names.values() if os.path.basename(name) != name]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: no index of a model in parts ({type(error).__name__}): "
                           'expected {"weight_map": {tensor: file}}') from None
    if wrong or not names:
        raise WeightsError(f"{path}: names {'a file elsewhere, ' + wrong[0] if wrong else 'no'} "
                           "part")
    found = {}
    for key, name in names.items():
        found.setdefault(path.parent / name, []).append(key)
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        raise WeightsError(f"{path}: of its {len(found)} parts {len(missing)} "
                           f"{'is' if len(missing) == 1 else 'are'} missing: {', '.join(missing)}; "
                           "download them into the same folder")
    return found


def files(source):
    """The files that hold the tensors of `source`, in order of their names."""
    path = find(source)
    return sorted(parts(path)) if is_index(path) else [path]


def check_kind(path):
    """WeightsError where a file is plainly something else, as a failed download leaves it."""
    with open(path, "rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf")
    for begins, what in OTHERS:
        if re.match(begins, head, re.IGNORECASE | re.DOTALL):
            code = re.search(rb"<Code>(\w+)", head)
            said = f" ({code[1].decode()})" if code else ""
            raise WeightsError(f"{path}: {what}{said}")
    if re.fullmatch(rb"[\t\r\n -~]+", head):
        raise WeightsError(f"{path}: a text in place of a file of weights; it begins: "
                           f"{printable(head[:60].decode().strip())}")
