"""The paper's claims in miniature: small controlled experiments, each with a verdict computed by a stated rule.

    python tools/claims.py [--seeds 5]      make claims; a run that is there already is not done again

Every experiment is a line of train.py on moving shapes, `--jobs` at a time with one thread each, in processes forked from one that has
imported it already and with the clips that another run has rendered (`moving_shapes.keep`); the two things that a claim compares
see the same number of clips and differ in what the claim is about: one flag in most; where the claim is that more pretraining, or another
expert, pays, in that. Numbers are of the test split (of claim 11, the validation split), on which nothing was tuned. Leaves
claims.md, claims.json and claims.png in --out (default runs/claims), and all runs in SEED/NAME there; `make figures` takes the first
and the last to where README shows them.

The rule: for each comparison the difference is taken seed by seed. It is *supported* where the 95 % interval of its mean (Student's
t) lies above 0, *not supported* where it lies below, else *undecided at this scale*; where a claim is that something is enough, 0 is
replaced by a margin that the claim names. A claim is supported if all its comparisons are, not supported if one is not. With a
single seed there is no interval: undecided.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mae  # noqa: E402, for what hiding costs; all else goes through train.py
from video import moving_shapes  # noqa: E402
import train  # noqa: E402
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t, two-sided, n - 1

SIZE = "--input-size 32"
MAE = f"mae --steps 900 --eval-every 900 --eval-clips 128 {SIZE}"
LABELS = f"classify --steps 400 --eval-every 400 --eval-clips 32 --test 500 {SIZE}"
CLIP = f"clip --steps 700 --eval-every 700 --eval-clips 32 --gallery 300 --test 300 --image-every 0 {SIZE}"
GROWN = f"{CLIP} --local-units 0 --no-temporal-downsample --steps 400 --eval-every 400"
FUSE = "fuse --masked {masked} --multimodal {multimodal} --steps 150 --eval-every 150 --eval-clips 32 --test 500"
SEGMENTS = "localise --steps 150 --eval-every 150 --videos 100"
PRETRAINED = {  # stage one, and what one flag changes
    "random": "--mask-type random", "frame": "--mask-type frame", "half": "--mask-ratio 0.5", "divided": "--space-time divided",
    "thin": "--decoder-width 48", "shallow": "--decoder-depth 1", "deep": "--decoder-depth 8",
    "pixels": "--no-normalise"}
RUNS = {  # name -> flags of train.py; {name} is the folder of that run
    "tube": MAE, **{name: f"{MAE} {flags}" for name, flags in PRETRAINED.items()},
    **{f"{name} with labels": f"{LABELS} --weights {{{name}}}" for name in PRETRAINED},
    "masked": f"{LABELS} --weights {{tube}}", "scratch": LABELS,
    **{f"{name} with {count} labels": f"{LABELS} --train-clips {count}" + " --weights {tube}" * (name == "masked")
       for name in ("masked", "scratch") for count in (100, 1000)},
    "clip": CLIP, "no local units": f"{CLIP} --local-units 0", "no global block": f"{CLIP} --global-layers none",
    "frame-wise": f"{CLIP} --kind frames", "no captions": f"{CLIP} --caption-weight 0",
    "few negatives": f"{CLIP} --batch-size 8 --steps 2800 --eval-every 2800 --lr 1e-3",  # as many clips
    "images": f"clip --kind frames --image-every 1 --image-batch 32 --steps 500 --eval-every 500 --eval-clips 100 {SIZE}",
    "from images": f"{GROWN} --weights {{images}}", "from nothing": GROWN,
    "probe of masked": f"classify --mode probe --weights {{tube}} --test 500 --eval-clips 32 {SIZE}",
    "probe of multimodal": f"classify --mode probe --weights {{clip}} --test 500 --eval-clips 32 {SIZE}",
    "segments of masked": f"{SEGMENTS} --weights {{tube}}", "segments of post-pretrained": f"{SEGMENTS} --weights {{masked}}",
    "multimodal": f"{LABELS} --weights {{clip}} --steps 200 --eval-every 200 --lr 2e-3 --layer-decay 0.75",
    "fusion": FUSE, "late, equal": f"{FUSE} --steps 0", "late, learned": f"{FUSE} --no-bridges",
    "before the first block": f"{FUSE} --before 0", "before the last block": f"{FUSE} --before 2",
    "only masked asks": f"{FUSE} --way masked", "only multimodal asks": f"{FUSE} --way multimodal",
    "no gates": f"{FUSE} --no-gates", "thawed": f"{FUSE} --thaw",
    "weak": FUSE.replace("{masked}", "{scratch}"),
}
MEAN = ("test_motion", "test_shape")  # accuracies whose mean is the measure: colour is always known
# number, claim, what it looks like in the paper, metric or metrics, [(better, worse), ...], margin. With four runs the
# difference of two differences: (a - b) - (c - d).
CLAIMS = (
    ("1", "Tube masking beats masking at random and whole frames, and hiding three quarters beats hiding half",
     "VideoMAE, Table 1b: tubes 69.6, random 68.3, frames 61.5 on Something-Something V2; 90 % of 196 places against 50 %, Figure 3. "
     "Here 75 % of 16 places leave 4", MEAN,
     [("masked", "random with labels"), ("masked", "frame with labels"), ("masked", "half with labels")]),
    ("2", "Joint space-time attention beats divided", "VideoMAE, Sec. 3.3, takes joint attention; TimeSformer (arXiv 2102.05095) prefers divided", MEAN,
     [("masked", "divided with labels")]),
    ("3", "A decoder of half the encoder's width and four blocks is enough: within 3 points of a wider, and of a deeper one",
     "VideoMAE, Table 1a: 4 blocks 69.6, 8 blocks 69.3; Sec. 3.3: half as wide", MEAN,
     [("thin with labels", "masked"), ("masked", "deep with labels")], 3),
    ("3b", "... and one block is not", "VideoMAE, Table 1a: 68.5", MEAN, [("masked", "shallow with labels")]),
    ("4", "Normalised pixels are the better target", "MAE (images), Table 1d: 85.4 against 84.9 of plain pixels", MEAN,
     [("masked", "pixels with labels")]),
    ("5", "Masked pretraining beats training from scratch", "VideoMAE, Table 2: 69.6 against 32.6 from scratch", MEAN,
     [("masked", "scratch"), ("masked with 1000 labels", "scratch with 1000 labels"),
      ("masked with 100 labels", "scratch with 100 labels")]),
    ("5b", "... and most when labels are few", "VideoMAE, Table 2: 80.0 against 68.8 on the 240,000 videos of Kinetics-400, 62.6 against 18.0 on the 3,500 of HMDB51", MEAN,
     [("masked with 1000 labels", "scratch with 1000 labels", "masked", "scratch"),
      ("masked with 100 labels", "scratch with 100 labels", "masked", "scratch")]),
    ("6", "Starting from image-text weights helps the video-text model", "UniFormerV2 and InternVideo start from CLIP", "test_t2v_R@1",
     [("from images", "from nothing")]),
    ("7", "Local units and global blocks each add to the frame-wise model, and motion needs them",
     "UniFormerV2 has local units for Something-Something, and does without for Kinetics", "test_zero_shot_motion",
     [("clip", "no local units"), ("clip", "no global block"), ("clip", "frame-wise")]),
    ("8", "Captioning beside contrast improves retrieval", "CoCa (arXiv 2205.01917) trains both from one pass, and InternVideo, Sec. 3.2, follows", "test_t2v_R@1",
     [("clip", "no captions")]),
    ("8b", "... and makes words come out: motion, shape and colour all right in a sentence", "InternVideo, Sec. 3.2", "test_captions_all_three",
     [("clip", "no captions")]),
    ("9", "More negatives help: 31 beside each true sentence, not 7",
     "CLIP and InternVideo train with batches of tens of thousands", "test_t2v_R@1", [("clip", "few negatives")]),
    ("10", "The multimodal encoder leads on appearance, by a linear probe", "InternVideo, Sec. 3.2: the two encoders complement each other",
     "test_shape", [("probe of multimodal", "probe of masked")]),
    ("10b", "The masked encoder leads on motion, by a linear probe", "InternVideo, Sec. 3.2", "test_motion",
     [("probe of masked", "probe of multimodal")]),
    ("11", "Post-pretraining on labels helps transfer: segments in long videos, from frozen features",
     "InternVideo, Sec. 3.2 trains its encoders on Kinetics-710 first", "val_mAP",
     [("segments of post-pretrained", "segments of masked")]),
    ("12", "Cross-model attention beats the better expert, and the sum of both scores without a bridge, its shares equal or learned",
     "InternVideo-T 91.1, UniFormerV2-L 90.0 on Kinetics-400; no late fusion is in the paper", "test_all_facts",
     [("fusion", "multimodal"), ("fusion", "masked"), ("fusion", "late, equal"), ("fusion", "late, learned")]),
    ("12b", "Both ways of the bridge, and gates, are worth having", "InternVideo, Sec. 3.2 has both ways; it prints no ablation",
     "test_all_facts", [("fusion", "only masked asks"), ("fusion", "only multimodal asks"), ("fusion", "no gates")]),
    ("12c", "Bridges before every block beat one bridge", "not in the paper: it names no layers", "test_all_facts",
     [("fusion", "before the first block"), ("fusion", "before the last block")]),
    ("12d", "A weak expert does no harm: within 1 point of the better expert alone", "not in the paper", "test_all_facts",
     [("weak", "multimodal")], 1),
    ("13", "Frozen experts give more than training everything", "InternVideo, Sec. 3.2 freezes both", "test_all_facts",
     [("fusion", "thawed")]),
    ("13b", "... and more for each second of training", "InternVideo, Sec. 3.2", "test_all_facts per second", [("fusion", "thawed")]),
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

    for claim in CLAIMS:
        for name in itertools.chain.from_iterable(claim[4]):
            add(name)
    return order


def folder(out, seed, name):
    return out / str(seed) / name.replace(" ", "_").replace(",", "")


def clips_of(out, seed):
    """Where the clips of a seed lie while its runs go on."""
    return out / str(seed) / "clips"


FORKS = multiprocessing.get_context("forkserver")  # the server forks before anything has started a thread
FORKS.set_forkserver_preload(["train"])


def train_with(flags, log, clips):
    """What a process of its own does: train.py with these flags, all that it says in a file."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    multiprocessing.set_start_method("fork", force=True)  # of the runs' own workers, as if train.py had been started
    moving_shapes.keep(clips)
    raise SystemExit(train.main(flags))


def do(out, seed, name):
    """One run, unless its metrics are there; returns whether it was needed."""
    place = folder(out, seed, name)
    if (place / "metrics.json").exists():
        return False
    flags = [str(folder(out, seed, part[1:-1])) if part.startswith("{") else part for part in RUNS[name].split()]
    place.mkdir(parents=True, exist_ok=True)
    flags += ["--seed", str(seed), "--no-figures", "--resume", "--out", str(place)]
    process = FORKS.Process(target=train_with, args=(flags, str(place / "run.log"), str(clips_of(out, seed))))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"claims.py: {name}, seed {seed}, ended with exit code {process.exitcode}; see {place}/run.log")
    return True


def run_all(out, seeds, jobs):
    """Every run of every seed, `jobs` at a time, with a bar; seed by seed, so that what is there can be judged early.
    Returns how many were not there already."""
    todo = [(seed, name) for seed in range(seeds) for name in wanted()]
    with tqdm(total=len(todo), unit="run", desc="claims") as bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running, done, made = {}, set(), 0
        while todo or running:
            for job in list(todo):
                if len(running) < jobs and all((job[0], other) in done for other in needs(RUNS[job[1]])):
                    todo.remove(job)
                    running[pool.submit(do, out, *job)] = job
            finished, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in finished:
                made += future.result()
                job = running.pop(future)
                done.add(job)
                bar.update()
                if all((job[0], name) in done for name in wanted()):  # the last of its seed
                    shutil.rmtree(clips_of(out, job[0]), ignore_errors=True)
    return made


def measure(run, metric):
    """What a run's metrics say of a claim's measure: a number, the mean of several, or one per second."""
    if isinstance(metric, tuple):
        return sum(run[name] for name in metric) / len(metric)
    name, per_second, _ = metric.partition(" per second")
    return run[name] / (run["seconds"] if per_second else 1)


def metrics_of(out, seeds, name):
    return [json.loads((folder(out, seed, name) / "metrics.json").read_text()) for seed in range(seeds)]


def interval(values):
    """(mean, half of the 95 % interval, inf where there is one value)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    spread = math.sqrt(sum((value - mean)**2 for value in values) / (n - 1))
    return mean, T95[n] * spread / math.sqrt(n)


def verdict(differences, margin=0):
    """The rule, for one comparison: list of a difference per seed -> its name."""
    mean, half = interval(differences)
    return "supported" if mean - half > -margin else "not supported" if mean + half < -margin else "undecided at this scale"


def judge(verdicts):
    """The rule, for a claim."""
    for name in ("not supported", "undecided at this scale"):
        if name in verdicts:
            return name
    return "supported"


@torch.no_grad()
def costs():
    """What hiding saves: [(mask ratio, tokens that the encoder sees, GFLOPs of VideoMAE-B's encoder on a clip of 16 x 224 x
    224, the same with a decoder, milliseconds of VideoMAE-S' encoder on one of 16 x 112 x 112 here, median of 5), ...]."""
    small, rows, times = mae.VideoMAE("small", image_size=112).eval(), [], {}
    with torch.device("meta"):
        base = mae.VideoMAE("base").eval()
    for ratio in (0.0, 0.5, 0.75, 0.9, 0.95):
        visible, wanted = mae.split_by_mask(mae.tube_mask(1, base.grid, ratio))
        video, counts = torch.empty(1, 3, 16, 224, 224, device="meta"), []
        for whole in (False, True):
            with FlopCounterMode(display=False) as counter:
                base.reconstruct(video, visible.to("meta"), wanted.to("meta")) if whole else base.encoder(video, visible.to("meta"))
            counts.append(counter.get_total_flops() / 1e9)
        rows.append([ratio, visible.shape[1], *counts])
    clip = torch.rand(1, 3, 16, 112, 112)
    for turn in range(6):  # interleaved; the first turn warms up
        for ratio, *_ in rows:
            visible, _ = mae.split_by_mask(mae.tube_mask(1, small.grid, ratio))
            began = time.perf_counter()
            small.encoder(clip, visible)
            times.setdefault(ratio, []).append(time.perf_counter() - began)
    return [(*row, 1000 * statistics.median(times[row[0]][1:])) for row in rows]


def report(out, seeds, seconds, jobs):
    """claims.json, claims.md and claims.png from the runs that are there."""
    found = []
    for number, claim, paper, metric, pairs, *margin in CLAIMS:
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        values = {name: [measure(run, metric) for run in metrics_of(out, seeds, name)] for name in names}
        compared = []
        for pair in pairs:
            signs = (1, -1, -1, 1)[:len(pair)]
            differences = [sum(sign * x for sign, x in zip(signs, row)) for row in zip(*(values[name] for name in pair))]
            mean, half = interval(differences)
            a, b, *others = pair
            said = f"({a} − {b}) − ({others[0]} − {others[1]})" if others else f"{a} − {b}"
            compared.append(dict(runs=pair, said=said, mean=mean, half=None if math.isinf(half) else half,
                                 verdict=verdict(differences, *margin)))
        cost = {name: sum(run["seconds"] for run in metrics_of(out, seeds, name)) / seeds for name in names}
        found.append(dict(number=number, claim=claim, paper=paper, metric=metric, margin=sum(margin), values=values,
                          compared=compared, seconds=cost, digits=2 if "per second" in metric else 1,
                          verdict=judge([row["verdict"] for row in compared])))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = dict(date=str(date.today()), machine=machine, seeds=seeds, jobs=jobs, seconds=round(seconds), claims=found, costs=costs())
    (out / "claims.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "claims.md").write_text(as_text(facts))
    draw(found, out / "claims.png")


def named(metric):
    """A claim's measure in words."""
    names = metric if isinstance(metric, (tuple, list)) else [metric]
    return " and ".join(name.removeprefix("test_").replace("val_", "validation ").replace("_", " ") for name in names) + (
        ", mean of both" if len(names) > 1 else "")


def as_text(facts):
    """claims.md."""
    lines = ["# The paper's claims, in miniature", "",
             f"{facts['date']}, {facts['machine']}, {facts['seeds']} seed{'s' * (facts['seeds'] > 1)}; by `make claims`, which took {facts['seconds'] / 60:.0f} minutes (less where it went on with runs that were there). Moving shapes, "
             f"test split (claim 11: validation split), percent; mean and standard deviation over seeds; seconds of one run on one thread, {facts['jobs']} at a time.", "",
             "How to read it. These are models of a million parameters that trained for a minute: what holds here need not hold "
             "for the paper's, nor the reverse. What is compared sees the same number of clips and differs in what the claim is about, mostly one flag "
             "(listed at the end); no flag was tuned for one side, the defaults were chosen on the validation split, and the test split was looked at once, here. For each "
             "comparison the difference is taken seed by seed; *supported* means that the 95 % interval of its mean lies above 0 (or, "
             "where a claim says *within*, above minus that margin), *not supported* that it lies below, *undecided at this scale* "
             "anything else; a claim is as good as the worst of its comparisons. With five seeds the interval is wide: undecided says "
             "that minutes do not decide it, not that there is nothing.", "",
             "| | claim | verdict |", "|---|---|---|",
             *(f"| {row['number']} | {row['claim']} | {row['verdict']} |" for row in facts["claims"]), "",
             "![differences with their 95 % intervals](claims.png)", ""]
    for row in facts["claims"]:
        lines += [f"## {row['number']}. {row['claim']}: {row['verdict']}", "", f"In the paper: {row['paper']}.", "",
                  f"| {named(row['metric'])} | mean | spread | seconds |", "|---|---|---|---|"]
        for name, values in row["values"].items():
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((value - mean)**2 for value in values) / max(1, len(values) - 1))
            lines.append(f"| {name} | {mean:.{row['digits']}f} | {spread:.{row['digits']}f} | {row['seconds'][name]:.0f} |")
        lines.append("")
        for pair in row["compared"]:
            half = "one seed" if pair["half"] is None else f"± {pair['half']:.{row['digits']}f}"
            lines.append(f"- {pair['said']}: {pair['mean']:+.{row['digits']}f} ({half}): {pair['verdict']}")
        if row["number"] == "1":
            lines += ["", "What hiding saves:", "", "| hidden | tokens seen | GFLOPs of VideoMAE-B's encoder, 16 x 224 x 224 | with decoder "
                      "| ms of VideoMAE-S' encoder, 16 x 112 x 112, here |", "|---|---|---|---|---|"]
            lines += [f"| {ratio:.0%} | {seen} | {flops:.0f} | {both:.0f} | {ms:.0f} |"
                      for ratio, seen, flops, both, ms in facts["costs"]]
        lines.append("")
    lines += ["## The runs", "", "`{name}` is the folder of that run; each also has `--seed` and `--no-figures`.", "", "| run | flags of train.py |", "|---|---|"]
    lines += [f"| {name} | `{RUNS[name]}` |" for name in wanted()]
    return "\n".join(lines) + "\n"


def draw(found, path):
    """One small picture for each claim: the difference of each comparison with its interval; the upright line is what it
    must be right of to be supported."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 1, figsize=(8, 0.5 + 0.95 * len(found)), facecolor="white", layout="constrained")
    for axis, row in zip(axes, found):
        for y, pair in enumerate(row["compared"]):
            colour = {"supported": "tab:green", "not supported": "tab:red"}.get(pair["verdict"], "tab:grey")
            axis.errorbar(pair["mean"], -y, xerr=pair["half"] or 0, fmt="o", color=colour, capsize=3, markersize=4)
            axis.text(1.01, -y, pair["said"], transform=axis.get_yaxis_transform(), fontsize=7, va="center")
        axis.axvline(-row["margin"], color="black", lw=0.8)
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
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which inherit it
    out.mkdir(parents=True, exist_ok=True)
    made, before = run_all(out, args.seeds, args.jobs), out / "claims.json"
    again = not made and before.exists()  # a report anew, of runs that took what they took
    seconds = json.loads(before.read_text())["seconds"] if again else time.monotonic() - started
    report(out, args.seeds, seconds, args.jobs)
    print(f"{out}/claims.md, claims.json, claims.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
