"""Data sets of clips, and the batches for training and evaluation.

    list --> Row (path, part, label, ...) --> Video --> choose_frames --> crop_frames --> item
             video/annotations, files         video/decoding, sampling, transforms, clips

    item: {"video": uint8 (T, H, W, 3), "labels": {question: int}, "path": str, ...}
    batch: {"video": uint8 (B, T, H, W, 3), "labels": {question: int64 (B,)}, ...}

1. `VideoFiles` reads a list of files in a format of video/annotations.py. `VideoShards` reads tar
   shards. video/moving_shapes.py generates clips. All three return the same items.
2. video/clips.py decodes, samples and crops each clip. "dense" sampling (stage 1) takes every 4th
   frame, from a random start in training and from the middle in evaluation. "segment" sampling
   (other stages) takes one frame of each of T equal segments: a random one in training, the middle
   one in evaluation. The other samplings reproduce official numbers.
3. `batches` collates items for training. Each random number is a function of (seed, index, epoch).
   So step k gets the same clips for any number of workers and after any resume. Tar shards are the
   exception; see `VideoShards`.
4. `held_out` collates each item of an evaluation set once.
5. Frames stay uint8 until they are on the device; `video.transforms.normalise` converts them.

Where we differ from official code: official loaders replace a corrupt video by another random one,
even in evaluation (VideoMAE kinetics.py:118). Here training skips it and reports it; evaluation
skips and counts it. VideoMAE fine-tuning spreads 16 frames over 64 with spacing 64/15; our "dense"
has the exact stride of VideoMAE pretraining. InternVideo's segment sampling never draws the last
frame of a segment; our "segment" can. `--sampling videomae-dense` and the like follow the official
rules exactly.

    python data.py PATH                 check a data set: bad files, statistics, a contact sheet
    python data.py PATH --cache DIR     write small copies of the videos, which load faster

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
    """VideoShards where the source is tar shards, else VideoFiles. Both take these arguments."""
    return (VideoShards if annotations.is_shards(source) else VideoFiles)(source, *args, **options)


def open_sets(source, held_out="", *, world="MovingShapes", frames, size, seed, motion_words=1.0,
              sampling="dense", stride=4, transform="plain", flip=True, video_folder="",
              frame_rate=25.0, **augment):
    """The training set and the held-out sets of a run: (train_set, {"val": ..., ...}).

    source    value of --data: a folder, a list ...; "" = generated clips
    held_out  value of --val-data; "" = a part of `source`
    world     class of video.moving_shapes that generates clips; its HELD_OUT names the held-out
              sets. Files have only "val"
    augment   further options of the training set

    VideoFiles explains the other options. Only this function asks whether clips come from files,
    because all data sets have the same interface.
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
                     official_order=train_set.official_order,
                     part="all" if held_out else "val", **options)
    print(f"--data {train_set.summary()}")
    if held_out:
        print(f"--val-data {val.summary()}")
        shared = {row.path for row in getattr(train_set, "rows", ())} & {
            row.path for row in getattr(val, "rows", ())}
        if shared:
            print(f"{len(shared):,} videos are in both --data and --val-data, as {min(shared)}")
    if val.several != train_set.several:
        count = "several labels" if val.several else "one label"
        raise DataError(f"{val.source}: its clips have {count} each, those of --data do not")
    absent = val.classes_without_clips()
    print(f"held out: {len(val)} clips" + (f"; none of {', '.join(absent[:5])}"
                                           f"{', ...' * (len(absent) > 5)}" if absent else ""))
    return train_set, {"val": val}


# ------------------------------------------------------------------------------------------------
# Batches

BATCH_LISTS = (*TEXTS, "captions", "path", "part", "clip", "facts",
               "index")  # lists with one entry per clip


def collate(items):
    """Items of one data set -> a batch without the unreadable items; or a DataError among them."""
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
    """Labels of B clips for one question -> int64 (B,), -1 = no label. None in `labels` = no label.

    Where a clip may have several labels: float32 (B, Y), 1 for each label, all 0 = no label.
    """
    example = next((label for label in labels if np.ndim(label)), None)
    if example is None:
        return torch.tensor([-1 if label is None else label for label in labels])
    rows = [np.zeros(len(example)) if label is None else label for label in labels]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def batches(dataset, batch_size, seed, steps, start=0, workers=0, shuffle=True, rank=0, world=1,
            repeats=1):
    """Iterate over the batches of steps start .. steps - 1; batch k is a function of (seed, k).

    An endless data set is read in order: step k has indices k*B to k*B + B - 1. A finite data set
    is read epoch by epoch. Each epoch has its own order, a function of (seed, epoch), unless
    shuffle=False. All batches have the same size, so a batch may contain clips of two epochs. The
    batches of `world` processes at step k together are the batch of one process with batch size
    B * world.

    workers  processes that load ahead; 0 = load in this process
    repeats  clips per file in a batch, each augmented on its own (repeated augmentation, arXiv
             1901.09335, as in VideoMAE); finite data sets only
    yields   dict: "video" uint8 (B, T, H, W, 3), "labels" {question: see `collate_labels`}, "bad"
             list of (path, reason), and the lists of BATCH_LISTS, such as "caption" and "path"
    raises   DataError of the data set, or where all files of a batch are unreadable
    """
    shards = isinstance(dataset, VideoShards)
    if repeats > 1 and (shards or not hasattr(dataset, "__len__")):
        raise DataError(f"repeats={repeats}: an endless data set cannot repeat clips")
    if shards:
        stream = ShardStream(dataset, seed, start, rank)
        loaded = load(stream, None, workers, collate, batch_size=batch_size)
        loaded = itertools.islice(loaded, max(steps - start, 0))
    else:
        plan = Plan(dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats)
        loaded = load(dataset, plan, workers, collate)
    for batch in loaded:
        if batch["video"] is None:
            raise DataError(f"all files of a batch are unreadable; {batch['bad'][0][1]}")
        yield batch


def spread(n, count):
    """`count` of the indices 0 to n - 1, evenly spaced from 0; all of them where n <= count."""
    return [i * n // min(n, count) for i in range(min(n, count))]


def held_out(dataset, count, batch_size, workers=0, rank=0, world=1):
    """Iterate once over `count` items in order; yields batches as `batches` does.

    An endless data set gives its first items. A finite one gives evenly spaced items (`spread`),
    because lists are often sorted by class; count=None takes all. Process `rank` of `world` gets
    every world-th batch, so that all processes together see each item once. batch["number"] is the
    index of the batch among those of all processes.

    The last batch, or one with unreadable files, may be smaller. batch["bad"] lists unreadable
    files, so readable + bad clips = count. If a single process can read no item, it raises
    DataError. One of several processes instead yields one batch whose "video" is None. No other
    batch is empty.
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
    # Each batch is yielded one step late: the last one must also report bad files that follow it.
    waiting, bad = None, []
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
    """Check a data set -> the exit code: 0, 1 where files are unreadable, 2 for a user's error."""
    from video import checking
    return checking.main(VideoFiles, argv)


if __name__ == "__main__":
    raise SystemExit(main())
