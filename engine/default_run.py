"""`python train.py`: the commands of the default run, one after the other, and its table."""

import json
import os
import shlex
import time
from pathlib import Path

from engine import processes
from engine.command_line import Parser, parse
from engine.errors import UserError
from engine.stage import STAGES


def default_run(commands, train, argv):
    """Commands of train.py in turn, then tools/table.py. What is done is not done again.

    commands  {"STAGE --flag value ...": seconds on two cores}; {out} stands for --out
    train     the function that runs a stage
    """
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="The default run: every stage on generated clips.")
    parser.add_argument("--out", default="runs/default", help="folder; in it one for each stage")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args(argv)
    if not 0 <= args.seed <= 10**9:
        raise UserError(f"--seed {args.seed}: must be at least 0 and at most {10**9}")
    began = time.monotonic()
    again = "python train.py" + f" --out {shlex.quote(args.out)}" * (args.out != "runs/default") \
        + f" --seed {args.seed}" * (args.seed > 0)
    stages = []
    for command, seconds in commands.items():
        name, *flags = shlex.split(command.format(out=shlex.quote(args.out)))
        flags += ["--seed", str(args.seed), "--resume"]
        stages.append((parse(STAGES[name], flags), seconds))
    waiting = [(stage, seconds) for stage, seconds in stages if not is_done(stage)]
    minutes = sum(seconds for _, seconds in waiting) / 60
    print(f"the default run, about {minutes:.0f} minutes on two cores: "
          + ", ".join(f"{Path(stage.out).name} {seconds} s" for stage, seconds in waiting))
    for stage, _ in stages:
        if is_done(stage):
            print(f"{Path(stage.out).name}: done already, see {stage.out}/metrics.json")
        else:
            train(stage, again)
    if processes.rank() == 0:
        from tools import table
        table.write_table(args.out, args.seed)
    print(f"the default run took {time.monotonic() - began:.0f} s; pictures, table and weights are "
          f"in {args.out}")


def is_done(stage):
    """True where the folder of a stage has its metrics.json. UserError where that is another's."""
    path = Path(stage.out) / "metrics.json"
    if not os.path.exists(path):
        return False
    try:
        seed = json.loads(path.read_text())["settings"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what a run wrote; remove it to have the stage done "
                        "anew") from None
    if seed != stage.seed:
        raise UserError(f"--seed {stage.seed}: {stage.out} was made with seed {seed}; use another "
                        "--out")
    return True
