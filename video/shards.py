"""Clips from tar shards in the WebDataset layout."""

import contextlib
import itertools
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import torch

from engine.errors import printable
from video import annotations
from video.annotations import DataError, split_files
from video.clip_set import ClipSet
from video.clips import Clips
from video.decoding import Bytes


class VideoShards(Clips, ClipSet):
    """Clips from tar shards: k.mp4 with k.txt, k.json or k.cls beside it.

    source  one .tar, a pattern like clips-{000000..000123}.tar, or a folder of .tar files. A
            pattern
            may be a URL that the `webdataset` package reads (pip install webdataset)

    The other arguments are those of data.VideoFiles and `Clips.prepare`. A .txt or .json file
    holds the caption, a .cls file the class number. part="val" is a random tenth of the shards,
    "train" the rest.

    Shards are for data sets that are too large for a list. Training draws shards with replacement,
    without end, and shuffles samples in a buffer of 200. The number of steps alone therefore
    decides the length of a run. A batch is a function of (seed, number of workers, step at which
    the run started): a resumed run draws new shards and does not repeat the old ones. Evaluation
    reads its shards once, in order.

    `items` and `captions` describe the first shard in training, and all shards in evaluation. They
    are used for the vocabulary and for `summary`. Raises DataError: no such shard, no video in it,
    webdataset not installed.
    """

    missing = ()

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all",
                 classes=None, official_order=True, video_folder="", frame_rate=25.0, **recipe):
        if video_folder:
            raise DataError(f"--video-folder: {source} contains its videos; remove this flag")
        try:
            import webdataset
        except ImportError:
            raise DataError(f"{source}: reading tar shards needs the webdataset package: "
                            "pip install webdataset") from None
        shards = (sorted(map(str, Path(source).glob("*.tar"))) if os.path.isdir(source)
                  else webdataset.shardlists.expand_urls(str(source)))
        absent = [shard for shard in shards if ":" not in shard and not os.path.isfile(shard)]
        if absent or not shards:
            raise DataError(f"{source}: no such shard{': ' + absent[0] if absent else ''}")
        if part != "all":
            parts = split_files([(shard,) for shard in shards])
            shards = [shard for shard, in parts[part == "val"]]
        self.prepare(frames, size, stride, sampling, train, **recipe)
        self.source, self.shards = str(source), shards
        described = list(map(describe_sample, self.samples(shards[:1] if train else shards)))
        if not described:
            raise DataError(f"{shards[0]}: no video in this shard")
        self.items = [(item["path"], item["labels"].get("label")) for item, _ in described]
        captions = [item.get("caption") for item, _ in described]
        self.captions = None if None in captions else captions

    def __len__(self):
        return len(self.items)

    def summary(self):
        """One line for the user: the number of shards, and the content of those listed."""
        caption = f" = {self.captions[0]!r}" if self.captions else ""
        where = "the first" if self.train else "them"
        return printable(f"{self.source}: {len(self.shards):,} tar shards, {len(self):,} videos in "
                         f"{where}, first {self.items[0][0]}{caption}")

    def training_captions(self):
        """The captions of the first shard. DataError where one is missing."""
        return self.captions or super().training_captions()

    def samples(self, shards, mix=None):
        """The raw samples of an iterable of shards, in order.

        mix  None, or a random.Random that shuffles them
        """
        import webdataset
        stages = [lambda: ({"url": shard} for shard in shards), webdataset.tarfile_to_samples()]
        if mix is not None:
            stages.append(webdataset.shuffle(200, rng=mix))
        try:
            for sample in webdataset.DataPipeline(*stages):
                if describe_sample(sample):
                    yield sample
        except DataError:
            raise
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"{self.source}: a shard cannot be read ({error})") from None

    def stream(self, *key):
        """Items like those of VideoFiles.

        In training they are endless, with draws seeded by the numbers of `key`. In evaluation each
        comes once, in order.
        """
        if not self.train:
            for item, content in map(describe_sample, self.samples(self.shards)):
                yield self.item(item, content, None)
            return
        rng = np.random.default_rng((self.seed, *key))
        endless = (self.shards[rng.integers(len(self.shards))] for _ in itertools.count())
        mix, bad = random.Random(int(rng.integers(2**63))), []
        for number, sample in enumerate(self.samples(endless, mix)):
            item = self.item(*describe_sample(sample), (self.seed, *key, number))
            bad += item["bad"]
            if len(bad) > 1000:
                raise DataError(f"{self.source}: a thousand samples in a row cannot be read; "
                                f"{bad[0][1]}")
            if item["video"] is not None:
                item["bad"], bad = bad, []
                yield item

    def item(self, item, content, key):
        """The item of `describe_sample` with its video, or with the error in "bad"."""
        item |= {"video": None, "bad": []}
        try:
            item["video"] = self.clip(Bytes(item["path"], content), key)
        except DataError as error:
            item["bad"].append((item["path"], str(error)))
        return item


def describe_sample(sample):
    """(item without video, content of the video file) of a WebDataset sample; None without video.

    The item is {"path", "labels" and, if there is one, "caption" and "captions"}. DataError where
    .cls holds a number too large for a class.
    """
    video = next((key for key in sample if annotations.is_media(f"x.{key}")), None)
    if video is None:
        return None
    caption = sample.get("txt", b"").decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        in_json = json.loads(sample.get("json", b"null")).get("caption")
        caption = caption or (in_json if isinstance(in_json, str) else "")
    name, label = f"{sample['__url__']}/{sample['__key__']}", sample.get("cls", b"-1").strip()
    if label.isdigit() and (len(label) > 18 or int(label) >= annotations.MOST_CLASSES):
        raise DataError(f"{name}.cls: {label[:20].decode()} is no class number; these are "
                        f"below {annotations.MOST_CLASSES:,}")
    item = {"path": f"{name}.{video}", "labels": {"label": int(label)} if label.isdigit() else {}}
    return item | ({"caption": caption, "captions": (caption,)} if caption else {}), sample[video]


class ShardStream(torch.utils.data.IterableDataset):
    """The endless items of VideoShards. Each worker process has its own stream."""

    def __init__(self, shards, *key):
        self.shards, self.key = shards, key

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self.shards.stream(*self.key, worker.id if worker else 0)
        except DataError as error:
            yield error
