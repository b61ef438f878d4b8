"""Test that a run which is killed many times ends with the same result as an uninterrupted run.

    python tools/soak.py                                             the default run, 20 kills
    python tools/soak.py --kills 5 mae --steps 200 --save-every 20   any stage, with its flags

1. One run is not interrupted.
2. A second one with the same flags gets SIGKILL at random moments, which no program can handle, and
   is started again with --resume. Every third kill waits until a file is being written.
3. All tensors in model.safetensors and all numbers in metrics.json except seconds must be equal bit
   for bit.

Prints a line for each kill and the result, and writes soak.json. The exit code is 1 if there is a
difference.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.0005  # seconds between two checks of the run


def command(stage, out):
    """The command of train.py, the same for the first start and for later ones."""
    more = [*stage, "--resume"] if stage else []
    return [sys.executable, str(ROOT / "train.py"), *more, "--out", str(out)]


def progress(out):
    """Stage and step of a run, as "clip step 300", from its newest log."""
    logs = sorted(out.rglob("log.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return "before the first log"
    lines = logs[-1].read_text().splitlines()
    step = json.loads(lines[-1]).get("step") if lines and lines[-1].endswith("}") else "?"
    return f"{logs[-1].parent.name} step {step}"


def half_written(out):
    return next(out.rglob("*.part"), None) if out.exists() else None


def run_and_kill(stage, out, delay, wait_for_write):
    """Start a run and kill it after `delay` seconds.

    wait_for_write  True: then also wait until a file is being written
    returns         (seconds until the kill, name of the file being written or ""); None if the run
                    finished before
    """
    with open(out.parent / "cut.log", "a") as log:
        process = subprocess.Popen(command(stage, out), stdout=log, stderr=log,
                                   start_new_session=True)
    started = time.monotonic()
    while process.poll() is None:
        lived = time.monotonic() - started
        part = half_written(out) if lived > delay else None
        if lived > delay and (part or not wait_for_write):
            os.killpg(process.pid, signal.SIGKILL)  # also its workers
            process.wait()
            return lived, part.name if part else ""
        time.sleep(POLL if lived > delay else min(0.05, delay - lived + POLL))
    if process.returncode:
        raise SystemExit(f"soak.py: the run ended with exit code {process.returncode}, "
                         f"see {log.name}")
    return None


def bits(tensor):
    return tensor.numpy().tobytes()


def differences(whole, cut):
    """Compare two folders of runs: ([names of tensors and numbers that differ], tensors compared).
    """
    differ, count = [], 0
    for path in sorted(whole.rglob("model.safetensors")):
        name = path.relative_to(whole)
        a, b = load_file(path), load_file(cut / name)
        count += len(a)
        differ += [f"{name}: {key}" for key in sorted(a.keys() | b.keys())
                   if key not in a or key not in b or bits(a[key]) != bits(b[key])]
    for path in sorted(whole.rglob("metrics.json")):
        a, b = (json.loads((folder / path.relative_to(whole)).read_text())
                for folder in (whole, cut))
        differ += [f"{path.relative_to(whole)}: {key}" for key in a
                   if key not in ("seconds", "settings") and a[key] != b.get(key)]
    return differ, count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--out", default="runs/soak", help="a new folder (default: runs/soak)")
    args, stage = parser.parse_known_args(argv)
    out, rng = Path(args.out), random.Random(args.seed)
    if out.exists():
        print(f"soak.py: --out {out}: exists already; give a new folder", file=sys.stderr)
        return 2
    out.mkdir(parents=True)
    started = time.monotonic()
    with open(out / "whole.log", "w") as log:
        subprocess.run(command(stage, out / "whole"), check=True, stdout=log, stderr=log)
    whole = time.monotonic() - started
    print(f"uninterrupted: {whole:.0f} s", flush=True)
    kills, wrong, count, started = [], [], 0, time.monotonic()
    while len(kills) < args.kills:
        # Start another run if one finishes before all kills.
        twin = out / f"cut{1 + sum(path.is_dir() for path in out.glob('cut*'))}"
        twin.mkdir()

        def delay():
            return rng.uniform(0, 1.5 * whole / args.kills) if len(kills) < args.kills else math.inf

        while killed := run_and_kill(stage, twin, delay(), len(kills) % 3 == 2):
            lived, writing = killed
            at = f"{twin.name}, {progress(twin)}"
            kills.append({"lived": round(lived, 2), "writing": writing, "place": at})
            print(f"kill {len(kills):2d} after {lived:6.1f} s, {at}"
                  + (f", in the middle of {writing}" if writing else ""), flush=True)
        differ, tensors = differences(out / "whole", twin)
        wrong, count = wrong + differ, count + tensors
    seconds = time.monotonic() - started
    verdict = f"{len(wrong)} DIFFER: {', '.join(wrong[:5])}" if wrong else \
        "all equal, bit for bit, and all metrics"
    print(f"{len(kills)} kills, {seconds:.0f} s in all; {count} tensors: {verdict}")
    facts = dict(stage=stage, seed=args.seed, kills=kills, undisturbed_s=whole, killed_s=seconds,
                 tensors=count, differ=wrong)
    (out / "soak.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
