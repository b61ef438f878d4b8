"""Estimate memory and days of the paper's pretraining from counted FLOPs.

    python tools/estimate.py                        eight GPUs of 400 TFLOP/s
    python tools/estimate.py --gpus 64 --tflops 125

1. For each size, `train.py --dry-run` counts one step with one clip on the CPU: the FLOPs, and the
   bytes that are kept for the backward pass.
2. days = 3 * forward FLOPs * clips / (GPUs * rate), with the number of clips of the papers.
3. The batch per GPU is the largest power of two that fits into memory, together with weights,
   gradients and optimiser states.

--tflops is the sustained rate of a GPU, not its peak. 40 % of the peak is a good value: in bfloat16
125 for an A100, 400 for an H100. Nothing here was measured on a GPU. The sentences come from the
generated world and have about 15 tokens. With 77 tokens the text encoder would cost five times as
much, which is still little compared with the videos.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.stage import STAGES  # noqa: E402
import train  # noqa: E402

KINETICS = 240_436  # number of training videos of Kinetics-400
MAE = dict(num_frames=16, input_size=224, mask_ratio=0.9, positions="sinusoid", optimizer="adamw")
CLIP = dict(num_frames=8, input_size=224, local_units=0, temporal_downsample=False, queries=256,
            caption_depth=6, image_every=0)
# name, stage, model, other flags, total number of clips, clips per step
# (VideoMAE Sec. 4, InternVideo Sec. 4.1)
ROWS = (
    ("VideoMAE-B, 800 epochs of Kinetics-400", "mae", "base", MAE, 800 * KINETICS, 1024),
    ("VideoMAE-L, 800 epochs", "mae", "large", MAE, 800 * KINETICS, 1024),
    ("VideoMAE-H, 1200 epochs", "mae", "huge", MAE, 1200 * KINETICS, 1024),
    ("video-text B/16, 200,000 steps of videos", "clip", "b16", CLIP, 200_000 * 14_336, 14_336),
    ("video-text L/14, 200,000 steps of videos", "clip", "l14", CLIP, 200_000 * 14_336, 14_336),
)
COLUMNS = ("parameters", "TFLOP per clip", "clips per GPU that fit", "GB per GPU", "micro-batches",
           "clips per step", "days", "clips to decode per second")


def count(stage):
    """Count one step with one clip.

    returns  (parameters, FLOPs of forward and backward pass, bytes of weights, gradients and
             optimiser, bytes of activations)
    """
    stage.device, stage.precision, stage.batch_size, stage.dry_run = "cpu", "bf16", 1, True
    with contextlib.redirect_stdout(io.StringIO()):
        train_set, _ = stage.datasets()
        facts = train.dry_run(stage, stage.build(train_set), train_set)
    fixed = 16 * facts["parameters"]  # float32: weight, gradient, AdamW's two averages
    activations = facts["expected_bytes"] - fixed
    return facts["parameters"], 3 * facts["forward_flops"], fixed, activations


def estimate(stage, clips, step, args):
    """The values of COLUMNS as text; clips: total number, step: clips per step."""
    parameters, flops, fixed, activations = count(stage)
    fits = 1
    while 2 * fits * activations + fixed < 0.9e9 * args.memory and 2 * fits * args.gpus <= step:
        fits *= 2
    rounds = -(-step // (fits * args.gpus))
    days = flops * clips / (args.gpus * args.tflops * 1e12) / 86400
    return (f"{parameters / 1e6:.0f} M", f"{flops / 1e12:.2f}", f"{fits}",
            f"{(fixed + fits * activations) / 1e9:.0f}", f"{rounds}",
            f"{fits * rounds * args.gpus:,}", f"{days:.1f}", f"{clips / days / 86400:,.0f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--tflops", type=float, default=400,
                        help="sustained rate of one GPU in TFLOP/s (default: 400)")
    parser.add_argument("--memory", type=float, default=80,
                        help="memory of one GPU in GB (default: 80)")
    parser.add_argument("--rows", default="", help="only rows whose name contains this text")
    args = parser.parse_args(argv)
    if min(args.gpus, args.tflops, args.memory) <= 0:
        print("estimate.py: --gpus, --tflops and --memory must be above 0", file=sys.stderr)
        return 2
    print(f"{args.gpus} GPUs of {args.memory:g} GB that sustain {args.tflops:g} TFLOP/s\n")
    rows = []
    for name, stage, model, flags, clips, step in ROWS:
        if args.rows in name:
            print(f"counting {name}", file=sys.stderr, flush=True)
            rows.append((name, *estimate(STAGES[stage](model=model, **flags), clips, step, args)))
    for half in (slice(0, 4), slice(4, 8)):  # two tables, at most 100 columns wide
        print("| recipe | " + " | ".join(COLUMNS[half]) + " |\n" + "|---" * 5 + "|")
        for name, *values in rows:
            print("| " + " | ".join([name, *values[half]]) + " |")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
