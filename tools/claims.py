"""The paper's claims in miniature: small controlled experiments, with verdicts by a stated rule.

    python tools/claims.py [--seeds 5]      make claims; a run that is there is not done again

Every experiment is one line of train.py (mae-divided: of variants/cards.py) on moving shapes.
`--jobs` of them run at a time with one thread each, in processes forked from one that has imported
train.py. A clip that one run has rendered is read by the others (`moving_shapes.keep`).

The two sides of a comparison see the same number of clips and differ in what the claim is about. In
most that is one flag; where the claim is about more pretraining or another encoder, it is that.
Numbers are those of the test split, on which nothing was tuned (claim 11: validation split).

The rule: the difference of each comparison is taken seed by seed.

- *supported*: the 95 % interval of its mean (Student's t) lies above 0;
- *not supported*: it lies below 0;
- *undecided at this scale*: anything else, and always with a single seed.

Where a claim says "within m points", 0 is replaced by -m. A claim is supported if all its
comparisons are, and not supported if one is not.

Leaves claims.md, claims.json and claims.png in --out (default runs/claims), and all runs in
SEED/NAME there. `make figures` copies claims.md to docs/ and claims.png to figures/.
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
import textwrap
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mae  # noqa: E402, for what hiding costs; all else goes through train.py
import train  # noqa: E402
import variants.cards  # noqa: E402,F401
from video import moving_shapes  # noqa: E402

# Student's t, two-sided 95 %, by number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

SIZE = "--input-size 32"
# The recipe of the default run with a quarter of its steps.
MAE = (f"--no-normalise --mask-ratio 0.5 --decoder-depth 1 --train-clips 10000 --batch-size 64 "
       f"--lr 1e-2 --steps 500 --eval-every 500 --eval-clips 128 {SIZE}")
TEST = "--eval-clips 32 --test 500"
PROBE = f"--steps 1000 --eval-every 1000 {TEST} {SIZE}"
ATTENTIVE = f"classify --mode attentive {PROBE}"  # frozen encoders, as in the default run
LABELS = f"classify --steps 400 --eval-every 400 {TEST} {SIZE}"  # all weights train
CLIP = (f"clip --steps 600 --eval-every 600 --eval-clips 32 --gallery 300 --test 300 "
        f"--image-every 0 {SIZE}")
GROWN = f"{CLIP} --local-units 0 --no-temporal-downsample --steps 400 --eval-every 400"
FUSE = (f"fuse --masked {{masked}} --multimodal {{multimodal}} --train-clips 4000 --steps 150 "
        f"--eval-every 150 {TEST}")
SEGMENTS = "localise --steps 150 --eval-every 150 --videos 100"
PRETRAINED = {  # stage one, and what one choice changes
    "random": f"mae {MAE} --mask-type random",
    "frame": f"mae {MAE} --mask-type frame",
    "three quarters": f"mae {MAE} --mask-ratio 0.75",
    "divided": f"mae-divided {MAE}",
    "thin": f"mae {MAE} --decoder-width 48",
    "four blocks": f"mae {MAE} --decoder-depth 4",
    "eight blocks": f"mae {MAE} --decoder-depth 8",
    "normalised": f"mae {MAE} --normalise",
}
FEW_LABELS = {
    f"masked with {count} labels": f"{ATTENTIVE} --probe-clips {count} --weights {{tube}}"
    for count in (100, 1000)} | {
    f"scratch with {count} labels": f"{LABELS} --train-clips {count}" for count in (100, 1000)}
RUNS = {  # name -> flags of train.py; {name} is the folder of that run
    "tube": f"mae {MAE}",
    **PRETRAINED,
    **{f"{name} probed": f"{ATTENTIVE} --probe-clips 4000 --weights {{{name}}}"
       for name in PRETRAINED},
    "masked": f"{ATTENTIVE} --probe-clips 4000 --weights {{tube}}",
    "untrained": f"{ATTENTIVE} --probe-clips 4000",
    "scratch": f"{LABELS} --train-clips 4000",
    **FEW_LABELS,
    "clip": CLIP,
    "no local units": f"{CLIP} --local-units 0",
    "no global block": f"{CLIP} --global-layers none",
    "frame-wise": f"{CLIP} --kind frames",
    "no captions": f"{CLIP} --caption-weight 0",
    "few negatives":  # as many clips
        f"{CLIP} --batch-size 8 --steps 2400 --eval-every 2400 --lr 1e-3",
    "images": "clip --kind frames --image-every 1 --image-batch 32 --steps 500 --eval-every 500 "
              f"--eval-clips 100 {SIZE}",
    "from images": f"{GROWN} --weights {{images}}",
    "from nothing": GROWN,
    "sparse":  # the multimodal encoder of the default run, with two thirds of its steps
        f"clip --num-frames 4 --local-units 0 --no-temporal-downsample --motion-words 0.1 "
        f"--steps 600 --eval-every 600 --eval-clips 32 {SIZE}",
    "multimodal": f"classify --mode probe --standardise --probe-clips 4000 --num-frames 4 {PROBE} "
                  "--weights {sparse}",
    "post-pretrained": f"{LABELS} --train-clips 4000 --weights {{tube}}",
    "segments of masked": f"{SEGMENTS} --weights {{tube}}",
    "segments of post-pretrained": f"{SEGMENTS} --weights {{post-pretrained}}",
    "fusion": FUSE,
    "late, equal": f"{FUSE} --steps 0",
    "late, learned": f"{FUSE} --no-bridges",
    "before the first block": f"{FUSE} --before 0",
    "before the last block": f"{FUSE} --before 2",
    "only masked asks": f"{FUSE} --way masked",
    "only multimodal asks": f"{FUSE} --way multimodal",
    "no gates": f"{FUSE} --no-gates",
    "thawed": f"{FUSE} --thaw",
    "weak": FUSE.replace("{masked}", "{untrained}"),
}


MEAN = ("test_motion", "test_shape")  # their mean is the measure: colour is always known


class Claim(NamedTuple):
    """pairs: runs (better, worse), or four runs for a difference of differences, (a-b) - (c-d)."""

    number: str
    claim: str
    paper: str  # what the paper prints
    metric: str | tuple
    pairs: list
    margin: float = 0
    remark: str = ""  # how to read what came out


CLAIMS = (
    Claim("1", "Tube masking beats masking at random and whole frames, and hiding three quarters "
          "beats hiding half",
          "VideoMAE, Table 1b: tubes 69.6, random 68.3, frames 61.5 on Something-Something V2; 90 "
          "% of 196 places against 50 %, Figure 3. Here 75 % of 16 places leave 4", MEAN,
          [("masked", "random probed"), ("masked", "frame probed"),
           ("three quarters probed", "masked")],
          remark="A tube of this world meets the shape less often than in the paper, where 20 "
          "places of 196 are visible."),
    Claim("2", "Joint space-time attention beats divided",
          "VideoMAE, Sec. 3.3, takes joint attention; TimeSformer (arXiv 2102.05095) prefers "
          "divided", MEAN, [("masked", "divided probed")],
          remark="Attention along time first is a strong hint in a world where motion is all."),
    Claim("3", "A decoder of half the encoder's width and four blocks is enough: within 3 points "
          "of a wider, and of a deeper one",
          "VideoMAE, Table 1a: 4 blocks 69.6, 8 blocks 69.3; Sec. 3.3: half as wide", MEAN,
          [("thin probed", "masked"), ("four blocks probed", "eight blocks probed")], 3),
    Claim("3b", "... and one block is not", "VideoMAE, Table 1a: 68.5", MEAN,
          [("four blocks probed", "masked")]),
    Claim("4", "Normalised pixels are the better target",
          "MAE (images), Table 1d: 85.4 against 84.9 of plain pixels", MEAN,
          [("normalised probed", "masked")]),
    Claim("5", "Masked pretraining beats training from scratch",
          "VideoMAE, Table 2: 69.6 against 32.6 from scratch", MEAN,
          [("masked", "scratch"), ("masked with 1000 labels", "scratch with 1000 labels"),
           ("masked with 100 labels", "scratch with 100 labels")],
          remark="A probe of the frozen masked encoder against the same network, all of whose "
          "weights learn from the labels alone."),
    Claim("5a", "... and the untrained encoder under the same probe", "nothing", MEAN,
          [("masked", "untrained")]),
    Claim("5b", "... and most when labels are few",
          "VideoMAE, Table 2: 80.0 against 68.8 on the 240,000 videos of Kinetics-400, 62.6 "
          "against 18.0 on the 3,500 of HMDB51", MEAN,
          [("masked with 1000 labels", "scratch with 1000 labels", "masked", "scratch"),
           ("masked with 100 labels", "scratch with 100 labels", "masked", "scratch")]),
    Claim("6", "Starting from image-text weights helps the video-text model",
          "UniFormerV2 and InternVideo start from CLIP", "test_t2v_R@1",
          [("from images", "from nothing")]),
    Claim("7", "Local units and global blocks each add to the frame-wise model, and motion needs "
          "them",
          "UniFormerV2 has local units for Something-Something, and does without for Kinetics",
          "test_zero_shot_motion",
          [("clip", "no local units"), ("clip", "no global block"), ("clip", "frame-wise")]),
    Claim("8", "Captioning beside contrast improves retrieval",
          "CoCa (arXiv 2205.01917) trains both from one pass, and InternVideo, Sec. 3.2, follows",
          "test_t2v_R@1", [("clip", "no captions")]),
    Claim("8b", "... and makes words come out: motion, shape and colour all right in a sentence",
          "InternVideo, Sec. 3.2", "test_captions_all_three", [("clip", "no captions")]),
    Claim("9", "More negatives help: 31 beside each true sentence, not 7",
          "CLIP and InternVideo train with batches of tens of thousands", "test_t2v_R@1",
          [("clip", "few negatives")]),
    Claim("10", "The multimodal encoder leads on appearance, frozen",
          "InternVideo, Sec. 3.2: the two encoders complement each other", "test_shape",
          [("multimodal", "masked")]),
    Claim("10b", "The masked encoder leads on motion, frozen", "InternVideo, Sec. 3.2",
          "test_motion", [("masked", "multimodal")],
          remark="One sentence in ten names the motion, and the multimodal encoder sees four "
          "frames."),
    Claim("11", "Post-pretraining on labels helps transfer: segments in long videos, from frozen "
          "features", "InternVideo, Sec. 3.2 trains its encoders on Kinetics-710 first", "val_mAP",
          [("segments of post-pretrained", "segments of masked")]),
    Claim("12", "Cross-model attention beats the better encoder, and the sum of both scores "
          "without it, with equal or learned shares",
          "InternVideo-T 91.1, UniFormerV2-L 90.0 on Kinetics-400; no late fusion is in the paper",
          "test_all_facts",
          [("fusion", "multimodal"), ("fusion", "masked"), ("fusion", "late, equal"),
           ("fusion", "late, learned")]),
    Claim("12b", "Both ways of cross-model attention, and gates, are worth having",
          "InternVideo, Sec. 3.2 has both ways; it prints no ablation", "test_all_facts",
          [("fusion", "only masked asks"), ("fusion", "only multimodal asks"),
           ("fusion", "no gates")]),
    Claim("12c", "Cross-model attention before every block beats one before a single block",
          "nothing; it names no layers", "test_all_facts",
          [("fusion", "before the first block"), ("fusion", "before the last block")]),
    Claim("12d", "A weak encoder does no harm: within 1 point of the better encoder alone",
          "nothing", "test_all_facts", [("weak", "multimodal")], 1),
    Claim("13", "Frozen encoders give more than training everything",
          "InternVideo, Sec. 3.2 freezes both", "test_all_facts", [("fusion", "thawed")]),
    Claim("13b", "... and more for each second of training", "InternVideo, Sec. 3.2",
          "test_all_facts per second", [("fusion", "thawed")]),
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
        for name in itertools.chain.from_iterable(claim.pairs):
            add(name)
    return order


def folder(out, seed, name):
    return out / str(seed) / name.replace(" ", "_").replace(",", "")


def clips_of(out, seed):
    """Where the clips of a seed lie while its runs go on."""
    return out / str(seed) / "clips"


# The server of forks starts before any thread does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def train_with(flags, log, clips):
    """Run train.py with these flags in this process; everything printed goes to the file `log`."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    multiprocessing.set_start_method("fork", force=True)  # of the run's own workers
    moving_shapes.keep(clips)
    raise SystemExit(train.main(flags))


def do(out, seed, name):
    """One run, unless its metrics are there; returns whether it was needed."""
    place = folder(out, seed, name)
    if (place / "metrics.json").exists():
        return False
    flags = [str(folder(out, seed, part[1:-1])) if part.startswith("{") else part
             for part in RUNS[name].split()]
    place.mkdir(parents=True, exist_ok=True)
    flags += ["--seed", str(seed), "--no-figures", "--resume", "--out", str(place)]
    args = (flags, str(place / "run.log"), str(clips_of(out, seed)))
    process = FORKS.Process(target=train_with, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"claims.py: {name}, seed {seed}, ended with exit code "
                         f"{process.exitcode}; see {place}/run.log")
    return True


def run_all(out, seeds, jobs):
    """Every run of every seed, `jobs` at a time, seed by seed. Returns how many were not there."""
    todo = [(seed, name) for seed in range(seeds) for name in wanted()]
    bar = tqdm(total=len(todo), unit="run", desc="claims")
    with bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running, done, made = {}, set(), 0
        while todo or running:
            for seed, name in list(todo):
                ready = all((seed, other) in done for other in needs(RUNS[name]))
                if ready and len(running) < jobs:
                    todo.remove((seed, name))
                    running[pool.submit(do, out, seed, name)] = seed, name
            finished, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in finished:
                made += future.result()
                seed, name = running.pop(future)
                done.add((seed, name))
                bar.update()
                if all((seed, other) in done for other in wanted()):  # the last of its seed
                    shutil.rmtree(clips_of(out, seed), ignore_errors=True)
    return made


def measure(run, metric):
    """A claim's measure of a run: a metric, the mean of several, or one per second of training."""
    if isinstance(metric, tuple):
        return sum(run[name] for name in metric) / len(metric)
    name, per_second, _ = metric.partition(" per second")
    return run[name] / (run["seconds"] if per_second else 1)


def metrics_of(out, seeds, name):
    places = [folder(out, seed, name) for seed in range(seeds)]
    return [json.loads((place / "metrics.json").read_text()) for place in places]


def mean_and_spread(values):
    """(mean, sample standard deviation; 0 where there is one value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean)**2 for x in values) / max(1, len(values) - 1))


def interval(values):
    """(mean, half of the 95 % interval, inf where there is one value)."""
    (mean, spread), n = mean_and_spread(values), len(values)
    return mean, math.inf if n < 2 else T95[n] * spread / math.sqrt(n)


def verdict(differences, margin=0):
    """The rule, for one comparison: list of a difference per seed -> its name."""
    mean, half = interval(differences)
    if mean - half > -margin:
        return "supported"
    return "not supported" if mean + half < -margin else "undecided at this scale"


def judge(verdicts):
    """The rule, for a claim."""
    for name in ("not supported", "undecided at this scale"):
        if name in verdicts:
            return name
    return "supported"


@torch.no_grad()
def costs():
    """What hiding saves: a list of rows (mask ratio, tokens that the encoder sees, GFLOPs of
    VideoMAE-B's encoder on a clip of 16 x 224 x 224, the same with the decoder, milliseconds of
    VideoMAE-S' encoder on a clip of 16 x 112 x 112 here, median of 5)."""
    small, rows, times = mae.VideoMAE("small", image_size=112).eval(), [], {}
    with torch.device("meta"):
        base = mae.VideoMAE("base").eval()
    for ratio in (0.0, 0.5, 0.75, 0.9, 0.95):
        hidden = mae.tube_mask(1, base.grid, ratio)
        visible = mae.split_by_mask(hidden)[0].to("meta")
        video, counts = torch.empty(1, 3, 16, 224, 224, device="meta"), []
        for part, given in ((base.encoder, [visible]), (base, [hidden])):
            with FlopCounterMode(display=False) as counter:
                part(video, *given)
            counts.append(counter.get_total_flops() / 1e9)
        rows.append([ratio, visible.shape[1], *counts])
    clip = torch.rand(1, 3, 16, 112, 112)
    for _ in range(6):  # interleaved; the first turn warms up
        for ratio, *_ in rows:
            visible = mae.split_by_mask(mae.tube_mask(1, small.grid, ratio))[0]
            began = time.perf_counter()
            small.encoder(clip, visible)
            times.setdefault(ratio, []).append(time.perf_counter() - began)
    return [(*row, 1000 * statistics.median(times[row[0]][1:])) for row in rows]


def judged(out, seeds, claim):
    """What the runs say about a claim: a dict for claims.json."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(claim.pairs)))
    runs = {name: metrics_of(out, seeds, name) for name in names}
    values = {name: [measure(run, claim.metric) for run in runs[name]] for name in names}
    compared = []
    for pair in claim.pairs:
        signs = (1, -1, -1, 1)[:len(pair)]
        differences = [sum(sign * x for sign, x in zip(signs, row))
                       for row in zip(*(values[name] for name in pair))]
        mean, half = interval(differences)
        compared.append(dict(runs=pair, text=difference_of(pair), mean=mean,
                             half=None if math.isinf(half) else half,
                             verdict=verdict(differences, claim.margin)))
    seconds = {name: sum(run["seconds"] for run in runs[name]) / seeds for name in names}
    return dict(claim._asdict(), values=values, compared=compared, seconds=seconds,
                digits=2 if "per second" in claim.metric else 1,
                verdict=judge([row["verdict"] for row in compared]))


def difference_of(pair):
    """Two or four names of runs -> their difference in words."""
    a, b, *others = pair
    return f"({a} − {b}) − ({others[0]} − {others[1]})" if others else f"{a} − {b}"


def report(out, seeds, seconds, jobs):
    """Write claims.json, claims.md and claims.png from the runs that are there."""
    claims = [judged(out, seeds, claim) for claim in CLAIMS]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = dict(date=str(date.today()), machine=machine, seeds=seeds, jobs=jobs,
                 seconds=round(seconds), claims=claims, costs=costs())
    (out / "claims.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "claims.md").write_text(as_text(facts))
    draw(claims, out / "claims.png")


def named(metric):
    """A claim's measure in words."""
    names = metric if isinstance(metric, (tuple, list)) else [metric]
    words = [name.removeprefix("test_").replace("val_", "validation ").replace("_", " ")
             for name in names]
    return " and ".join(words) + ", mean of both" * (len(names) > 1)


def wrapped(text, indent=""):
    """Lines of at most 100 columns; those after the first begin with `indent`."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


HOW_TO_READ = """\
These are models of a million parameters that trained for a minute. What holds here need not hold
for the paper's models, nor the reverse. Both sides of a comparison see the same number of clips and
differ in what the claim is about, mostly one flag; the flags of all runs are at the end. No flag
was tuned for one side. The defaults were chosen on the validation split, and the test split was
used once, here.

The difference of each comparison is taken seed by seed. *Supported* means that the 95 % interval of
its mean lies above 0 (or above minus a margin, where a claim says *within*). *Not supported* means
that it lies below; then the opposite holds here. *Undecided* is anything else. A claim is as good
as the worst of its comparisons. With five seeds the interval is wide: undecided says that minutes
do not decide it, not that there is no effect.
"""


def as_text(facts):
    """claims.md."""
    seeds = f"{facts['seeds']} seed{'s' * (facts['seeds'] > 1)}"
    about = (f"{facts['date']}, {facts['machine']}, {seeds}; by `make claims`, which took "
             f"{facts['seconds'] / 60:.0f} minutes (less where runs were there already). Moving "
             "shapes, test split (claim 11: validation split), percent; mean and standard "
             f"deviation over seeds; seconds of one run on one thread, {facts['jobs']} at a time.")
    lines = ["# The paper's claims, in miniature", "", wrapped(about), ""]
    lines += [HOW_TO_READ]
    for kind in ("supported", "undecided at this scale", "not supported"):
        lines += [f"{kind.capitalize()}:", ""]
        lines += [wrapped(f"- {row['number']}. {row['claim']}", "  ")
                  for row in facts["claims"] if row["verdict"] == kind] + [""]
    lines += ["![differences with their 95 % intervals](claims.png)", ""]
    for row in facts["claims"]:
        lines += about_claim(row)
        if row["number"] == "1":
            lines += about_costs(facts["costs"])
    lines += ["## The runs", "", wrapped(
        "`{name}` is the folder of that run. Each run also has `--seed` and `--no-figures`. "
        "`mae-divided` is a stage of `python -m variants.cards`, the others of `train.py`."), ""]
    lines += [wrapped(f"- {name}: `{RUNS[name]}`", "  ") for name in wanted()]
    return "\n".join(lines) + "\n"


def about_claim(row):
    """A claim's section of claims.md."""
    digits = row["digits"]
    lines = [f"## Claim {row['number']}: {row['verdict']}", "", wrapped(f"{row['claim']}."), "",
             wrapped(f"In the paper: {row['paper']}."), "",
             f"| {named(row['metric'])} | mean | spread | seconds |", "|---|---|---|---|"]
    for name, values in row["values"].items():
        mean, spread = mean_and_spread(values)
        lines.append(f"| {name} | {mean:.{digits}f} | {spread:.{digits}f} "
                     f"| {row['seconds'][name]:.0f} |")
    lines.append("")
    for pair in row["compared"]:
        half = "one seed" if pair["half"] is None else f"± {pair['half']:.{digits}f}"
        lines.append(wrapped(
            f"- {pair['text']}: {pair['mean']:+.{digits}f} ({half}): {pair['verdict']}", "  "))
    lines += ["", wrapped(row["remark"])] if row["remark"] else []
    return [*lines, ""]


def about_costs(costs):
    """What hiding saves, as lines of claims.md."""
    text = ("What hiding saves. GFLOPs are those of VideoMAE-B on a clip of 16 x 224 x 224, "
            "encoder alone and with decoder; milliseconds are those of VideoMAE-S' encoder on a "
            "clip of 16 x 112 x 112, here:")
    lines = [wrapped(text), "", "| hidden | tokens seen | GFLOPs | with decoder | ms |",
             "|---|---|---|---|---|"]
    lines += [f"| {ratio:.0%} | {tokens} | {encoder:.0f} | {both:.0f} | {ms:.0f} |"
              for ratio, tokens, encoder, both, ms in costs]
    return [*lines, ""]


def draw(claims, path):
    """One small plot per claim: the difference of each comparison with its interval. A comparison
    is supported where its whole interval lies to the right of the vertical line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"supported": "tab:green", "not supported": "tab:red"}
    figure, axes = plt.subplots(len(claims), 1, figsize=(8, 0.5 + 0.95 * len(claims)),
                                facecolor="white", layout="constrained")
    for axis, row in zip(axes, claims):
        for y, pair in enumerate(row["compared"]):
            colour = colours.get(pair["verdict"], "tab:grey")
            axis.errorbar(pair["mean"], -y, xerr=pair["half"] or 0, fmt="o", color=colour,
                          capsize=3, markersize=4)
            axis.text(1.01, -y, pair["text"], transform=axis.get_yaxis_transform(), fontsize=7,
                      va="center")
        axis.axvline(-row["margin"], color="black", lw=0.8)
        axis.set(yticks=[], ylim=(0.6 - len(row["compared"]), 0.6))
        axis.tick_params(labelsize=7)
        axis.set_title(f"{row['number']}. {row['claim']}", fontsize=8, loc="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="2 to 10 give verdicts (default: 5)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)),
                        help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/claims")
    args = parser.parse_args(argv)
    if not 1 <= args.seeds <= 10 or args.jobs < 1:
        print("claims.py: --seeds must be 1 to 10, --jobs at least 1", file=sys.stderr)
        return 2
    out, started = Path(args.out), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the runs
    out.mkdir(parents=True, exist_ok=True)
    made, before = run_all(out, args.seeds, args.jobs), out / "claims.json"
    seconds = time.monotonic() - started
    if not made and before.exists():  # only a new report; keep what the runs took
        seconds = json.loads(before.read_text())["seconds"]
    report(out, args.seeds, seconds, args.jobs)
    print(f"{out}/claims.md, claims.json, claims.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
