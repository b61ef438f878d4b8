"""Data sets of clips, and the batches for training and evaluation.

    list --> Row (path, part, label, ...) --> Video --> choose_frames --> crop_frames --> item
             video/annotations, files         video/decoding, sampling, transforms, clips

    item: {"video": uint8 (T, H, W, 3), "labels": {question: int}, "path": str, ...}
    batch: {"video": uint8 (B, T, H, W, 3), "labels": {question: int64 (B,)}, ...}

    T frames, H rows and W columns of pixels, B clips. A question is a set of classes, such as
    "motion"; most data sets have one, "label". video/clip_set.py lists the other keys.

1. `VideoFiles` reads a list of files in a format of video/annotations.py. `VideoShards` reads tar
   shards. video/moving_shapes.py generates clips. All three return the same items.
2. video/clips.py decodes, samples and crops each clip. "dense" sampling (stage 1) takes every n-th
   frame (--sampling-rate, default 4). Its window starts at a random frame in training, and is
   centred in evaluation. "segment" sampling (other stages) divides the video into T equal segments
   and takes one frame of each: a random one in training, the middle one in evaluation. The other
   samplings follow official code (video/sampling.py).
3. `batches` makes batches for training. The order of an epoch is a function of (seed, epoch). The
   frames and crop of an item are a function of (seed, index, epoch). So step k gets the same clips
   for any number of workers and after any resume. Tar shards are the exception; see `VideoShards`.
4. `held_out` makes batches for evaluation. Each item occurs once, without random numbers.
5. Frames stay uint8 until they are on the device; `video.transforms.normalise` converts them.

Where we differ from official code:
- Official loaders replace a corrupt video by a random other one, even in evaluation
  (VideoMAE kinetics.py:118). Here training takes the next readable file of the list and reports the
  corrupt one. Evaluation takes no other file and counts the corrupt one.
- VideoMAE's fine-tuning spreads 16 frames over 64, with a spacing of 64/15. Our "dense" has a
  spacing of exactly 4, as VideoMAE's pretraining.
- InternVideo's segment sampling never draws the last frame of a segment. Our "segment" can draw it.
`--sampling videomae-dense`, `internvideo` and others follow the official rules exactly.

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
    """Open a source of --data: VideoShards for tar shards, VideoFiles for all others.

    The arguments are those of VideoFiles; VideoShards has the same ones.
    """
    return (VideoShards if annotations.is_shards(source) else VideoFiles)(source, *args, **options)


def open_sets(source, held_out="", *, generated="MovingShapes", frames, size, seed,
              motion_words=1.0, sampling="dense", stride=4, transform="plain", flip=True,
              video_folder="", frame_rate=25.0, **augment):
    """The training set and the held-out sets of a run: (train_set, {"val": ..., ...}).

    source        value of --data: a folder, a list ...; "" = generated clips
    held_out      value of --val-data: another source; "" = hold out a part of `source`
    generated     name of the class in video.moving_shapes that generates clips. Its HELD_OUT names
                  the held-out sets; files have only "val"
    motion_words  of generated clips, see video.moving_shapes.MovingShapes
    augment       options for the training set alone, see video.clips.Clips.prepare

    VideoFiles explains the other options. Files, shards and generated clips have one interface,
    video.clip_set.ClipSet, so the training loop does not ask where clips come from.
    """
    if not source:
        make = functools.partial(getattr(moving_shapes, generated), frames=frames, size=size,
                                 seed=seed, motion_words=motion_words)
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

# Keys whose values are lists in a batch, with one entry per clip.
BATCH_LISTS = (*TEXTS, "captions", "path", "part", "clip", "facts", "index")


def collate(items):
    """Make a batch from the items of one data set, without the unreadable ones.

    Where an item is a DataError, return it: raised in a worker process, it would come with a long
    traceback. "video" is None where no item is readable.
    """
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
    """Make a tensor from the labels of B clips for one question. None = the clip has no label.

    labels   class numbers -> int64 (B,), -1 = no label; or vectors (Y,) of a question to which a
             clip may have several answers -> float32 (B, Y), 1 for each answer, all 0 = no label
    """
    example = next((label for label in labels if np.ndim(label)), None)
    if example is None:
        return torch.tensor([-1 if label is None else label for label in labels])
    rows = [np.zeros(len(example)) if label is None else label for label in labels]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def batches(dataset, batch_size, seed, steps, start=0, workers=0, shuffle=True, rank=0, world=1,
            repeats=1):
    """Iterate over the batches of steps start .. steps - 1; batch k is a function of (seed, k).

    A step is one batch. A stage with --accum 4 therefore uses four of these steps for each step of
    its optimiser.

    An endless data set is read in order: step k has indices k*B to k*B + B - 1. A finite data set
    is read epoch by epoch. Each epoch has its own order, unless shuffle=False. All batches have the
    same size, so a batch may contain clips of two epochs.

    workers      processes that load ahead; 0 = load in this process
    rank, world  index of this process, number of processes. Their batches of step k together are
                 the batch of one process with batch size B * world
    repeats      clips per file in a batch, each augmented on its own (repeated augmentation, arXiv
                 1901.09335, as in VideoMAE); finite data sets only
    yields       dict: "video" uint8 (B, T, H, W, 3), "labels" {question: see `collate_labels`},
                 "bad" list of (path, reason), and the lists of BATCH_LISTS, such as "path"
    raises       DataError of the data set, or where all files of a batch are unreadable
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
    every world-th batch, so all processes together see each item once. batch["number"] is the index
    of the batch among those of all processes.

    The last batch, or one with unreadable files, may be smaller. batch["bad"] lists unreadable
    files: readable and bad clips together are `count`. Batches without a readable clip are left
    out. If none remains and world is 1, DataError is raised. With world > 1 this yields a single
    batch whose "video" is None, so that the others learn which files are bad.
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
    # A readable batch reports the bad files of unreadable batches before it. It waits for
    # the next readable one. If none follows, it also reports those after it.
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
