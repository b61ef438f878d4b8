"""Find the files of weights that a user's path refers to.

    FILE              .safetensors, .pth, .pt, .bin, .ckpt, or the index of a model in parts
    FOLDER            a run; a Hugging Face folder, whole or in parts; a folder of DeepSpeed
    FILE::NAME        the part NAME of the file, see `weights.unwrap`

Nothing here opens a pickle. Errors say what a file is if it is clearly not a file of weights, for
example a web page.
"""

import json
import os
import re
import stat
from pathlib import Path

from engine.errors import UserError, printable

# The files to look for in a folder, in this order.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
               "pytorch_model.bin.index.json")
# DeepSpeed's files of a model: with whole tensors, and with the pieces of ZeRO-3.
DEEPSPEED, ZERO_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"

# Files that a failed download may leave: (regular expression of the beginning, message).
OTHERS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch the file with git "
     "lfs pull, or download it with hf download"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype\s+)?html", "a web page in place of a file "
     "of weights: its address leads to a page or needs a login; download the file itself"),
    (rb"\s*<(\?xml|Error)", "a server's XML message in place of a file of weights: the address is "
     "wrong, has expired or is not public; download the file again"),
    (rb"$", "an empty file: the download did not work; download it again"),
)


class WeightsError(UserError):
    """A file of weights cannot be used. The message is one line with the reason."""


def split(source):
    """FILE::NAME -> (path, NAME). NAME is "" if there is none, or if a file has this whole name."""
    path, _, name = str(source).rpartition("::")
    if not path or not name or os.path.exists(source):
        return Path(source), ""
    return Path(path), name


def find(source):
    """Path of the file, or of the index of a model in parts, that `source` refers to. Raises
    WeightsError."""
    path = split(source)[0]
    if os.path.isdir(path):
        models = [path / name for name in MODEL_FILES if os.path.exists(path / name)]
        path = models[0] if models else deepspeed(path)
    if path.name.startswith("zero_pp_rank_"):
        raise zero_3_error(path)
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a possible path
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not os.path.exists(path.parent)
        hint = (f"; a Hugging Face id? Download it first: hf download {source} --local-dir FOLDER"
                if hub else "")
        raise WeightsError(f"{path}: no such file of weights" + hint) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):  # reading from a pipe might never end
        raise WeightsError(f"{path}: a folder, a pipe or a device in place of a file of weights")
    return path


def deepspeed(folder):
    """The newest model file in a folder of DeepSpeed or in the folder of one of its checkpoints.
    """
    folders, latest = [folder], folder / "latest"
    if latest.is_file():
        folders.append(folder / latest.read_text(errors="replace").strip()[:200].rpartition("/")[2])
    else:
        steps = {folder / name: int(step[1]) for name in os.listdir(folder)
                 if (step := re.fullmatch(r"(?:global_step|checkpoint-)(\d{1,18})", name))}
        folders += sorted(steps, key=steps.get, reverse=True)
    for path in folders:
        if (path / DEEPSPEED).exists():
            if others := sorted(path.glob("mp_rank_0[1-9]_model_states.pt")):
                raise WeightsError(f"{path}: holds a model in several parts, such as "
                                   f"{others[0].name}, by DeepSpeed's tensor parallelism; join "
                                   "them where it was trained")
            return path / DEEPSPEED
        if (path / ZERO_3).exists():
            raise zero_3_error(path / ZERO_3)
    if latest.is_file():
        raise WeightsError(f"{latest}: names {folders[-1].name}, where there is no {DEEPSPEED}")
    raise WeightsError(f"{folder}: this folder holds no model.safetensors; give a run's folder or "
                       "a file of weights")


def zero_3_error(path):
    """The error for files of ZeRO-3, in which every tensor is cut into pieces."""
    return WeightsError(
        f"{path}: DeepSpeed's ZeRO-3 cuts each tensor into pieces, so no tensor in here is whole; "
        "join them with the script that DeepSpeed left in the folder above, run there: "
        "python zero_to_fp32.py . whole")


def is_index(path):
    """True for the index of a model in parts."""
    return Path(path).name.endswith(".index.json")


def parts(path):
    """Read an index: {path of a part: [names of its tensors]}. Raises WeightsError, with the names
    of missing parts."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name in names.values() if os.path.basename(name) != name]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: no index of a model in parts ({type(error).__name__}): "
                           'expected {"weight_map": {tensor: file}}') from None
    if wrong or not names:
        raise WeightsError(f"{path}: names {'a file elsewhere, ' + wrong[0] if wrong else 'no'} "
                           "part")
    tensors = {}
    for key, name in names.items():
        tensors.setdefault(path.parent / name, []).append(key)
    missing = [part.name for part in tensors if not part.is_file()]
    if missing:
        raise WeightsError(f"{path}: of its {len(tensors)} parts {len(missing)} "
                           f"{'is' if len(missing) == 1 else 'are'} missing: {', '.join(missing)}; "
                           "download them into the same folder")
    return tensors


def files(source):
    """The files that contain the tensors of `source`, sorted by name."""
    path = find(source)
    return sorted(parts(path)) if is_index(path) else [path]


def check_kind(path):
    """WeightsError if a file is clearly something else, such as the result of a failed download."""
    with open(path, "rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf")
    for pattern, message in OTHERS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            code = re.search(rb"<Code>(\w+)", head)
            detail = f" ({code[1].decode()})" if code else ""
            raise WeightsError(f"{path}: {message}{detail}")
    if re.fullmatch(rb"[\t\r\n -~]+", head):
        raise WeightsError(f"{path}: a text file in place of a file of weights; it begins: "
                           f"{printable(head[:60].decode().strip())}")
