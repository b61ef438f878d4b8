"""`VideoFiles`: a data set of clips from a folder or a list of video files.

    source --> annotations.read --> rows --> split --> labels as numbers --> self[index]: an item

video/annotations.py decides what a source is and where its files are. This file turns the rows
into items. Class names become numbers. A tenth of the files is held out if there is no official
split. An item reads the clip of its row; files that cannot be read are named as bad.
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

TEXTS = "caption", "question", "answer", "candidates"  # texts that a row may have


class VideoFiles(Clips, ClipSet):
    """Clips from video files, folders of pictures, or single pictures (clips of one frame).

    source    whatever `annotations.read` accepts: a folder, a list, the files of a benchmark
    part      "all", "train" or "val". "val" is the tenth that `split_files` holds out, "train" the
              rest. If the source has splits of its own, these are used instead; "all" is then its
              training split with train=True, else its validation split
    classes   {question: names in label order}, so that a validation list gets the label numbers of
              the
              training set; a sequence of names belongs to the question "label"
    official_order  True: `classes` have an official order (from weights or the source), and a
              number in the list is an index into it. False: the order is ours, and a number is only
              a name
    video_folder  where the files are, if not in the source's folder or below it
    frame_rate    frames per second of folders of pictures; 0 = each picture is a clip
    recipe    see video.clips.Clips.prepare

    self[index] and self[index, epoch] return an item; see video/clip_set.py. A row with a part of
    a video is a clip of that part. If the source has no labels, "labels" is {}. "bad" names files
    that cannot be read. With train=True such a file is replaced by the next readable one. With
    train=False "video" is None, so that an evaluation can count the file.

    `rows` are the rows of the clips. `captions` is None or has one caption per row. `kind` names
    the format. Raises DataError if the source has no known format, a label is unknown, or no file
    exists.
    """

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all",
                 classes=None, official_order=True, video_folder="", frame_rate=25.0, **recipe):
        if part not in ("all", "train", "val"):
            raise DataError(f"no part {part!r}: choose all, train or val")
        self.prepare(frames, size, stride, sampling, train, frame_rate=frame_rate or 25.0, **recipe)
        self.source, self.all_captions = str(source), None
        listing = annotations.read(source, video_folder, frame_rate > 0)
        self.kind, rows, self.notes = listing.kind, listing.rows, list(listing.notes)
        if listing.unused:
            self.notes.append(f"not used: {', '.join(listing.unused)}")
        # The order of class folders is ours. A file beside a list gives the official order.
        is_official = bool(listing.classes) and not listing.kind.startswith("folder of")
        self.official_order = official_order if classes else is_official
        self._number_labels(rows, classes or listing.classes or {})
        if len({row.split for row in rows}) > 1:
            split = {"all": "train" if train else "val"}.get(part, part)
            rows = [row for row in rows if row.split == split]
            if not rows:
                raise DataError(f"{source}: no file has the split {split}; some have another")
            self.kind += f", its {split} split"
        elif part != "all":
            if rows[0].split:
                self.notes.append(f"all its rows are of the split {rows[0].split}; a part of these "
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
                            f"{listing.hint}")
        if any(map(os.path.isdir, paths)):
            self.notes.append(f"its videos are folders of pictures, read at {self.frame_rate:g} "
                              "frames per second (--frame-rate)")

    def _number_labels(self, rows, classes):
        """Set self.classes, self.several and self.numbers: {question: {label as written: number}}.
        """
        classes = classes if isinstance(classes, dict) else {"label": classes}
        self.classes, self.numbers, several = {}, {}, set()
        for question, labels in annotations.by_question(rows).items():
            names, self.numbers[question], note = annotations.number_labels(
                self.source, labels, classes.get(question), self.official_order or not classes)
            self.classes[question] = tuple(names)
            self.notes += [note] if note else []
            several |= {question} if any(isinstance(label, tuple) for label in labels) else set()
        self.several = frozenset(several)

    def labels_at(self, index):
        """{question: class number, or uint8 (Y,)} of the clip at this index."""
        labels = {}
        for question, number in self.numbers.items():
            label = annotations.label_of(self.rows[index], question)
            if question in self.several:
                labels[question] = np.zeros(len(self.classes[question]), np.uint8)
                labels[question][[number[name] for name in annotations.labels_of(label)
                                  if name in number]] = 1
            elif label is not None:
                labels[question] = number[label]
        return labels

    def classes_without_clips(self):
        """Names of classes without a clip."""
        present = {(question, numbers[label]) for question, numbers in self.numbers.items()
                   for row in self.rows
                   for label in annotations.labels_of(annotations.label_of(row, question))
                   if label in numbers}
        return [name for question, names in self.classes.items()
                for number, name in enumerate(names) if (question, number) not in present]

    @property
    def items(self):
        """[(path, class number of the first question, or None), ...]"""
        first = next(iter(self.classes), None)
        return [(row.path, self.labels_at(i).get(first)) for i, row in enumerate(self.rows)]

    def keep(self, indices):
        """Keep only the rows with these indices. Returns self."""
        self.rows = [self.rows[i] for i in indices]
        self.captions = self.captions and [self.captions[i] for i in indices]
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
        """Keep `count` random files, the same ones in every run. Returns self."""
        return self.keep(sorted(np.random.default_rng(0).permutation(len(self))[:count].tolist()))

    def one_item_per_video(self):
        """Keep one item per video or part of one, with all its captions as "captions".

        No change for data without captions and for multiple choice. Returns self.
        """
        if not self.captions or self.rows[0].candidates:
            return self
        captions, first = {}, {}
        for i, row in enumerate(self.rows):
            captions.setdefault(row.clip, []).append(row.caption)
            first.setdefault(row.clip, i)
        self.all_captions = {clip: tuple(texts) for clip, texts in captions.items()}
        return self.keep(list(first.values()))

    def count_captions(self, indices):
        """Total number of captions of the items with these indices."""
        return sum(len((self.all_captions or {}).get(self.rows[i].clip, ("",))) for i in indices)

    def with_views(self, clips, crops):
        """A copy for evaluation, whose items have several views: see video.clips.Clips.prepare."""
        views = copy.copy(self)
        views.views = (clips, crops)
        return views

    def training_captions(self):
        """All captions. DataError where there are none or one is empty."""
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
        """For the user: format, counts, classes, a sample, missing files, unused columns."""
        row, label = self.rows[0], self.rows[0].label
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
                 + ("" if label is None else f" = {', '.join(annotations.labels_of(label))}")
                 + (f" = {row.caption!r}" if row.caption else ""))
        missing = f"; {len(self.missing):,} MISSING, e.g. {self.missing[0]}" if self.missing else ""
        lines = [f"{self.source}: {self.kind}: {counts}, {first}{missing}",
                 *(f"  {note}" for note in self.notes)]
        return "\n".join(map(printable, lines))

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        index, bad = range(len(self))[index], []
        for candidate in range(index, index + (len(self) if self.train else 1)):
            item = self._describe(candidate % len(self)) | {"bad": bad}
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

    def _describe(self, index):
        """The item at this index, without its video."""
        row = self.rows[index]
        item = {"video": None, "labels": self.labels_at(index), "path": row.path, "part": row.part,
                "clip": number_of(row.clip)}
        texts = {key: getattr(row, key) for key in TEXTS}
        item |= {key: text for key, text in texts.items() if text is not None}
        if "caption" in item:
            item["captions"] = (self.all_captions or {}).get(row.clip, (item["caption"],))
        return item


def number_of(clip):
    """A number in [0, 2**63) that identifies a clip (`Row.clip`), the same in every process."""
    digest = hashlib.blake2b(repr(clip).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
