"""How much memory and how many days would the paper's pretraining take? Estimates from FLOPs.

    python tools/estimate.py                        eight GPUs of 400 TFLOP/s
    python tools/estimate.py --gpus 64 --tflops 125

For each size one step of train.py is counted on one clip, on the CPU (`--dry-run`): FLOPs, and the
bytes that the backward pass keeps.

    days = 3 * forward FLOPs * clips / (GPUs * rate)

Clips are as many as the papers trained on. The batch per GPU is the largest power of two that fits
beside weights, gradients and optimiser. --tflops is what a GPU sustains, not its peak: 40 % of the
peak is good (in bfloat16 an A100 then gives 125, an H100 400). Nothing here was measured on a GPU.
Sentences are those of the generated world, about 15 tokens. With 77 tokens the text encoder would
cost five times as much, which is little beside the videos.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.stage import STAGES  # noqa: E402
import train  # noqa: E402

KINETICS = 240_436  # training videos of Kinetics-400
MAE = dict(num_frames=16, input_size=224, mask_ratio=0.9, positions="sinusoid", optimizer="adamw")
CLIP = dict(num_frames=8, input_size=224, local_units=0, temporal_downsample=False, queries=256,
            caption_depth=6, image_every=0)
# name, stage, model, other flags, clips in all, clips per step
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
    """(parameters, FLOPs of a clip forward and backward, bytes beside activations, bytes of one
    clip's activations)."""
    stage.device, stage.precision, stage.batch_size, stage.dry_run = "cpu", "bf16", 1, True
    with contextlib.redirect_stdout(io.StringIO()):
        train_set, _ = stage.datasets()
        facts = train.dry_run(stage, stage.build(train_set), train_set)
    fixed = 16 * facts["parameters"]  # weight, gradient and AdamW's two averages, float32
    activations = facts["expected_bytes"] - fixed
    return facts["parameters"], 3 * facts["forward_flops"], fixed, activations


def estimate(stage, clips, step, args):
    """The values of COLUMNS, as text."""
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
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=400,
                        help="sustained by one GPU, 1e12 per second (default: 400)")
    parser.add_argument("--memory", type=float, default=80, help="of one GPU, GB (default: 80)")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
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
