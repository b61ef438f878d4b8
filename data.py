"""Clips for training and evaluation: from a list of files to batches.

    list --> Row (path, label, caption, ...) --> Video --> choose_frames --> crop_frames --> item
             video/annotations.py                video/decoding, sampling, transforms, clips

    item: {"video": uint8 (T, H, W, 3), "labels": {question: int}, "path": str, ...}
    batch: {"video": uint8 (B, T, H, W, 3), "labels": {question: int64 (B,)}, ...}

1. `VideoFiles` reads a list of files, as video/annotations.py understands it. `VideoShards` reads
   tar shards. video/moving_shapes.py generates clips. All three return the same items.
2. A clip is decoded, sampled and cropped by one recipe (video/clips.py). "dense" sampling (stage 1)
   takes every 4th frame, from a random start in training and from the middle in evaluation.
   "segment" sampling (other stages) takes one frame of each of T equal parts: a random one in
   training, the middle one in evaluation. Other names reproduce official numbers.
3. `batches` collates items for training. Step k holds the same clips for any number of workers
   and after any resume, because each random draw is a function of (seed, index, epoch). Tar shards
   are the exception; see `VideoShards`.
4. `held_out` collates each item of an evaluation set once.
5. Frames stay uint8 until they are on the device; `video.transforms.normalise` converts them.

Where we differ from official code: official loaders put another random video in place of a corrupt
one, even in evaluation (VideoMAE kinetics.py:118). Here training reports what it skipped, and
evaluation never substitutes. VideoMAE fine-tuning spreads 16 frames over 64 with spacing 64/15; our
"dense" has the exact stride of its pretraining. InternVideo's segment sampling never draws the last
frame of a segment; our "segment" can. `--sampling videomae-dense` and others like it follow the
official rules exactly.

    python data.py PATH                 check a data set: bad files, statistics, a contact sheet
    python data.py PATH --cache DIR     write small copies, so that later epochs load faster

>>> spread(9, 3)
[0, 3, 6]
"""

import copy
import functools
import hashlib
import itertools
import os

import numpy as np
import torch

from engine.errors import printable
from video import annotations, moving_shapes
from video.annotations import DataError, split_files
from video.clip_set import ClipSet
from video.clips import Clips
from video.loading import Plan, load
from video.shards import ShardStream, VideoShards, describe_sample

TEXTS = "caption", "question", "answer", "candidates"  # that a file may have


class VideoFiles(Clips, ClipSet):
    """Clips from video files, from folders of pictures, or from pictures, clips of one frame.

    source    whatever `annotations.read` knows: a folder, a list, a benchmark's own files
    part      "all", "train" or "val": without or only the tenth that `split_files` holds out. Where
              the source has splits of its own, they count instead; "all" is then its training set
              with train=True, else its validation set
    classes   {question: names in label order}, to read a validation list with the labels of the
              training set; names alone are those of the question "label"
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
                 classes=None, video_folder="", frame_rate=25.0, **recipe):
        if part not in ("all", "train", "val"):
            raise DataError(f"no part {part!r}: choose all, train or val")
        self.prepare(frames, size, stride, sampling, train, frame_rate=frame_rate or 25.0, **recipe)
        self.source, self.all_captions = str(source), None
        found = annotations.read(source, video_folder, frame_rate > 0)
        self.kind, rows, self.notes = found.kind, found.rows, list(found.notes)
        if found.unused:
            self.notes.append(f"not used: {', '.join(found.unused)}")
        self._number_labels(rows, classes or found.classes or {})
        if len({row.split for row in rows}) > 1:
            own = {"all": "train" if train else "val"}.get(part, part)
            rows = [row for row in rows if row.split == own]
            if not rows:
                raise DataError(f"{source}: gives some files a split, and none the split {own}")
            self.kind += f", its {own} split"
        elif part != "all":
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
                self.source, labels, classes.get(question))
            self.classes[question] = tuple(names)
            self.notes += [note] if note else []
            several |= {question} if any(isinstance(label, tuple) for label in labels) else set()
        self.several = frozenset(several)

    def labels_at(self, place):
        """{question: class number, or uint8 (Y,) of several} of the clip at this place."""
        labels = {}
        of_row = annotations.by_question(self.rows[place:place + 1])
        for question, number in self.numbers.items():
            label, = of_row.get(question, (None,))
            if question in self.several:
                labels[question] = np.zeros(len(self.classes[question]), np.uint8)
                labels[question][[number[name] for name in annotations.labels_of(label)
                                  if name in number]] = 1
            elif label is not None:
                labels[question] = number[label]
        return labels

    def absent_classes(self):
        """Names of the classes that no clip has."""
        there = {(question, self.numbers[question][label]) for row in self.rows
                 for question, (one,) in annotations.by_question([row]).items()
                 if question in self.numbers for label in annotations.labels_of(one)
                 if label in self.numbers[question]}
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
            labels = annotations.by_question(self.rows)[question]
            kept = {label for label, number in self.numbers[question].items()
                    if old[number] in names}
            self.keep([i for i, label in enumerate(labels)
                       if kept & set(annotations.labels_of(label))])
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


def open_clips(source, *args, **options):
    """VideoFiles, or VideoShards where the source is tar shards; arguments as theirs."""
    return (VideoShards if annotations.is_shards(source) else VideoFiles)(source, *args, **options)


def open_sets(source, held_out="", *, world="MovingShapes", frames, size, seed, motion_words=1.0,
              sampling="dense", stride=4, transform="plain", flip=True, video_folder="",
              frame_rate=25.0, **augment):
    """The training set and the held-out sets of a run: (train_set, {"val": ..., ...}).

    source    what --data names: a folder, a list ...; "" = generated clips
    held_out  what --val-data names; "" = a part of `source`
    world     class of video.moving_shapes that generates clips; its HELD_OUT names the held-out
              sets. Files have only "val"
    augment   more for the training set; this and the rest: see VideoFiles

    Only this function asks whether clips come from files: all data sets have one interface.
    """
    if not source:
        make = functools.partial(getattr(moving_shapes, world), frames=frames, size=size, seed=seed,
                                 motion_words=motion_words)
        train_set = make("train")
        return train_set, {split: make(split) for split in train_set.HELD_OUT}
    options = dict(frames=frames, size=size, sampling=sampling, stride=stride, seed=seed, flip=flip,
                   transform=transform, video_folder=video_folder, frame_rate=frame_rate)
    train_set = open_clips(source, train=True, part="all" if held_out else "train", **options,
                           **augment)
    val = open_clips(held_out or source, train=False, classes=train_set.classes,
                     part="all" if held_out else "val", **options)
    print(f"--data {train_set.summary()}")
    absent = val.absent_classes()
    print(f"held out: {len(val)} clips" + (f"; none of {', '.join(absent[:5])}"
                                           f"{', ...' * (len(absent) > 5)}" if absent else ""))
    return train_set, {"val": val}


# ------------------------------------------------------------------------------------------------
# Batches

BATCH_LISTS = (*TEXTS, "captions", "path", "part", "clip", "facts",
               "index")  # one entry for each clip


def collate(items):
    """Items of one data set -> a batch, without the unreadable ones; or a DataError among them."""
    for item in items:
        if isinstance(item, DataError):
            return item
    good = [item for item in items if item["video"] is not None]
    batch = {key: [item[key] for item in good] for key in BATCH_LISTS if good and key in good[0]}
    questions = dict.fromkeys(question for item in good for question in item.get("labels", ()))
    batch["labels"] = {question: collate_labels([item["labels"].get(question) for item in good])
                       for question in questions}
    batch["bad"] = [entry for item in items for entry in item.get("bad", ())]
    batch["video"] = torch.from_numpy(np.stack([item["video"] for item in good])) if good else None
    return batch


def collate_labels(labels):
    """The answers of several clips to one question, None = none: int64 (B,), -1 = none; where a
    clip may have several answers, float32 (B, Y) with a one for each, no one = none."""
    several = next((label for label in labels if np.ndim(label)), None)
    if several is None:
        return torch.tensor([-1 if label is None else label for label in labels])
    rows = [np.zeros(len(several)) if label is None else label for label in labels]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def batches(dataset, batch_size, seed, steps, start=0, workers=0, shuffle=True, rank=0, world=1,
            repeats=1):
    """Iterate over the batches of steps start .. steps - 1; batch k is a function of (seed, k).

    An endless data set is read in order: step k holds indices k*B to k*B + B - 1. A finite one is
    read epoch after epoch, each in its own order drawn from (seed, epoch) unless shuffle=False. A
    batch may contain clips of two epochs, so that all batches have the same size. The batches of
    `world` processes at step k are together the batch of one process with batch size B * world.

    workers  processes that load ahead; 0 = load in this one
    repeats  clips of each file side by side, each with its own random draws (repeated augmentation,
             arXiv 1901.09335, as VideoMAE uses it); finite data sets only
    yields   dict: "video" uint8 (B, T, H, W, 3), "labels" {question: see `collate_labels`}, "bad"
             list of (path, reason), and lists such as "caption" and "path", see BATCH_LISTS
    raises   DataError where the data set does, or for a batch of nothing but unreadable files
    """
    shards = isinstance(dataset, VideoShards)
    if repeats > 1 and (shards or not hasattr(dataset, "__len__")):
        raise DataError(f"repeats={repeats}: an endless data set has no use for it")
    if shards:
        stream = ShardStream(dataset, seed, start, rank)
        loaded = load(stream, None, workers, collate, batch_size=batch_size)
        loaded = itertools.islice(loaded, max(steps - start, 0))
    else:
        plan = Plan(dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats)
        loaded = load(dataset, plan, workers, collate)
    for batch in loaded:
        if batch["video"] is None:
            raise DataError(f"a whole batch of unreadable files; {batch['bad'][0][1]}")
        yield batch


def spread(n, count):
    """Indices of `count` of n items, evenly spaced from 0 on; all indices where n <= count."""
    return [i * n // min(n, count) for i in range(min(n, count))]


def held_out(dataset, count, batch_size, workers=0, rank=0, world=1):
    """Iterate once over `count` items, in order, as batches like those of `batches`.

    An endless data set gives its first items. A finite one gives evenly spaced ones (`spread`),
    because lists are often sorted by class; count=None takes all. Process `rank` of `world` gets
    every world-th batch, so that together they see every item once. "number" is the batch's place
    among all.

    The last batch may be smaller, and so may one with unreadable files. These are in "bad", so that
    evaluated + bad = count. If no item can be read: DataError; one of several processes instead
    yields one batch whose "video" is None. No other batch is empty.
    """
    if hasattr(dataset, "__len__"):
        count = len(dataset) if count is None else min(count, len(dataset))
    chosen = spread(len(dataset), count) if hasattr(dataset, "__len__") else range(count)
    if isinstance(dataset, VideoShards):
        samples = itertools.islice(map(describe_sample, dataset.samples(dataset.shards)), count)
        parts = iter(lambda: list(itertools.islice(samples, batch_size)), [])
        loaded = (collate([dataset.item(*sample, None) for sample in part])
                  for part in itertools.islice(parts, rank, None, world))
    else:
        plan = [list(chosen[first:first + batch_size]) for first in range(0, count, batch_size)]
        loaded = load(dataset, plan[rank::world], workers, collate)
    waiting, bad = None, []  # one batch is held back: the last one also reports what follows it
    for number, batch in zip(itertools.count(rank, world), loaded):
        bad += batch["bad"]
        if batch["video"] is None:
            continue
        if waiting is not None:
            yield waiting
        waiting, bad, batch["bad"], batch["number"] = batch, [], bad, number
    if waiting is not None:
        waiting["bad"] += bad
        yield waiting
    elif world == 1:
        raise DataError(f"none of the {count} held-out clips can be read; {bad[0][1]}")
    elif bad:
        yield {"video": None, "bad": bad, "number": rank}


def main(argv=None):
    """Check a data set. Returns the exit code: 0, 1 where files are bad, 2 for a user's mistake."""
    from video import checking
    return checking.main(VideoFiles, argv)


if __name__ == "__main__":
    raise SystemExit(main())
