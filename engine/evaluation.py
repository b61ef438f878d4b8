"""Evaluation: the held-out batches of a data set, kept or decoded again, and means over them."""

import numbers

import data
import torch

from engine import processes


def weighted_mean(rows):
    """[(number, clips, {name: value}, ...), ...] -> {name: mean over all clips}."""
    total = {}
    for _, count, values, *_ in rows:
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value * count
    return {name: value / sum(row[1] for row in rows) for name, value in total.items()}


def to_device(batch, device):
    """A batch, a dict, with its tensors on the device; from pinned memory without waiting."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def numbers_of(results):
    """{set: {name: value}} -> {"<set>_<name>": number}; what is no number is left out."""
    return {f"{which}_{name}": value if isinstance(value, (int, float)) else float(value)
            for which, values in results.items() for name, value in values.items()
            if isinstance(value, numbers.Real)}


class HeldOut:
    """The held-out batches of this process, on its device, each time they are iterated over.

    They are kept in memory where they are small, and decoded again by the workers where they are
    not. After a pass:

    clips    how many could be read, of all processes
    bad      [(path, reason), ...] of those that could not
    first    the first batch, for pictures; None where this process has none

    The pass ends in DataError where no clip can be read. All processes must come to its end.
    """

    KEPT = 2**28  # bytes

    def __init__(self, dataset, count, stage):
        self.dataset, self.count, self.stage = dataset, count, stage
        self.first = self.clips = self.bad = self.kept = None

    def __iter__(self):
        if self.kept is not None:
            for batch in self.kept:
                yield to_device(batch, self.stage.device)
            return
        self.first, kept, size, rows = None, [], 0, []  # size: bytes up to here
        for batch in data.held_out(self.dataset, self.count, self.stage.eval_batch,
                                   self.stage.workers, processes.rank(), processes.world()):
            readable = batch["video"] is not None
            size += batch["video"].nbytes if readable else 0
            rows.append((batch["number"], len(batch["video"]) if readable else 0,
                         batch.get("bad", ()), size))
            if not readable:
                continue
            self.first = self.first or batch
            if size <= self.KEPT:
                kept.append(batch)
            else:
                kept.clear()
            yield to_device(batch, self.stage.device)
        rows = processes.collect(rows)
        self.clips = sum(count for _, count, *_ in rows)
        self.bad = [pair for *_, bad, _ in rows for pair in bad]
        if not self.clips:
            raise data.DataError(f"none of the held-out clips can be read; {self.bad[0][1]}")
        # All processes keep, or none: collective calls must meet at the end of the next pass.
        self.kept = kept if all(size <= self.KEPT for *_, size in rows) else None


def evaluate(stage, model, held_out):
    """{name: HeldOut} -> {name: what stage.evaluate returns for it, and "clips"}."""
    results = {}
    for name, clips in held_out.items():
        results[name] = dict(stage.evaluate(model, clips, clips.dataset))
        if clips.clips is None:  # the stage did not read all clips; a whole pass counts them
            for _ in clips:
                pass
        results[name]["clips"] = clips.clips
    return results
