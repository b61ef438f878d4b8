"""A fifth stage: which way does time run? ("Learning and Using the Arrow of Time", CVPR 2018.)

A card of train.py is a dataclass: its fields become flags, its methods say what is learned; `fit` does the rest, checkpoints
and resuming included. Write a stage that plays clips backwards, each with probability a half, and learns to tell which. The coins come
from `rng` alone, so that a resumed run is the run. Evaluation gives "val_accuracy" in percent.

On moving shapes this must fail! Twins are each other's reverse, equally likely: see the head of moving_shapes.py. So let your data be
`moving_shapes.MovingShapes(...).only(["grow"])`, where time shows, and see that without `only` it stays at 50 %.

`train.Classify` and `train.Stage.evaluate` are the places to look at. Test it as it runs: the test calls train.py's `fit`.
"""

from dataclasses import dataclass

import train


@dataclass
class Arrow(train.Stage):
    """Which way does time run?"""

    num_frames: int = train.flag(4, "frames per clip", low=2)
    input_size: int = train.flag(32, "height and width in pixels", low=16)
    motions: str = train.flag("grow", "motions to show, with commas; all = all")

    def build(self):
        """-> a model"""
        raise NotImplementedError

    def datasets(self):
        """-> training set, held-out set"""
        raise NotImplementedError

    def loss(self, model, batch, rng):
        """batch["video"] uint8 (B, T, H, W, 3), rng: torch.Generator -> loss (), {"loss": ..., "accuracy": percent}"""
        raise NotImplementedError
