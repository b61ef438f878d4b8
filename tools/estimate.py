"""How much memory and how many days would the paper's pretraining take? Estimates, from counted FLOPs.

    python tools/estimate.py                        eight GPUs of 400 TFLOP/s
    python tools/estimate.py --gpus 64 --tflops 125

For each size one step of train.py is counted on one clip, on the CPU (`--dry-run`): FLOPs, and the bytes that the backward pass
keeps. Days = 3 * forward FLOPs * clips / (GPUs * rate), clips as the papers trained; the batch per GPU is the largest power of
two that fits beside weights, gradients and optimiser. --tflops is what a GPU keeps up, not its peak: 40 % of the peak is good
(an A100 then gives 125, an H100 400, in bfloat16). Nothing here was measured on a GPU. Sentences are those of the
generated world, about 15 tokens; of 77 the text tower would cost five times as much, which is little beside the videos.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

KINETICS = 240_436  # training videos of Kinetics-400
MAE = dict(num_frames=16, input_size=224, mask_ratio=0.9, positions="sinusoid", optimizer="adamw")
CLIP = dict(num_frames=8, input_size=224, local_units=0, temporal_downsample=False, queries=256, caption_depth=6, image_every=0)
ROWS = (  # what, card, clips in all, clips of a step in all: VideoMAE Sec. 4, InternVideo Sec. 4.1
    ("VideoMAE-B, 800 epochs of Kinetics-400", train.MAE(model="base", **MAE), 800 * KINETICS, 1024),
    ("VideoMAE-L, 800 epochs", train.MAE(model="large", **MAE), 800 * KINETICS, 1024),
    ("VideoMAE-H, 1200 epochs", train.MAE(model="huge", **MAE), 1200 * KINETICS, 1024),
    ("video-text B/16, the 200,000 steps of videos", train.Clip(model="b16", **CLIP), 200_000 * 14_336, 14_336),
    ("video-text L/14, the 200,000 steps of videos", train.Clip(model="l14", **CLIP), 200_000 * 14_336, 14_336),
)


def count(card):
    """(parameters, FLOPs of a clip forward and backward, bytes beside activations, bytes of one clip's activations)."""
    card.device, card.precision, card.batch_size, card.dry_run = "cpu", "bf16", 1, True
    with contextlib.redirect_stdout(io.StringIO()):
        found = train.dry_run(card, card.build())
    fixed = 16 * found["parameters"]  # weight, gradient and AdamW's two averages, float32
    return found["parameters"], 3 * found["forward_flops"], fixed, found["expected_bytes"] - fixed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=400, help="kept up by one GPU, 1e12 per second (default: 400)")
    parser.add_argument("--memory", type=float, default=80, help="of one GPU, GB (default: 80)")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    args = parser.parse_args(argv)
    if min(args.gpus, args.tflops, args.memory) <= 0:
        print("estimate.py: --gpus, --tflops and --memory must be above 0", file=sys.stderr)
        return 2
    print(f"| estimates: {args.gpus} GPUs of {args.memory:g} GB that keep up {args.tflops:g} TFLOP/s | parameters | TFLOP per clip | "
          "clips per GPU that fit | micro-batches | clips per step | GB per GPU | days | clips to decode per second |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, card, clips, step in ROWS:
        if args.rows not in name:
            continue
        parameters, flops, fixed, activations = count(card)
        fits = 1
        while 2 * fits * activations + fixed < 0.9e9 * args.memory and 2 * fits * args.gpus <= step:
            fits *= 2
        rounds = -(-step // (fits * args.gpus))
        days = flops * clips / (args.gpus * args.tflops * 1e12) / 86400
        print(f"| {name} | {parameters / 1e6:.0f} M | {flops / 1e12:.2f} | {fits} | {rounds} | {fits * rounds * args.gpus:,} | "
              f"{(fixed + fits * activations) / 1e9:.0f} | {days:.1f} | "
              f"{clips / days / 86400:,.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
