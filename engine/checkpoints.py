"""Checkpoints: last.pt and the one before it, last.1.pt.

    model, optimiser, average --> tensors_of --> save_checkpoint --> last.pt
    last.pt, or last.1.pt if it is damaged --> resume_from --> restore --> model, optimiser, average

1. A checkpoint has facts {"step", "settings", "seconds", ...} (see FACTS) and three groups of
   tensors: "model", "average" (--ema) and "optimiser".
2. With --shard a checkpoint is a folder with a part of each process. Any number of processes can
   load it.
3. A new checkpoint is written under another name and then renamed, so a kill never damages the old
   one. Reading checks names, shapes and checksums.
4. A run resumes only with the recipe of its checkpoint (`check_recipe`).
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

MAX_CHECKPOINTS = 2  # if the newest is damaged, --resume takes the one before

# Flags that a resumed run may change, because they do not change what is learned.
FREE_TO_CHANGE = {
    "out", "resume", "device", "workers", "steps", "eval_every", "save_every", "log_every",
    "eval_clips", "eval_batch", "dry_run", "weights", "shard", "attention", "compile", "precision",
    "recompute", "figures"}

# Flags of older versions that a checkpoint may contain: {flag: its default}. Defaults of 0, "" and
# False are left out. FREE: every value is accepted, because the flag changed nothing, or --weights
# determined it.
FREE = object()
REMOVED = {
    "keep": FREE, "max_bad": FREE, "onednn": FREE, "decoder": "pyav", "blr": 1.5e-4,
    "space_time": "joint", "source": "all",                           # of mae; of fuse
    "motion_words": 1.0,                                              # of retrieve, like all below
    "gallery": FREE, "merge_share": FREE, "model": FREE, "kind": FREE, "local_units": FREE,
    "temporal_downsample": FREE, "vocabulary": FREE, "caption_depth": FREE, "queries": FREE,
    "image_batch": FREE}

# Facts of a checkpoint and their types. "onednn" ("on", "off", "") was a setting in older versions.
FACTS = {"step": int, "settings": dict, "seconds": float, "processes": int, "initial": dict,
         "bad": dict}


def recipe_of(stage):
    """The settings that change what is learned: {flag: value}."""
    return {key: value for key, value in dataclasses.asdict(stage).items()
            if key not in FREE_TO_CHANGE}


def tensors_of(model, optimizer, average):
    """All tensors of a checkpoint. optimizer, average: may be None.

    -> {"model": ..., "average": ..., "optimiser": {"<parameter>.<state name>": tensor}}. Names
    instead of positions let any number of processes load it.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {f"{names[parameter]}.{key}": value
              for parameter, state in (optimizer.state if optimizer else {}).items()
              for key, value in state.items()}
    return {"model": model.state_dict(), "average": average.state if average else {},
            "optimiser": states}


def restore(tensors, model, optimizer, average):
    """Load the result of `tensors_of`, full or sharded. UserError where it does not fit."""
    mismatch = UserError("the checkpoint's tensors are not those of this model; start anew without "
                         "--resume")
    for saved, own in ((tensors["model"], model.state_dict()),
                       (tensors["average"], average.state if average else {})):
        if list(saved) != list(own) or any(saved[name].shape != own[name].shape for name in own):
            raise mismatch
        for name, value in own.items():
            value.detach().copy_(processes.shard_like(saved[name], value))
    parameters = dict(model.named_parameters())
    owner = {parameter: part for part in optimizer.parts for group in part.param_groups
             for parameter in group["params"]}
    states = {}
    for full_name, value in tensors["optimiser"].items():
        name, key = full_name.rpartition(".")[::2]
        part = owner.get(parameters.get(name))
        if part is None or value.ndim and value.shape != parameters[name].shape:
            raise mismatch
        states.setdefault(part, {}).setdefault(name, set()).add(key)
    if any(keys != next(iter(group.values())) for group in states.values()
           for keys in group.values()):
        raise mismatch  # an optimiser has the same states for every parameter
    for full_name, value in tensors["optimiser"].items():
        name, key = full_name.rpartition(".")[::2]
        parameter = parameters[name]
        owner[parameter].state[parameter][key] = processes.shard_like(value, parameter)


def checkpoints(out):
    """The checkpoints in a run's folder, newest first: [last.pt, last.1.pt, ...]."""
    older = {int(path.name.split(".")[1]): path for path in out.glob("last.*.pt")
             if path.name.split(".")[1].isdecimal()}
    return [path for path in (out / "last.pt", *(older[n] for n in sorted(older))) if path.exists()]


def save_checkpoint(out, facts, tensors, shard=False):
    """Write a new last.pt, rename the earlier ones, remove those beyond MAX_CHECKPOINTS.

    All processes call this. With `shard` each writes its part, otherwise process 0 writes all.
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

    def path_of(n):
        return out / (f"last.{n}.pt" if n else "last.pt")

    free = next(n for n in itertools.count() if n == MAX_CHECKPOINTS or not path_of(n).exists())
    remove(path_of(free))  # needed for n == MAX_CHECKPOINTS: os.replace cannot replace a folder
    for n in range(free, 0, -1):
        os.replace(path_of(n - 1), path_of(n))
    os.replace(new, path_of(0))
    weights.settle(out)
    for old in checkpoints(out)[MAX_CHECKPOINTS:]:
        remove(old)


def remove(path):
    """Remove a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_checkpoint(path, like):
    """(facts, tensors) of one checkpoint. ValueError where it is damaged.

    like  the model's own tensors: `tensors_of` without an optimiser
    """
    try:
        return read_parts(path, like) if path.is_dir() else read_whole(path)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # the machine's error, not the file's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(lines[0][:100]) from None


def read_whole(path):
    """`read_checkpoint` for a file."""
    saved = weights.load(path)
    tensors = {key: saved.pop(key) for key in ("model", "average", "optimiser")}
    if saved["tensors"] != [len(group) for group in tensors.values()]:
        raise ValueError("some of its tensors are missing")
    if any(not isinstance(saved[key], kind) for key, kind in FACTS.items()):
        raise ValueError("its facts have other types")
    if not all(isinstance(value, torch.Tensor) for group in tensors.values()
               for value in group.values()):
        raise ValueError("holds more than tensors")
    return saved, tensors


def read_parts(path, like):
    """`read_checkpoint` for a folder of parts."""
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
    for group in ("model", "average"):  # restore the model's order of names
        tensors[group] = {name: tensors[group][name] for name in like["model"]
                          if name in tensors[group]}
    return saved, tensors


def resume_from(out, stage, like):
    """(facts, tensors) of the newest readable checkpoint; None where the folder has none.

    Damaged ones are printed and renamed. UserError where all are damaged, or where the recipe is
    another one.
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
    print_changes(path, saved, stage)
    return saved, tensors


def without_caption_decoder(tensors, like):
    """The tensors without the caption decoder that older runs of `retrieve` have in their model."""
    inner = [name.removeprefix("clip.") for name in tensors["model"] if name.startswith("clip.")]
    if inner != list(like["model"]):
        return tensors
    return {group: {name.removeprefix("clip."): value for name, value in values.items()
                    if name.startswith("clip.")} for group, values in tensors.items()}


def check_recipe(path, saved, stage):
    """UserError where a checkpoint was made with another recipe.

    A flag that the checkpoint does not contain counts as its default: another value may not be
    typed. A flag that has been removed since must have had its default in the checkpoint.
    """
    old, new = saved["settings"], recipe_of(stage)
    defaults = {field.name: field.default for field in dataclasses.fields(stage)}
    old_clips = saved["processes"] * old["batch_size"] * old["accum"]
    # Older versions stored flags that --weights determine as typed, not with their real values.
    skipped = stage.fixed if "onednn" in old else set()
    # The same clips per step may be split over processes and micro-batches in another way.
    same = {"batch_size", "accum"} if old_clips == clips_per_step(stage) else set()
    changed = {key: old.get(key, defaults[key]) for key, value in new.items()
               if old.get(key, defaults[key]) != value and key not in same
               and (key in old or key in stage.typed) and key not in skipped}
    removed = {key: value for key, value in old.items() if key not in defaults
               and value and REMOVED.get(key) not in (FREE, value)}

    def flags(values):
        return ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())

    if removed:
        raise UserError(f"{path} was made with {flags(removed)}, which this version does not have: "
                        "start anew with another --out")
    if changed:
        raise UserError(f"{path} was made with {flags(changed)}: resume with the same, or use "
                        "another --out")


def print_changes(path, saved, stage):
    """Print what differs in a resumed run: steps, precision, processes."""
    old = saved["settings"]
    old_clips = saved["processes"] * old["batch_size"] * old["accum"]
    if old["steps"] != stage.steps:
        print(f"--steps was {old['steps']} and is {stage.steps} now: the learning rate follows the "
              "new schedule from here on")
    if old["precision"] != stage.precision:
        print(f"--precision was {old['precision']} and is {stage.precision} now")
    if saved["processes"] != processes.world():
        clips = clips_per_step(stage)
        print(f"{path} was made by {saved['processes']} processes, {processes.world()} go on with "
              "it: " + (f"{clips} clips a step as before" if old_clips == clips else
                        f"a step had {old_clips} clips and has {clips} now (--batch-size is per "
                        "process)"))


def archive_old_run(out):
    """Move the files of an earlier run in `out` into out/previous-N, so none is overwritten."""
    names = ("log.jsonl", "metrics.json", "model.safetensors", "config.json", "tokenizer.json",
             "questions.json", "predictions.csv", "report.html")
    old_files = [out / name for name in names if (out / name).exists()] + checkpoints(out)
    if not old_files:
        return
    n = next(n for n in itertools.count(1) if not (out / f"previous-{n}").exists())
    (out / f"previous-{n}").mkdir()
    for path in old_files + sorted(out.glob("*.png")) + sorted(out.glob("*.gif")):
        path.rename(out / f"previous-{n}" / path.name)
    print(f"{out} holds an earlier run: moved to {out}/previous-{n} (--resume would go on with it)")
