"""Features of long videos, as tools/extract.py writes them, with their temporal annotations."""

import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from video.annotations import DataError

DAMAGE = (  # what numpy raises for files that are not what they seem
    KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError, OSError, EOFError,
    RuntimeError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)


def read_features(folder, segments, subset, classes=None):
    """Features of long videos, and what happens in them when.

    folder    of .npz files as tools/extract.py writes them, named by the ids of the annotation,
              also `v_` + id
    segments  result of `annotations.read_segments`
    subset    the part to read, as the annotation calls it; case does not matter
    classes   names in label order; None: the sorted labels of this part
    returns   a list of {"features": float32 (T', F), "times": float64 (T',) s, "duration": s,
              "segments": list of (start s, end s, label), "path": str, "model": str,
              "window", "stride": int, frames}; the class names; and the ids of the videos whose
              features are missing
    raises    DataError: no such subset or folder, no features at all, a damaged file, an unknown
              label
    """
    folder, items, missing = Path(folder), [], []
    rows = {name: row for name, row in segments.items() if row.subset.lower() == subset.lower()}
    if not rows:
        known = ", ".join(sorted({row.subset for row in segments.values()}))
        raise DataError(f"no video of the subset {subset!r} in the annotation: it has {known}")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; it should hold the .npz files of "
                        "tools/extract.py")
    classes = classes or sorted({label for row in rows.values() for *_, label in row.segments})
    files = {path.stem: path for path in sorted(folder.rglob("*.npz")) if os.path.isfile(path)}
    for name, row in rows.items():
        path = files.get(name) or files.get("v_" + name)
        if path is None:
            missing.append(name)
            continue
        unknown = {label for *_, label in row.segments} - set(classes)
        if unknown:
            raise DataError(f"{name}: label {sorted(unknown)[0]!r} is not among the {len(classes)} "
                            "classes of training")
        items.append(_read_file(path) | {"path": str(path), "segments": [
            (start, end, classes.index(label)) for start, end, label in row.segments]})
    if not items:
        raise DataError(f"{folder}: has the features of none of the {len(rows)} videos, "
                        f"e.g. {missing[0]}.npz")
    return items, classes, missing


def _read_file(path):
    keys = ("feats", "timestamps", "duration", "model", "window", "stride")
    try:
        with np.load(path) as file:  # never unpickles: an array of objects is a ValueError
            raw = {key: file[key] for key in keys}
        kinds = "".join(raw[key].dtype.kind for key in raw)
        if not re.fullmatch("[fiu][fiu][fiu]U[iu][iu]", kinds):
            raise ValueError(f"numbers and words of the wrong kinds, {kinds}")
        item = {"features": raw["feats"].astype(np.float32),
                "times": raw["timestamps"].astype(float),
                "duration": float(raw["duration"]), "model": str(raw["model"]),
                "window": int(raw["window"]), "stride": int(raw["stride"])}
    except DAMAGE as error:
        raise DataError(f"{path}: not a file of tools/extract.py "
                        f"({type(error).__name__})") from None
    features, times = item["features"], item["times"]
    if features.ndim != 2:
        raise DataError(f"{path}: has {features.ndim - 1} numbers a row, not one: "
                        "extract with --pool all")
    finite = np.isfinite(features).all() and np.isfinite(times).all()
    if times.shape != features.shape[:1] or not features.size or not finite or not (
            0 < item["duration"] < math.inf and item["window"] > 0 and item["stride"] > 0):
        raise DataError(f"{path}: damaged: features and times of different lengths, or values "
                        "that are not finite or not positive")
    return item
