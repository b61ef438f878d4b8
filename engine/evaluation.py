"""Evaluation: held-out batches, which stay in memory where they are small, and means over clips.

    data set --> HeldOut: batches on the device --> stage.evaluate --> {name: value} of each set
"""

import numbers

import data
import torch

from engine import processes


def weighted_mean(rows):
    """[(batch number, clips, {name: value}, ...), ...] -> {name: mean over all clips}."""
    total = {}
    for _, count, values, *_ in rows:
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value * count
    return {name: value / sum(row[1] for row in rows) for name, value in total.items()}


def to_device(batch, device):
    """A batch with its tensors on the device. Copies from pinned memory are asynchronous."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def numbers_of(results):
    """{set: {name: value}} -> {"<set>_<name>": number}, without values that are not numbers."""
    return {f"{which}_{name}": value if isinstance(value, (int, float)) else float(value)
            for which, values in results.items() for name, value in values.items()
            if isinstance(value, numbers.Real)}


class HeldOut:
    """An iterable over the held-out batches of this process, on its device.

    The first pass decodes them. Later passes take them from memory, or decode them again where they
    have more than CACHE_BYTES. After a pass these attributes are set:

    clips    number of readable clips of all processes
    bad      [(path, reason), ...] of unreadable clips of all processes
    first    first batch of this process, for pictures; None where it has none

    The first pass ends with DataError where no clip is readable. All processes must finish a pass,
    because its end is a collective call.
    """

    CACHE_BYTES = 2**28

    def __init__(self, dataset, count, stage):
        self.dataset, self.count, self.stage = dataset, count, stage
        self.first = self.clips = self.bad = self.cached = None

    def __iter__(self):
        if self.cached is not None:
            for batch in self.cached:
                yield to_device(batch, self.stage.device)
            return
        self.first, cached, size, rows = None, [], 0, []  # size: bytes of all batches so far
        for batch in data.held_out(self.dataset, self.count, self.stage.eval_batch,
                                   self.stage.workers, processes.rank(), processes.world()):
            readable = batch["video"] is not None
            size += batch["video"].nbytes if readable else 0
            rows.append((batch["number"], len(batch["video"]) if readable else 0,
                         batch.get("bad", ()), size))
            if not readable:
                continue
            self.first = self.first or batch
            if size <= self.CACHE_BYTES:
                cached.append(batch)
            else:
                cached.clear()
            yield to_device(batch, self.stage.device)
        rows = processes.gather_rows(rows)
        self.clips = sum(count for _, count, *_ in rows)
        self.bad = [pair for *_, bad, _ in rows for pair in bad]
        if not self.clips:
            raise data.DataError(f"none of the held-out clips can be read; {self.bad[0][1]}")
        # All processes cache or none: a pass over decoded batches ends in a collective call.
        self.cached = cached if all(size <= self.CACHE_BYTES for *_, size in rows) else None


def evaluate(stage, model, held_out):
    """{name: HeldOut} -> {name: result of stage.evaluate, and "clips", the number of clips}."""
    results = {}
    for name, clips in held_out.items():
        results[name] = dict(stage.evaluate(model, clips, clips.dataset))
        if clips.clips is None:  # the stage did not read all clips: a full pass counts them
            for _ in clips:
                pass
        results[name]["clips"] = clips.clips
    return results
