"""Clips for training and evaluation: from a list of files to batches.

    list --> Row (path, part, label, ...) --> Video --> choose_frames --> crop_frames --> item
             video/annotations, files         video/decoding, sampling, transforms, clips

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

import functools
import itertools

import numpy as np
import torch

from video import annotations, moving_shapes
from video.files import TEXTS, VideoFiles
from video.loading import Plan, load
from video.rows import DataError
from video.shards import ShardStream, VideoShards, describe_sample


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
                     in_order=train_set.in_order, part="all" if held_out else "val", **options)
    print(f"--data {train_set.summary()}")
    if held_out:
        print(f"--val-data {val.summary()}")
        both = {row.path for row in getattr(train_set, "rows", ())} & {
            row.path for row in getattr(val, "rows", ())}
        if both:
            print(f"{len(both):,} videos are in both --data and --val-data, as {min(both)}")
    if val.several != train_set.several:
        has = "several labels" if val.several else "one label"
        raise DataError(f"{val.source}: its clips have {has} each, those of --data have not")
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
