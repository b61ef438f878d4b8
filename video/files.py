"""Clips from a list of video files: `VideoFiles`.

    source --> annotations.read --> rows --> split --> labels as numbers --> self[index]: an item

What a source is, and where its files lie, is decided in video/annotations.py. Here its rows become
items: class names become numbers, a tenth is held out where there is no official split, and the
clip of a row is read, or the row is named as bad.
"""

import copy
import hashlib
import os

import numpy as np

from engine.errors import printable
from video import annotations
from video.annotations import split_files
from video.clip_set import ClipSet
from video.clips import Clips
from video.rows import DataError

TEXTS = "caption", "question", "answer", "candidates"  # that a file may have


class VideoFiles(Clips, ClipSet):
    """Clips from video files, from folders of pictures, or from pictures, clips of one frame.

    source    whatever `annotations.read` knows: a folder, a list, a benchmark's own files
    part      "all", "train" or "val": without or only the tenth that `split_files` holds out. Where
              the source has splits of its own, they count instead; "all" is then its training set
              with train=True, else its validation set
    classes   {question: names in label order}, to read a validation list with the labels of the
              training set; names alone are those of the question "label"
    in_order  True: numbers in the list are places in `classes`, which an official list or weights
              give; False: the order is our own, so numbers are names like all others
    video_folder  where the files lie, if not in the source's folder or below it
    frame_rate    frames a second of videos that are folders of pictures; 0 = no folder of pictures
              is a video: each picture is a clip
    the rest  see video.clips.Clips.prepare

    self[index] and self[index, epoch] return an item, see video/clip_set.py. Its labels are {},
    {"label": int}, or those of other questions; a question in `several` has a uint8 vector (Y,)
    with 1 for each class of the clip. A row that names a part of a video is a clip of that part. A
    file that cannot be read is named in "bad". With train=True the next readable file replaces it.
    With train=False "video" is None, so that an evaluation can count it.

    `rows` lists what the source says of each clip, `captions` is None or parallel to it, `kind`
    names the format. Raises DataError if source is none of these, a label is unknown, or no file
    exists.
    """

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all",
                 classes=None, in_order=True, video_folder="", frame_rate=25.0, **recipe):
        if part not in ("all", "train", "val"):
            raise DataError(f"no part {part!r}: choose all, train or val")
        self.prepare(frames, size, stride, sampling, train, frame_rate=frame_rate or 25.0, **recipe)
        self.source, self.all_captions = str(source), None
        found = annotations.read(source, video_folder, frame_rate > 0)
        self.kind, rows, self.notes = found.kind, found.rows, list(found.notes)
        if found.unused:
            self.notes.append(f"not used: {', '.join(found.unused)}")
        # Names of folders are in an order of ours, those of a file beside the list are not.
        self.in_order = in_order if classes else bool(found.classes) and not found.kind.startswith(
            "folder of")
        self._number_labels(rows, classes or found.classes or {})
        if len({row.split for row in rows}) > 1:
            own = {"all": "train" if train else "val"}.get(part, part)
            rows = [row for row in rows if row.split == own]
            if not rows:
                raise DataError(f"{source}: gives some files a split, and none the split {own}")
            self.kind += f", its {own} split"
        elif part != "all":
            if rows[0].split:
                self.notes.append(f"all its rows are of the split {rows[0].split}; a part of them "
                                  "is held out")
            rows = split_files(rows)[part == "val"]
        self.rows = rows
        self.captions = [row.caption for row in rows] if rows[0].caption is not None else None
        paths = dict.fromkeys(row.path for row in rows)
        self.missing = [path for path in paths
                        if not os.path.isfile(path) and not os.path.isdir(path)]
        if len(self.missing) == len(paths):
            raise DataError(f"{source}: none of its {len(self.missing)} files exists, the first is "
                            f"{self.missing[0]}; paths are relative to the list's folder"
                            f"{found.hint}")
        if any(map(os.path.isdir, paths)):
            self.notes.append(f"its videos are folders of pictures, taken at {self.frame_rate:g} "
                              "frames a second (--frame-rate)")

    def _number_labels(self, rows, classes):
        classes = classes if isinstance(classes, dict) else {"label": classes}
        self.classes, self.numbers, several = {}, {}, set()
        for question, labels in annotations.by_question(rows).items():
            names, self.numbers[question], note = annotations.number_labels(
                self.source, labels, classes.get(question), self.in_order or not classes)
            self.classes[question] = tuple(names)
            self.notes += [note] if note else []
            several |= {question} if any(isinstance(label, tuple) for label in labels) else set()
        self.several = frozenset(several)

    def labels_at(self, place):
        """{question: class number, or uint8 (Y,) of several} of the clip at this place."""
        labels = {}
        for question, number in self.numbers.items():
            label = annotations.label_of(self.rows[place], question)
            if question in self.several:
                labels[question] = np.zeros(len(self.classes[question]), np.uint8)
                labels[question][[number[name] for name in annotations.labels_of(label)
                                  if name in number]] = 1
            elif label is not None:
                labels[question] = number[label]
        return labels

    def absent_classes(self):
        """Names of the classes that no clip has."""
        there = {(question, numbers[label]) for question, numbers in self.numbers.items()
                 for row in self.rows
                 for label in annotations.labels_of(annotations.label_of(row, question))
                 if label in numbers}
        return [name for question, names in self.classes.items()
                for number, name in enumerate(names) if (question, number) not in there]

    @property
    def items(self):
        """[(path, class number of the first question, or None), ...]"""
        first = next(iter(self.classes), None)
        return [(row.path, self.labels_at(i).get(first)) for i, row in enumerate(self.rows)]

    def keep(self, places):
        """Keep only the files at these places of the list. Returns self."""
        self.rows = [self.rows[i] for i in places]
        self.captions = self.captions and [self.captions[i] for i in places]
        return self

    def only(self, question, names):
        """Keep only files of these classes, numbered in this order. Returns self."""
        old = self.classes[question]
        if not set(old) <= set(names):
            kept = {label for label, number in self.numbers[question].items()
                    if old[number] in names}
            self.keep([i for i, row in enumerate(self.rows) if kept & set(
                annotations.labels_of(annotations.label_of(row, question)))])
        if not self.rows:
            raise DataError(f"{self.source}: no file of the classes {', '.join(names)}")
        self.numbers = self.numbers | {question: {
            label: names.index(old[number]) for label, number in self.numbers[question].items()
            if old[number] in names}}
        self.classes = self.classes | {question: tuple(names)}
        return self

    def labels_of(self, question):
        """The labels of all items, in order. DataError where an item has none."""
        labels = [self.labels_at(i).get(question) for i in range(len(self))]
        if question not in self.classes or any(label is None for label in labels):
            first = self.rows[next((i for i, label in enumerate(labels) if label is None), 0)]
            raise DataError(f"{self.source}: no {question} of {first.path}")
        return labels

    def first(self, count):
        """Keep `count` files, drawn at random but always the same. Returns self."""
        return self.keep(sorted(np.random.default_rng(0).permutation(len(self))[:count].tolist()))

    def by_video(self):
        """One item for each video, or part of one, with all its captions as "captions"; no change
        where there are none, or where the task is to choose among several. Returns self."""
        if not self.captions or self.rows[0].candidates:
            return self
        captions, first = {}, {}
        for i, row in enumerate(self.rows):
            captions.setdefault(row.clip, []).append(row.caption)
            first.setdefault(row.clip, i)
        self.all_captions = {clip: tuple(texts) for clip, texts in captions.items()}
        return self.keep(list(first.values()))

    def captions_of(self, places):
        """How many captions the items with these numbers have together."""
        return sum(len((self.all_captions or {}).get(self.rows[i].clip, ("",))) for i in places)

    def with_views(self, clips, crops):
        """A copy for evaluation whose items have several views: see video.clips.Clips.prepare."""
        views = copy.copy(self)
        views.views = (clips, crops)
        return views

    def training_captions(self):
        """All captions, for a vocabulary. DataError where there are none, or one is empty."""
        if self.captions is None:
            return super().training_captions()
        for row, caption in zip(self.rows, self.captions):
            if not caption:
                raise DataError(f"{self.source}: the caption of {row.path} is empty")
        return list(self.captions)

    def training_questions(self):
        """All pairs (question, answer). DataError where one is missing."""
        if any(row.answer is None or not (row.question or "").strip() for row in self.rows):
            return super().training_questions()
        return [(row.question, row.answer) for row in self.rows]

    def __len__(self):
        return len(self.rows)

    def summary(self):
        """For the user: kind, counts, classes, a sample, what is missing, what was not used."""
        row, some = self.rows[0], self.rows[0].label
        videos, clips = ({key(row) for row in self.rows} for key in (
            lambda row: row.path, lambda row: row.clip))
        counts = (f"{len(clips):,} clips of " if len(clips) > len(videos) or row.part else "")
        counts += f"{len(videos):,} video{'s' * (len(videos) > 1)}"
        counts += (f", {len(self):,} captions" if self.captions else
                   f", {len(self):,} questions" if row.question else "")
        for question, names in self.classes.items():
            counts += (f", {len(names)} classes" + f" of {question}" * (question != "label")
                       + f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                       + ", several a clip" * (question in self.several))
        counts += "" if self.classes else ", no labels"
        first = (f"first {row.path}" + (f", {row.part}" if row.part else "")
                 + ("" if some is None else f" = {', '.join(annotations.labels_of(some))}")
                 + (f" = {row.caption!r}" if row.caption else ""))
        missing = f"; {len(self.missing):,} MISSING, e.g. {self.missing[0]}" if self.missing else ""
        lines = [f"{self.source}: {self.kind}: {counts}, {first}{missing}",
                 *(f"  {note}" for note in self.notes)]
        return "\n".join(map(printable, lines))

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        index, bad = range(len(self))[index], []
        for place in range(index, index + (len(self) if self.train else 1)):
            item = self._describe(place % len(self)) | {"bad": bad}
            try:
                item["video"] = self.clip(
                    item["path"], (self.seed, index, epoch) if self.train else None, item["part"])
                return item
            except DataError as error:
                bad.append((item["path"], str(error)))
        if self.train:
            raise DataError(f"{self.source}: none of its {len(self)} files can be read; "
                            f"{bad[0][1]}")
        return item

    def _describe(self, place):
        """The item at this place without its video."""
        row = self.rows[place]
        item = {"video": None, "labels": self.labels_at(place), "path": row.path, "part": row.part,
                "clip": number_of(row.clip)}
        texts = {key: getattr(row, key) for key in TEXTS}
        item |= {key: text for key, text in texts.items() if text is not None}
        if "caption" in item:
            item["captions"] = (self.all_captions or {}).get(row.clip, (item["caption"],))
        return item


def number_of(clip):
    """A number in [0, 2**63) that tells clips apart, on every process the same; see Row.clip."""
    digest = hashlib.blake2b(repr(clip).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
