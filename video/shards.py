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
    """Clips from tar shards in the WebDataset layout: k.mp4 with k.txt, k.json or k.cls beside it.

    source  one .tar, a pattern like clips-{000000..000123}.tar, or a folder of .tar files; the pattern
            may be a URL, as the `webdataset` package reads them (pip install webdataset)
    The rest as `VideoFiles`; labels are the numbers of .cls. "val" is every tenth shard, "train" the rest.

    Shards are for data too large to be listed, so training draws shards with replacement for ever, a
    shuffle buffer of 200 samples mixes what comes out, and a run is as long as its steps say, however
    the shards fall on processes and workers. A batch is a function of (seed, number of workers, step at
    which the run began): a resumed run draws new shards, it does not repeat the old ones. Evaluation
    reads its shards once, in order.

    `items` and `captions` list what the first shard holds, the held-out part all of its own: enough for
    a vocabulary and for `summary`. Raises DataError: no such shard, no video in it, package absent.
    """

    missing = ()

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, part="all", classes=None,
                 **recipe):
        try:
            import webdataset
        except ImportError:
            raise DataError(f"{source}: tar shards are read by the webdataset package: pip install webdataset") from None
        shards = (sorted(map(str, Path(source).glob("*.tar"))) if os.path.isdir(source)
                  else webdataset.shardlists.expand_urls(str(source)))
        absent = [shard for shard in shards if ":" not in shard and not os.path.isfile(shard)]
        if absent or not shards:
            raise DataError(f"{source}: no such shard{': ' + absent[0] if absent else ''}")
        if part != "all":
            shards = [shard for shard, in split_files([(shard,) for shard in shards])[part == "val"]]
        self.prepare(frames, size, stride, sampling, train, **recipe)
        self.source, self.shards = str(source), shards
        known = [describe_sample(sample) for sample in self.samples(shards[:1] if train else shards)]
        if not known:
            raise DataError(f"{shards[0]}: no video in this shard")
        self.items = [(item["path"], item["labels"].get("label")) for item, _ in known]
        captions = [item.get("caption") for item, _ in known]
        self.captions = None if None in captions else captions

    def __len__(self):
        return len(self.items)

    def summary(self):
        """One line for the user: how many shards, and what is in the first."""
        said = f" = {self.captions[0]!r}" if self.captions else ""
        return printable(f"{self.source}: {len(self.shards):,} tar shards, {len(self):,} videos in "
                                     f"{'the first' if self.train else 'them'}, first {self.items[0][0]}{said}")

    def training_captions(self):
        """The captions of the first shard. DataError where one has none."""
        return self.captions or super().training_captions()

    def samples(self, shards, mix=None):
        """The raw samples of an iterable of shards, one after another; mix: a random.Random to shuffle by."""
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
        """Items like those of VideoFiles: for ever and mixed by the numbers of `key`, or in evaluation once."""
        if not self.train:
            for item, content in map(describe_sample, self.samples(self.shards)):
                yield self.item(item, content, None)
            return
        rng = np.random.default_rng((self.seed, *key))
        endless = (self.shards[rng.integers(len(self.shards))] for _ in itertools.count())
        bad = []
        for count, sample in enumerate(self.samples(endless, random.Random(int(rng.integers(2**63))))):
            item = self.item(*describe_sample(sample), (self.seed, *key, count))
            bad += item["bad"]
            if len(bad) > 1000:
                raise DataError(f"{self.source}: a thousand samples in a row cannot be read; {bad[0][1]}")
            if item["video"] is not None:
                item["bad"], bad = bad, []
                yield item

    def item(self, item, content, key):
        item |= {"video": None, "bad": []}
        try:
            item["video"] = self.clip(Bytes(item["path"], content), key)
        except DataError as error:
            item["bad"].append((item["path"], str(error)))
        return item


def describe_sample(sample):
    """({"path", "label" and "caption" if there}, content of its video) of a WebDataset sample, or None."""
    video = next((key for key in sample if annotations.is_media(f"x.{key}")), None)
    if video is None:
        return None
    said = sample.get("txt", b"").decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        told = json.loads(sample.get("json", b"null")).get("caption")
        said = said or (told if isinstance(told, str) else "")
    label = sample.get("cls", b"-1").strip()
    if label.isdigit() and (len(label) > 18 or int(label) >= annotations.MOST_CLASSES):
        raise DataError(f"{sample['__url__']}/{sample['__key__']}.cls: {label[:20].decode()} is no class number; these are "
                        f"below {annotations.MOST_CLASSES:,}")
    item = {"path": f"{sample['__url__']}/{sample['__key__']}.{video}",
            "labels": {"label": int(label)} if label.isdigit() else {}}
    return item | ({"caption": said, "captions": (said,)} if said else {}), sample[video]


class ShardStream(torch.utils.data.IterableDataset):
    """The endless items of VideoShards, each worker's its own."""

    def __init__(self, shards, *key):
        self.shards, self.key = shards, key

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self.shards.stream(*self.key, worker.id if worker else 0)
        except DataError as error:
            yield error
