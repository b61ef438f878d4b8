"""Annotations: which clips a source lists, and their labels, captions and questions.

A source is a folder, a list, the file of a benchmark, or a single video. Its content decides its
format; there is no flag for it.

    folder or list --> format --> rows --> locate the files --> Listing(kind, rows, classes)

1. The first row of video/formats.FORMATS that recognises a list reads it. Folders are read here.
2. A row lists possible names of its file, because many formats give an id without a suffix.
   `_locate` searches the list's folder and the folder of --video-folder, both with two levels of
   sub-folders. It searches elsewhere only if the path in the list points there.
3. If a source has splits of its own, video/files.py trains on "train" and evaluates on the rest.
   Otherwise `split_files` holds out a tenth of the files.

Everything a source contains is used, or named in `Listing.unused` or `Listing.notes`. Content that
would change the meaning of a row is a DataError.

| folder | label | caption |
| --- | --- | --- |
| of videos; if there are none, of pictures | first sub-folder | x.txt beside every x.mp4 |
| of folders of numbered pictures, each a video | first sub-folder | |
| with metadata.csv or metadata.jsonl (Hugging Face hub) | its columns | its columns |
| with the split lists of UCF101 or HMDB51, in it or in a sub-folder | official | |

A video with several captions becomes several rows. UCF101 and HMDB51 have three splits. The first
is read unless a file of another one is given. The summary names the split.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "train.json"
>>> _ = path.with_name("run.mp4").write_bytes(b"")
>>> _ = path.write_text('[{"video": "run.mp4", "caption": ["a dog", "it runs"]}]')
>>> [row.caption for row in read(path).rows]
['a dog', 'it runs']
"""

import csv
import fnmatch
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
from video.texts import parse_int, read_source, read_text, require_file

MOST_CLASSES = 1_000_000  # larger numbers are dates or ids, not classes
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")  # a label that looks like a number
_GROUP = re.compile(r"(v_.+_g\d+)_c\d+\.\w+")  # UCF101: clips of one group are cut from one video
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl")


def add_flags(parser):
    """--video-folder and --frame-rate, for every command that reads a source."""
    parser.add_argument("--video-folder", default="",
                        help="where the files are, if not in the list's folder or below it")
    parser.add_argument("--frame-rate", type=float, default=25.0,
                        help="frames per second of videos that are folders of pictures; 0 = each "
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
    """Read any source that the table above or video/formats.py names -> Listing.

    source        path of a folder, a list, a single video or a picture
    video_folder  where the files are, if not in the list's folder or below it
    pictures_are_videos  True: numbered pictures in one folder are one video. False: each picture
                         is a
            clip of one frame
    raises        DataError: no such file, no known format, a line that breaks its format
    """
    if video_folder and not os.path.isdir(video_folder):
        raise DataError(f"--video-folder {video_folder}: no such folder")
    try:
        listing = _read(Path(source), video_folder, pictures_are_videos)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or source}: cannot be read "
                        f"({error.strerror or error})") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
            csv.Error) as error:
        raise DataError(f"{source}: no known format "
                        f"({type(error).__name__}: {error})") from error
    for row in listing.rows:
        try:
            "".join(filter(None, (row.path, *labels_of(row.label), *row[2:6],
                                  *(row.candidates or ())))).encode()
        except UnicodeEncodeError:  # logs, lists and tokenizers would fail later
            raise DataError(f"{source}: the texts or the name of {row.path} are not UTF-8 or have "
                            "an invalid character; correct the text or rename the file") from None
        if "\0" in row.path:
            raise DataError(f"{source}: {row.path} is not a valid file name")
    formats.all_have_the_same(source, listing.rows, [row.path for row in listing.rows])
    return listing


def _read(source, video_folder, pictures_are_videos):
    folders = [Path(video_folder)] if video_folder else []
    if os.path.isdir(source):
        return _read_folder(source, folders, pictures_are_videos)
    if is_media(source.name):
        require_file(source)
        return Listing("one file", [Row(str(source))])
    return _locate(formats.read_list(read_source(source)), [*folders, source.parent], source)


# ------------------------------------------------------------------------------------------------
# Locating files


def _locate(listing, folders, source):
    """The listing with one path per row.

    All files of a list of paths must be in, or relative to, one folder. Ids may be spread over
    several folders if no id is in two of them.
    """
    if not listing.rows:
        raise DataError(f"{source}: names no video")
    find = _FileFinder()
    rows = [row if isinstance(row.path, tuple) else row._replace(path=(row.path,))
            for row in listing.rows]
    sample = rows[::max(1, len(rows) // 30)]
    matched = {folder: {i for i, row in enumerate(sample) if find(folder, row)}
               for folder in _search_folders(folders)}
    ranked = sorted(matched, key=lambda folder: -len(matched[folder]))
    if not matched[ranked[0]]:
        above = folders[-1].resolve().parent
        other = next((folder for folder in (above, *_subfolders(above))
                      if any(find(folder, row) for row in sample)), None)
        hint = f"; {other} has files of these names: to use these, give --video-folder " \
               f"{other}" if other else ""
        listing = listing._replace(hint=hint)
    ranked = _preferred(ranked, matched, source) + ranked
    searched, covered = ranked[:1], set(matched[ranked[0]])
    for folder in ranked[1:]:  # including folders without a file of the sample
        if folder not in searched and not matched[folder] & covered:
            searched.append(folder)
            covered |= matched[folder]
    return listing._replace(rows=[
        _locate_row(find, searched if isinstance(old.path, tuple) else searched[:1], row)
        for old, row in zip(listing.rows, rows)])


def _preferred(ranked, matched, source):
    """The folder to prefer where several contain equally many of the list's files.

    returns  [the folder closest to the top]; if several are equally close, [the one whose name
             occurs
             in the list's name]; [] if one folder has the most files
    raises   DataError if there is no such folder
    """
    best = matched[ranked[0]]
    alike = [folder for folder in ranked
             if len(matched[folder]) == len(best) and matched[folder] & best]
    if len(alike) < 2:
        return []
    depth = min(len(folder.parts) for folder in alike)
    alike = [folder for folder in alike if len(folder.parts) == depth]
    named = [folder for folder in alike if folder.name.lower() in source.name.lower()]
    if len(alike) > 1 and len(named) != 1:
        raise DataError(f"{source}: {alike[0]} and {alike[1]} have files of the same names; "
                        f"choose one, as in --video-folder {alike[0]}")
    return named if len(alike) > 1 else alike


def _locate_row(find, folders, row):
    """The row with the path of its file; if no folder has it, with the path that is missing."""
    for folder in folders:
        file = find(folder, row)
        if file:
            path, part = file
            in_frames = row.frames_part and os.path.isdir(path)
            return row._replace(path=path, part=row.frames_part if in_frames else part)
    name = next(name for name in row.path if isinstance(name, str))
    return row._replace(path=str(folders[0] / (name if is_media(name) else name + ".mp4")))


def _subfolders(folder):
    """Up to 50 sub-folders, sorted; hidden ones are left out."""
    try:
        return sorted(entry for entry in folder.iterdir()
                      if entry.is_dir() and entry.name[0] != ".")[:50]
    except OSError:
        return []


def _search_folders(folders):
    """The folders, and the folders one or two levels below them."""
    first = [folder for top in folders for folder in (top, *_subfolders(top))]
    second = [folder for top in folders for below in _subfolders(top)
              for folder in _subfolders(below)][:200]
    return list(dict.fromkeys(first + second))


class _FileFinder:
    """(folder, row) -> (path, part) of the first possible name of the row that exists.

    Each folder is listed once, because a million separate lookups are slower.
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
    for subfolder in (folder, *_subfolders(folder)):
        names = os.listdir(subfolder)
        splits = sorted(name for name in names if re.fullmatch(r".+_test_split1\.txt", name))
        if splits or fnmatch.filter(names, formats.UCF101_CLASSES):
            listing = (formats.read_hmdb51(read_source(subfolder / splits[0])) if splits else
                       _read_ucf101(subfolder, 1))
            return _locate(listing, [*folders, folder], folder)
    lists = sorted(name for name in os.listdir(folder)
                   if Path(name).suffix.lower() in _LISTS and (folder / name).is_file())
    metadata = [name for name in ("metadata.csv", "metadata.jsonl") if name in lists]
    if metadata:
        return _read_metadata(folder, folders, metadata[0], lists)
    files, content = _media_below(folder, pictures_are_videos)
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
    notes = _folder_notes(files, labelled, sum(map(os.path.isfile, beside)))
    if all(map(os.path.isfile, beside)):
        captions = [read_text(path).strip() for path in beside]
        labelled, content = False, f"{content} with a .txt beside each"
        lists = [name for name in lists if folder / name not in set(beside)]
    # These paths need no _locate, which could replace a broken link by a file in another folder.
    rows = [Row(str(folder / name), name.parts[0] if labelled else None, caption)
            for name, caption in zip(files, captions)]
    # Folder names are class names, even if they are numbers. Numbers are sorted numerically.
    classes = {row.label for row in rows} - {None}
    order = int if all(map(str.isdecimal, classes)) else str
    if all(_GROUP.fullmatch(name.name) for name in files):
        notes += ("its clips form groups, as in UCF101; whole groups are held out, which is no "
                  "official split",)
    return Listing(f"folder of {content}", rows, sorted(classes, key=order) or None, tuple(lists),
                   notes)


def _folder_notes(files, labelled, texts):
    """Notes for the user about unusual files in a folder."""
    notes, tops = (), {name.parts[0] for name in files}
    outside = [name for name in files if len(name.parts) == 1]
    if outside and len(outside) < len(files):
        notes += (f"no labels, because {outside[0]} is not in a class folder",)
    if labelled and len(tops) == 1 and len({name.parts[:2] for name in files if len(name.parts) > 2
                                            }) > 1:
        notes += (f"one class, {min(tops)}; give that folder to use its sub-folders as classes",)
    if 0 < texts < len(files):
        notes += (f"no captions, because {len(files) - texts:,} of {len(files):,} files have no "
                  ".txt beside them",)
    return notes


def _read_metadata(folder, folders, name, lists):
    listing = formats.read_list(read_source(folder / name))
    listing = _locate(listing, [*folders, folder], folder / name)
    files, _ = _media_below(folder, False)
    others = {str(folder / file) for file in files} - {row.path for row in listing.rows}
    notes = (f"{len(others)} files are not named in {name}, the first is {min(others)}",) \
        if others else ()
    return listing._replace(kind=f"folder with {name}", notes=notes, unused=(
        *listing.unused, *(other for other in lists if other != name)))


def _media_below(folder, pictures_are_videos):
    """(paths relative to the folder, what they are in words).

    The paths are all videos below the folder; if there are none, all folders of numbered pictures;
    if there are none of these either, all pictures.
    """
    def refuse(error):  # os.walk would silently skip unreadable folders
        raise error

    def leads_back(link):  # a link to a parent folder would repeat the same files without end
        return link.is_symlink() and Path(os.path.realpath(link.parent)).is_relative_to(
            os.path.realpath(link))

    files = []
    for parent, folder_names, file_names in os.walk(folder, onerror=refuse, followlinks=True):
        folder_names[:] = [name for name in folder_names
                           if name[0] != "." and name != "lost+found"
                           and not leads_back(Path(parent, name))]
        files += [Path(parent, name).relative_to(folder) for name in file_names
                  if is_media(name) and not name.startswith(".")]
    files.sort()
    videos = [name for name in files if name.suffix.lower() in VIDEO_SUFFIXES]
    if not files:
        raise DataError(f"{folder}: no video below this folder (searched for "
                        f"{' '.join(sorted(VIDEO_SUFFIXES))}, then for "
                        f"{' '.join(sorted(IMAGE_SUFFIXES))})")
    if videos:
        others = {name.parent for name in files} - {name.parent for name in videos}
        frames = [parent for parent in sorted(others) if pictures_are_videos
                  and is_frames_folder(folder / parent)]
        if frames:
            raise DataError(f"{folder}: holds videos ({videos[0]}) and folders of numbered "
                            f"pictures ({frames[0]}); give a folder with one kind, or use "
                            "--frame-rate 0 to ignore pictures")
        return videos, "videos"
    parents = sorted({name.parent for name in files})
    frames = [parent for parent in parents
              if pictures_are_videos and is_frames_folder(folder / parent)]
    if 2 * len(frames) <= len(parents):
        return files, "pictures"
    if len(frames) < len(parents):
        others = sorted(set(parents) - set(frames))
        raise DataError(f"{folder}: {len(frames)} of its folders hold the pictures of a video, but "
                        f"{others[0]} does not; remove it, or use --frame-rate 0 to make each "
                        "picture a clip")
    return parents, "folders of numbered pictures"


def _read_ucf101(folder, number):
    """The train and test lists of one split, from the folder with classInd.txt."""
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
    """All labels of a row as one tuple of texts, for any form of `Row.label`."""
    if isinstance(label, dict):
        return tuple(name for value in label.values() for name in labels_of(value))
    return label if isinstance(label, tuple) else () if label is None else (label,)


def label_of(row, question):
    """The label of a row for one question; None where it has none."""
    return row.label.get(question) if isinstance(row.label, dict) else row.label


def by_question(rows):
    """{question: [label of each row]}; labels without a question belong to "label"."""
    if isinstance(rows[0].label, dict):
        return {question: [label_of(row, question) for row in rows]
                for question in dict.fromkeys(key for row in rows for key in row.label)}
    return {} if rows[0].label is None else {"label": [row.label for row in rows]}


def number_labels(source, labels, classes, official_order=True):
    """(class names, {label as written: number}, a note for the user or "").

    labels    of all rows, as written: a text, a tuple of several texts, or None
    classes   names in the order of their numbers; None: the labels themselves, sorted
    official_order  True: the order of classes is official, so a number may be an index into them
    raises    DataError: a label that is not among the classes, or a number that cannot be a class

    Numbers are names too: the labels 1 and 2 are two classes, not three. If `classes` are words, a
    number is the index of its name.
    """
    written = sorted({name for label in labels for name in labels_of(label)})
    note, number = "", {}
    if not written:
        return list(classes or []), {}, ""
    if not set(written) <= set(classes or ()) and all(map(_NUMBER.fullmatch, written)):
        number = {label: parse_int(label) for label in written}
        invalid = [label for label in written if number[label] is None
                   or number[label] >= MOST_CLASSES]
        if invalid:
            raise DataError(f"{source}: label {invalid[0][:60]!r} is no class number; class "
                            f"numbers are whole numbers from 0 to {MOST_CLASSES - 1:,}")
        known = sorted(set(number.values()))
        if classes is None and known[-1] + 1 > len(known):
            note = (f"the labels are {len(known)} numbers from {known[0]} to {known[-1]}; each is "
                    "a class of that name, and the missing numbers are no classes")
        classes = list(map(str, known)) if classes is None else list(classes)
        if all(map(str.isdecimal, classes)):
            indices = {int(name): index for index, name in enumerate(classes)}
            number = {label: indices.get(value, len(classes)) for label, value in number.items()}
        elif not official_order:
            number = {}
    else:
        classes = list(classes or written)
        number = {name: index for index, name in enumerate(classes)}
    unknown = [label for label in written if number.get(label, len(classes)) >= len(classes)]
    if unknown:
        raise DataError(f"{source}: label {unknown[0]!r} is not among the {len(classes)} known "
                        f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    return classes, number, note


def split_files(items, fraction=0.1, seed=0):
    """(training items, held-out items): a random share, at least one file, is held out.

    items   tuples that begin with a path. Items of one path (its captions and parts) stay
            together, and
            so do clips of one group of UCF101, which come from one video

    The share is the same in all runs, because the seed is not the training seed. A single file is
    in both parts.
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
        listing = read(argv[0])
    except DataError as error:
        print(f"annotations.py: {error}", file=sys.stderr)
        return 2
    print(printable(f"{argv[0]}: {listing.kind}, {len(listing.rows):,} rows"))
    for row in itertools.islice(listing.rows, 5):
        print({key: value for key, value in row._asdict().items() if value is not None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
