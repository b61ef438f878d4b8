"""`python train.py`: run the commands of the default run, then write its table and its page.

    commands --> jobs --> train, side by side or one after the other --> table.json, report.html

On a CPU, as many stages run at a time as there are processors, each in its own process. With one
processor, on a GPU or under torchrun, they run one after the other in this process. The results are
bit-identical.
"""

import contextlib
import json
import os
import shlex
import shutil
import time
from pathlib import Path

from engine import machine, processes, report, side_by_side
from engine.command_line import Parser, parse
from engine.errors import UserError
from engine.stage import STAGES
from video import moving_shapes

ROOM = 2**32  # bytes; clips are cached only where the disk has this much free space


def default_run(commands, train, argv):
    """Run the commands, then tools/table.py, and write one page about all runs.

    A stage that has finished before is skipped.

    commands  {"STAGE --flag value ...": seconds on two cores}; {out} stands for --out. A command
              comes after those whose results it needs
    train     the function that runs a stage
    """
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="The default run: the four stages on generated clips.")
    parser.add_argument("--out", default="runs/default", help="folder for all stages")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    args = parser.parse_args(argv)
    if not 0 <= args.seed <= 10**9:
        raise UserError(f"--seed {args.seed}: must be at least 0 and at most {10**9}")
    started = time.monotonic()
    resume_command = (
        "python train.py" + f" --out {shlex.quote(args.out)}" * (args.out != "runs/default")
        + f" --seed {args.seed}" * (args.seed > 0))
    jobs, names = [], []
    for command, seconds in commands.items():
        name, *flags = shlex.split(command.format(out=shlex.quote(args.out)))
        flags += ["--seed", str(args.seed), "--resume"]
        stage = parse(STAGES[name], flags)
        names.append(Path(stage.out).name)
        if is_done(stage):
            print(f"{Path(stage.out).name}: done already, see {stage.out}/metrics.json")
        else:
            jobs.append(side_by_side.Job(stage, seconds, jobs))
    at_once = stages_at_once(jobs)
    minutes = side_by_side.seconds_left(jobs, at_once) / 60
    print(f"the default run, about {minutes:.0f} minutes on two cores"
          + f", {at_once} stages at a time" * (at_once > 1) + ": "
          + ", ".join(f"{job.name} {job.seconds} s" for job in jobs))
    with cached_clips(Path(args.out) / "clips") as clips:
        if at_once > 1:
            side_by_side.run(train, jobs, at_once, resume_command, clips)
        else:
            for job in jobs:
                train(job.stage, resume_command)
    if processes.rank() == 0:
        from tools import table
        table.write_table(args.out, args.seed)
        report.write(args.out, names)
    print(f"the default run took {time.monotonic() - started:.0f} s; pictures, table and weights "
          f"are in {args.out}; open {args.out}/report.html in a browser")


def stages_at_once(jobs):
    """Number of jobs that run at the same time."""
    if processes.is_distributed() or any(
            machine.choose_device(job.stage.device) != "cpu" for job in jobs):
        return 1
    return min(len(jobs), machine.processors())


@contextlib.contextmanager
def cached_clips(folder):
    """Context in which generated clips are cached in a folder, which all stages share -> its name.

    None where there is no cache: with several processes, or with little space on the disk. The
    folder is new in each context, because clips of an earlier run may come from other code. It is
    removed at the end.
    """
    clips = None
    with contextlib.suppress(OSError, ValueError):  # the first stage reports errors of --out
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not processes.is_distributed() and shutil.disk_usage(folder.parent).free >= ROOM:
            folder.mkdir()
            moving_shapes.set_cache_folder(folder)
            clips = str(folder)
    try:
        yield clips
    finally:
        if clips:
            moving_shapes.set_cache_folder(None)
            shutil.rmtree(folder, ignore_errors=True)


def is_done(stage):
    """True where the stage has finished. UserError where it ran with another seed."""
    path = Path(stage.out) / "metrics.json"
    if not os.path.exists(path):
        return False
    try:
        seed = json.loads(path.read_text())["settings"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what a run wrote; remove it to run the stage "
                        "again") from None
    if seed != stage.seed:
        raise UserError(f"--seed {stage.seed}: {stage.out} was made with seed {seed}; use another "
                        "--out")
    return True
