"""The paper's claims in miniature: small controlled experiments, each with a verdict computed by a stated rule.

    python tools/claims.py [--seeds 5]      make claims; a run that is there already is not done again

Every experiment is a line of train.py on moving shapes, two at a time with one thread each; the two things that a claim compares
have the same budget of steps and clips and differ in one flag. Numbers are of the test split, on which nothing was tuned. Leaves
claims.md, claims.json and claims.png in --out (default runs/claims); runs/claims/SEED/NAME has all runs.

The rule: for each comparison the difference is taken seed by seed. It is *supported* where the 95 % interval of its mean (Student's
t) lies above 0, *not supported* where it lies below, else *undecided at this scale*. A claim is supported if all its comparisons
are, not supported if one is not. With a single seed there is no interval: undecided.
"""

import argparse
import concurrent.futures
import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t, two-sided, n - 1

MAE = "mae --steps 500 --eval-every 500 --eval-clips 128"
LABELS = "classify --steps 200 --eval-every 200 --eval-clips 1000 --test"
CLIP = "clip --steps 1000 --eval-every 1000 --eval-clips 500 --gallery 500 --test"
FUSE = "fuse --masked {masked} --multimodal {multimodal} --steps 150 --eval-every 150 --eval-clips 1000 --test"
RUNS = {  # name -> flags of train.py; {name} is the folder of that run
    "tube": MAE, "random": f"{MAE} --mask-type random", "frame": f"{MAE} --mask-type frame", "half": f"{MAE} --mask-ratio 0.5",
    "thin": f"{MAE} --decoder-width 48", "wide": f"{MAE} --decoder-width 192", "shallow": f"{MAE} --decoder-depth 1",
    "deep": f"{MAE} --decoder-depth 8", "pixels": f"{MAE} --no-normalise",
    **{f"{name} with labels": f"{LABELS} --weights {{{name}}}" for name in (
        "random", "frame", "half", "thin", "wide", "shallow", "deep", "pixels")},
    "scratch": LABELS,
    **{f"{name} with {count} labels": f"{LABELS} --train-clips {count}" + f" --weights {{{name}}}" * (name != "scratch")
       for name in ("scratch", "tube") for count in (100, 1000)},
    "clip": CLIP, "frame-wise": f"{CLIP} --kind frames", "no local units": f"{CLIP} --local-units 0",
    "no captions": f"{CLIP} --caption-weight 0", "few negatives": f"{CLIP} --batch-size 8 --image-batch 16 --steps 4000 --eval-every 4000 --lr 1e-3",  # as many clips
    "probe of tube": "classify --mode probe --weights {tube} --test --eval-clips 1000",
    "probe of clip": "classify --mode probe --weights {clip} --test --eval-clips 1000",
    "masked": f"{LABELS} --weights {{tube}}", "multimodal": f"{LABELS} --weights {{clip}} --lr 2e-3 --layer-decay 0.75",
    "fusion": FUSE, "late": f"{FUSE} --no-bridges", "only masked asks": f"{FUSE} --way masked",
    "only multimodal asks": f"{FUSE} --way multimodal", "no gates": f"{FUSE} --no-gates", "thawed": f"{FUSE} --thaw",
    "weak": FUSE.replace("{masked}", "{scratch}"), "weak, late": FUSE.replace("{masked}", "{scratch}") + " --no-bridges",
}
# number, claim, what it looks like in the paper, metric, [(better, worse), ...], rows to show beside them
CLAIMS = (
    (1, "Tube masking beats masking at random and whole frames, and hiding much beats hiding half",
     "VideoMAE, Table 1b: tubes 69.6, random 68.3, frames 61.5 on Something-Something V2; ratio 0.9 against 0.5, Figure 3",
     "test_all_facts", [("masked", "random with labels"), ("masked", "frame with labels"),
                        ("masked", "half with labels")]),
    (3, "A narrow decoder of four blocks is enough", "VideoMAE, Table 1a: 1 block 68.5, 4 blocks 69.6, 8 blocks 69.3",
     "test_all_facts", [("masked", "shallow with labels"), ("masked", "deep with labels"),
                        ("thin with labels", "wide with labels")]),
    (4, "Normalised pixels are the better target", "MAE, Table 1d: 84.9 against 84.4 to 84.6 of plain pixels", "test_all_facts",
     [("masked", "pixels with labels")]),
    (5, "Masked pretraining beats training from scratch, most with few labels", "VideoMAE, Table 2: 69.6 against 32.6 from scratch",
     "test_all_facts", [("masked", "scratch"), ("tube with 1000 labels", "scratch with 1000 labels"),
                        ("tube with 100 labels", "scratch with 100 labels")]),
    (7, "Local and global units add to the frame-wise model, and motion needs them",
     "UniFormerV2, Tables 8 and 9: local units matter on Something-Something, not on Kinetics", "test_zero_shot_motion",
     [("clip", "frame-wise"), ("clip", "no local units")]),
    (8, "Captioning beside contrast improves retrieval", "CoCa, Table 8b; InternVideo, Sec. 3.2", "test_t2v_R@1",
     [("clip", "no captions")]),
    (9, "More negatives help", "CLIP and InternVideo train with batches of tens of thousands", "test_t2v_R@1",
     [("clip", "few negatives")]),
    ("10a", "Language features lead on appearance", "InternVideo, Sec. 3.2: the two encoders complement each other", "test_shape",
     [("probe of clip", "probe of tube")]),
    ("10b", "Masked features lead on motion", "InternVideo, Sec. 3.2", "test_motion", [("probe of tube", "probe of clip")]),
    (12, "Cross-model attention beats the better expert and learned late fusion",
     "InternVideo, Table 1: 91.1 against 90.0 on Kinetics-400; late fusion is not in the paper", "test_all_facts",
     [("fusion", "multimodal"), ("fusion", "masked"), ("fusion", "late")]),
    ("12b", "Both ways of the bridge, and gates, are worth having", "InternVideo, Sec. 3.2 has both; it prints no ablation",
     "test_all_facts", [("fusion", "only masked asks"), ("fusion", "only multimodal asks"), ("fusion", "no gates")]),
    ("12c", "A weak expert does no harm", "not in the paper", "test_all_facts", [("weak", "multimodal"), ("weak", "weak, late")]),
    (13, "Frozen experts give more than training everything, in less time", "InternVideo, Sec. 3.2 freezes both",
     "test_all_facts", [("fusion", "thawed")]),
)


def needs(flags):
    """Names of the runs whose folders these flags name."""
    return [part[1:-1] for part in flags.split() if part.startswith("{")]


def wanted():
    """All runs that some claim shows, and what they stand on, each after what it needs."""
    order = []

    def add(name):
        for other in needs(RUNS[name]):
            add(other)
        if name not in order:
            order.append(name)

    for *_, pairs in CLAIMS:
        for pair in pairs:
            for name in pair:
                add(name)
    return order


def folder(out, seed, name):
    return out / str(seed) / name.replace(" ", "_").replace(",", "")


def do(out, seed, name):
    """One run, unless its metrics are there."""
    place = folder(out, seed, name)
    if (place / "metrics.json").exists():
        return
    flags = [str(folder(out, seed, part[1:-1])) if part.startswith("{") else part for part in RUNS[name].split()]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "run.log", "a") as log:
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--seed", str(seed), "--resume", "--out", str(place)],
                              stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"claims.py: {name}, seed {seed}, ended with exit code {done.returncode}; see {place}/run.log")


def run_all(out, seeds, jobs):
    """Every run of every seed, `jobs` at a time, with a bar; seed by seed, so that what is there can be judged early."""
    todo = [(seed, name) for seed in range(seeds) for name in wanted()]
    with tqdm(total=len(todo), unit="run", desc="claims") as bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running, done = {}, set()
        while todo or running:
            for job in list(todo):
                if len(running) < jobs and all((job[0], other) in done for other in needs(RUNS[job[1]])):
                    todo.remove(job)
                    running[pool.submit(do, out, *job)] = job
            finished, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in finished:
                future.result()
                done.add(running.pop(future))
                bar.update()


def metrics_of(out, seeds, name):
    return [json.loads((folder(out, seed, name) / "metrics.json").read_text()) for seed in range(seeds)]


def interval(values):
    """(mean, half of the 95 % interval, inf where there is one value)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    spread = math.sqrt(sum((value - mean)**2 for value in values) / (n - 1))
    return mean, T95[n] * spread / math.sqrt(n)


def verdict(differences):
    """The rule, for one comparison: list of a difference per seed -> its name."""
    mean, half = interval(differences)
    return "supported" if mean - half > 0 else "not supported" if mean + half < 0 else "undecided at this scale"


def judge(verdicts):
    """The rule, for a claim."""
    for name in ("not supported", "undecided at this scale"):
        if name in verdicts:
            return name
    return "supported"


def report(out, seeds, seconds):
    """claims.json, claims.md and claims.png from the runs that are there."""
    found = []
    for number, claim, paper, metric, pairs in CLAIMS:
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        values = {name: [run[metric] for run in metrics_of(out, seeds, name)] for name in names}
        compared = []
        for better, worse in pairs:
            differences = [a - b for a, b in zip(values[better], values[worse])]
            mean, half = interval(differences)
            compared.append(dict(better=better, worse=worse, mean=mean, half=None if math.isinf(half) else half,
                                 verdict=verdict(differences)))
        cost = {name: sum(run["seconds"] for run in metrics_of(out, seeds, name)) / seeds for name in names}
        found.append(dict(number=number, claim=claim, paper=paper, metric=metric, values=values, compared=compared, seconds=cost,
                          verdict=judge([row["verdict"] for row in compared])))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = dict(date=str(date.today()), machine=machine, seeds=seeds, seconds=round(seconds), claims=found)
    (out / "claims.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "claims.md").write_text(as_text(facts))
    draw(found, out / "claims.png")


def as_text(facts):
    """claims.md."""
    lines = ["# The paper's claims, in miniature", "",
             f"{facts['date']}, {facts['machine']}, {facts['seeds']} seed{'s' * (facts['seeds'] > 1)}; by `make claims`. Moving shapes, "
             "test split, percent; mean and standard deviation over seeds. The rule of the verdicts is at the head of "
             "`tools/claims.py`.", ""]
    for row in facts["claims"]:
        lines += [f"## {row['number']}. {row['claim']}: {row['verdict']}", "", f"In the paper: {row['paper']}.", "",
                  f"| {row['metric'].removeprefix('test_').replace('_', ' ')} | mean | spread | seconds |", "|---|---|---|---|"]
        for name, values in row["values"].items():
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((value - mean)**2 for value in values) / max(1, len(values) - 1))
            lines.append(f"| {name} | {mean:.1f} | {spread:.1f} | {row['seconds'][name]:.0f} |")
        lines.append("")
        for pair in row["compared"]:
            half = "one seed" if pair["half"] is None else f"± {pair['half']:.1f}"
            lines.append(f"- {pair['better']} − {pair['worse']}: {pair['mean']:+.1f} ({half}): {pair['verdict']}")
        lines.append("")
    return "\n".join(lines)


def draw(found, path):
    """One small picture for each claim: the difference of each comparison with its interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 1, figsize=(8, 0.5 + 0.95 * len(found)), facecolor="white", layout="constrained")
    for axis, row in zip(axes, found):
        for y, pair in enumerate(row["compared"]):
            colour = {"supported": "tab:green", "not supported": "tab:red"}.get(pair["verdict"], "tab:grey")
            axis.errorbar(pair["mean"], -y, xerr=pair["half"] or 0, fmt="o", color=colour, capsize=3, markersize=4)
            axis.text(1.01, -y, f"{pair['better']} − {pair['worse']}", transform=axis.get_yaxis_transform(), fontsize=7, va="center")
        axis.axvline(0, color="black", lw=0.8)
        axis.set(yticks=[], ylim=(0.6 - len(row["compared"]), 0.6))
        axis.tick_params(labelsize=7)
        axis.set_title(f"{row['number']}. {row['claim']}", fontsize=8, loc="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="2 to 10 give verdicts (default: 5)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/claims")
    args = parser.parse_args(argv)
    if not 1 <= args.seeds <= 10 or args.jobs < 1:
        print("claims.py: --seeds must be 1 to 10, --jobs at least 1", file=sys.stderr)
        return 2
    out, started = Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    run_all(out, args.seeds, args.jobs)
    report(out, args.seeds, time.monotonic() - started)
    print(f"{out}/claims.md, claims.json, claims.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
