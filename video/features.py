"""Precomputed features of long videos, matched with their temporal annotations.

    tools/extract.py      .npz with features, times, window, stride and the model
    other sources         .npy, or .npz with one array (T', F); a `Grid` gives the times

docs/tasks.md has the stride, window and frame rate of published features.
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

DAMAGE = (  # what numpy raises for damaged or foreign files
    KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError, OSError, EOFError,
    RuntimeError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)
KEYS = ("feats", "timestamps", "duration", "model", "window", "stride")  # of tools/extract.py
OTHERS = (".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".mat", ".csv")
_PART = re.compile(r"(.+)_[\d.]+_[\d.]+")  # name of tools/extract.py for a part: id, start, end


class Grid(NamedTuple):
    """The positions of features in a video, for files without times."""

    stride: int = 0  # frames from one row to the next; 0 = unknown
    window: int = 0  # frames that one row covers; 0 = stride
    rate: float = 0.0  # frames per second of the video that was read; 0 = that of the annotation


def read_features(folder, videos, subset, classes=None, grid=Grid()):
    """Features of long videos with their annotated segments: (items, class names, missing).

    folder    of files named by the ids of the annotation, or by `v_` + id: .npz of
              tools/extract.py,
              or .npy or .npz with one array (T', F)
    videos    `segments.Annotation.videos`
    subset    the subset to read, as the annotation names it; case does not matter
    classes   names in label order; None: the sorted labels of this subset
    grid      `Grid` of files that hold only features
    raises    DataError: no such subset or folder, no features at all, a damaged file, an unknown
              label, no segment, features that do not fit the annotation

    missing are the ids of videos without features. An item is a dict:

    features        float32 (T', F)
    times           float64 (T',), seconds
    duration        seconds
    segments        list of (start s, end s, class number)
    path, model     str; model is "" if unknown
    window, stride  int, frames
    misfit          a sentence if the lengths of features and annotation differ, else ""
    """
    folder, items = Path(folder), []
    rows = {name: row for name, row in videos.items() if row.subset.lower() == subset.lower()}
    if not rows:
        known = ", ".join(sorted({row.subset for row in videos.values()}))
        raise DataError(f"no video of the subset {subset!r} in the annotation: it has {known}; "
                        "give --train-subset and --val-subset")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; it should hold one file of features per "
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
        raise DataError(f"{folder}: no video of the subset {subset!r} has both features and "
                        "segments; many test sets are published without segments")
    _check_lengths(folder, items)
    return items, classes, [name for name in rows if name not in files]


def _files(folder, rows):
    """{id: path of its features}. DataError where no video has any, or a video has two files."""
    files, parts, others, matched = {}, {}, [], {}
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
        same_stem = next((files[stem] for stem in names if stem in files), ())
        if len(same_stem) > 1:
            raise DataError(f"{same_stem[0]} and {same_stem[1]}: two files of features of one "
                            "video; keep one")
        if same_stem:
            matched[name] = same_stem[0]
        elif part := next((parts[stem] for stem in names if stem in parts), None):
            raise DataError(f"{part}: features of a part of {name}; localisation needs whole "
                            "videos: extract them with a list that names no parts")
    if not matched and others:
        raise DataError(f"{others[0]}: {others[0].suffix} files are not read; save the features of "
                        "each video as .npy, (T', F)")
    if not matched:
        raise DataError(f"{folder}: has features of none of the {len(rows)} videos, "
                        f"such as {next(iter(rows))}.npz")
    return matched


def _read_file(path, row, grid):
    """An item of `read_features` without segments and path."""
    try:
        raw = _arrays(path)
        kinds = "".join(array.dtype.kind for array in raw.values())
        if not re.fullmatch("[fiu]|[fiu][fiu][fiu]U[iu][iu]", kinds):
            raise ValueError(f"arrays of wrong types, {kinds}")
        if len(raw) == 1:
            return _item_on_grid(path, *raw.values(), row, grid)
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
    """{name: array}: those of tools/extract.py, or a single array. Nothing is unpickled."""
    content = np.load(path)  # ValueError for an array of Python objects
    if isinstance(content, np.ndarray):
        return {"feats": content}
    with content as file:
        return {key: file[key] for key in (file.files if len(file.files) == 1 else KEYS)}


def _item_on_grid(path, features, row, grid):
    """An item whose times follow from `grid`.

    Row i of the features covers `window` frames, starting at frame i * stride.
    """
    if not grid.stride:
        raise DataError(f"{path}: holds only features; give the number of frames from one to "
                        "the next with --stride (and --window, --rate)")
    rate, window = grid.rate or row.rate, grid.window or grid.stride
    if not rate:
        raise DataError(f"{path}: holds only features, and the annotation has no `fps`; give "
                        "the frames per second of the video with --rate")
    index = np.arange(len(features) if features.ndim else 0)
    length = (index[-1:].sum() * grid.stride + window) / rate  # seconds that the features cover
    item = {"features": features.astype(np.float32),
            "times": (index * grid.stride + (window - 1) / 2) / rate,
            "duration": row.duration or length, "model": "", "window": window,
            "stride": grid.stride, "misfit": ""}
    _check(path, item)
    # Tools treat the last frames differently, and annotations define a duration differently.
    annotated = row.duration or max((end for _, end, _ in row.segments), default=length)
    slack = (window + grid.stride) / rate + 0.05 * annotated
    if length + slack < annotated or row.duration and length - slack > annotated:
        what = "lasts" if row.duration else "has a segment that ends at"
        item["misfit"] = (f"{path}: {len(features)} features, {grid.stride} frames apart, at "
                          f"{rate:g} frames per second, end at {length:.1f} s, but in the "
                          f"annotation the video {what} {annotated:.1f} s" + (
                              "; is it (F, T')?" if abs((features.shape[1] * grid.stride) / rate
                                                        - annotated) <= slack else ""))
    return item


def _check(path, item):
    """DataError where an item is damaged."""
    features, times = item["features"], item["times"]
    if features.ndim != 2:
        raise DataError(f"{path}: features have {max(features.ndim, 1)} axes, not two: "
                        "extract with --pool all, or save (T', F)")
    finite = np.isfinite(features).all() and np.isfinite(times).all()
    if times.shape != features.shape[:1] or not features.size or not finite or not (
            0 < item["duration"] < math.inf and item["window"] > 0 and item["stride"] > 0):
        raise DataError(f"{path}: damaged: features and times have different lengths, or "
                        "values are not finite or not positive")


def _check_lengths(folder, items):
    """DataError if features of a folder are not (T', F), or over a tenth do not fit in length.

    A few odd videos are normal. More of them mean a wrong stride or rate.
    """
    shapes = {item["features"].shape: item["path"] for item in items}
    if len({width for _, width in shapes}) > 1:
        one, other = list(shapes.items())[:2]
        transposed = len({height for height, _ in shapes}) == 1
        raise DataError(f"{folder}: {other[1]} is {other[0][0]} x {other[0][1]}, but {one[1]} is "
                        f"{one[0][0]} x {one[0][1]}; " + (
                            "these are (F, T'): save them transposed" if transposed else
                            "the second axis is F, the same for all"))
    misfits = [item["misfit"] for item in items if item["misfit"]]
    if 10 * len(misfits) > len(items):
        raise DataError(f"{misfits[0]}; this is so for {len(misfits)} of {len(items)} videos: "
                        "check --stride and --rate")
