"""Features of long videos, with their temporal annotations.

    tools/extract.py      .npz with features, times, window, stride and the model
    other people          .npy, or .npz with one array: (T', F) alone; a `Grid` says the times

docs/tasks.md has the stride, the window and the rate of published features.
"""

import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from video.rows import DataError

DAMAGE = (  # what numpy raises for files that are not what they seem
    KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError, OSError, EOFError,
    RuntimeError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)
KEYS = ("feats", "timestamps", "duration", "model", "window", "stride")  # of tools/extract.py
OTHERS = (".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".mat", ".csv")
_PART = re.compile(r"(.+)_[\d.]+_[\d.]+")  # tools/extract.py: a part of a video, start and end


class Grid(NamedTuple):
    """Where the rows of features lie in a video, for files that do not say it."""

    stride: int = 0  # frames from one row to the next; 0 = not said
    window: int = 0  # frames that a row has seen; 0 = stride
    rate: float = 0.0  # frames a second of the video that was read; 0 = as the annotation says


def read_features(folder, videos, subset, classes=None, grid=Grid()):
    """Features of long videos, and what happens in them when.

    folder    of files named by the ids of the annotation, also `v_` + id: .npz of tools/extract.py,
              or .npy and .npz with one array (T', F)
    videos    `segments.Annotation.videos`
    subset    the part to read, as the annotation calls it; case does not matter
    classes   names in label order; None: the sorted labels of this part
    grid      `Grid` of files that hold features alone
    returns   a list of {"features": float32 (T', F), "times": float64 (T',) s, "duration": s,
              "segments": list of (start s, end s, label), "path": str, "model": str, "" = unknown,
              "window", "stride": int, frames; "misfit": where features and annotation differ in
              length, a sentence, else ""}; the class names; and the ids of the videos whose
              features are missing
    raises    DataError: no such subset or folder, no features at all, a damaged file, an unknown
              label, no segment, features that do not fit the annotation
    """
    folder, items = Path(folder), []
    rows = {name: row for name, row in videos.items() if row.subset.lower() == subset.lower()}
    if not rows:
        known = ", ".join(sorted({row.subset for row in videos.values()}))
        raise DataError(f"no video of the subset {subset!r} in the annotation: it has {known}; say "
                        "--train-subset and --val-subset")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; it should hold a file of features for each "
                        "video, .npz of tools/extract.py or .npy")
    classes = classes or sorted({label for row in rows.values() for *_, label in row.segments})
    files = _files(folder, rows)
    for name, path in files.items():
        unknown = {label for *_, label in rows[name].segments} - set(classes)
        if unknown:
            raise DataError(f"{name}: label {sorted(unknown)[0]!r} is not among the {len(classes)} "
                            "classes of training")
        items.append(_read_file(path, rows[name], grid) | {"path": str(path), "segments": [
            (start, end, classes.index(label)) for start, end, label in rows[name].segments]})
    if not any(item["segments"] for item in items):
        raise DataError(f"{folder}: no video of the subset {subset!r} that has features has a "
                        "segment; the segments of many test sets are not published")
    _check_lengths(folder, items)
    return items, classes, [name for name in rows if name not in files]


def _files(folder, rows):
    """{id: path of its features}. DataError where there are none, or another thing."""
    files, parts, others, found = {}, {}, [], {}
    for path in sorted(path for path in folder.rglob("*") if os.path.isfile(path)):
        if path.suffix in (".npz", ".npy"):
            files.setdefault(path.stem, []).append(path)
        elif path.suffix.lower() in OTHERS:
            others.append(path)
    for stem, (path, *_) in files.items():
        if match := _PART.fullmatch(stem):
            parts[match[1]] = path
    for name, row in rows.items():
        names = (name, "v_" + name, *([row.file] if row.file else []))
        same = next((files[one] for one in names if one in files), ())
        if len(same) > 1:
            raise DataError(f"{same[0]} and {same[1]}: two files of features of one video; "
                            "leave one")
        if same:
            found[name] = same[0]
        elif part := next((parts[one] for one in names if one in parts), None):
            raise DataError(f"{part}: features of a part of {name}; localisation needs whole "
                            "videos: extract them with a list that names no parts")
    if not found and others:
        raise DataError(f"{others[0]}: {others[0].suffix} files are not read; save the features of "
                        "each video as .npy, (T', F)")
    if not found:
        raise DataError(f"{folder}: has the features of none of the {len(rows)} videos, "
                        f"e.g. {next(iter(rows))}.npz")
    return found


def _read_file(path, row, grid):
    """An item of `read_features` without its segments and path."""
    try:
        raw = _arrays(path)
        kinds = "".join(array.dtype.kind for array in raw.values())
        if not re.fullmatch("[fiu]|[fiu][fiu][fiu]U[iu][iu]", kinds):
            raise ValueError(f"numbers and words of the wrong kinds, {kinds}")
        if len(raw) == 1:
            return _placed(path, *raw.values(), row, grid)
        item = {"features": raw["feats"].astype(np.float32),
                "times": raw["timestamps"].astype(float),
                "duration": float(raw["duration"]), "model": str(raw["model"]),
                "window": int(raw["window"]), "stride": int(raw["stride"]), "misfit": ""}
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: not a file of tools/extract.py, nor one array (T', F) of numbers "
                        f"({type(error).__name__})") from None
    _check(path, item)
    return item


def _arrays(path):
    """{name: array}: those of tools/extract.py, or one array alone. Nothing is ever unpickled."""
    content = np.load(path)  # an array of objects is a ValueError
    if isinstance(content, np.ndarray):
        return {"feats": content}
    with content as file:
        return {key: file[key] for key in (file.files if len(file.files) == 1 else KEYS)}


def _placed(path, features, row, grid):
    """An item of features that lie as `grid` says: row i has seen `window` frames from
    i * stride on."""
    if not grid.stride:
        raise DataError(f"{path}: holds features alone; say how many frames lie from one to the "
                        "next, --stride (and --window, --rate)")
    rate, window = grid.rate or row.rate, grid.window or grid.stride
    if not rate:
        raise DataError(f"{path}: holds features alone, and the annotation no `fps`; say how many "
                        "frames a second the video has, --rate")
    number = np.arange(len(features) if features.ndim else 0)
    length = (number[-1:].sum() * grid.stride + window) / rate  # seconds that the features cover
    item = {"features": features.astype(np.float32),
            "times": (number * grid.stride + (window - 1) / 2) / rate,
            "duration": row.duration or length, "model": "", "window": window,
            "stride": grid.stride, "misfit": ""}
    _check(path, item)
    # Tools differ in what they do with the last frames, and annotations in what a duration is.
    said = row.duration or max((end for _, end, _ in row.segments), default=length)
    slack = (window + grid.stride) / rate + 0.05 * said
    if length + slack < said or row.duration and length - slack > said:
        what = "lasts" if row.duration else "has a segment that ends at"
        item["misfit"] = (f"{path}: {len(features)} features, {grid.stride} frames apart, at "
                          f"{rate:g} frames a second, end at {length:.1f} s, but by the annotation "
                          f"the video {what} {said:.1f} s" + ("; is it (F, T')?" if abs(
                              (features.shape[1] * grid.stride) / rate - said) <= slack else ""))
    return item


def _check(path, item):
    """DataError where an item is damaged."""
    features, times = item["features"], item["times"]
    if features.ndim != 2:
        raise DataError(f"{path}: has {max(features.ndim, 1) - 1} numbers a row, not one: "
                        "extract with --pool all, or save (T', F)")
    finite = np.isfinite(features).all() and np.isfinite(times).all()
    if times.shape != features.shape[:1] or not features.size or not finite or not (
            0 < item["duration"] < math.inf and item["window"] > 0 and item["stride"] > 0):
        raise DataError(f"{path}: damaged: features and times of different lengths, or values "
                        "that are not finite or not positive")


def _check_lengths(folder, items):
    """DataError where the features of a folder are not (T', F), or more than a tenth do not fit.

    A few odd videos are in every data set; more of them mean a wrong stride or rate.
    """
    shapes = {item["features"].shape: item["path"] for item in items}
    if len({width for _, width in shapes}) > 1:
        one, other = list(shapes.items())[:2]
        turned = len({height for height, _ in shapes}) == 1
        raise DataError(f"{folder}: {other[1]} is {other[0][0]} x {other[0][1]}, but {one[1]} is "
                        f"{one[0][0]} x {one[0][1]}; " + (
                            "these are (F, T'): save them transposed" if turned else
                            "the second axis is F, the same for all"))
    misfits = [item["misfit"] for item in items if item["misfit"]]
    if 10 * len(misfits) > len(items):
        raise DataError(f"{misfits[0]}; so it is with {len(misfits)} of {len(items)} videos: check "
                        "--stride and --rate")
