"""Does a run that is killed again and again end like one that never was?

    python tools/soak.py                                             the default run, 20 kills
    python tools/soak.py --kills 5 mae --steps 200 --save-every 20   any stage, with its flags

One run is not disturbed. Its twin gets SIGKILL, which no program can handle, at random moments, and
is started again with --resume. Every third kill waits until a file is being written, the worst
moment. Then every tensor of every model.safetensors and every number of every metrics.json except
seconds must be equal to the last bit. Prints a line for each kill and the verdict, writes
soak.json. The exit code is 1 where something differs.
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
POLL = 0.0005  # s


def command(stage, out):
    """train.py as it is started the first time and again."""
    more = [*stage, "--resume"] if stage else []
    return [sys.executable, str(ROOT / "train.py"), *more, "--out", str(out)]


def place(out):
    """Where a run is: "clip step 300", by the newest of its logs."""
    logs = sorted(out.rglob("log.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return "before the first log"
    lines = logs[-1].read_text().splitlines()
    step = json.loads(lines[-1]).get("step") if lines and lines[-1].endswith("}") else "?"
    return f"{logs[-1].parent.name} step {step}"


def half_written(out):
    return next(out.rglob("*.part"), None) if out.exists() else None


def run_and_kill(stage, out, delay, wait_for_write):
    """One start. Returns (seconds it lived, what was being written or "") if it was killed, and
    None if it ended."""
    with open(out.parent / "cut.log", "a") as log:
        process = subprocess.Popen(command(stage, out), stdout=log, stderr=log,
                                   start_new_session=True)
    started = time.monotonic()
    while process.poll() is None:
        lived = time.monotonic() - started
        part = half_written(out) if lived > delay else None
        if lived > delay and (part or not wait_for_write):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
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
    """Names of what is not equal in two folders of runs."""
    found, count = [], 0
    for path in sorted(whole.rglob("model.safetensors")):
        name = path.relative_to(whole)
        a, b = load_file(path), load_file(cut / name)
        count += len(a)
        found += [f"{name}: {key}" for key in sorted(a.keys() | b.keys())
                  if key not in a or key not in b or bits(a[key]) != bits(b[key])]
    for path in sorted(whole.rglob("metrics.json")):
        a, b = (json.loads((folder / path.relative_to(whole)).read_text())
                for folder in (whole, cut))
        found += [f"{path.relative_to(whole)}: {key}" for key in a
                  if key not in ("seconds", "settings") and a[key] != b.get(key)]
    return found, count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="runs/soak", help="a new folder")
    args, stage = parser.parse_known_args(argv)
    out, rng = Path(args.out), random.Random(args.seed)
    if out.exists():
        print(f"soak.py: --out {out}: exists already", file=sys.stderr)
        return 2
    out.mkdir(parents=True)
    started = time.monotonic()
    with open(out / "whole.log", "w") as log:
        subprocess.run(command(stage, out / "whole"), check=True, stdout=log, stderr=log)
    whole = time.monotonic() - started
    print(f"undisturbed: {whole:.0f} s", flush=True)
    kills, wrong, count, started = [], [], 0, time.monotonic()
    while len(kills) < args.kills:
        # another twin where the first ended before all kills
        twin = out / f"cut{1 + sum(path.is_dir() for path in out.glob('cut*'))}"
        twin.mkdir()

        def delay():
            return rng.uniform(0, 1.5 * whole / args.kills) if len(kills) < args.kills else math.inf

        while killed := run_and_kill(stage, twin, delay(), len(kills) % 3 == 2):
            lived, writing = killed
            at = f"{twin.name}, {place(twin)}"
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
