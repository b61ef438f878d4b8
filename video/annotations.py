"""Which clips a data set has, and what is said of them.

A source is a folder, a list, a benchmark's own file, or a single video. The content decides its
format, never a flag.

    folder or list --> format --> rows --> where are the files? --> Listing(kind, rows, classes)

1. A list is read by the first of video/formats.FORMATS that recognises it. A folder is read here.
2. A row lists possible names of its file, because many formats give an id without a suffix.
   `_locate` looks in the list's folder and below it, and in a folder that the user names. It never
   looks elsewhere, unless the path in the list says so.
3. Where a source has splits of its own, data.VideoFiles trains on "train" and evaluates on the
   rest. Otherwise `split_files` holds out a tenth of the files.

What a source says is used; what is not used is named in `Listing.unused` and `Listing.notes`; what
would change the meaning is a DataError.

| folder | label | caption |
| --- | --- | --- |
| of videos, or else of pictures | first sub-folder | x.txt beside every x.mp4 |
| of folders of numbered pictures: each is a video | first sub-folder | |
| with metadata.csv or metadata.jsonl, as the Hugging Face hub has it | its columns | its columns |
| UCF101's and HMDB51's split lists, or a folder that has them below it | official | |

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
import functools
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np

from engine.errors import printable
from video import formats
from video.frames import is_frames_folder
from video.rows import (IMAGE_SUFFIXES, LIKELY_SUFFIXES, VIDEO_SUFFIXES, DataError, Listing, Row,
                        is_media)
from video.texts import decode, must_be_a_file, read_source, whole

MOST_CLASSES = 1_000_000  # a larger label is no class number but a date, or an id
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")  # a label that is meant as a number
_GROUP = re.compile(r"(v_.+_g\d+)_c\d+\.\w+")  # UCF101: clips of one group are cut from one video
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl")


def add_flags(parser):
    """--video-folder and --frame-rate, which every command that reads a source has."""
    parser.add_argument("--video-folder", default="",
                        help="where the files lie, if not in the list's folder or below it")
    parser.add_argument("--frame-rate", type=float, default=25.0,
                        help="frames a second of videos that are folders of pictures; 0 = each "
                             "picture is a clip (default: 25)")


def is_shards(source):
    """True for tar shards: a .tar, a pattern like clips-{000000..000123}.tar, a folder of them."""
    if os.path.isdir(source):
        try:
            names = [name for name in os.listdir(source) if not name.startswith(".")]
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror})") from None
        return any(name.endswith(".tar") for name in names) and not any(map(is_media, names))
    return str(source).endswith(".tar")


def read(source, video_folder="", pictures_are_videos=True):
    """Read any source that the table above or video/formats.py names.

    source        path of a folder, a list or a single video or picture
    video_folder  where the files lie, if not in the list's folder or below it
    pictures_are_videos  True: numbered pictures that share a folder are one video; False: each
                  picture is a clip of one frame
    returns       Listing
    raises        DataError: no such file, none of the known formats, a line that breaks its format
    """
    if video_folder and not os.path.isdir(video_folder):
        raise DataError(f"--video-folder {video_folder}: no such folder")
    try:
        found = _read(Path(source), video_folder, pictures_are_videos)
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
            "".join(filter(None, (row.path, *labels_of(row.label), *row[2:6],
                                  *(row.candidates or ())))).encode()
        except UnicodeEncodeError:  # logs, lists and tokenizers would fail on it much later
            raise DataError(f"{source}: what it says of {row.path} holds half a character, or its "
                            "name is not UTF-8; mend or rename it") from None
        if "\0" in row.path:
            raise DataError(f"{source}: {row.path} can be no file's name")
    formats.all_have_the_same(source, found.rows, [row.path for row in found.rows])
    return found


def _read(source, video_folder, pictures_are_videos):
    folders = [Path(video_folder)] if video_folder else []
    if os.path.isdir(source):
        return _read_folder(source, folders, pictures_are_videos)
    if is_media(source.name):
        must_be_a_file(source)
        return Listing("one file", [Row(str(source))])
    return _locate(formats.read_list(read_source(source)), [*folders, source.parent], source)


# ------------------------------------------------------------------------------------------------
# Where the files are


def _locate(found, folders, source):
    """Listing, its rows with one path each.

    Files lie in one of the folders or below it. A list of paths has all its files in one place; ids
    may be spread over several folders, if no id is in two of them.
    """
    if not found.rows:
        raise DataError(f"{source}: names no video")
    find = _Finder()
    rows = [row if isinstance(row.path, tuple) else row._replace(path=(row.path,))
            for row in found.rows]
    sample = rows[::max(1, len(rows) // 30)]
    roots = {root: {i for i, row in enumerate(sample) if find(root, row)}
             for root in _roots(folders)}
    places = sorted(roots, key=lambda root: -len(roots[root]))
    if not roots[places[0]]:
        above = folders[-1].resolve().parent
        other = next((root for root in (above, *_below(above))
                      if any(find(root, row) for row in sample)), None)
        hint = f"; {other} has files of these names: if these are meant, say --video-folder " \
               f"{other}" if other else ""
        found = found._replace(hint=hint)
    places = _preferred(places, roots, source) + places
    used, covered = places[:1], set(roots[places[0]])
    for root in places[1:]:  # also those without a file of the sample
        if root not in used and not roots[root] & covered:
            used.append(root)
            covered |= roots[root]
    return found._replace(rows=[
        _found_in(find, used if isinstance(old.path, tuple) else used[:1], row)
        for old, row in zip(found.rows, rows)])


def _preferred(places, roots, source):
    """Of several folders with as many files of the list: [the nearest one, or the one whose name is
    in the list's], or a DataError where two are alike. [] where one folder has most."""
    best = roots[places[0]]
    alike = [root for root in places if len(roots[root]) == len(best) and roots[root] & best]
    if len(alike) < 2:
        return []
    depth = min(len(root.parts) for root in alike)
    alike = [root for root in alike if len(root.parts) == depth]
    called = [root for root in alike if root.name.lower() in source.name.lower()]
    if len(alike) > 1 and len(called) != 1:
        raise DataError(f"{source}: {alike[0]} and {alike[1]} have files of the same names; say "
                        f"which are meant: --video-folder {alike[0]}")
    return called if len(alike) > 1 else alike


def _found_in(find, roots, row):
    for root in roots:
        file = find(root, row)
        if file:
            path, part = file
            in_frames = row.frames_part and os.path.isdir(path)
            return row._replace(path=path, part=row.frames_part if in_frames else part)
    name = next(name for name in row.path if isinstance(name, str))
    return row._replace(path=str(roots[0] / (name if is_media(name) else name + ".mp4")))


def _below(folder):
    try:
        return sorted(entry for entry in folder.iterdir()
                      if entry.is_dir() and entry.name[0] != ".")[:50]
    except OSError:
        return []


def _roots(folders):
    """The folders, and what lies one or two steps below them."""
    first = [folder for top in folders for folder in (top, *_below(top))]
    second = [folder for top in folders for one in _below(top) for folder in _below(one)][:200]
    return list(dict.fromkeys(first + second))


class _Finder:
    """(folder, row) -> (path, part) of the first of the row's possible names that is there.

    Each folder is listed once: that is faster than asking for each of a million names.
    """

    def __init__(self):
        self._list = functools.lru_cache(maxsize=None)(self._read)

    def _read(self, folder):
        """({name: True for a folder}, {name without suffix: names}) of a folder."""
        try:
            with os.scandir(folder) as entries:
                names = {entry.name: entry.is_dir() for entry in entries
                         if entry.is_dir() or entry.is_file()}
        except OSError:
            return {}, {}
        stems = {}
        for name in sorted(names):
            stem, _, suffix = name.rpartition(".")
            if "." + suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                stems.setdefault(stem, []).append(name)
        return names, stems

    def __call__(self, root, row):
        for entry in row.path:
            name, part = (entry, row.part) if isinstance(entry, str) else entry
            for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
                path = self._path(os.path.join(root, spelling))
                if path:
                    return path, part
        return None

    def _path(self, target):
        folder, name = os.path.split(target)
        names, stems = self._list(folder)
        if name in names and (not names[name] or is_frames_folder(target)):
            return target
        if is_media(name) or name not in stems:
            return None
        likely = [stem for suffix in LIKELY_SUFFIXES for stem in stems[name]
                  if stem.lower().endswith(suffix)]
        return os.path.join(folder, (likely or stems[name])[0])


# ------------------------------------------------------------------------------------------------
# Folders


def _read_folder(folder, folders, pictures_are_videos):
    for place in (folder, *_below(folder)):
        names = os.listdir(place)
        splits = sorted(name for name in names if re.fullmatch(r".+_test_split1\.txt", name))
        if splits or "classInd.txt" in names:
            found = (formats.read_hmdb51(read_source(place / splits[0])) if splits else
                     _read_ucf101(place, 1))
            return _locate(found, [*folders, folder], folder)
    lists = sorted(name for name in os.listdir(folder)
                   if Path(name).suffix.lower() in _LISTS and (folder / name).is_file())
    metadata = [name for name in ("metadata.csv", "metadata.jsonl") if name in lists]
    if metadata:
        return _read_metadata(folder, folders, metadata[0], lists)
    files, what = _media_below(folder, pictures_are_videos)
    labelled = all(len(name.parts) > 1 for name in files)
    tops = {name.parts[0] for name in files}
    split = next((name for name in sorted(tops) if name.lower() in (
        "train", "training", "val", "valid", "validation", "test", "testing")), None)
    if all(re.match(r"train|val|test", name, re.I) for name in tops):
        split = split or min(tops)
    if labelled and split:
        raise DataError(f"{folder}: its sub-folder '{split}' looks like a split, not a class; "
                        f"give {folder / split} instead")
    captions = [None] * len(files)
    beside = [folder / name.with_suffix(".txt") for name in files]
    notes = _about_folders(files, labelled, sum(map(os.path.isfile, beside)))
    if all(map(os.path.isfile, beside)):
        captions = [decode(path).strip() for path in beside]
        labelled, what = False, f"{what} with a .txt beside each"
        lists = [name for name in lists if folder / name not in set(beside)]
    # The paths are final strings: for a broken link, _locate must not find a file of the same name
    # elsewhere.
    rows = [Row(str(folder / name), name.parts[0] if labelled else None, caption)
            for name, caption in zip(files, captions)]
    # The names of folders are names, also where they are numbers; numbers are sorted as such.
    classes = {row.label for row in rows} - {None}
    order = int if all(map(str.isdecimal, classes)) else str
    if all(_GROUP.fullmatch(name.name) for name in files):
        notes += ("its clips are in groups, as those of UCF101; whole groups are held out, which "
                  "is no official split",)
    return Listing(f"folder of {what}", rows, sorted(classes, key=order) or None, tuple(lists), notes)


def _about_folders(files, labelled, texts):
    """What is odd about the files of a folder, as sentences for the user."""
    notes, tops = (), {name.parts[0] for name in files}
    outside = [name for name in files if len(name.parts) == 1]
    if outside and len(outside) < len(files):
        notes += (f"no labels, since {outside[0]} lies in no class folder",)
    if labelled and len(tops) == 1 and len({name.parts[:2] for name in files if len(name.parts) > 2
                                            }) > 1:
        notes += (f"one class, {min(tops)}; give that folder for the classes below it",)
    if 0 < texts < len(files):
        notes += (f"no captions, since {len(files) - texts:,} of {len(files):,} files have no .txt "
                  "beside them",)
    return notes


def _read_metadata(folder, folders, name, lists):
    found = formats.read_list(read_source(folder / name))
    found = _locate(found, [*folders, folder], folder / name)
    files, _ = _media_below(folder, False)
    others = {str(folder / file) for file in files} - {row.path for row in found.rows}
    notes = (f"{len(others)} files are not named in {name}, the first is {min(others)}",) \
        if others else ()
    return found._replace(kind=f"folder with {name}", notes=notes, unused=(
        *found.unused, *(one for one in lists if one != name)))


def _media_below(folder, pictures_are_videos):
    """Paths of all videos below a folder, relative to it, or else of all folders of numbered
    pictures, or else of all pictures; and which of the three, in words."""
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
    if videos:
        others = {name.parent for name in files} - {name.parent for name in videos}
        frames = [place for place in sorted(others) if pictures_are_videos
                  and is_frames_folder(folder / place)]
        if frames:
            raise DataError(f"{folder}: holds videos, as {videos[0]}, and folders of numbered "
                            f"pictures, as {frames[0]}; give one kind, or say --frame-rate 0, "
                            "which leaves pictures out")
        return videos, "videos"
    places = sorted({name.parent for name in files})
    frames = [place for place in places if pictures_are_videos and is_frames_folder(folder / place)]
    if 2 * len(frames) <= len(places):
        return files, "pictures"
    if len(frames) < len(places):
        others = sorted(set(places) - set(frames))
        raise DataError(f"{folder}: {len(frames)} of its folders hold the pictures of a video, but "
                        f"{others[0]} does not; take it out, or say --frame-rate 0: then each "
                        "picture is a clip")
    return places, "folders of numbered pictures"


def _read_ucf101(folder, number):
    """The train and test list of one split, from the folder that holds classInd.txt."""
    rows = []
    for split, name in (("train", f"trainlist{number:02d}.txt"),
                        ("val", f"testlist{number:02d}.txt")):
        if os.path.isfile(folder / name):
            rows += formats.read_list(read_source(folder / name)).rows
    if not rows:
        raise DataError(f"{folder}: has classInd.txt but no trainlist{number:02d}.txt")
    return Listing(f"UCF101, split {number}", rows, formats.ucf101_classes(folder))


# ------------------------------------------------------------------------------------------------
# Labels and parts


def labels_of(label):
    """All labels of a row as one tuple of texts, of whatever form `Row.label` has."""
    if isinstance(label, dict):
        return tuple(name for one in label.values() for name in labels_of(one))
    return label if isinstance(label, tuple) else () if label is None else (label,)


def label_of(row, question):
    """The label of a row that answers one question, None where it has none."""
    return row.label.get(question) if isinstance(row.label, dict) else row.label


def by_question(rows):
    """{question: [label of each row]}; the one question of a list without names is "label"."""
    if isinstance(rows[0].label, dict):
        return {question: [label_of(row, question) for row in rows]
                for question in dict.fromkeys(key for row in rows for key in row.label)}
    return {} if rows[0].label is None else {"label": [row.label for row in rows]}


def number_labels(source, labels, classes, in_order=True):
    """(class names, {label as written: number}, a note for the user or "").

    labels   of all rows, as written: a text, a tuple of several, None where there is none
    classes  names in the order of their numbers, or None: the labels themselves, sorted
    in_order  True: a number may be the place of a name in `classes`
    raises   DataError: a label that is not among the classes, or a number that can be no class

    Labels that are numbers are names too: 1 and 2 are two classes, not three. Where `classes` have
    names that are no numbers, a number is the place of its name.
    """
    written = sorted({name for label in labels for name in labels_of(label)})
    note, number = "", {}
    if not written:
        return list(classes or []), {}, ""
    if not set(written) <= set(classes or ()) and all(map(_NUMBER.fullmatch, written)):
        number = {label: whole(label) for label in written}
        odd = [label for label in written if number[label] is None
               or number[label] >= MOST_CLASSES]
        if odd:
            raise DataError(f"{source}: label {odd[0][:60]!r} is no class number; these are whole, "
                            f"from 0 on, and below {MOST_CLASSES:,}")
        known = sorted(set(number.values()))
        if classes is None and known[-1] + 1 > len(known):
            note = (f"the labels are {len(known)} numbers from {known[0]} to {known[-1]}; each is "
                    "a class of that name, and the numbers between are none")
        classes = list(map(str, known)) if classes is None else list(classes)
        if all(map(str.isdecimal, classes)):
            places = {int(name): place for place, name in enumerate(classes)}
            number = {label: places.get(value, len(classes)) for label, value in number.items()}
        elif not in_order:
            number = {}
    else:
        classes = list(classes or written)
        number = {name: place for place, name in enumerate(classes)}
    unknown = [label for label in written if number.get(label, len(classes)) >= len(classes)]
    if unknown:
        raise DataError(f"{source}: label {unknown[0]!r} is not among the {len(classes)} known "
                        f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    return classes, number, note


def split_files(items, fraction=0.1, seed=0):
    """(training items, held-out items): a fixed random share of at least one file is held out.

    items   tuples that begin with a path; those of one path, its captions and parts, stay together,
            and so do the clips of one group of UCF101, which are cut from one video

    The seed is not the training seed, so runs with different seeds share a validation set. A single
    file is in both parts.
    """
    groups = [_group(item[0]) for item in items]
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        return list(items), list(items)
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    order = np.random.default_rng(seed).permutation(len(names))
    held = {names[i] for i in order[:count].tolist()}
    return ([item for item, group in zip(items, groups) if group not in held],
            [item for item, group in zip(items, groups) if group in held])


def _group(path):
    match = _GROUP.fullmatch(os.path.basename(path))
    return os.path.join(os.path.dirname(path), match[1]) if match else path


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
