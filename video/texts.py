"""Reading a list before its format is known: lines, a table with a header, JSON, JSON lines.

    file --> read_text --> Source(lines, content of JSON, columns, records)

A table, JSON lines and a JSON list of objects all become records: named values, with names in
lower case. One reader of a format (video/formats.py) therefore serves all three.
"""

import csv
import io
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from video.rows import DataError, Part, is_media

_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".list")
PATH_COLUMNS = ("path", "file_name", "filename", "file", "video_path", "clip_path", "image_path",
                "video", "image", "video_name", "vid_name", "clip_name", "gif_name", "video_id",
                "vid_id", "vid", "youtubeid", "youtube_id", "videoid", "filepath", "file_path",
                "clip", "id")


class Source(NamedTuple):
    """A list that was read, of any format."""

    path: Path
    lines: list  # of (line number, stripped line); no empty lines or comments
    content: object = None  # parsed JSON
    container: str = "list"  # list, table with a header, JSON, JSON lines
    columns: tuple = ()  # names of the records' values, lower case, in order of appearance
    records: list = ()  # of (location, such as "line 3", {column: value})

    def beside(self, pattern):
        """Files in the list's folder whose names match a pattern, sorted."""
        return sorted(self.path.parent.glob(pattern))


def require_file(path):
    """DataError unless path is a readable regular file. Reading a pipe could block forever."""
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a valid file name
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):
        raise DataError(f"{path}: is a folder, a pipe or a device, not a file")


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; else DataError."""
    require_file(path)
    raw = path.read_bytes()
    is_utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return raw.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() in _TEXT_SUFFIXES and (is_utf16 or b"\0" not in raw):
            line = raw[:error.start].count(b"\n") + 1
            raise DataError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not "
                            f"{'UTF-16' if is_utf16 else 'UTF-8; save the list with that encoding'}"
                            ) from None
        raise DataError(f"{path}: neither a video nor a text file; give a folder of videos, a "
                        "video, or a list with 'path label' on each line") from None


def split_lines(text):
    """The lines of a text. str.splitlines would also split at U+2028 and form feeds in captions."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_json(text, location):
    """The value of a JSON text. DataError with the location (file, line) if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error})") from None


def read_source(path):
    """Read a list -> Source. DataError: not text, empty, invalid JSON, an invalid row."""
    text = read_text(path)
    lines = [(number, line)
             for number, line in enumerate(map(str.strip, split_lines(text)), 1)
             if line and line[:2] != "# "]
    if not lines:
        raise DataError(f"{path}: the list is empty; write 'path label' on each line")
    if path.suffix.lower() == ".jsonl":
        return _json_lines(path, lines)
    if lines[0][1][0] in "[{":
        return _json(path, text, lines)
    for delimiter in "\t;,":
        names = [name.strip().strip('"').lower() for name in lines[0][1].split(delimiter)]
        if not any(map(is_media, names)) and set(names) & set(PATH_COLUMNS):
            return _table(path, text, lines, delimiter)
    return Source(path, lines)


def read_table(path):
    """The records of a table beside a list. Any column names are accepted."""
    return _table(path, read_text(path), [], ",").records


def _json(path, text, lines):
    try:
        content = parse_json(text, path)
    except DataError as error:
        if "Extra data" in str(error):
            return _json_lines(path, lines)
        raise
    if isinstance(content, dict) and content and all(map(is_media, content)):
        content = [{"path": name, "label": label} for name, label in content.items()]
    elif isinstance(content, dict) and content and all(
            isinstance(column, dict) and column for column in content.values()) and {
            key.lower() for key in content} & set(PATH_COLUMNS):  # by column, as pandas writes it
        rows = next(iter(content.values()))
        content = [{key: column.get(row) for key, column in content.items()} for row in rows]
    elif isinstance(content, dict) and {key.lower() for key in content} & set(PATH_COLUMNS):
        content = [content]
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        records = [(f"entry {number}", entry) for number, entry in enumerate(content, 1)]
        return _with_columns(Source(path, lines, content, "JSON", records=records))
    return Source(path, lines, content, "JSON")


def _json_lines(path, lines):
    """One object per line; its keys are the columns."""
    records = []
    for number, line in lines:
        item = parse_json(line, f"{path}, line {number}")
        if not isinstance(item, dict):
            raise DataError(f"{path}, line {number}: expected an object like "
                            '{"path": "dog.mp4", "caption": "a dog runs"}, got ' + line[:40])
        records.append((f"line {number}", item))
    return _with_columns(Source(path, lines, None, "JSON lines", records=records))


def _with_columns(source):
    """The source with its columns. The keys of all records become lower case."""
    columns, records = {}, []
    for location, record in source.records:
        lower_case = {key.strip().lower(): value for key, value in record.items()}
        if len(lower_case) < len(record):
            raise DataError(f"{source.path}, {location}: two of its keys differ only in case")
        columns |= dict.fromkeys(lower_case)
        records.append((location, lower_case))
    return source._replace(columns=tuple(columns), records=records)


def _table(path, text, lines, delimiter, quoting=csv.QUOTE_MINIMAL):
    """A table whose header names its columns."""
    # Without strict, an unclosed quote turns the rest of the file into one caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting,
                        strict=True)
    names, records = None, []
    while True:
        line = reader.line_num + 1  # first line of the row; quoted text may contain line breaks
        try:
            row = next(reader, None)
        except csv.Error as error:
            if delimiter == "\t" and quoting != csv.QUOTE_NONE:  # such files often do not quote
                return _table(path, text, lines, delimiter, csv.QUOTE_NONE)
            raise DataError(f"{path}, line {line}: not a row of a table ({error}); close quoted "
                            "text with a quote, and double a quote inside it") from None
        if row is None:
            break
        if not any(map(str.strip, row)):
            continue
        if names is None:
            names = [name.strip().lower() for name in row]
            duplicate = next((name for name in names if name and names.count(name) > 1), None)
            if duplicate:
                raise DataError(f"{path}, line {line}: two columns are called {duplicate!r}")
            continue
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: {len(row)} columns, but the header has "
                            f"{len(names)}; put quotes around text that contains the separator")
        values = zip(names, map(str.strip, row))
        records.append((f"line {line}", {name: value for name, value in values if name}))
    if not records:
        raise DataError(f"{path}: has a header but no line below it")
    columns = tuple(name for name in names if name)
    return Source(path, lines, None, "table with a header", columns, records)


# ------------------------------------------------------------------------------------------------
# Values of records


def parse_int(value):
    """The whole number >= 0 that a JSON value or a text stands for, or None.

    7, "7", 7.0 and "7.0" are 7, because columns with gaps are often written as floats. true, 7.5
    and numbers of more than 18 digits, which may not fit int64, give None.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        value = re.sub(r"\.0+$", "", value)
        return int(value) if value.isdecimal() and len(value) <= 18 else None
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return value if is_int and 0 <= value < 10**18 else None


def parse_seconds(value):
    """A time in seconds, from 7, 7.5, "7.5", "1:07" or "0:01:07.250"; None for anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:[.,]\d*)?)", value.strip())
        if not match:
            return None
        hours, minutes, rest = match.groups()
        value = int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(rest.replace(",", "."))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def parse_part(location, start, end, in_frames=False):
    """A Part from two values as written. DataError where one is invalid, or the end is not later.
    """
    parse = parse_int if in_frames else parse_seconds
    first, last = parse(start), parse(end)
    if first is None or last is None or last <= first:
        unit = "frame numbers" if in_frames else "seconds, or hh:mm:ss.mmm"
        raise DataError(f"{location}: a part of a video needs a start and a later end, in {unit}; "
                        f"got {str(start)[:30]!r} and {str(end)[:30]!r}")
    return Part(first, last, in_frames)
