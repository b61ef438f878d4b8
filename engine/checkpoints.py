"""Checkpoints: last.pt and the one before it, written aside and renamed, read strictly.

A checkpoint is {"step", "settings", "seconds", ...} (see FACTS) and three groups of tensors:
"model", "average" (--ema) and "optimiser". With --shard it is a folder in which each process has
written its part. It loads at any number of processes.
"""

import dataclasses
import errno
import itertools
import os
import shutil
from pathlib import Path

import torch

import weights
from engine import processes
from engine.errors import UserError
from engine.optimisers import clips_per_step

KEPT = 2  # should the newest be damaged, --resume takes the one before

# Flags that a resumed run may change: they do not decide what is learned.
FREE_TO_CHANGE = {
    "out", "resume", "device", "workers", "steps", "eval_every", "save_every", "log_every",
    "eval_clips", "eval_batch", "dry_run", "weights", "shard", "attention", "compile", "precision",
    "recompute", "figures"}

# Flags of older versions that a checkpoint may name: {flag: its default}, where that is not 0, ""
# or False. FREE: any value may go on, because it changed nothing or --weights decided it.
FREE = object()
REMOVED = {
    "keep": FREE, "max_bad": FREE, "onednn": FREE, "decoder": "pyav", "blr": 1.5e-4,
    "space_time": "joint", "source": "all",                           # of mae, of fuse
    "motion_words": 1.0,                                              # of retrieve, as all below
    "gallery": FREE, "merge_share": FREE, "model": FREE, "kind": FREE, "local_units": FREE,
    "temporal_downsample": FREE, "vocabulary": FREE, "caption_depth": FREE, "queries": FREE,
    "image_batch": FREE}

# What a checkpoint says of its run. "onednn" ("on", "off", "") was among the settings before.
FACTS = {"step": int, "settings": dict, "seconds": float, "processes": int, "initial": dict,
         "bad": dict}


def recipe_of(stage):
    """The settings that decide what is learned."""
    return {key: value for key, value in dataclasses.asdict(stage).items()
            if key not in FREE_TO_CHANGE}


def tensors_of(model, optimizer, average):
    """Everything a run must remember beside its facts.

    -> {"model": ..., "average": ..., "optimiser": {"<parameter>.<what>": tensor}}. By name, so that
    it can be read however many processes hold it in parts. optimizer, average: or None
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots = {f"{names[parameter]}.{what}": value
             for parameter, state in (optimizer.state if optimizer else {}).items()
             for what, value in state.items()}
    return {"model": model.state_dict(), "average": average.state if average else {},
            "optimiser": slots}


def restore(tensors, model, optimizer, average):
    """Put back what `tensors_of` took, whole or in parts. UserError where it does not fit."""
    other = UserError("the checkpoint's tensors are not those of this model; start anew without "
                      "--resume")
    for saved, own in ((tensors["model"], model.state_dict()),
                       (tensors["average"], average.state if average else {})):
        if list(saved) != list(own) or any(saved[name].shape != own[name].shape for name in own):
            raise other
        for name, value in own.items():
            value.detach().copy_(processes.place(saved[name], value))
    parameters = dict(model.named_parameters())
    owner = {parameter: part for part in optimizer.parts for group in part.param_groups
             for parameter in group["params"]}
    slots = {}
    for key, value in tensors["optimiser"].items():
        name, what = key.rpartition(".")[::2]
        part = owner.get(parameters.get(name))
        if part is None or value.ndim and value.shape != parameters[name].shape:
            raise other
        slots.setdefault(part, {}).setdefault(name, set()).add(what)
    if any(whats != next(iter(group.values())) for group in slots.values()
           for whats in group.values()):
        raise other  # an optimiser remembers the same of every parameter
    for key, value in tensors["optimiser"].items():
        name, what = key.rpartition(".")[::2]
        parameter = parameters[name]
        owner[parameter].state[parameter][what] = processes.place(value, parameter)


def checkpoints(out):
    """Those in a run's folder, newest first: last.pt, last.1.pt ... Folders, with --shard."""
    older = {int(path.name.split(".")[1]): path for path in out.glob("last.*.pt")
             if path.name.split(".")[1].isdecimal()}
    return [path for path in (out / "last.pt", *(older[n] for n in sorted(older))) if path.exists()]


def save_checkpoint(out, facts, tensors, shard=False):
    """Write last.pt aside, rename the earlier ones, give it its name, remove what is beyond KEPT.

    All processes call this; with `shard` each writes its part, else the first writes all.
    """
    new = out / "last.pt.part"
    if shard:
        if processes.rank() == 0:
            shutil.rmtree(new, ignore_errors=True)
        processes.wait()
        flat = {f"{group}/{name}": value for group, values in tensors.items()
                for name, value in values.items()}
        processes.save_parts(new, flat, facts)
    if processes.rank() > 0:
        return
    if not shard:
        weights.write_torch(out / "last.pt.whole", facts | tensors)
        new = out / "last.pt.whole"

    def place(n):
        return out / (f"last.{n}.pt" if n else "last.pt")

    free = next(n for n in itertools.count() if n == KEPT or not place(n).exists())
    remove(place(free))  # there if it is beyond KEPT; a folder cannot be replaced
    for n in range(free, 0, -1):
        os.replace(place(n - 1), place(n))
    os.replace(new, place(0))
    weights.settle(out)
    for old in checkpoints(out)[KEPT:]:
        remove(old)


def remove(path):
    """A file or a whole folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_checkpoint(path, like):
    """(facts, tensors) of one checkpoint; ValueError where it is not what was written.

    like  the model's own tensors, `tensors_of` without the optimiser's
    """
    try:
        return read_parts(path, like) if path.is_dir() else read_whole(path)
    except MemoryError:
        raise
    except Exception as error:  # whatever a torn file makes torch raise
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # not the file's fault
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(lines[0][:100]) from None


def read_whole(path):
    """`read_checkpoint` of a file."""
    saved = weights.load(path)
    tensors = {key: saved.pop(key) for key in ("model", "average", "optimiser")}
    if saved["tensors"] != [len(group) for group in tensors.values()]:
        raise ValueError("some of its tensors are missing")
    if any(not isinstance(saved[key], kind) for key, kind in FACTS.items()):
        raise ValueError("its facts have other types")
    if not all(isinstance(value, torch.Tensor) for group in tensors.values()
               for value in group.values()):
        raise ValueError("holds something else than tensors")
    return saved, tensors


def read_parts(path, like):
    """`read_checkpoint` of a folder."""
    saved = processes.read_facts(path)

    def make(name, shape, dtype):
        group, name = name.split("/", 1)
        own = like["model"].get(name if group != "optimiser" else name.rpartition(".")[0])
        if own is not None and own.shape == shape:
            return torch.zeros_like(own.detach())
        return torch.empty(shape, dtype=dtype)

    tensors = {"model": {}, "average": {}, "optimiser": {}}
    for name, value in processes.read_parts(path, make).items():
        group, name = name.split("/", 1)
        tensors[group][name] = value
    for group in ("model", "average"):  # parts come in an order of their own
        tensors[group] = {name: tensors[group][name] for name in like["model"]
                          if name in tensors[group]}
    return saved, tensors


def resume_from(out, stage, like):
    """(facts, tensors) of the newest checkpoint that can be read, or None where there is none.

    A damaged one is named and set aside. UserError where none can be read or the recipe is another.
    """
    damaged = []
    for path in checkpoints(out):
        try:
            saved, tensors = read_checkpoint(path, like)
            break
        except ValueError as error:
            damaged.append((path, error))
    else:
        if damaged:
            raise UserError(f"{damaged[0][0]}: not a readable checkpoint ({damaged[0][1]}), nor is "
                            "an older one there; start anew without --resume")
        print(f"nothing to resume in {out}: starting at step 0")
        return None
    check_recipe(path, saved, stage)
    tensors = without_caption_decoder(tensors, like)
    for bad, error in damaged:
        names = (Path(f"{bad}.damaged" + f".{n}" * (n > 0)) for n in itertools.count())
        aside = next(name for name in names if not name.exists())
        print(f"{bad}: damaged ({error}); taking {path}, step {saved['step']}, and setting it "
              f"aside as {aside}")
        if processes.rank() == 0:
            bad.rename(aside)
    tell_changes(path, saved, stage)
    return saved, tensors


def without_caption_decoder(tensors, like):
    """Tensors of an older run of `retrieve`, which kept its encoders in a model with a decoder."""
    inner = [name.removeprefix("clip.") for name in tensors["model"] if name.startswith("clip.")]
    if inner != list(like["model"]):
        return tensors
    return {group: {name.removeprefix("clip."): value for name, value in values.items()
                    if name.startswith("clip.")} for group, values in tensors.items()}


def check_recipe(path, saved, stage):
    """UserError where a checkpoint was made with another recipe.

    Compares both ways: a flag that the checkpoint does not know had its default in it and must not
    be typed otherwise; a flag of the checkpoint that was removed since must have had its default.
    """
    was, now = saved["settings"], recipe_of(stage)
    defaults = {field.name: field.default for field in dataclasses.fields(stage)}
    before = saved["processes"] * was["batch_size"] * was["accum"]
    # Older code wrote down flags that --weights fix as they were typed, not as they are.
    skipped = stage.fixed if "onednn" in was else set()
    # As many clips a step as before may be shared out in another way.
    same = {"batch_size", "accum"} if before == clips_per_step(stage) else set()
    other = {key: was.get(key, defaults[key]) for key, value in now.items()
             if was.get(key, defaults[key]) != value and key not in same
             and (key in was or key in stage.typed) and key not in skipped}
    gone = {key: value for key, value in was.items() if key not in defaults
            and value and REMOVED.get(key) not in (FREE, value)}

    def flags(values):
        return ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())

    if gone:
        raise UserError(f"{path} was made with {flags(gone)}, which this version does not have: "
                        "start anew with another --out")
    if other:
        raise UserError(f"{path} was made with {flags(other)}: resume with the same, or use "
                        "another --out")


def tell_changes(path, saved, stage):
    """Print what a resumed run does otherwise than before."""
    was = saved["settings"]
    before = saved["processes"] * was["batch_size"] * was["accum"]
    if was["steps"] != stage.steps:
        print(f"--steps was {was['steps']} and is {stage.steps} now: the learning rate follows the "
              "new schedule from here on")
    if was["precision"] != stage.precision:
        print(f"--precision was {was['precision']} and is {stage.precision} now")
    if saved["processes"] != processes.world():
        clips = clips_per_step(stage)
        print(f"{path} was made by {saved['processes']} processes, {processes.world()} go on with "
              "it: " + (f"{clips} clips a step as before" if before == clips else
                        f"a step had {before} clips and has {clips} now (--batch-size is per "
                        "process)"))


def keep_old_run(out):
    """Move what an earlier run left in `out` into out/previous-N: nothing is overwritten."""
    names = ("log.jsonl", "metrics.json", "model.safetensors", "config.json", "tokenizer.json",
             "questions.json", "predictions.csv", "report.html")
    left = [out / name for name in names if (out / name).exists()] + checkpoints(out)
    if not left:
        return
    n = next(n for n in itertools.count(1) if not (out / f"previous-{n}").exists())
    (out / f"previous-{n}").mkdir()
    for path in left + sorted(out.glob("*.png")) + sorted(out.glob("*.gif")):
        path.rename(out / f"previous-{n}" / path.name)
    print(f"{out} holds an earlier run: moved to {out}/previous-{n} (--resume would go on with it)")
