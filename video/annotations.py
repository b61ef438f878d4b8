"""Which files a data set has, and what is said of them: every annotation format as published.

Each benchmark writes "this video shows that" in its own way. Conversion by hand is where labels
shift by one, paths with spaces break, and a test video slips into training. So files are read as
their authors publish them. The format is recognised by the content, never by a flag.

    folder or file --> format? --> rows --> where are the videos? --> Found(kind, rows, classes)

1. `read` looks at the source: a folder, a text, a JSON. The first lines decide the format. One
   function a format turns it into rows: possible file names, label, caption, split, question.
2. A row lists possible names of its file, because many formats give an id without a suffix.
   `_locate` looks in the list's folder, beside and below it, and keeps the folder that holds most
   files of a sample.
3. Where a source has splits of its own, data.VideoFiles trains on "train" and evaluates on the
   rest.

| format | recognised by | label | caption |
| --- | --- | --- | --- |
| folder | videos, or else pictures, below it | sub-folder | x.txt beside every x.mp4 |
| list | `path label`, separated by space, comma, tab or `::` | last field | |
| table, JSON lines | a column or key `path` (`video`, `image`, ...) | `label` | `caption` |
| Kinetics | a column youtube_id | label | |
| Something-Something V2 | JSON with id and template | template | label |
| UCF101 | Class/v_Class_g01_c01.avi; or classInd.txt in a folder | folder | |
| HMDB51 | CLASS_test_split1.txt, 1 = train, 2 = test | file name | |
| MSR-VTT | JSON with videos and sentences; its 9k list; the 1k-A list | | each sentence |
| WebVid | columns videoid, page_dir, name | | name |
| VINDLU | JSON list of video (or image) and caption, one or several | | each |
| question answering | question and answer | | |
| multiple choice | candidates (or several captions) and index of the answer | | the right one |

A video with several captions makes as many rows. UCF101 and HMDB51 have three splits: the first is
read unless a file of another one is named, and the summary says which.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "train.json"
>>> _ = path.with_name("run.mp4").write_bytes(b"")
>>> _ = path.write_text('[{"video": "run.mp4", "caption": ["a dog", "it runs"]}]')
>>> [row.caption for row in read(path).rows]
['a dog', 'it runs']
"""

import csv
import io
import itertools
import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError, printable


class DataError(UserError):
    """The user's data or request is wrong: one line with the fault, the file, and what to do."""


class Row(NamedTuple):
    """One thing that a source says about one file."""

    path: str | tuple  # of the file; before `_locate` its possible names, likeliest first
    label: str | None = None  # as written
    caption: str | None = None
    split: str | None = None  # "train" or "val", where the source tells; "val" also means test
    question: str | None = None
    answer: str | None = None  # the right answer in words
    candidates: tuple | None = None  # of answers in words, among them the right one


class Timed(NamedTuple):
    """What happens when in one long video."""

    subset: str  # as written: training, Validation, ...
    segments: list  # of (start s, end s, label as written)


class Found(NamedTuple):
    """What `read` makes of a source."""

    kind: str  # in words, for the user
    rows: list  # of Row, each with one path
    classes: list | None = None  # names in the official order, where the source fixes one


VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
IMAGE_SUFFIXES = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
LIKELY_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")  # for sources that tell an id and no suffix
_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".list")
_COLUMNS = {  # what a header line, or a key of JSON, may call a column
    "path": ("path", "video", "image", "file", "filename", "video_path", "image_path", "video_id"),
    "label": ("label", "class", "category"),
    "caption": ("caption", "text", "sentence"),
    "question": ("question",),
    "answer": ("answer", "correct"),
    "candidates": ("candidates", "options", "choices"),
    "split": ("split",),
}
MOST_CLASSES = 1_000_000  # a larger label is no class number but a date, or an id
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")  # a label that is meant as a number
_NUMBERED_ANSWER = re.compile(r"(?:a|option|candidate)_?\d+")  # a column with a candidate


def is_media(name):
    """True for the name of a video or picture, judged by its suffix."""
    suffix = Path(str(name).strip().strip('"')).suffix.lower()
    return suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES


def is_shards(source):
    """True for tar shards: a .tar, a pattern like clips-{000000..000123}.tar, a folder of them."""
    if os.path.isdir(source):
        try:
            names = [name for name in os.listdir(source) if not name.startswith(".")]
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror})") from None
        return any(name.endswith(".tar") for name in names) and not any(map(is_media, names))
    return str(source).endswith(".tar")


def read(source):
    """Read any source that the table above names.

    source   path of a folder, a list or a single video or picture
    returns  Found; every row's path begins with the folder in which most files are
    raises   DataError: no such file, none of the known kinds, a line that breaks its format
    """
    try:
        found = _read(Path(source))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or source}: cannot be read "
                        f"({error.strerror or error})") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
            csv.Error) as error:
        raise DataError(f"{source}: of no format known here "
                        f"({type(error).__name__}: {error})") from error
    for row in found.rows:
        try:
            "".join(filter(None, (*row[:6], *(row.candidates or ())))).encode()
        except UnicodeEncodeError:  # logs, lists and tokenizers would fail on it much later
            raise DataError(f"{source}: what it says of {row.path} holds half a character, or its "
                            "name is not UTF-8; mend or rename it") from None
        if "\0" in row.path:
            raise DataError(f"{source}: {row.path} can be no file's name")
    _all_have_the_same(source, found.rows, [row.path for row in found.rows])
    return found


def _read(source):
    if os.path.isdir(source):
        return _read_folder(source)
    if is_media(source.name):
        _must_be_a_file(source)
        return Found("one file", [Row(str(source))])
    return _locate(_read_text(source), source)


def _must_be_a_file(path):
    """DataError where there is no readable regular file. Reading a pipe could wait for ever."""
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: it can be no name
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):
        raise DataError(f"{path}: a folder, a pipe or a device in place of a file")


def _all_have_the_same(source, rows, places):
    """DataError where some rows lack what others have; places: of the rows, in words."""
    for what in ("label", "caption", "question", "answer", "candidates", "split"):
        has = [getattr(row, what) is not None for row in rows]
        if any(has) and not all(has):
            raise DataError(f"{source}, {places[has.index(False)]}: has no {what}, "
                            "other lines have")


# ------------------------------------------------------------------------------------------------
# Where the files are


def _locate(found, source):
    """Found, its rows with one path each. Files lie in the list's folder, below it or beside it."""
    rows, folder = found.rows, source if os.path.isdir(source) else source.parent
    if not rows:
        raise DataError(f"{source}: names no video")
    if all(isinstance(row.path, str) for row in rows) and os.path.isfile(folder / rows[0].path):
        return found._replace(rows=[row._replace(path=str(folder / row.path)) for row in rows])
    rows = [row if isinstance(row.path, tuple) else row._replace(path=(row.path,)) for row in rows]
    sample = rows[::max(1, len(rows) // 30)]

    def below(place):
        try:
            return sorted(entry for entry in place.iterdir()
                          if entry.is_dir() and entry.name[0] != ".")[:50]
        except OSError:
            return []

    def name_in(root, row):
        return next((name for name in row.path if os.path.isfile(root / name)), None)

    roots = [folder, *below(folder), folder.parent, *below(folder.parent)]
    best = max(roots, key=lambda root: sum(name_in(root, row) is not None for row in sample))
    return found._replace(rows=[row._replace(path=str(best / (name_in(best, row) or row.path[0])))
                                for row in rows])


def _names(stem, *folders):
    """Possible names of a file: its stem as it is or with a usual suffix, in these folders too."""
    stems = [*(f"{folder}/{stem}" for folder in folders if folder), stem]
    return tuple(stems if is_media(stem) else
                 [name + suffix for suffix in LIKELY_SUFFIXES for name in stems])


# ------------------------------------------------------------------------------------------------
# Folders


def _read_folder(folder):
    names = os.listdir(folder)
    splits = sorted(name for name in names if re.fullmatch(r".+_test_split1\.txt", name))
    if splits:
        return _locate(_read_hmdb51(folder / splits[0]), folder)
    if "classInd.txt" in names:
        return _locate(_read_ucf101(folder, 1), folder)
    names, what = _media_below(folder)
    labelled = all(len(name.parts) > 1 for name in names)
    split = next((name.parts[0] for name in names
                  if name.parts[0].lower() in ("train", "val", "validation", "test")), None)
    if labelled and split:
        raise DataError(f"{folder}: its sub-folder '{split}' looks like a split, not a class; "
                        f"give {folder / split} instead")
    captions = [None] * len(names)
    beside = [folder / name.with_suffix(".txt") for name in names]
    if all(map(os.path.isfile, beside)):
        captions = [_decode(path).strip() for path in beside]
        labelled, what = False, f"{what} with a .txt beside each"
    # The paths are final strings: for a broken link, _locate must not find a file of the same name
    # elsewhere.
    rows = [Row(str(folder / name), name.parts[0] if labelled else None, caption)
            for name, caption in zip(names, captions)]
    # A folder may have any name. A number that can be no class, such as a date, is a name.
    labels = {row.label for row in rows} - {None}
    named = any(_NUMBER.fullmatch(label) and not _is_class_number(_whole(label))
                for label in labels)
    return Found(f"folder of {what}", rows, sorted(labels) if named else None)


def _media_below(folder):
    """Paths of all videos below a folder, relative to it, or else of all pictures; and which."""
    def refuse(error):  # os.walk would skip folders that it may not read
        raise error

    def leads_back(link):  # up, to where the same files would be found again and again
        return link.is_symlink() and Path(os.path.realpath(link.parent)).is_relative_to(
            os.path.realpath(link))

    files = []
    for place, below, here in os.walk(folder, onerror=refuse, followlinks=True):
        below[:] = [name for name in below if name[0] != "." and name != "lost+found"
                    and not leads_back(Path(place, name))]
        files += [Path(place, name).relative_to(folder) for name in here
                  if is_media(name) and not name.startswith(".")]
    files.sort()
    videos = [name for name in files if name.suffix.lower() in VIDEO_SUFFIXES]
    if not files:
        raise DataError(f"{folder}: no video below this folder (looked for "
                        f"{' '.join(sorted(VIDEO_SUFFIXES))}, then for "
                        f"{' '.join(sorted(IMAGE_SUFFIXES))})")
    return (videos, "videos") if videos else (files, "pictures")


def _read_ucf101(folder, number):
    """The train and test list of one split, from the folder that holds classInd.txt."""
    rows = []
    for split, name in (("train", f"trainlist{number:02d}.txt"),
                        ("val", f"testlist{number:02d}.txt")):
        if os.path.isfile(folder / name):
            rows += _read_text(folder / name).rows
    if not rows:
        raise DataError(f"{folder}: has classInd.txt but no trainlist{number:02d}.txt")
    return Found(f"UCF101, split {number}", rows, _ucf101_classes(folder))


def _ucf101_classes(folder):
    path = folder / "classInd.txt"
    if not os.path.isfile(path):
        return None
    pairs = [line.split(maxsplit=1) for line in _lines(_decode(path)) if line.strip()]
    if any(len(pair) != 2 or _whole(pair[0]) is None for pair in pairs):
        raise DataError(f"{path}: expected lines like '1 ApplyEyeMakeup'")
    named = {_whole(number): name.strip() for number, name in pairs}
    if sorted(named) != list(range(1, len(pairs) + 1)):
        raise DataError(f"{path}: its numbers are not 1 to {len(pairs)}, each once")
    return [named[number] for number in sorted(named)]


def _read_hmdb51(path):
    """All classes of the split that this file belongs to; 1 = train, 2 = test, 0 = in neither."""
    number = re.search(r"_test_split(\d)\.txt$", path.name)[1]
    ending, rows, classes = f"_test_split{number}.txt", [], []
    for file in sorted(path.parent.glob("*" + ending)):
        label = file.name[:-len(ending)]
        classes.append(label)
        for at, line in enumerate(_lines(_decode(file)), 1):
            name, _, flag = line.strip().rpartition(" ")
            if line.strip() and (flag not in ("0", "1", "2") or not is_media(name)):
                raise DataError(f"{file}, line {at}: expected a video's name and 0, 1 or 2, "
                                f"got {line[:60]!r}")
            if line.strip() and flag != "0":
                rows.append(Row(_names(name.strip(), label), label,
                                split="train" if flag == "1" else "val"))
    return Found(f"HMDB51, split {number}", rows, classes)


# ------------------------------------------------------------------------------------------------
# Texts


def _lines(text):
    """The lines of a text. str.splitlines would also split captions, at U+2028 or form feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _whole(value):
    """The whole number >= 0 that a value of JSON or a text means, or None.

    7, "7", and 7.0 (where a column had gaps) are 7. true, 7.5 and what fits no int64 are none.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) <= 18 else None
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return value if is_int and 0 <= value < 10**18 else None


def _is_class_number(number):
    return number is not None and number < MOST_CLASSES


def _split(text):
    """"train" for train, Training ...; None for none; else, as for validate and test, "val"."""
    return ("train" if text.lower().startswith("train") else "val") if text else None


def _decode(path):
    _must_be_a_file(path)
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() in _TEXT_SUFFIXES and b"\0" not in raw:
            line = raw[:error.start].count(b"\n") + 1
            raise DataError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; "
                            "save the list with that encoding") from None
        raise DataError(f"{path}: neither a video nor a text file; give a folder of videos, one "
                        "video, or a list with 'path label' on each line") from None


def _read_text(path):
    text = _decode(path)
    lines = [(number, line) for number, line in enumerate(map(str.strip, _lines(text)), 1) if line]
    if not lines:
        raise DataError(f"{path}: the list is empty; write 'path label' on each line")
    if re.fullmatch(r".+_test_split\d\.txt", path.name) and lines[0][1][-1] in "012":
        return _read_hmdb51(path)
    if path.suffix.lower() == ".jsonl":
        return _read_json_lines(path, lines)
    if lines[0][1][0] in "[{":
        return _read_json(path, text, lines)
    for delimiter in (",", "\t"):
        names = [name.strip().strip('"').lower() for name in lines[0][1].split(delimiter)]
        if set(names) & {"youtube_id", "videoid", *_COLUMNS["path"]}:
            return _read_table(path, text, delimiter)
    if all(re.match(r"(.+)/v_\w+_g\d\d_c\d\d\.\w+(?: \d+)?$", line) for _, line in lines):
        stems = [line.split(" ")[0] for _, line in lines]
        split = {"train": "train", "testl": "val"}.get(path.name[:5])
        number = re.search(r"list0?(\d)", path.name)
        rows = [Row((stem, stem.split("/")[-1]), stem.split("/")[-2], split=split)
                for stem in stems]
        return Found("UCF101" + (f", split {number[1]}" if number else ""), rows,
                     _ucf101_classes(path.parent))
    return _read_list(path, lines)


def _read_list(path, lines):
    """`path label` lines. VideoMAE V2 writes `path 0 -1 [label]`: from frame 0 to the end."""
    if all(is_media(line) for _, line in lines):
        return Found("list of paths", [Row(line.strip('"')) for _, line in lines])
    whole = [re.fullmatch(r"(.+?)[ ,]+0[ ,]+-1(?:[ ,]+(\d+))?", line) for _, line in lines]
    if all(match and is_media(match[1]) for match in whole):
        return Found("VideoMAE V2's list of whole videos",
                     [Row(match[1], match[2]) for match in whole])

    def splits_off_a_video(separator):
        return sum(separator in line and is_media(line.rsplit(separator, 1)[0])
                   for _, line in lines)
    # Split at the last separator: a path may contain it too.
    separator = max(("::", "\t", ",", " "), key=splits_off_a_video)
    rows = [(number, *line.rpartition(separator)) for number, line in lines]
    if rows[0][1].strip().lower() in _COLUMNS["path"]:
        del rows[0]
    for number, name, _, label in rows:
        if not is_media(name):
            raise DataError(f"{path}, line {number}: expected 'path label', a video's name and "
                            f"then a space, comma, tab or '::', got {(name or label)[:60]!r}")
    rows = [Row(name.strip().strip('"'), label.strip() or None) for _, name, _, label in rows]
    return Found("list of `path label` lines", rows)


def _read_table(path, text, delimiter, quoting=csv.QUOTE_MINIMAL):
    """A CSV or tab-separated file whose header names its columns."""
    # Strict: otherwise an unclosed quote makes the rest of the file one caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting,
                        strict=True)
    names, records = None, []
    while True:
        line = reader.line_num + 1  # the first of the row; quoted text may hold line breaks
        try:
            row = next(reader, None)
        except csv.Error as error:
            if delimiter == "\t" and quoting != csv.QUOTE_NONE:  # such files often have no quoting
                return _read_table(path, text, delimiter, csv.QUOTE_NONE)
            raise DataError(f"{path}, line {line}: not a row of a table ({error}); quoted text "
                            "ends with a quote, and a quote within it is doubled") from None
        if row is None:
            break
        if not row or len(row) == 1 and not row[0].strip():
            continue
        if names is None:
            names = [name.strip().lower() for name in row]
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice:
                raise DataError(f"{path}, line {line}: two columns are called {twice!r}")
            continue
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: {len(row)} columns, but the header has "
                            f"{len(names)}; put quotes around text that contains the separator")
        records.append((f"line {line}", {name: text.strip() for name, text in zip(names, row)}))
    if not records:
        raise DataError(f"{path}: has a header and no line below it")
    return _from_table(path, names, records)


def _from_table(path, names, records):
    """Found, from the columns' names and [(place in words, {column: text})]."""
    if "youtube_id" in names:
        return _read_kinetics(path, names, records)
    if {"videoid", "page_dir", "name"} <= set(names):
        return Found("WebVid", [
            Row(_names(record["videoid"], record["page_dir"]), caption=record["name"])
            for _, record in records])
    if names == ["video_id"]:
        return _read_msrvtt_list(path, [record["video_id"] for _, record in records])
    numbered = [name for name in names if _NUMBERED_ANSWER.fullmatch(name)]
    if numbered and "answer" in names:
        for _, record in records:
            record["candidates"] = [record[name] for name in numbered]
    kind = "MSR-VTT 1k-A" if {"vid_key", "sentence"} <= set(names) else "table with a header"
    return _from_records(path, records, kind)


def _read_kinetics(path, names, records):
    """Kinetics' own CSV: label,youtube_id,time_start,time_end,split; files are id_start_end.mp4."""
    rows = []
    for line, record in records:
        try:
            start, end = (int(float(record[key])) for key in ("time_start", "time_end"))
            stem = f"{record['youtube_id']}_{start:06d}_{end:06d}"
        except (KeyError, ValueError, OverflowError):
            raise DataError(f"{path}, {line}: Kinetics needs time_start and time_end in "
                            "seconds") from None
        label, split = record.get("label") or None, record.get("split", "")
        folders = [label, label and label.replace(" ", "_"), split, label and f"{split}/{label}"]
        rows.append(Row(_names(stem, *folders) + _names(record["youtube_id"], label), label,
                        split=_split(split)))
    return Found("Kinetics", rows)


def _read_msrvtt_list(path, ids):
    """A list of MSR-VTT's video ids, like its 9k list; the sentences are in the JSON beside it."""
    found = [(file, _parse(_decode(file), file)) for file in sorted(path.parent.glob("*.json"))]
    found = [(file, content) for file, content in found
             if isinstance(content, dict) and {"videos", "sentences"} <= content.keys()]
    if not found:
        raise DataError(f"{path}: lists video ids alone; put MSRVTT_data.json, which has the "
                        "sentences, beside it")

    def unknown(content):
        return len(set(ids) - {sentence["video_id"] for sentence in content["sentences"]})

    # Two files are published, of different videos: take the one that knows most of these.
    file, content = min(found, key=lambda pair: unknown(pair[1]))
    rows = _msrvtt_rows(file, content, set(ids))
    return Found(f"MSR-VTT, the {len(ids):,} videos of {path.name}",
                 [row._replace(split=None) for row in rows])


def _msrvtt_rows(path, content, wanted=None):
    """A row for each sentence, or for those of the wanted ids."""
    try:
        splits = {video["video_id"]: video.get("split") for video in content["videos"]}
        pairs = [(sentence["video_id"], sentence["caption"]) for sentence in content["sentences"]]
        texts = [*splits, *(split for split in splits.values() if split is not None),
                 *itertools.chain(*pairs)]
    except (KeyError, TypeError, AttributeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: MSR-VTT needs video_id in videos, video_id and caption in "
                        "sentences, all of them text")
    named = {name for name, _ in pairs}
    unknown = sorted((wanted or set()) - named) or sorted(named - splits.keys())
    if unknown:
        raise DataError(f"{path}: {unknown[0]!r} is not both among its videos and in its sentences")
    return [Row(_names(name), caption=caption.strip(), split=_split(splits[name]))
            for name, caption in pairs if wanted is None or name in wanted]


# ------------------------------------------------------------------------------------------------
# JSON


def _parse(text, place):
    """What a JSON text holds; DataError that names the place where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from None


def _read_json(path, text, lines):
    try:
        content = _parse(text, path)
    except DataError as error:
        if "Extra data" in str(error):
            return _read_json_lines(path, lines)
        raise
    if isinstance(content, dict) and {"videos", "sentences"} <= content.keys():
        return Found("MSR-VTT", _msrvtt_rows(path, content))
    if isinstance(content, dict) and content and all(
            str(value).isdecimal() for value in content.values()):
        raise DataError(f"{path}: this is the file of label names; give the list of videos that "
                        "lies beside it")
    if isinstance(content, dict) and set(content) & set(_COLUMNS["path"]):
        content = [content]
    if not isinstance(content, list) or not content or not all(
            isinstance(item, dict) for item in content):
        raise DataError(f"{path}: no known format: expected a list of objects like "
                        '{"video": "dog.mp4", "caption": "a dog runs"}, or MSR-VTT\'s videos and '
                        "sentences")
    if "id" in content[0] and not set(content[0]) & set(_COLUMNS["path"]):
        return _read_something(path, content)
    records = [(f"entry {number}", item) for number, item in enumerate(content, 1)]
    return _from_records(path, records, None)


def _read_something(path, content):
    """Something-Something V2: labels are templates without brackets; a labels file numbers them."""
    classes = None
    for file in sorted(path.parent.glob("*labels.json")):
        classes = _numbered_templates(file)
    known, rows = set(classes or ()), []
    for number, item in enumerate(content, 1):
        name, template, caption = item.get("id"), item.get("template"), item.get("label")
        name = name if isinstance(name, str) else _whole(name)
        if name in (None, "") or not all(text is None or isinstance(text, str)
                                         for text in (template, caption)):
            raise DataError(f"{path}, entry {number}: needs an \"id\", and template and label must "
                            "be text")
        label = template and template.replace("[", "").replace("]", "")
        if label and classes and label not in known:
            raise DataError(f"{path}, entry {number}: its template {label!r} is not in the labels "
                            "file beside it")
        rows.append(Row(_names(str(name)), label or None, caption))
    if classes is None and any(row.label for row in rows):
        raise DataError(f"{path}: put something-something-v2-labels.json, which numbers the "
                        "templates, beside it")
    return Found("Something-Something V2", rows, classes)


def _numbered_templates(file):
    """The templates of a labels file, in the order of their numbers."""
    numbers = _parse(_decode(file), file)
    if isinstance(numbers, dict):
        whole = {name: _whole(number) for name, number in numbers.items()}
        if set(whole.values()) == set(range(len(whole))):
            return sorted(whole, key=whole.get)
    raise DataError(f"{file}: does not number the templates, 0 to one less than there are, "
                    "each once")


def _read_json_lines(path, lines):
    """An object on each line, with the same names for the keys as columns have."""
    records = []
    for number, line in lines:
        item = _parse(line, f"{path}, line {number}")
        if not isinstance(item, dict):
            raise DataError(f"{path}, line {number}: expected an object like "
                            '{"path": "dog.mp4", "caption": "a dog runs"}, got ' + line[:40])
        records.append((f"line {number}", item))
    return _from_records(path, records, "JSON lines")


def _from_records(path, records, kind):
    """Found, from [(place in words, {name of _COLUMNS: value})]; `kind`: of the container."""
    rows, places = [], []
    for place, record in records:
        found = _rows_of(f"{path}, {place}", record)
        rows += found
        places += [place] * len(found)
    if rows[0].candidates:
        kind = "multiple choice"
    elif rows[0].question:
        kind = "question answering"
    elif kind is None:
        captions = rows[0].caption
        kind = "captions in JSON, as VINDLU and UMT have them" if captions else "JSON"
    _all_have_the_same(path, rows, places)
    return Found(kind, rows)


def _rows_of(place, record):
    """The rows of one record, one for each caption; place: in words, with the file."""
    field = {key: next((record[name] for name in names if record.get(name) is not None), None)
             for key, names in _COLUMNS.items()}
    name, label, caption, question, answer, candidates, split = (field[key] for key in _COLUMNS)
    label = label if isinstance(label, str) or _whole(label) is None else str(_whole(label))
    if isinstance(caption, list) and isinstance(answer, int) and candidates is None:
        caption, candidates = None, caption  # UMT's multiple choice
    captions = _as_list(caption)
    texts = [name, *captions, *_as_list(candidates),
             *(text for text in (label, question, split) if text is not None)]
    if not all(isinstance(text, str) for text in texts) or not name.strip() or caption == []:
        raise DataError(f"{place}: needs a \"path\", and path and caption must be text, label text "
                        f"or a whole number, got {json.dumps(record)[:60]}")
    if candidates is not None:
        answer, candidates = _chosen(place, answer, candidates)
        captions = [answer]
    elif answer is not None:
        answer = _most_frequent(place, answer)
    names = name.strip() if is_media(name) else _names(name.strip())
    label, split = label and label.strip() or None, _split(split and split.strip())
    return [Row(names, label, text and text.strip(), split, question or None, answer, candidates)
            for text in captions or [None]]


def _as_list(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def _chosen(place, answer, candidates):
    """(the right one, all candidates) of a multiple choice whose answer is an index."""
    if not isinstance(candidates, list) or not candidates:
        raise DataError(f"{place}: the candidates of a multiple choice are a list of texts, "
                        f"got {json.dumps(candidates)[:60]}")
    right = _whole(answer)
    if right is None or right >= len(candidates):
        raise DataError(f"{place}: the answer of a multiple choice is the place of the right one, "
                        f"0 to {len(candidates) - 1}, got {json.dumps(answer)[:60]}")
    return candidates[right], tuple(candidates)


def _most_frequent(place, answer):
    """The answer in words; of a list of answers the most frequent one."""
    answers = _as_list(answer)
    if not answers or not all(isinstance(text, str) or _whole(text) is not None
                              for text in answers):
        raise DataError(f"{place}: an answer is a text, a whole number, or a list of these, "
                        f"got {json.dumps(answer)[:60]}")
    answers = [text if isinstance(text, str) else str(_whole(text)) for text in answers]
    return max(answers, key=answers.count)


# ------------------------------------------------------------------------------------------------
# Labels and parts


def number_labels(source, labels, classes):
    """(class names, {label as written: number}); all-integer labels are numbers already.

    labels   of all rows, as written, None where there is none
    classes  names in the order of their numbers, or None: the labels themselves, sorted
    raises   DataError: a label that is not among the classes, or a number that can be no class
    """
    written = sorted({label for label in labels if label is not None})
    if not written:
        return list(classes or []), {}
    if not set(written) <= set(classes or ()) and all(map(_NUMBER.fullmatch, written)):
        number = {label: _whole(label) for label in written}
        odd = [label for label in written if not _is_class_number(number[label])]
        if odd:
            raise DataError(f"{source}: label {odd[0][:60]!r} is no class number; these are whole, "
                            f"from 0 on, and below {MOST_CLASSES:,}")
        classes = list(classes or map(str, range(max(number.values()) + 1)))
        unknown = [label for label in written if number[label] >= len(classes)]
    else:
        classes = list(classes or written)
        number = {name: place for place, name in enumerate(classes)}
        unknown = [label for label in written if label not in number]
    if unknown:
        raise DataError(f"{source}: label {unknown[0]!r} is not among the {len(classes)} known "
                        f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    return classes, number


def split_files(items, fraction=0.1, seed=0):
    """(training items, held-out items): a fixed random share of at least one file is held out.

    items   tuples that begin with a path; those of one path, its captions, stay together

    The seed is not the training seed, so runs with different seeds share a validation set. A single
    file is in both parts.
    """
    paths = list(dict.fromkeys(item[0] for item in items))
    if len(paths) < 2:
        return list(items), list(items)
    count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    order = np.random.default_rng(seed).permutation(len(paths))
    held = {paths[i] for i in order[:count].tolist()}
    return ([item for item in items if item[0] not in held],
            [item for item in items if item[0] in held])


def read_segments(path):
    """Temporal annotations in the format of ActivityNet; THUMOS14, HACS and FineAction use it too.

    {"database": {id: {"subset": ..., "annotations": [
        {"segment": [start s, end s], "label": ...}]}}}

    returns  {id: Timed}. Segments that end where they start, or earlier, are left out and counted
             on standard error
    raises   DataError: no such file, or another format
    """
    path, found = Path(path), {}
    try:
        for name, row in _parse(_decode(path), path)["database"].items():
            segments = [(*entry["segment"], entry["label"]) for entry in row.get("annotations", ())]
            for text in (name, row["subset"], *(label for *_, label in segments)):
                text.encode()  # AttributeError: no text; ValueError: it holds half a character
            for start, end, _ in segments:
                if not all(type(moment) in (int, float) and math.isfinite(moment)
                           for moment in (start, end)):
                    raise ValueError(f"{name}: a segment from {start!r} to {end!r}")
            found[name] = Timed(row["subset"], [(float(start), float(end), label)
                                                for start, end, label in segments])
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise DataError(f"{path}: not an annotation as ActivityNet has them: JSON with a "
                        "`database` of id, `subset` and `annotations` of `segment` and `label` "
                        f"({type(error).__name__}: {error})") from None
    if not found:
        raise DataError(f"{path}: names no video")
    empty = sum(end <= start for row in found.values() for start, end, _ in row.segments)
    if empty:
        print(f"{path}: {empty} segments end where they start, or earlier, and are left out",
              file=sys.stderr)
    return {name: row._replace(segments=[s for s in row.segments if s[1] > s[0]])
            for name, row in found.items()}


def main(argv=None):
    """`python -m video.annotations SOURCE`: print the format of a source, and its first rows."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1:
            raise DataError("python -m video.annotations SOURCE: give one folder or file")
        found = read(argv[0])
    except DataError as error:
        print(f"annotations.py: {error}", file=sys.stderr)
        return 2
    print(printable(f"{argv[0]}: {found.kind}, {len(found.rows):,} rows"))
    for row in itertools.islice(found.rows, 5):
        print({key: value for key, value in row._asdict().items() if value is not None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
