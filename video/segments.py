"""Temporal annotations: which action happens when in a long video.

    file or folder --> the first row of FORMATS that recognises it --> its reader --> Annotation

FORMATS is a table with one row per format. To add a format, write a row and its reader.
docs/formats.md and the tests use the example in the row. Unused keys are reported once. A key that
would change the meaning of a segment is a DataError.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "mine.json"
>>> _ = path.write_text('{"database": {"ab": {"subset": "training", "annotations": ['
...                     '{"segment": [1, 2.5], "label": "Jump"}]}}}')
>>> read_segments(path).videos["ab"].segments
[(1.0, 2.5, 'Jump')]
"""

import collections
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

from video.rows import DataError
from video.texts import parse_json, parse_seconds, read_text, split_lines

USED = {"subset", "annotations", "segment", "label", "duration", "fps", "frame_rate"}
CHANGES = {  # keys that would change the meaning of a segment, and why they are refused
    "score": "these are predictions, not annotations",
    "unit": "segments are in seconds", "time_unit": "segments are in seconds",
    "offset": "segments count from the start of the video",
    "ignore": "leave such segments out", "ambiguous": "leave such segments out",
    "difficult": "leave such segments out",
}
_THUMOS = re.compile(r"video_(validation|test|background|train)_\d+")
_TEXT = re.compile(r"(\w+)_(val|test)\.txt")


class Timed(NamedTuple):
    """The segments of one long video."""

    subset: str  # as written: training, Validation, ...
    segments: list  # of (start s, end s, label as written)
    duration: float | None = None  # seconds; None where the annotation has none
    rate: float | None = None  # frames per second; None where the annotation has none
    file: str = ""  # file name without suffix, where it may differ from the id


class Annotation(NamedTuple):
    """The result of `read_segments`."""

    kind: str  # the format, for the user
    videos: dict  # {id: Timed}
    subsets: tuple  # (for training, for evaluation), the default
    unused: tuple = ()  # keys that are not used
    notes: tuple = ()  # messages for the user

    def summary(self):
        """One line: format, videos per subset, segments, classes, unused keys."""
        labels = [label for row in self.videos.values() for *_, label in row.segments]
        counts = collections.Counter(row.subset for row in self.videos.values())
        parts = [", ".join(f"{count:,} videos of {name}" for name, count in counts.items()),
                 f"{len(labels):,} segments of {len(set(labels)):,} classes", *self.notes]
        if self.unused:
            parts.append("not used: " + ", ".join(self.unused))
        return f"{self.kind}: " + "; ".join(parts)


class Source(NamedTuple):
    """An opened annotation of any format."""

    path: Path
    content: object = None  # parsed JSON
    texts: tuple = ()  # paths of the text files below a folder

    @property
    def database(self):
        """{id: entry of the video}; empty where there is none."""
        content = self.content if isinstance(self.content, dict) else {}
        found = content.get("database")
        return found if isinstance(found, dict) else {}

    def any_has(self, key):
        """True where at least one video of the database has the key."""
        return any(isinstance(row, dict) and key in row for row in self.database.values())


class Format(NamedTuple):
    """One format of temporal annotations."""

    name: str
    matches: Callable  # Source -> bool
    read: Callable  # Source -> (videos, unused, notes)
    file: str  # usual name of the annotation file
    example: str  # an example of the annotation, in a few lines
    beside: tuple  # names of other files that belong to it
    subsets: tuple  # (for training, for evaluation), the default
    about: str  # notes for the user, printed in docs/formats.md


def read_segments(path):
    """Read a temporal annotation in any format of FORMATS -> Annotation.

    Segments that do not end after their start are left out and counted in the notes. Raises
    DataError: no such file, none of the formats, a segment or a key that cannot be understood.
    """
    path = Path(path)
    if os.path.isdir(path):
        source = Source(path, texts=tuple(sorted(
            file for file in path.rglob("*.txt") if _TEXT.fullmatch(file.name))))
    elif _TEXT.fullmatch(path.name):
        raise DataError(f"{path}: one class of THUMOS14; give the folder with the text files of "
                        "all classes")
    else:
        source = Source(path, parse_json(read_text(path), path))
    chosen = next((chosen for chosen in FORMATS if chosen.matches(source)), None)
    if chosen is None:
        raise DataError(f"{path}: not JSON in ActivityNet's form, with a `database` of "
                        "videos, and not a folder of THUMOS14's text files")
    try:
        videos, unused, notes = chosen.read(source)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON in ActivityNet's form: a `database` of ids, "
                        "each with `subset` and `annotations` of `segment` and `label` "
                        f"({type(error).__name__}: {error})") from None
    empty = sum(end <= start for row in videos.values() for start, end, _ in row.segments)
    if empty:
        notes = (*notes, f"{empty} segments do not end after their start and are left out")
    videos = {name: row._replace(segments=[s for s in row.segments if s[1] > s[0]])
              for name, row in videos.items()}
    if not videos:
        raise DataError(f"{path}: names no video")
    return Annotation(chosen.name, videos, chosen.subsets, unused, notes)


# ------------------------------------------------------------------------------------------------
# Readers


def _read_database(source):
    """(videos, unused, notes) of {"database": {id: {"subset", "annotations", ...}}}."""
    videos, keys = {}, dict.fromkeys(source.content)
    _refuse_changes(source.path, source.content)
    for name, row in source.database.items():
        location, segments = f"{source.path}, {name}", []
        for entry in row.get("annotations") or ():
            start, end = (_boundary(location, value) for value in _pair(location, entry["segment"]))
            segments.append((start, end, entry["label"]))
            keys |= dict.fromkeys(entry)
            _refuse_changes(location, entry)
        keys |= dict.fromkeys(row)
        _refuse_changes(location, row)
        texts = (name, row.get("subset"), *(label for *_, label in segments))
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{location}: not JSON in ActivityNet's form: subset and labels must "
                            "be text")
        for text in texts:
            text.encode()  # ValueError for an unpaired surrogate
        fps = row.get("fps") if row.get("fps") is not None else row.get("frame_rate")
        videos[name] = Timed(row["subset"], segments, _positive(location, row.get("duration")),
                             _positive(location, fps))
    return videos, tuple(key for key in keys if key not in USED | {"database"}), ()


def _read_fineaction(source):
    """ActivityNet's form, where features may be named by the file of the video."""
    videos, unused, notes = _read_database(source)
    videos = {name: row._replace(file=Path(source.database[name].get("filename") or "").stem)
              for name, row in videos.items()}
    return videos, tuple(key for key in unused if key != "filename"), notes


def _read_thumos(source):
    """Leaves out segments labelled Ambiguous, as the official evaluation does."""
    videos, unused, notes = _read_database(source)
    kept = {name: [segment for segment in row.segments if segment[2].lower() != "ambiguous"]
            for name, row in videos.items()}
    ambiguous = sum(len(row.segments) - len(kept[name]) for name, row in videos.items())
    if ambiguous:
        notes = (*notes, f"{ambiguous} segments labelled Ambiguous are left out")
    return {name: row._replace(segments=kept[name]) for name, row in videos.items()}, unused, notes


def _read_thumos_texts(source):
    """One text file per class and subset. A line is an id, start and end in seconds."""
    videos, notes = {}, []
    for file in source.texts:
        label, subset = _TEXT.fullmatch(file.name).groups()
        subset = "Validation" if subset == "val" else "Test"
        if label == "Ambiguous":
            notes.append(f"{file.name} is left out, as in the official evaluation")
            continue
        for number, line in enumerate(split_lines(read_text(file)), 1):
            if not line.strip():
                continue
            location, fields = f"{file}, line {number}", line.split()
            if len(fields) != 3 or None in (parse_seconds(fields[1]), parse_seconds(fields[2])):
                raise DataError(f"{location}: expected an id, a start and an end in seconds, got "
                                f"{line[:60]!r}")
            row = videos.setdefault(fields[0], Timed(subset, []))
            if row.subset != subset:
                raise DataError(f"{location}: {fields[0]} is also a video of {row.subset}")
            row.segments.append((parse_seconds(fields[1]), parse_seconds(fields[2]), label))
    return videos, (), tuple(notes)


def _pair(location, segment):
    if not isinstance(segment, list) or len(segment) != 2:
        raise DataError(f"{location}: not JSON in ActivityNet's form: a segment must be "
                        f"[start s, end s], got {str(segment)[:60]}")
    return segment


def _boundary(location, value):
    """A boundary of a segment, float seconds. Some annotations start slightly before 0."""
    parsed = parse_seconds(abs(value)) if type(value) in (int, float) else None
    if parsed is None:
        raise DataError(f"{location}: not JSON in ActivityNet's form: a segment holds "
                        f"{str(value)[:60]!r} instead of seconds")
    return float(value)


def _positive(location, value):
    """A duration or frame rate: a number, in HACS as text. None where it is missing or 0."""
    if value is not None and parse_seconds(value) is None:
        raise DataError(f"{location}: duration and frames per second must be numbers, got "
                        f"{str(value)[:60]!r}")
    return parse_seconds(value) or None if value is not None else None


def _refuse_changes(location, entry):
    for key, value in entry.items():
        reason = CHANGES.get(key.lower()) if value not in (None, "", False, []) else None
        if reason:
            raise DataError(f"{location}: has {key!r} {str(value)[:40]}: {reason}")


# ------------------------------------------------------------------------------------------------
# The table


def _is_thumos(source):
    return bool(source.database) and all(_THUMOS.fullmatch(name) for name in source.database)


def _is_fineaction(source):
    return source.any_has("filename") and all(re.fullmatch(r"v_\d{8}", name)
                                              for name in source.database)


def _is_hacs(source):
    return source.any_has("url") and all(
        isinstance(row, dict) and isinstance(row.get("duration"), str)
        for row in source.database.values())


def _is_activitynet(source):
    return bool(source.database) and ("taxonomy" in source.content or source.any_has("resolution"))


# The first row that recognises a source reads it, so special formats precede general ones.
FORMATS = (
    Format("THUMOS14, ActionFormer's JSON", _is_thumos, _read_thumos, "thumos14.json",
           '{"database": {"video_validation_0000266": {"subset": "Validation",\n'
           '    "duration": 91.4, "fps": 30.0, "annotations": [{"label": "BaseballPitch",\n'
           '    "segment": [72.8, 76.4], "segment(frames)": [2184, 2292], "label_id": 0}]}}}',
           (), ("Validation", "Test"),
           "a run trains on Validation and evaluates on Test, as is usual: the training set of "
           "THUMOS14 has no untrimmed videos"),
    Format("THUMOS14, one text file per class", lambda source: bool(source.texts),
           _read_thumos_texts, "annotation/BaseballPitch_val.txt",
           "video_validation_0000266  72.80 76.40",
           ("annotation/BaseballPitch_test.txt", "annotation/Ambiguous_val.txt"),
           ("Validation", "Test"),
           "give the folder with the text files of both subsets, or a folder above it. Ambiguous "
           "segments are left out. Each CliffDiving segment is also a Diving segment; both stay"),
    Format("FineAction", _is_fineaction, _read_fineaction,
           "annotations_gt.json",
           '{"database": {"v_00000001": {"filename": "v_00000001.mp4", "subset": "training",\n'
           '    "duration": 91.4, "annotations": [{"label": "drink", "segment": [7.2, 8.1]}]}}}',
           (), ("training", "validation"),
           "features are named by the id or by the file of the video"),
    Format("HACS Segments", _is_hacs, _read_database, "HACS_segments_v1.1.1.json",
           '{"database": {"--0edUL8zmA": {"subset": "training", "duration": "92.166667",\n'
           '    "url": "https://x/y", "annotations": [\n'
           '        {"label": "Dodgeball", "segment": [5.4, 11.6]}]}}}',
           (), ("training", "validation"), "the subset testing is published without segments"),
    Format("ActivityNet 1.3", _is_activitynet, _read_database, "activity_net.v1-3.min.json",
           '{"version": "VERSION 1.3", "taxonomy": [], "database": {"sJFgo9H6zNo": {\n'
           '    "subset": "training", "duration": 141.44, "resolution": "320x240",\n'
           '    "url": "https://x/y", "annotations": [{"label": "Fun sliding down",\n'
           '    "segment": [0.01, 139.04]}]}}}',
           (), ("training", "validation"),
           "ids have no prefix `v_`, but most files and features have it; both are found. The "
           "subset testing is published without segments"),
    Format("JSON in ActivityNet's form", lambda source: bool(source.database), _read_database,
           "mine.json",
           '{"database": {"ab": {"subset": "training", "duration": 30.5, "fps": 25,\n'
           '    "annotations": [{"label": "jump", "segment": [7.2, 8.1]}]}}}',
           (), ("training", "validation"),
           "for your own annotations; `duration` (seconds) and `fps` are optional"),
)

HEAD = """
## Temporal annotations

`--annotations` of the stage `localise` reads the formats below. The content decides the format. The
run prints the format, the number of videos in each subset, the numbers of segments and classes, and
the keys that it does not use.

`--train-subset` and `--val-subset` choose other subsets than the defaults named here.
"""
