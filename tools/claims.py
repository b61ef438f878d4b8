"""Test claims of the paper with small controlled experiments and a fixed rule for verdicts.

    python tools/claims.py [--seeds 5]      `make claims`; finished runs are skipped

    RUNS (commands) --> metrics.json of each run and seed --> differences --> verdict of each claim

Every experiment is one command of train.py (mae-divided: of variants/cards.py) on moving shapes.
`--jobs` experiments run in parallel with one thread each. Their processes are forked from one that
has already imported train.py. They share the rendered clips (`moving_shapes.set_cache_folder`).

Both sides of a comparison see the same labelled clips. In most comparisons they differ in one
flag. Some claims are about more pretraining or another encoder; then they differ in that. The
numbers are measured on the test split, with which nothing was tuned (claim 11: validation split).

The rule: take the difference between both sides for each seed.

- *supported*: the 95 % interval of its mean (Student's t) lies above 0;
- *not supported*: the interval lies below 0;
- *undecided at this scale*: otherwise, and always with a single seed.

If a claim says "within m points", 0 is replaced by -m. A claim is supported if all its comparisons
are. It is not supported if one comparison is not.

Writes claims.md, claims.json and claims.png to --out (default runs/claims), and each run to
SEED/NAME in it. `make figures` copies claims.md to docs/ and claims.png to figures/.
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
import mae  # noqa: E402, only for `costs`; all other results come from train.py
import train  # noqa: E402
import variants.cards  # noqa: E402,F401
from video import moving_shapes  # noqa: E402

# Student's t, two-sided 95 %, by number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

SIZE = "--input-size 32"
# Claims 1 to 4 compare choices of stage 1, in 500 steps. Claims 5 and 10 to 13 use the encoders of
# the default run. Claims 6 to 9 are about stage 2.
STAGE_ONE, STAGE_TWO = (command.partition(" --out")[0] for command in train.DEFAULT_RUN
                        if command.startswith(("mae ", "clip ")))
TUBE = f"{STAGE_ONE} --steps 500 --eval-every 500 --eval-clips 128"
TEST = "--eval-clips 32 --test 500"
PROBE = f"--steps 1000 --eval-every 1000 {TEST} {SIZE}"
ATTENTIVE = f"classify --mode attentive {PROBE}"  # frozen encoders, as in the default run
LABELS = f"classify --steps 800 --eval-every 800 {TEST} {SIZE}"  # all weights train
CLIP = (f"clip --steps 600 --eval-every 600 --eval-clips 32 --gallery 300 --test 300 "
        f"--image-every 0 {SIZE}")
GROWN = f"{CLIP} --local-units 0 --no-temporal-downsample --steps 400 --eval-every 400"
FUSE = (f"fuse --masked {{masked}} --multimodal {{multimodal}} --train-clips 4000 --steps 200 "
        f"--eval-every 200 {TEST}")
SEGMENTS = "localise --steps 150 --eval-every 150 --videos 100"
PRETRAINED = {  # stage one, and with one choice changed
    "tube": TUBE,
    "random": f"{TUBE} --mask-type random",
    "frame": f"{TUBE} --mask-type frame",
    "three-quarters": f"{TUBE} --mask-ratio 0.75",
    "divided": TUBE.replace("mae ", "mae-divided ", 1),
    "thin": f"{TUBE} --decoder-width 48",
    "four-blocks": f"{TUBE} --decoder-depth 4",
    "eight-blocks": f"{TUBE} --decoder-depth 8",
    "normalised": f"{TUBE} --normalise",
}
FEW_LABELS = {
    f"post-pretrained with {count} labels":
        f"{LABELS} --train-clips {count} --weights {{stage-one}}" for count in (100, 1000)} | {
    f"scratch with {count} labels": f"{LABELS} --train-clips {count}" for count in (100, 1000)}
RUNS = {  # name -> flags of train.py; {name} stands for the folder of that run
    **PRETRAINED,
    **{f"{name} probed": f"{ATTENTIVE} --probe-clips 4000 --weights {{{name}}}"
       for name in PRETRAINED},
    "stage-one": f"{STAGE_ONE} --eval-every 1800 --eval-clips 128",
    "masked": f"{ATTENTIVE} --probe-clips 4000 --weights {{stage-one}}",
    "untrained": f"{ATTENTIVE} --probe-clips 4000",
    "scratch": f"{LABELS} --train-clips 4000",
    **FEW_LABELS,
    "clip": CLIP,
    "no local units": f"{CLIP} --local-units 0",
    "no global block": f"{CLIP} --global-layers none",
    "frame-wise": f"{CLIP} --kind frames",
    "no captions": f"{CLIP} --caption-weight 0",
    "few negatives":  # the same number of clips
        f"{CLIP} --batch-size 8 --steps 2400 --eval-every 2400 --lr 1e-3",
    "images": "clip --kind frames --image-every 1 --image-batch 32 --steps 500 --eval-every 500 "
              f"--eval-clips 100 {SIZE}",
    "from images": f"{GROWN} --weights {{images}}",
    "from nothing": GROWN,
    "stage-two": f"{STAGE_TWO} --eval-every 900 --eval-clips 32",
    "multimodal": f"classify --mode probe --standardise --probe-clips 4000 --num-frames 4 {PROBE} "
                  "--weights {stage-two}",
    "post-pretrained": f"{LABELS} --train-clips 4000 --weights {{stage-one}}",
    "segments of masked": f"{SEGMENTS} --weights {{stage-one}}",
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


MEAN = ("test_motion", "test_shape")  # averaged; every model recognises the colour


class Claim(NamedTuple):
    """A claim and the comparisons that test it."""

    number: str
    claim: str
    paper: str  # the numbers or the statement in the paper
    metric: str | tuple  # see `measure`
    pairs: list  # of (better, worse) runs, or (a, b, c, d) for the difference (a-b) - (c-d)
    margin: float = 0
    remark: str = ""  # how to interpret the result


CLAIMS = (
    Claim("1", "Tube masking beats random masking and masking of whole frames, and hiding three "
          "quarters beats hiding half",
          "VideoMAE, Table 1b: tubes 69.6, random 68.3, frames 61.5 on Something-Something V2; 90 "
          "% of 196 places against 50 %, Figure 3. Here 75 % of 16 places leave 4", MEAN,
          [("tube probed", "random probed"), ("tube probed", "frame probed"),
           ("three-quarters probed", "tube probed")],
          remark="With 16 places, few visible tubes meet the shape; the paper has 196 places and "
          "shows 20."),
    Claim("2", "Joint space-time attention beats divided",
          "VideoMAE, Sec. 3.3, takes joint attention; TimeSformer (arXiv 2102.05095) prefers "
          "divided", MEAN, [("tube probed", "divided probed")],
          remark="Attention over time first suits a world in which motion matters most."),
    Claim("3", "A decoder of half the encoder's width and four blocks is enough: within 3 points "
          "of a wider, and of a deeper one",
          "VideoMAE, Table 1a: 4 blocks 69.6, 8 blocks 69.3; Sec. 3.3: half as wide", MEAN,
          [("thin probed", "tube probed"), ("four-blocks probed", "eight-blocks probed")], 3),
    Claim("3b", "... and a decoder of one block is not enough", "VideoMAE, Table 1a: 68.5", MEAN,
          [("four-blocks probed", "tube probed")]),
    Claim("4", "Normalised pixels are the better target",
          "MAE (images), Table 1d: 85.4 against 84.9 of plain pixels", MEAN,
          [("normalised probed", "tube probed")]),
    Claim("5", "Masked pretraining beats training from scratch",
          "VideoMAE, Table 2: 69.6 against 32.6 from scratch", MEAN,
          [("post-pretrained", "scratch"),
           ("post-pretrained with 1000 labels", "scratch with 1000 labels"),
           ("post-pretrained with 100 labels", "scratch with 100 labels")],
          remark="All weights of both networks train, with the same labels and steps."),
    Claim("5a", "... and, frozen, the untrained network with the same probe", "nothing", MEAN,
          [("masked", "untrained")]),
    Claim("5b", "... and the gain is larger with fewer labels",
          "VideoMAE, Table 2: 80.0 against 68.8 on the 240,000 videos of Kinetics-400, 62.6 "
          "against 18.0 on the 3,500 of HMDB51", MEAN,
          [(f"post-pretrained with {count} labels", f"scratch with {count} labels",
            "post-pretrained", "scratch") for count in (1000, 100)]),
    Claim("6", "Starting from image-text weights helps the video-text model",
          "UniFormerV2 and InternVideo start from CLIP", "test_t2v_R@1",
          [("from images", "from nothing")]),
    Claim("7", "Local units and global blocks each add to the frame-wise model, and motion needs "
          "them",
          "UniFormerV2 has local units for Something-Something, and does without for Kinetics",
          "test_zero_shot_motion",
          [("clip", "no local units"), ("clip", "no global block"), ("clip", "frame-wise")]),
    Claim("8", "A captioning loss in addition to the contrastive loss improves retrieval",
          "CoCa (arXiv 2205.01917) trains both from one pass, and InternVideo, Sec. 3.2, follows",
          "test_t2v_R@1", [("clip", "no captions")]),
    Claim("9", "More negatives help: 31 instead of 7 for each pair",
          "CLIP and InternVideo train with batches of tens of thousands", "test_t2v_R@1",
          [("clip", "few negatives")]),
    Claim("10", "The multimodal encoder leads on appearance, frozen",
          "InternVideo, Sec. 3.2: the two encoders complement each other", "test_shape",
          [("multimodal", "masked")]),
    Claim("10b", "The masked encoder leads on motion, frozen", "InternVideo, Sec. 3.2",
          "test_motion", [("masked", "multimodal")],
          remark="One sentence in ten names the motion, and the multimodal encoder sees four "
          "frames."),
    Claim("11", "Post-pretraining on labels helps transfer to localisation in long videos with "
          "frozen features",
          "InternVideo, Sec. 3.2 trains its encoders on Kinetics-710 first", "val_mAP",
          [("segments of post-pretrained", "segments of masked")]),
    Claim("12", "Cross-model attention beats the better encoder, the equal sum of both scores, and "
          "the same training without it",
          "InternVideo-T 91.1, UniFormerV2-L 90.0 on Kinetics-400; no late fusion is in the paper",
          "test_all_facts",
          [("fusion", "multimodal"), ("fusion", "masked"), ("fusion", "late, equal"),
           ("fusion", "late, learned")]),
    Claim("12b", "Both directions of cross-model attention, and its gates, improve accuracy",
          "InternVideo, Sec. 3.2 has both ways; it prints no ablation", "test_all_facts",
          [("fusion", "only masked asks"), ("fusion", "only multimodal asks"),
           ("fusion", "no gates")]),
    Claim("12c", "Cross-model attention before every block beats that before a single block",
          "nothing; it names no layers", "test_all_facts",
          [("fusion", "before the first block"), ("fusion", "before the last block")]),
    Claim("12d", "A weak masked encoder does no harm: within 1 point of the better encoder alone",
          "nothing", "test_all_facts", [("weak", "multimodal")], 1),
    Claim("12e", "... but fusion with an untrained masked encoder is worse than with a trained one",
          "nothing", "test_all_facts", [("fusion", "weak")]),
    Claim("13", "Frozen encoders give a higher accuracy than training everything",
          "InternVideo, Sec. 3.2 freezes both", "test_all_facts", [("fusion", "thawed")]),
    Claim("13b", "... and a higher accuracy per second of training", "InternVideo, Sec. 3.2",
          "test_all_facts per second", [("fusion", "thawed")]),
)


def needs(flags):
    """Names of the runs whose folders occur in these flags."""
    return [part[1:-1] for part in flags.split() if part.startswith("{")]


def wanted():
    """All runs that the claims need. A run comes after those whose weights it uses."""
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
    """The folder of rendered clips, which the runs of a seed share."""
    return out / str(seed) / "clips"


# The server that forks processes must start before any thread.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def train_with(flags, log, clips):
    """Run train.py with these flags in this process, with all output in the file `log`."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    multiprocessing.set_start_method("fork", force=True)  # for the run's own workers
    moving_shapes.set_cache_folder(clips)
    raise SystemExit(train.main(flags))


def do_run(out, seed, name):
    """Do one run, unless it is finished. Returns True if it was done."""
    target = folder(out, seed, name)
    if (target / "metrics.json").exists():
        return False
    flags = [str(folder(out, seed, part[1:-1])) if part.startswith("{") else part
             for part in RUNS[name].split()]
    target.mkdir(parents=True, exist_ok=True)
    flags += ["--seed", str(seed), "--no-figures", "--resume", "--out", str(target)]
    args = (flags, str(target / "run.log"), str(clips_of(out, seed)))
    process = FORKS.Process(target=train_with, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"claims.py: {name}, seed {seed}, ended with exit code "
                         f"{process.exitcode}; see {target}/run.log")
    return True


def run_all(out, seeds, jobs):
    """Do all runs, `jobs` in parallel, seed by seed. Returns the number of runs done."""
    todo = [(seed, name) for seed in range(seeds) for name in wanted()]
    bar = tqdm(total=len(todo), unit="run", desc="claims")
    with bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running, done, made = {}, set(), 0
        while todo or running:
            for seed, name in list(todo):
                ready = all((seed, other) in done for other in needs(RUNS[name]))
                if ready and len(running) < jobs:
                    todo.remove((seed, name))
                    running[pool.submit(do_run, out, seed, name)] = seed, name
            finished, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in finished:
                made += future.result()
                seed, name = running.pop(future)
                done.add((seed, name))
                bar.update()
                if all((seed, other) in done for other in wanted()):  # all runs of this seed
                    shutil.rmtree(clips_of(out, seed), ignore_errors=True)
    return made


def measure(run, metric):
    """The value of a claim's metric for the metrics of a run.

    metric  a name; a tuple of names, which are averaged; or "NAME per second", divided by the
            seconds of training
    """
    if isinstance(metric, tuple):
        return sum(run[name] for name in metric) / len(metric)
    name, per_second, _ = metric.partition(" per second")
    return run[name] / (run["seconds"] if per_second else 1)


def metrics_of(out, seeds, name):
    folders = [folder(out, seed, name) for seed in range(seeds)]
    return [json.loads((path / "metrics.json").read_text()) for path in folders]


def mean_and_spread(values):
    """(mean, sample standard deviation). The latter is 0 for a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean)**2 for x in values) / max(1, len(values) - 1))


def interval(values):
    """(mean, half the width of the 95 % interval). The latter is inf for a single value."""
    (mean, spread), n = mean_and_spread(values), len(values)
    return mean, math.inf if n < 2 else T95[n] * spread / math.sqrt(n)


def verdict(differences, margin=0):
    """The verdict of one comparison. differences: one for each seed."""
    mean, half = interval(differences)
    if mean - half > -margin:
        return "supported"
    return "not supported" if mean + half < -margin else "undecided at this scale"


def judge(verdicts):
    """The verdict of a claim, from those of its comparisons."""
    for name in ("not supported", "undecided at this scale"):
        if name in verdicts:
            return name
    return "supported"


@torch.no_grad()
def costs():
    """The cost of masked modelling for several mask ratios, as a list of rows:

    (mask ratio, visible tokens, GFLOPs of VideoMAE-B's encoder for a clip of 16 x 224 x 224, the
    same with the decoder, milliseconds of VideoMAE-S' encoder for a clip of 16 x 112 x 112 on this
    machine, median of 5)
    """
    small, rows, times = mae.VideoMAE("small", image_size=112).eval(), [], {}
    with torch.device("meta"):
        base = mae.VideoMAE("base").eval()
    for ratio in (0.0, 0.5, 0.75, 0.9, 0.95):
        hidden = mae.tube_mask(1, base.grid, ratio)
        visible = mae.split_by_mask(hidden)[0].to("meta")
        video, counts = torch.empty(1, 3, 16, 224, 224, device="meta"), []
        for part, arguments in ((base.encoder, [visible]), (base, [hidden])):
            with FlopCounterMode(display=False) as counter:
                part(video, *arguments)
            counts.append(counter.get_total_flops() / 1e9)
        rows.append([ratio, visible.shape[1], *counts])
    clip = torch.rand(1, 3, 16, 112, 112)
    for _ in range(6):  # ratios alternate; the first round is a warm-up
        for ratio, *_ in rows:
            visible = mae.split_by_mask(mae.tube_mask(1, small.grid, ratio))[0]
            start = time.perf_counter()
            small.encoder(clip, visible)
            times.setdefault(ratio, []).append(time.perf_counter() - start)
    return [(*row, 1000 * statistics.median(times[row[0]][1:])) for row in rows]


def judged(out, seeds, claim):
    """The result of a claim: a dict for claims.json."""
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
    """Write claims.json, claims.md and claims.png from finished runs."""
    claims = [judged(out, seeds, claim) for claim in CLAIMS]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = dict(date=str(date.today()), machine=machine, seeds=seeds, jobs=jobs,
                 seconds=round(seconds), claims=claims, costs=costs())
    (out / "claims.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "claims.md").write_text(as_text(facts))
    draw(claims, out / "claims.png")


def named(metric):
    """A claim's metric in words."""
    names = metric if isinstance(metric, (tuple, list)) else [metric]
    words = [name.removeprefix("test_").replace("val_", "validation ").replace("_", " ")
             for name in names]
    return " and ".join(words) + ", mean of both" * (len(names) > 1)


def wrapped(text, indent=""):
    """Wrap a text at 100 columns. Lines after the first begin with `indent`."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


HOW_TO_READ = """\
These models have a million parameters and trained for a minute or two. A result here may be
different for the paper's models. Both sides of a comparison see the same labelled clips. Most
comparisons change one flag; the flags of all runs are at the end. Some claims are about more
pretraining; then one side has more. Recipes were chosen on validation clips, with these seeds or
some of them. Nothing was chosen on the test split.

For each comparison, the difference between both sides is taken for each seed. *Supported* means
that the 95 % interval of its mean lies above 0, or above minus a margin if a claim says *within*.
*Not supported* means that the interval lies below, so the opposite is true here. *Undecided* is
everything else. The worst comparison decides about a claim. With five seeds the interval is wide.
An undecided claim may have an effect that is too small for these experiments.
"""


def as_text(facts):
    """The text of claims.md."""
    seeds = f"{facts['seeds']} seed{'s' * (facts['seeds'] > 1)}"
    about = (f"{facts['date']}, {facts['machine']}, {seeds}; by `make claims`, which took "
             f"{facts['seconds'] / 60:.0f} minutes (less if some runs were finished). Moving "
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
        "`{name}` is the folder of that run. Of a flag that occurs twice, the last value counts. "
        "Each run also has `--seed` and `--no-figures`. `mae-divided` is a stage "
        "of `python -m variants.cards`, the others of `train.py`."), ""]
    lines += [wrapped(f"- {name}: `{RUNS[name]}`", "  ") for name in wanted()]
    return "\n".join(lines) + "\n"


def about_claim(row):
    """The section of a claim in claims.md, as lines."""
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
    """The table of `costs` in claims.md, as lines."""
    text = ("The cost of a forward pass. GFLOPs are those of VideoMAE-B for a clip of 16 x 224 x "
            "224, of the encoder alone and with the decoder. Milliseconds are those of VideoMAE-S' "
            "encoder for a clip of 16 x 112 x 112 on this machine:")
    lines = [wrapped(text), "", "| hidden | visible tokens | GFLOPs | with decoder | ms |",
             "|---|---|---|---|---|"]
    lines += [f"| {ratio:.0%} | {tokens} | {encoder:.0f} | {both:.0f} | {ms:.0f} |"
              for ratio, tokens, encoder, both, ms in costs]
    return [*lines, ""]


def draw(claims, path):
    """Draw a small plot for each claim: the difference of each comparison with its interval.

    A comparison is supported if its whole interval lies to the right of the vertical line."""
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
    parser.add_argument("--seeds", type=int, default=5,
                        help="number of seeds, 2 to 10 for verdicts (default: 5)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)),
                        help="runs in parallel, with one thread each")
    parser.add_argument("--out", default="runs/claims")
    args = parser.parse_args(argv)
    if not 1 <= args.seeds <= 10 or args.jobs < 1:
        print("claims.py: --seeds must be 1 to 10, --jobs at least 1", file=sys.stderr)
        return 2
    out, started = Path(args.out), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the runs
    out.mkdir(parents=True, exist_ok=True)
    made, earlier = run_all(out, args.seeds, args.jobs), out / "claims.json"
    seconds = time.monotonic() - started
    if not made and earlier.exists():  # only the report is new; keep the time of the runs
        seconds = json.loads(earlier.read_text())["seconds"]
    report(out, args.seeds, seconds, args.jobs)
    print(f"{out}/claims.md, claims.json, claims.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
