"""The annotation formats of lists: one table, FORMATS, with one row per format.

    Source --> the first row of FORMATS that recognises it --> its reader --> Listing(kind, rows)

Each benchmark publishes annotations in its own form. Conversion by hand causes errors, such as
labels shifted by one, so lists are read as published. The content decides the format; there is no
flag for it.

A format is one `Format` below: its name, the columns (or a function) that identify it, a reader
and an example. To add one, write a row and its reader. docs/formats.md and the tests use the
example. Most readers call `read_records` with the names of their columns.
"""

import ast
import contextlib
import functools
import re
import textwrap
from typing import Callable, NamedTuple

from video import segments
from video.rows import DataError, Listing, Part, Row, is_media
from video.texts import (PATH_COLUMNS, parse_int, parse_json, parse_part, read_table, read_text,
                         split_lines)

COLUMNS = {  # accepted names of a table's columns and of JSON keys
    "path": PATH_COLUMNS,
    "label": ("label", "class", "category", "tag", "labels", "classes", "tags"),
    "caption": ("caption", "text", "sentence", "description", "captions", "sentences"),
    "question": ("question",),
    "answer": ("answer", "correct"),
    "candidates": ("candidates", "options", "choices"),
    "split": ("split",),
    "start": ("start", "start_time", "start_timestamp", "time_start", "start_sec", "begin"),
    "end": ("end", "end_time", "end_timestamp", "time_end", "end_sec", "stop", "stop_time",
            "stop_timestamp"),
    "start_frame": ("start_frame", "frame_start", "begin_frame"),
    "end_frame": ("end_frame", "stop_frame", "frame_end"),
    "parts": ("timestamps", "times", "segments", "segment", "timestamp"),
}
SEVERAL_LABELS = ("labels", "classes", "tags")  # columns whose text may contain several labels
LABEL_SEPARATOR = re.compile(r"[|;]|(?<=\d),(?=\d)")  # separates labels; commas: numbers only
VAL_AND_TEST = "its validation and test splits are both held out, as one set"
CANDIDATE_COLUMN = re.compile(r"(?:a|option|candidate)_?\d+")  # one candidate each


class Format(NamedTuple):
    """One format of lists."""

    name: str
    needs: tuple  # columns that identify it, lower case; () = only `matches`
    read: Callable  # Source -> Listing
    file: str  # usual file name of the list
    example: str  # an example of the list, at most three lines
    videos: tuple  # files, or folders/ of pictures, that belong to the example
    matches: Callable | None = None  # Source -> bool; None = has all columns in `needs`
    about: str = ""  # notes for the user, printed in docs/formats.md

    def recognises(self, source):
        """True where the source has this format."""
        if self.matches:
            return self.matches(source)
        return bool(source.records) and set(self.needs) <= set(source.columns)


def _nearest_format(source):
    """The known format that a source resembles most, and the columns it lacks, for a message."""
    columns = {key.lower() for key in source.content} if isinstance(source.content, dict) else \
        set(source.columns)
    known = [row for row in FORMATS if row.needs]
    best = max(known, key=lambda row: (len(columns & set(row.needs)), -len(row.needs)))
    if not columns & set(best.needs):
        return "give a list with 'path label' on each line, or a table with a column 'path'"
    lacks = [name for name in best.needs if name not in columns]
    return f"nearest is {best.name}; missing: {', '.join(lacks)}"


# ------------------------------------------------------------------------------------------------
# Records: tables, JSON lists, JSON lines


def read_records(source, kind=None, names=None, **columns):
    """Listing with a row for each caption (or else each part) of each record.

    names    function (record, value of its path column, location) -> possible names of its file
    columns  field=(column names), instead of those in COLUMNS; () = the format has no such column
    """
    chosen = {field: [name for name in choices if name in source.columns]
              for field, choices in (COLUMNS | columns).items()}
    # All records must use the same column for a field. Only the path column may differ.
    chosen |= {field: present[:1] for field, present in chosen.items() if field != "path"}
    used, rows, locations = set(), [], []
    for location, record in source.records:
        record_rows = _rows_of(f"{source.path}, {location}", record, chosen, used, names)
        rows += record_rows
        locations += [location] * len(record_rows)
    if rows[0].candidates:
        kind = kind or "multiple choice"
    elif rows[0].question:
        kind = kind or "question answering"
    elif source.container == "JSON":
        captions = rows[0].caption
        kind = kind or ("captions in JSON, as in VINDLU and UMT" if captions else "JSON")
    all_have_the_same(source.path, rows, locations)
    if any(isinstance(row.label, tuple) for row in rows):
        rows = _same_form_of_label(source, chosen["label"], rows)
    splits = {str(record.get(name)).lower()[:3] for name in chosen["split"]
              for _, record in source.records}
    return Listing(kind or source.container, rows,
                   unused=tuple(name for name in source.columns if name not in used),
                   notes=(VAL_AND_TEST,) if {"val", "tes"} <= splits else ())


def _same_form_of_label(source, columns, rows):
    """Rows with a tuple of labels each; some had a single label.

    If a table has exactly one label in every row, the rows have single labels instead.
    """
    if source.container == "table with a header" and columns[0] in SEVERAL_LABELS and all(
            isinstance(row.label, tuple) and len(row.label) == 1 for row in rows):
        return [row._replace(label=row.label[0]) for row in rows]
    return [row if isinstance(row.label, (tuple, dict)) else row._replace(label=(row.label,))
            for row in rows]


def all_have_the_same(source, rows, locations):
    """DataError where some rows lack a field that others have.

    locations  of the rows, for the message
    """
    for field in ("label", "caption", "question", "answer", "candidates", "split", "part"):
        has = [getattr(row, field) is not None for row in rows]
        if any(has) and not all(has):
            raise DataError(f"{source}, {locations[has.index(False)]}: has no {field}, "
                            "but other rows have one")
    several = [isinstance(row.label, dict) for row in rows]
    if any(several) and not all(several):
        raise DataError(f"{source}, {locations[several.index(False)]}: its label has no named "
                        "questions, but those of other rows have them")


def _rows_of(location, record, columns, used, names):
    """The rows of one record. Names of columns that are used are added to the set `used`."""
    name_of = {field: next((name for name in choices if record.get(name) is not None), None)
               for field, choices in columns.items()}
    field = {key: record[name] if name else None for key, name in name_of.items()}
    used |= {name for field, name in name_of.items() if field != "parts"}
    numbered = [name for name in record if CANDIDATE_COLUMN.fullmatch(name)]
    if field["candidates"] is None and numbered and field["answer"] is not None:
        field["candidates"] = [record[name] for name in numbered]
        used |= set(numbered)
    path, caption, question, split = (field[key] for key in ("path", "caption", "question",
                                                             "split"))
    answer, candidates = field["answer"], field["candidates"]
    if not isinstance(path, str) or (name_of["path"] or "").endswith("id") and "." in path:
        # 7, or 7.0 from a column with gaps
        path = path if parse_int(path) is None else str(parse_int(path))
    caption = _parse_list(caption, name_of["caption"])
    if isinstance(caption, list) and isinstance(answer, int) and candidates is None:
        caption, candidates = None, caption  # UMT's multiple choice
    captions = _as_list(caption)
    texts = [path, *captions, *_as_list(candidates),
             *(text for text in (question, split) if text is not None)]
    label, is_valid = _label(field["label"], name_of["label"] in SEVERAL_LABELS)
    if not all(isinstance(text, str) for text in texts) or not is_valid or not path.strip() \
            or caption == []:
        raise DataError(f"{location}: needs a \"path\"; path and caption must be text, label text "
                        f"or a whole number, got {str(record)[:60]}")
    if candidates is not None:
        answer, candidates = _right_candidate(location, answer, candidates)
        captions = [answer]
    elif answer is not None:
        answer = _most_frequent(location, answer)
    path = names(record, path.strip(), location) if names else _path_or_id(path)
    row = Row(path, label, None, _split(split and split.strip(), location), question or None,
              answer, candidates)
    rows, has_parts = _with_parts(location, row, [text.strip() for text in captions], field,
                                  name_of["parts"])
    used |= {name_of["parts"]} if has_parts else set()
    return rows


def _parse_list(value, column):
    """A list that a table holds as text, "['a', 'b']", as a list. Other values stay as they are."""
    plural = column in ("captions", "sentences", *COLUMNS["parts"])
    if plural and isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(value)
    return value


def _with_parts(location, row, captions, field, column):
    """(a row for each caption or label, with its part; True if "parts" gave the part)."""
    first, last = field["start_frame"], field["end_frame"]
    if first not in (None, "") or last not in (None, ""):
        row = row._replace(frames_part=parse_part(location, first, last, in_frames=True))
        row = row._replace(part=row.frames_part)
    start, end, parts = field["start"], field["end"], _parse_list(field["parts"], column)
    if start not in (None, "") or end not in (None, ""):
        row, parts = row._replace(part=parse_part(location, start, end)), None
    if isinstance(parts, dict):
        parts = [parts.get("start"), parts.get("end")]
    if isinstance(parts, list) and parts:
        rows = _row_per_part(location, row, captions, parts)
        captions = captions or [None] * len(rows)
        rows = rows if len(rows) > 1 else rows * len(captions)
        return [part_row._replace(caption=text) for part_row, text in zip(rows, captions)], True
    if parts not in (None, "", []) and column in ("timestamps", "segments", "segment"):
        raise DataError(f"{location}: {column} must be a list [start, end], "
                        f"got {str(parts)[:60]!r}")
    return [row._replace(caption=text) for text in captions or [None]], False


def _row_per_part(location, row, captions, parts):
    """A row for each part. Labels without captions are assigned to the parts in order."""
    parts = parts if isinstance(parts[0], list) else [parts]
    labels = row.label if isinstance(row.label, tuple) and not captions else ()
    others = len(captions) or len(labels)
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in parts) or (
            len(parts) > 1 and others and len(parts) != others):
        raise DataError(f"{location}: parts must be pairs [start, end], one per caption or label, "
                        f"got {str(parts)[:60]}")
    rows = [row._replace(part=parse_part(location, *pair)) for pair in parts]
    if labels and len(rows) > 1:
        rows = [part_row._replace(label=label) for part_row, label in zip(rows, labels)]
    return rows


def _path_or_id(path):
    """A path of a list. An id without suffix becomes a tuple: any video suffix may follow."""
    return path.strip() if is_media(path) else (path.strip(),)


def _split(text, location):
    """"train" for train, Training ...; "val" for val, dev, test ...; None for an empty text.

    DataError for other words.
    """
    if not text:
        return None
    if re.match(r"train|trn", text, re.I):
        return "train"
    if not re.match(r"val|dev|test|eval|holdout", text, re.I):
        raise DataError(f"{location}: the split {text[:30]!r} is unknown; use train, val or test")
    return "val"


def _as_list(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def _label(value, several=False):
    """(label of a row, True where it is valid).

    A label is a text, a tuple of several texts, or a dict with one of these per question.
    """
    if isinstance(value, dict):
        parts = {key: _label(item) for key, item in value.items()}
        return {key: item for key, (item, _) in parts.items()}, all(ok for _, ok in parts.values())
    if isinstance(value, str) and several:
        value = [item for item in map(str.strip, LABEL_SEPARATOR.split(value)) if item]
    if isinstance(value, list):
        parts = [_label(item) for item in value]
        return tuple(item for item, _ in parts), all(ok and isinstance(item, str)
                                                     for item, ok in parts)
    if isinstance(value, str) or value is None:
        return value and value.strip() or None, True
    return str(parse_int(value)), parse_int(value) is not None


def _right_candidate(location, answer, candidates):
    """(right candidate, all candidates) of a multiple choice; answer is an index or a text."""
    if not isinstance(candidates, list) or not candidates:
        raise DataError(f"{location}: the candidates of a multiple choice must be a list of texts, "
                        f"got {str(candidates)[:60]}")
    right = candidates.index(answer) if answer in candidates else parse_int(answer)
    if right is None or right >= len(candidates):
        raise DataError(f"{location}: the answer of a multiple choice must be the index of the "
                        f"right candidate, 0 to {len(candidates) - 1}, got {str(answer)[:60]!r}")
    return candidates[right], tuple(candidates)


def _most_frequent(location, answer):
    """The answer in words; of a list of answers, the most frequent one."""
    answers = _as_list(answer)
    if not answers or not all(isinstance(text, str) or parse_int(text) is not None
                              for text in answers):
        raise DataError(f"{location}: an answer must be a text, a whole number or a list of these, "
                        f"got {str(answer)[:60]!r}")
    answers = [text if isinstance(text, str) else str(parse_int(text)) for text in answers]
    return max(answers, key=answers.count)


# ------------------------------------------------------------------------------------------------
# Retrieval and captions


def _read_msrvtt(source):
    content = source.content
    rows = _msrvtt_rows(source.path, content)
    splits = {str(video.get("split"))[:3] for video in content["videos"]}
    return Listing("MSR-VTT", rows, unused=_unused_keys(content["videos"], "video_id", "split")
                   + _unused_keys(content["sentences"], "video_id", "caption"),
                   notes=(VAL_AND_TEST,) if {"val", "tes"} <= splits else ())


def _unused_keys(records, *used):
    """Keys of the first record that are not in `used`."""
    return tuple(key for key in records[0] if key not in used) if records else ()


def _read_msrvtt_ids(source):
    """A list of MSR-VTT video ids, such as the 9k list; the JSON beside it has the sentences."""
    path, ids = source.path, [str(record["video_id"]) for _, record in source.records]
    candidates = [(file, parse_json(read_text(file), file)) for file in source.beside("*.json")]
    candidates = [(file, content) for file, content in candidates
                  if isinstance(content, dict) and {"videos", "sentences"} <= content.keys()]
    if not candidates:
        raise DataError(f"{path}: contains only video ids; put MSRVTT_data.json, which has the "
                        "sentences, beside it")

    def unknown(content):
        return len(set(ids) - {sentence["video_id"] for sentence in content["sentences"]})

    # Two files are published, of different videos: use the one that has most of these ids.
    file, content = min(candidates, key=lambda pair: unknown(pair[1]))
    rows = _msrvtt_rows(file, content, set(ids))
    return Listing(f"MSR-VTT, the {len(ids):,} videos of {path.name}",
                   [row._replace(split=None) for row in rows])


def _msrvtt_rows(path, content, wanted=None):
    """A row for each sentence, or only for those of the wanted ids."""
    try:
        splits = {video["video_id"]: video.get("split") for video in content["videos"]}
        pairs = [(sentence["video_id"], sentence["caption"]) for sentence in content["sentences"]]
        texts = [*splits, *(split for split in splits.values() if split is not None),
                 *(text for pair in pairs for text in pair)]
    except (KeyError, TypeError, AttributeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: MSR-VTT needs video_id in videos, and video_id and caption "
                        "in sentences, all of them text")
    named = {name for name, _ in pairs}
    unknown = sorted((wanted or set()) - named) or sorted(named - splits.keys())
    if unknown:
        raise DataError(f"{path}: {unknown[0]!r} is missing in its videos or in its sentences")
    return [Row((name,), caption=caption.strip(), split=_split(splits[name], path))
            for name, caption in pairs if wanted is None or name in wanted]


def _read_msvd(source):
    """Lines of an id and a sentence. Split lists are used if they are beside the list."""
    splits = {line: split for split in ("train", "val", "test")
              for file in source.beside(f"{split}_list.txt")
              for line in map(str.strip, split_lines(read_text(file))) if line}
    rows, skipped = [], 0
    for number, line in source.lines:
        name, _, caption = line.partition(" ")
        if line.startswith("#") or splits and name not in splits:
            skipped += line[0] != "#"
            continue
        if not caption.strip():
            raise DataError(f"{source.path}, line {number}: expected a video's id and a sentence, "
                            f"got {line[:60]!r}")
        rows.append(Row((name,), caption=caption.strip(), split=_split(splits.get(name), name)))
    notes = (f"{skipped:,} sentences are of videos that no split list names",) if skipped \
        else () if splits else ("there are no split lists train_list.txt, val_list.txt and "
                                "test_list.txt beside it",)
    return Listing("MSVD", rows, notes=notes)


def _paragraphs(source, kind, pairs, unused, notes):
    """Listing with one row per video, whose caption is all its sentences: the usual protocol.

    pairs  (possible names of the file, sentence)
    """
    sentences = {}
    for names, text in pairs:
        if not isinstance(text, str) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{source.path}: {kind} needs text in each sentence and name; got "
                            f"{str(text)[:40]!r} of {str(names[0])[:40]!r}")
        sentences.setdefault(names, []).append(text.strip())
    rows = [Row(names, caption=" ".join(texts)) for names, texts in sentences.items()]
    return Listing(kind, rows, unused=unused, notes=notes)


def _read_didemo(source):
    pairs = [((record["video"], str(record["video"]).rsplit(".", 1)[0]), record["description"])
             for _, record in source.records]
    unused = tuple(name for name in source.columns if name not in ("video", "description"))
    return _paragraphs(source, "DiDeMo", pairs, unused, (
        "all sentences of a video form one paragraph; their times are not used",))


def _read_activitynet_captions(source):
    pairs = [((name, name.removeprefix("v_")), text) for name, entry in source.content.items()
             for text in entry["sentences"]]
    return _paragraphs(source, "ActivityNet Captions", pairs, ("timestamps", "duration"), (
        "all sentences of a video form one paragraph; their times are not used",))


def _read_lsmdc(source):
    """Tab-separated, without a header: id, two pairs of times in the film, sentence."""
    rows = []
    for number, line in source.lines:
        fields = line.split("\t")
        if len(fields) != 6:
            raise DataError(f"{source.path}, line {number}: LSMDC has 6 columns, separated by "
                            f"tabs, got {len(fields)}")
        film = fields[0].rpartition("_")[0]
        rows.append(Row((f"{film}/{fields[0]}", fields[0]), caption=fields[-1].strip()))
    return Listing("LSMDC", rows, notes=("its files are already cut; the times, which refer to the "
                                         "whole film, are not used",))


def _clip_names(name, part):
    """Possible names of a clip: two spellings of a cut file, or a part of the whole video."""
    start, end = int(part.start), int(part.end)
    return f"{name}_{start:06d}_{end:06d}", f"{name}_{start}_{end}", (name, part)


def _read_vatex(source):
    def names(record, name, location):
        match = re.fullmatch(r"(.+)_(\d+)_(\d+)", name)
        return (name, (match[1], parse_part(location, match[2], match[3]))) if match else (name,)
    return read_records(source, "VATEX", names, path=("videoid",), caption=("encap",))


def _read_internvid(source):
    def names(record, name, location):
        times = record["start_timestamp"], record["end_timestamp"]
        return (f"{name}_{times[0]}_{times[1]}", (name, parse_part(location, *times)))
    listing = read_records(source, "InternVid", names)
    return listing._replace(rows=[row._replace(part=None) for row in listing.rows])


def _read_coco(source):
    content = source.content
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [Row((files[annotation["image_id"]],), caption=annotation["caption"].strip())
                for annotation in content["annotations"]]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{source.path}: COCO captions need id and file_name in images, image_id "
                        "and caption in annotations") from None
    return Listing("COCO captions", rows, unused=_unused_keys(content["images"], "id", "file_name")
                   + _unused_keys(content["annotations"], "image_id", "caption"))


def _read_webvid(source):
    return read_records(
        source, "WebVid", lambda record, name, _: (f"{record['page_dir']}/{name}", name),
        path=("videoid",), caption=("name",), label=())


# ------------------------------------------------------------------------------------------------
# Questions


def _is_numbered_qa(source):
    return {"video_id", "question", "answer"} <= set(source.columns) and all(
        parse_int(record.get("video_id")) is not None for _, record in source.records)


def _read_numbered_qa(source):
    """MSRVTT-QA and MSVD-QA number their videos; the map file of MSVD gives the names."""
    mapped = {}
    for file in source.beside("youtube_mapping.txt"):
        pairs = [line.split() for line in split_lines(read_text(file)) if line.strip()]
        mapped = {pair[-1]: pair[0] for pair in pairs}

    def names(record, number, location):
        known = mapped.get(f"vid{number}")
        return (known,) if known else (f"video{number}", f"vid{number}", number)
    return read_records(source, "MSVD-QA" if mapped else "MSRVTT-QA", names, path=("video_id",))


def _read_nextqa(source):
    folders = {}
    for file in source.beside("map_vid_vidorID.json"):
        folders = parse_json(read_text(file), file)
    return read_records(source, "NExT-QA", lambda record, name, _: (
        *((folders[name],) if name in folders else ()), name), path=("video",))


# ------------------------------------------------------------------------------------------------
# Recognition


def _read_kinetics(source):
    """Files are cut and called id_start_end.mp4, or they are whole videos, id.mp4."""
    def names(record, name, location):
        cut = parse_part(location, *(str(record.get(key)) for key in ("time_start", "time_end")))
        label, split = (str(record[key]) if record.get(key) else None for key in ("label", "split"))
        folders = [label, label and label.replace(" ", "_"), split,
                   label and split and f"{split}/{label}"]
        *stems, whole_video = _clip_names(name, cut)
        return (*(f"{folder}/{stem}" for stem in stems[:1] for folder in folders if folder),
                *stems, whole_video)
    listing = read_records(source, "Kinetics", names, path=("youtube_id",))
    return listing._replace(rows=[row._replace(part=None) for row in listing.rows])


def _read_kinetics_json(source):
    """{id: {"annotations": {"label": ..., "segment": [start, end]}, "subset": ...}}."""
    records = []
    for name, entry in source.content.items():
        clip, location = entry["annotations"], f"entry {name!r}"
        segment = clip.get("segment") if isinstance(clip, dict) else None
        if not isinstance(segment, list) or len(segment) != 2:
            raise DataError(f"{source.path}, {location}: annotations must have a segment, "
                            "[start, end] in seconds")
        records.append((location, {"label": clip.get("label"), "youtube_id": name, "time_start":
                                   segment[0], "time_end": segment[1], "split": entry["subset"]}))
    return _read_kinetics(source._replace(records=records, columns=tuple(records[0][1])))


def _read_hvu(source):
    """Kinetics' columns, with several tags. A table of tag categories makes them questions."""
    category = {record["tag"]: record["category"] for file in source.beside("*Categories*.csv")
                for _, record in read_table(file)}
    listing = _read_kinetics(source)
    unknown = {tag for row in listing.rows for tag in row.label if category and tag not in category}
    notes = (f"{len(unknown)} tags, such as {min(unknown)}, have no category and are not used",) \
        if unknown else ()
    rows = [row if not category else row._replace(label={
        question: tuple(tag for tag in row.label if category.get(tag) == question)
        for question in sorted(set(category.values()))}) for row in listing.rows]
    return listing._replace(kind="HVU", rows=rows, notes=notes)


def _is_numbered_frames(source):
    return not source.records and source.content is None and all(
        re.fullmatch(r"\d+(;[^;]*[^\d;][^;]*)?", line) for _, line in source.lines)


def _read_numbered_frames(source):
    """Jester and Something-Something V1: `id;label`; videos are folders of pictures."""
    classes = [line for file in source.beside("*labels.csv")[:1]
               for line in map(str.strip, split_lines(read_text(file))) if line]
    pairs = [line.partition(";")[::2] for _, line in source.lines]
    return Listing("Jester and Something-Something V1",
                   [Row((name,), label.strip() or None) for name, label in pairs], classes or None)


def _read_diving48(source):
    classes = [parse_json(read_text(file), file) for file in source.beside("*vocab*.json")[:1]]
    names = ["_".join(words) for words in classes[0]] if classes else None
    return read_records(source, "Diving48", path=("vid_name",))._replace(classes=names)


def _read_epic(source):
    """Three questions: the verb, the noun, and the action, which is both together."""
    def files(record, name, location):
        person = name.split("_")[0]
        return f"{person}/videos/{name}", f"{person}/rgb_frames/{name}", f"{person}/{name}", name

    labels, classes = _epic_labels(source)
    listing = read_records(source, "EPIC-Kitchens-100", files, path=("video_id",), label=(),
                           caption=("narration",))
    # The numbers of the frame pictures start at 1.
    parts = [row.frames_part and Part(max(row.frames_part.start - 1, 0), row.frames_part.end - 1,
                                      True) for row in listing.rows]
    return listing._replace(
        rows=[row._replace(label=label, frames_part=one)
              for row, label, one in zip(listing.rows, labels, parts)], classes=classes,
        unused=tuple(name for name in listing.unused if name not in ("verb_class", "noun_class")))


def _epic_labels(source):
    """({question: label} of each record, {question: names}).

    EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv name verbs and nouns; without them the
    numbers are the names. The classes of "action" are the pairs in the training and validation
    lists, because some pairs are only in the validation list.
    """
    names = {what: {parse_int(record["id"]): record["key"] for file in source.beside(
        f"EPIC_100_{what}_classes.csv") for _, record in read_table(file)}
        for what in ("verb", "noun")}

    def label(record):
        pair = {}
        for what, known in names.items():
            number = parse_int(record[f"{what}_class"])
            if number is None or known and number not in known:
                raise DataError(f"{source.path}: {record[f'{what}_class']!r} is not a {what}_class")
            pair[what] = known.get(number, str(number))
        return pair | {"action": " ".join(pair.values())}

    labels = [label(record) for _, record in source.records]
    others = [label(record) for name in ("train", "validation")
              for file in source.beside(f"EPIC_100_{name}.csv") for _, record in read_table(file)]
    classes = {what: [known[number] for number in sorted(known)]
               for what, known in names.items() if known}
    return labels, classes | {"action": sorted({one["action"] for one in labels + others})}


def _read_charades(source):
    """Several classes per video: `c092 11.90 21.20;c147 0.00 12.60`."""
    known = dict(line.split(" ", 1) for file in source.beside("Charades_v1_classes.txt")
                 for line in map(str.strip, split_lines(read_text(file))) if line)
    rows = []
    for location, record in source.records:
        codes = dict.fromkeys(action.split()[0] for action in record["actions"].split(";")
                              if action.strip())
        unknown = [code for code in codes if known and code not in known]
        if unknown:
            raise DataError(f"{source.path}, {location}: the class {unknown[0]!r} is not in "
                            "Charades_v1_classes.txt")
        rows.append(Row((record["id"],), tuple(known.get(code, code) for code in codes)))
    return Listing("Charades", rows, list(known.values()) or None,
                   unused=tuple(name for name in source.columns if name not in ("id", "actions")),
                   notes=("a video has the classes of all its actions; the times are not used",))


def _read_something(source):
    """Something-Something V2. Labels are templates without brackets, numbered by a labels file."""
    path, classes = source.path, None
    for file in source.beside("*labels.json"):
        classes = _numbered_templates(file)
    known, rows = set(classes or ()), []
    for location, item in source.records:
        name, template, caption = item.get("id"), item.get("template"), item.get("label")
        name = name if isinstance(name, str) else parse_int(name)
        if name in (None, "") or not all(text is None or isinstance(text, str)
                                         for text in (template, caption)):
            raise DataError(f"{path}, {location}: needs an \"id\", and template and label must "
                            "be text")
        label = template and template.replace("[", "").replace("]", "")
        if label and classes and label not in known:
            raise DataError(f"{path}, {location}: its template {label!r} is not in the labels "
                            "file beside it")
        rows.append(Row((str(name),), label or None, caption))
    if classes is None and any(row.label for row in rows):
        raise DataError(f"{path}: put something-something-v2-labels.json, which numbers the "
                        "templates, beside it")
    all_have_the_same(path, rows, [location for location, _ in source.records])
    return Listing("Something-Something V2", rows, classes, unused=tuple(
        name for name in source.columns if name not in ("id", "template", "label")))


def _numbered_templates(file):
    """The templates of a labels file, ordered by their numbers."""
    numbers = parse_json(read_text(file), file)
    if isinstance(numbers, dict):
        whole_numbers = {name: parse_int(number) for name, number in numbers.items()}
        if set(whole_numbers.values()) == set(range(len(whole_numbers))):
            return sorted(whole_numbers, key=whole_numbers.get)
    raise DataError(f"{file}: must give the templates the numbers from 0 on, each number "
                    "once")


def _is_label_names(source):
    content = source.content
    return isinstance(content, dict) and bool(content) and all(
        str(value).isdecimal() for value in content.values())


def _refuse_label_names(source):
    raise DataError(f"{source.path}: this is the file of label names; give the list of videos "
                    "that lies beside it")


def read_hmdb51(source):
    """All classes of the split of this file; 1 = train, 2 = test, 0 = in neither."""
    path = source.path
    number = re.search(r"_test_split(\d)\.txt$", path.name)[1]
    ending, rows, classes = f"_test_split{number}.txt", [], []
    for file in source.beside("*" + ending):
        label = file.name[:-len(ending)]
        classes.append(label)
        for at, line in enumerate(split_lines(read_text(file)), 1):
            name, _, flag = line.strip().rpartition(" ")
            if line.strip() and (flag not in ("0", "1", "2") or not is_media(name)):
                raise DataError(f"{file}, line {at}: expected a video's name and 0, 1 or 2, "
                                f"got {line[:60]!r}")
            if line.strip() and flag != "0":
                rows.append(Row((f"{label}/{name.strip()}", name.strip()), label,
                                split="train" if flag == "1" else "val"))
    return Listing(f"HMDB51, split {number}", rows, classes)


_UCF101 = re.compile(r"(.*/)?([^/]+)/(v_\w+_g\d\d_c\d\d\.\w+)(?: (\d+))?")


def _is_ucf101(source):
    """True if each line names a class folder and each number, if any, belongs to one folder."""
    matches = [_UCF101.fullmatch(line) for _, line in source.lines]
    if source.records or source.content is not None or not all(matches):
        return False
    pairs = {(match[2], match[4]) for match in matches}
    names, numbers = ({pair[i] for pair in pairs} for i in (0, 1))
    return numbers == {None} or len(pairs) == len(names) == len(numbers)


def _read_ucf101(source):
    name = source.path.name
    matches = [_UCF101.fullmatch(line) for _, line in source.lines]
    stems = [f"{match[1] or ''}{match[2]}/{match[3]}" for match in matches]
    split = {"train": "train", "testl": "val"}.get(name[:5])
    number = re.search(r"list0?(\d)", name)
    rows = [Row((stem, stem.split("/")[-1]), stem.split("/")[-2], split=split) for stem in stems]
    return Listing("UCF101" + (f", split {number[1]}" if number else ""), rows,
                   ucf101_classes(source.path.parent))


UCF101_CLASSES = "[cC]lass[iI]nd.txt"  # mirrors spell it in several ways


def ucf101_classes(folder):
    """Class names in the order of classInd.txt; None where there is no such file."""
    path = next(folder.glob(UCF101_CLASSES), None)
    if path is None:
        return None
    pairs = [line.split(maxsplit=1) for line in split_lines(read_text(path)) if line.strip()]
    if any(len(pair) != 2 or parse_int(pair[0]) is None for pair in pairs):
        raise DataError(f"{path}: expected lines like '1 ApplyEyeMakeup'")
    named = {parse_int(number): name.strip() for number, name in pairs}
    if sorted(named) != list(range(1, len(pairs) + 1)):
        raise DataError(f"{path}: must contain each number from 1 to {len(pairs)} once")
    return [named[number] for number in sorted(named)]


# ------------------------------------------------------------------------------------------------
# Lists without a header

_WHOLE_VIDEO = re.compile(r"(.+?)[ ,]+0[ ,]+-1(?:[ ,]+(\d+))?")
_SEVERAL_NUMBERS = re.compile(r"(.+\.\w{2,5})((?:[ ,;\t]+\d+){2,})")
_FRAME_FOLDER = re.compile(r"(.+?)[ ,;\t]+(\d+)(?:[ ,;\t]+(\d+))?")


def _lines_match(pattern, media):
    def matches(source):
        matches_of_lines = [pattern.fullmatch(line) for _, line in source.lines]
        return not source.records and source.content is None and all(
            match and is_media(match[1]) == media for match in matches_of_lines)
    return matches


def _read_whole_videos(source):
    matches = [_WHOLE_VIDEO.fullmatch(line) for _, line in source.lines]
    return Listing("VideoMAE V2's list of whole videos",
                   [Row(match[1], match[2]) for match in matches])


def _read_several_labels(source):
    """`path 1 5 7`: classes of one video. DataError if it may be `path start end label`."""
    matches = [_SEVERAL_NUMBERS.fullmatch(line) or re.fullmatch(r"(.+\.\w{2,5})[ ,;\t]+(\d+)", line)
               for _, line in source.lines]
    labels = [tuple(re.findall(r"\d+", match[2])) for match in matches]
    joined = all(re.fullmatch(r"[ \t]+\d+(,\d+)*|\d+", match[2]) for match in matches)
    if len({len(numbers) for numbers in labels}) == 1 and not joined:
        raise DataError(f"{source.path}: {len(labels[0])} numbers after each path may be classes, "
                        "a count of frames and a class, or a part and a class; add a header such "
                        "as 'path,labels' or 'path,start_frame,end_frame,label'")
    return Listing("list of paths with several labels",
                   [Row(match[1].strip().strip('"'), label)
                    for match, label in zip(matches, labels)])


def _is_several_labels(source):
    pattern = re.compile(r"(.+\.\w{2,5})([ ,;\t]+\d+)+")
    return _lines_match(pattern, True)(source) and any(_SEVERAL_NUMBERS.fullmatch(line)
                                                       for _, line in source.lines)


def _read_frame_folders(source):
    """`folder frames label`, as in TSN and mmaction2; in VideoMAE V2 `folder 0 frames`."""
    rows, matches = [], [_FRAME_FOLDER.fullmatch(line) for _, line in source.lines]
    has_start = all(match[2] in ("0", "1") and match[3] not in (None, "0") for match in matches)
    ambiguous = next((match for match in matches if re.search(r"[ ,;\t]\d+$", match[1])), None)
    if ambiguous or any(match[3] is None for match in matches):
        raise DataError(f"{source.path}: the numbers after {(ambiguous or matches[0])[1]} may be "
                        "frames or classes; write 'folder frames label', or add a header "
                        "'path,label'")
    for (number, _), match in zip(source.lines, matches):
        count, label = (match[3], None) if has_start else (match[2], match[3])
        cut = parse_part(f"{source.path}, line {number}", 0, count, in_frames=True)
        rows.append(Row(match[1].strip().strip('"'), label, part=cut))
    return Listing("list of `folder frames label` lines", rows)


def _read_list(source):
    """Lines of `path` or `path label`."""
    path, lines = source.path, source.lines
    if all(is_media(line) for _, line in lines):
        return Listing("list of paths", [Row(line.strip('"')) for _, line in lines])

    def splits_off_a_video(separator):
        return sum(separator in line and is_media(line.rsplit(separator, 1)[0])
                   for _, line in lines)
    # Split at the last separator, because a path may contain it. A quoted label may contain it too.
    separator = max(("::", "\t", ";", ",", " "), key=splits_off_a_video)
    quoted = re.compile(r'(.+?)\s*[;,\t ]\s*"([^"]*)"')
    rows = [(number, match[1], match[2]) if (match := quoted.fullmatch(line)) else
            (number, *line.rpartition(separator)[::2]) for number, line in lines]
    if rows[0][1].strip().lower() in PATH_COLUMNS:
        del rows[0]
    for number, name, label in rows:
        if not is_media(name):
            raise DataError(f"{path}, line {number}: expected 'path label', a video name and "
                            f"then a space, comma, tab or '::', got {(name or label)[:60]!r}")
    return Listing("list of `path label` lines",
                   [Row(name.strip().strip('"'), label.strip() or None) for _, name, label in rows])


def _has_keys(*names):
    def matches(source):
        return isinstance(source.content, dict) and set(names) <= source.content.keys()
    return matches


def _entries_have(*names):
    """True where the JSON is {id: entry}, and every entry has these keys."""
    def matches(source):
        content = source.content
        return isinstance(content, dict) and bool(content) and all(
            isinstance(entry, dict) and set(names) <= entry.keys() for entry in content.values())
    return matches


def _is_called(pattern):
    return lambda source: re.fullmatch(pattern, source.path.name) is not None


def _lines_start_with(pattern):
    def matches(source):
        return not source.records and source.content is None and all(
            re.match(pattern, line) for _, line in source.lines if line[0] != "#")
    return matches


def _records_reader(kind):
    return functools.partial(read_records, kind=kind)


# The first row that recognises a source reads it, so special formats precede general ones.
FORMATS = (
    Format("MSR-VTT", ("videos", "sentences"), _read_msrvtt, "MSRVTT_data.json",
           '{"videos": [{"video_id": "video0", "split": "train"}],\n'
           ' "sentences": [{"video_id": "video0", "caption": "a car drives"}]}',
           ("TrainValVideo/video0.mp4",), _has_keys("videos", "sentences"),
           "captions; the videos may be in two folders, TrainValVideo and TestVideo"),
    Format("MSR-VTT ids", ("video_id",), _read_msrvtt_ids, "MSRVTT_train.9k.csv",
           "video_id\nvideo0", ("videos/video0.mp4",),
           lambda source: source.columns == ("video_id",) and all(
               re.fullmatch(r"video\d+", str(record["video_id"])) for _, record in source.records),
           "the list of the 9k split, with MSRVTT_data.json beside it"),
    Format("MSR-VTT 1k-A", ("vid_key", "video_id", "sentence"), _records_reader("MSR-VTT 1k-A"),
           "MSRVTT_JSFUSION_test.csv",
           'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a cat, asleep"',
           ("videos/video9770.mp4",), None, "captions of the usual test set"),
    Format("MSRVTT-QA and MSVD-QA", ("video_id", "question", "answer"), _read_numbered_qa,
           "val_qa.json",
           '[{"category_id": 1, "video_id": 6513, "question": "what is he doing?",\n'
           '  "answer": "cook", "id": 1}]', ("videos/video6513.mp4",), _is_numbered_qa,
           "videos have numbers; youtube_mapping.txt beside it names those of MSVD-QA"),
    Format("MSVD", (), _read_msvd, "AllVideoDescriptions.txt",
           "mv89psg6zh4_33_46 a bird is bathing in a sink\n"
           "mv89psg6zh4_33_46 a bird splashes",
           ("YouTubeClips/mv89psg6zh4_33_46.avi",),
           lambda source: _is_called("AllVideoDescriptions.txt")(source)
           or _lines_start_with(r"[\w-]{11}_\d{1,5}_\d{1,5} [^\d\s]")(source),
           "each line has an id and a sentence; train_list.txt, val_list.txt and test_list.txt "
           "beside it give the splits"),
    Format("DiDeMo", ("video", "description", "times"), _read_didemo, "test_data.json",
           '[{"video": "user1_1.avi", "description": "a dog runs in", "times": [[0, 0]]},\n'
           ' {"video": "user1_1.avi", "description": "it leaves", "times": [[1, 1]]}]',
           ("videos/user1_1.avi",), None, "all sentences of a video form one paragraph"),
    Format("ActivityNet Captions", ("v_...", "timestamps", "sentences"),
           _read_activitynet_captions, "val_1.json",
           '{"v_ab": {"duration": 9.5, "timestamps": [[0, 4], [4, 9]],\n'
           '          "sentences": ["A dog runs in.", "It leaves."]}}',
           ("videos/v_ab.mp4",), _entries_have("timestamps", "sentences"),
           "all sentences of a video form one paragraph"),
    Format("LSMDC", (), _read_lsmdc, "LSMDC16_annos_test.csv",
           "1004_Juno_00.00.32.238-00.00.37.202\t00.00.32.238\t00.00.37.202\t00.00.32.238\t"
           "00.00.37.202\tSomeone walks.",
           ("1004_Juno/1004_Juno_00.00.32.238-00.00.37.202.avi",),
           _lines_start_with(r"\S+_\d\d\.\d\d\.\d\d\.\d+-\S+\t"),
           "tab-separated, without a header"),
    Format("VATEX", ("videoid", "encap"), _read_vatex, "vatex_training_v1.0.json",
           '[{"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A boy climbs.", "A wall."],\n'
           '  "chCap": []}]', ("videos/Ptf_2VRj-V0_000122_000132.mp4",), None,
           "English captions; files are already cut, or are parts of ID.mp4"),
    Format("InternVid", ("youtubeid", "start_timestamp", "end_timestamp", "caption"),
           _read_internvid, "InternVid-10M-FLT.jsonl",
           '{"YoutubeID": "aaa", "Start_timestamp": "00:00:04.000", "End_timestamp": '
           '"00:00:08.000",\n "Caption": "a field"}'.replace("\n ", " "), ("aaa.mp4",), None,
           "parts of whole videos, or files called aaa_00:00:04.000_00:00:08.000.mp4"),
    Format("COCO captions", ("images", "annotations"), _read_coco, "captions_val2014.json",
           '{"images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],\n'
           ' "annotations": [{"image_id": 9, "caption": "a plate"}]}',
           ("val2014/COCO_val2014_000000000009.jpg",), _has_keys("images", "annotations"),
           "image-text data, for --image-data of stage clip"),
    Format("HVU", ("tags", "youtube_id", "time_start", "time_end"), _read_hvu,
           "HVU_Train_V1.0.csv", "Tags,youtube_id,time_start,time_end\n"
           "running|dog|park,ab,5,15", ("ab_000005_000015.mp4",), None,
           "several labels per video; with HVU_Tags_Categories_V1.0.csv beside it, each category "
           "becomes a question"),
    Format("Kinetics", ("youtube_id", "time_start", "time_end"), _read_kinetics, "train.csv",
           "label,youtube_id,time_start,time_end,split\nriding a bike,ab,5,15,train",
           ("train/riding a bike/ab_000005_000015.mp4",), None,
           "files are called ID_start_end.mp4, in class folders or not, or are parts of ID.mp4"),
    Format("Kinetics in JSON", (), _read_kinetics_json, "train.json",
           '{"ab": {"annotations": {"label": "riding a bike", "segment": [5.0, 15.0]},\n'
           '        "duration": 10.0, "subset": "train", "url": "https://x/ab"}}',
           ("train/riding a bike/ab_000005_000015.mp4",),
           _entries_have("annotations", "subset", "url"), "files as above"),
    Format("WebVid", ("videoid", "page_dir", "name"), _read_webvid, "results_2M_train.csv",
           "videoid,contentUrl,duration,page_dir,name\n"
           "12,https://x/12.mp4,PT00H00M09S,006001_006050,A wave breaks.",
           ("videos/006001_006050/12.mp4",), None, "captions"),
    Format("TGIF-QA", ("gif_name", "question", "answer"), _records_reader(None),
           "Test_frameqa_question.csv", "gif_name\tquestion\tanswer\ntumblr_1\twhat runs ?\tdog",
           ("gifs/tumblr_1.gif",), None,
           "tab-separated; a1 to a5 are the candidates of multiple choice"),
    Format("NExT-QA", ("video", "question", "answer", "qid", "a0"), _read_nextqa, "val.csv",
           "video,frame_count,question,answer,qid,type,a0,a1,a2\n"
           "4010069381,369,how does he move,1,6,CH,runs,walks,jumps",
           ("videos/4010069381.mp4",), None,
           "multiple choice; map_vid_vidorID.json beside it gives the folders"),
    Format("Jester and Something-Something V1", (), _read_numbered_frames,
           "jester-v1-train.csv", "100;Swiping Left\n101;Thumb Up",
           ("20bn-jester-v1/100/", "20bn-jester-v1/101/"), _is_numbered_frames,
           "folders of pictures; the file *labels.csv beside it gives the class order"),
    Format("Something-Something V2", ("id", "template"), _read_something,
           "something-something-v2-train.json",
           '[{"id": "7", "label": "dropping a pen", "template": "Dropping [something]"}]',
           ("videos/7.webm",), lambda source: source.container == "JSON"
           and ({"id", "template"} <= set(source.columns) or source.columns == ("id",)),
           "the file something-something-v2-labels.json beside it numbers the templates"),
    Format("Diving48", ("vid_name", "label", "start_frame", "end_frame"), _read_diving48,
           "Diving48_V2_train.json",
           '[{"vid_name": "2x00lRzlTVQ_00000", "label": 34, "start_frame": 0, "end_frame": 20}]',
           ("rgb/2x00lRzlTVQ_00000.mp4",), None,
           "the file Diving48_vocab.json beside it names the classes"),
    Format("EPIC-Kitchens-100", ("narration_id", "video_id", "verb_class", "noun_class"),
           _read_epic, "EPIC_100_train.csv",
           "narration_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,"
           "verb,verb_class,noun,noun_class\nP01_01_0,P01_01,00:00:00.14,00:00:03.37,8,202,open "
           "door,open,3,door,3", ("P01/videos/P01_01.MP4",), None,
           "three questions: verb, noun, action; EPIC_100_verb_classes.csv and "
           "EPIC_100_noun_classes.csv beside it name the classes"),
    Format("Charades", ("id", "actions"), _read_charades, "Charades_v1_train.csv",
           "id,subject,actions,length\n46GP8,HR43,c092 11.90 21.20;c147 0.00 12.60,24.83",
           ("Charades_v1/46GP8.mp4",), None,
           "several classes per video; Charades_v1_classes.txt beside it names them"),
    Format("HMDB51", (), read_hmdb51, "wave_test_split1.txt", "a.avi 1\nb.avi 2",
           ("wave/a.avi", "wave/b.avi"),
           lambda source: _is_called(r".+_test_split\d\.txt")(source)
           and source.lines[0][1][-1] in "012",
           "1 = train, 2 = test; the files of all classes are in one folder"),
    Format("UCF101", (), _read_ucf101, "trainlist01.txt",
           "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1",
           ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",),
           _is_ucf101,
           "the file classInd.txt beside it gives the class order"),
    Format("VideoMAE V2's list of whole videos", (), _read_whole_videos, "k710.csv",
           "a.mp4 0 -1 3\nb.mp4 0 -1 1", ("a.mp4", "b.mp4"), _lines_match(_WHOLE_VIDEO, True),
           "`path 0 -1`, with or without a class"),
    Format("list of paths with several labels", (), _read_several_labels, "multi.txt",
           "a.mp4 1 5 7\nb.mp4 5", ("a.mp4", "b.mp4"), _is_several_labels,
           "as in mmaction2"),
    Format("list of `folder frames label` lines", (), _read_frame_folders, "rawframes.txt",
           "data/clap_0 12 0\ndata/wave_0 12 1", ("data/clap_0/", "data/wave_0/"),
           _lines_match(_FRAME_FOLDER, False),
           "folders of numbered pictures, as in TSN and mmaction2"),
    Format("file of label names", (), _refuse_label_names, "labels.json",
           '{"Dropping something": "0"}', (), _is_label_names, "refused: it lists no videos"),
    Format("table, JSON list or JSON lines", ("path",), read_records, "train.csv",
           "path,start,end,label\nlong.mp4,0,4,red\nlong.mp4,0:04,00:00:08.000,blue",
           ("long.mp4",),
           lambda source: bool(source.records) and any(
               set(record) & set(PATH_COLUMNS) for _, record in source.records),
           "with any of the column names above"),
    Format("list of `path label` lines", (), _read_list, "train.txt", "a.mp4 0\nb.mp4 1",
           ("a.mp4", "b.mp4"),
           lambda source: not source.records and source.content is None,
           "separated by space, tab, comma, semicolon or `::`; the label is optional"),
)


def read_list(source):
    """Source -> Listing, by the first format that recognises it. DataError where none does."""
    for row in FORMATS:
        if row.recognises(source):
            return row.read(source)
    raise DataError(f"{source.path}: no known format; {_nearest_format(source)}")


HEAD = """# Formats of lists

`--data` of every stage, and `python data.py PATH`, read the formats below. The content decides the
format; there is no flag for it. Content that is not used is named once, when the run starts.
Content that cannot be understood is an error of one line.

Videos are searched for in the list's folder and in the folder of `--video-folder`, both with two
levels of sub-folders. Other folders are read only if the path in the list points there. An id
stands for a file with any video suffix, or for a folder of numbered pictures.

This page is printed by `python -m video.formats`.

## Folders

- Videos in class folders: `run/a.mp4`, `jump/b.mp4`. Folder names are class names, even if they are
  numbers.
- Videos with a text file beside each: `a.mp4`, `a.txt`. The text is the caption.
- Folders of numbered pictures in class folders: `clap/clap_0/img_00001.jpg`. Each folder is one
  video, ordered by the numbers, with `--frame-rate` frames per second (default 25). With
  `--frame-rate 0` each picture is a clip.
- A folder with `metadata.csv` or `metadata.jsonl`, as on the Hugging Face hub. The column
  `file_name` names the files.
- UCF101 and HMDB51: a folder with the official split lists in it or in a sub-folder. The first
  split is read. To read another split, give its list. Without lists, a tenth is held out in whole
  groups (`g01`), which is no official split.

## Tables and records

A CSV, a table separated by tabs or semicolons, a JSON list of objects and JSON lines are
equivalent. Files may be UTF-8 or UTF-16. Column names may be in any case.
Long lines of the examples below are wrapped. The accepted column names are:

"""


def page():
    """The text of docs/formats.md: each format with its example."""
    lines = [HEAD + "| content | column names |", "| --- | --- |"]
    for field, names in COLUMNS.items():
        examples = ", ".join(f"`{name}`" for name in names[:5]) + ", ..." * (len(names) > 5)
        lines.append(f"| {field.replace('_', ' ')} | {examples} |")
    for row in FORMATS:
        lines += _entry(f"## {row.name}", row.about, row.file, row.videos, row.example)
    refused = ", ".join(f"`{key}`" for key in segments.CHANGES)
    lines += [segments.HEAD, textwrap.fill("A key of a video or a segment that would change its "
                                           f"meaning is refused: {refused}.", 99)]
    for row in segments.FORMATS:
        about = f"{row.about}. Subsets: {row.subsets[0]} and {row.subsets[1]}"
        lines += _entry(f"### {row.name}", about, row.file, row.beside, row.example)
    return "\n".join(lines) + "\n"


def _entry(title, about, file, beside, example):
    """The lines of one format."""
    lies = ", and beside it " + ", ".join(f"`{name}`" for name in beside) if beside else ""
    return [f"\n{title}\n", textwrap.fill(f"{about[:1].upper()}{about[1:]}.", 99), "",
            textwrap.fill(f"`{file}`{lies}:", 99, break_on_hyphens=False), "",
            *("    " + line for part in example.splitlines() for line in textwrap.wrap(
                part, 90, subsequent_indent="  ", expand_tabs=False, replace_whitespace=False,
                drop_whitespace=False))]


if __name__ == "__main__":
    print(page(), end="")
