"""Test that the labels of moving shapes depend on the order of frames.

    python tools/order_matters.py [--steps 1500] [--seeds 1]

Every motion has a twin with the same distribution of clips, but played backwards. A model that sees
the frames in random order cannot distinguish twins. Its expected accuracy is therefore at most
50 %. The same model with frames in order should be far above. Both train on the same clips and are
evaluated on the same 2048 held-out clips. Results: LOG.md.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import mae  # noqa: E402
import train  # noqa: E402, registers the stages
from engine import machine, optimisers  # noqa: E402
from engine.stage import STAGES  # noqa: E402
from video import moving_shapes, transforms  # noqa: E402

FRAMES, SIZE = 8, 32


def as_input(clips, shuffle, rng):
    """uint8 clips (B, T, H, W, 3) -> network input; `shuffle` gives frames in random order."""
    if shuffle:
        order = torch.rand(clips.shape[:2], generator=rng).argsort(dim=1)
        clips = clips[torch.arange(len(clips))[:, None], order]
    return transforms.normalise(clips, mae.IMAGENET_MEAN, mae.IMAGENET_STD)


def accuracy(seed, shuffle, steps, batch_size=32):
    """Train a classifier on frames in order or shuffled. Returns its held-out accuracy in [0, 1].
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    world = moving_shapes.MovingShapes("train", FRAMES, SIZE, seed)
    size = mae.Size(128, 4, 4, 512, 8, 64, 1, 2, 256)
    model = mae.VideoClassifier(size, classes=len(world.motions), frames=FRAMES, image_size=SIZE,
                                head_scale=1.0)
    recipe = STAGES["mae"](lr=2e-3, steps=steps, device="cpu",
                           precision=machine.choose_precision("auto", "cpu"))
    optimiser = optimisers.build_optimizer(model, recipe)
    for step, batch in enumerate(data.batches(world, batch_size, seed, steps, workers=1)):
        with recipe.autocast():
            logits = model(as_input(batch["video"], shuffle, rng))
        F.cross_entropy(logits.float(), batch["labels"]["motion"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.set_rate(optimisers.learning_rate(recipe, step))
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    correct = total = 0
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        world = moving_shapes.MovingShapes("val", FRAMES, SIZE, seed)
        for batch in data.held_out(world, 2048, 128):
            answers = model(as_input(batch["video"], shuffle, rng)).argmax(1)
            correct += (answers == batch["labels"]["motion"]).sum().item()
            total += len(answers)
    return correct / total


def main():
    """Print the two accuracies of each seed."""
    parser = argparse.ArgumentParser(description="Test that the labels of moving shapes "
                                     "depend on the order of frames.")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of 32 clips")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    args = parser.parse_args()
    for seed in range(args.seeds):
        for shuffle in (False, True):
            started = time.monotonic()
            result = accuracy(seed, shuffle, args.steps)
            print(f"seed {seed}, frames {'shuffled' if shuffle else 'in order'}: {result:.1%} "
                  f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
