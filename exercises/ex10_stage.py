"""A stage of your own: which way does time run?

("Learning and Using the Arrow of Time", CVPR 2018.)

A stage of train.py is a dataclass: its fields become flags, its methods say what is learned. The
loop does the rest, checkpoints and resuming included. Write a stage that plays clips backwards,
each with probability one half, and learns to tell which. Take random numbers from `rng` only; then
a resumed run repeats the whole run. Evaluation gives "val_accuracy" in percent.

On all moving shapes this must fail! Every motion has a twin that is its reverse and equally likely,
see video/moving_shapes.py. So use `MovingShapes(...).only("motion", ["grow"])`, where time shows,
and see that without `only` it stays at 50 %.

Look at the stage `mae` of train.py and at `Stage` in engine/stage.py. The test runs `train.train`.
"""

from dataclasses import dataclass

from engine.stage import Stage, flag


@dataclass
class Arrow(Stage, name="arrow"):
    """Which way does time run?"""

    num_frames: int = flag(4, "frames per clip", low=2)
    input_size: int = flag(32, "height and width in pixels", low=16)
    motions: str = flag("grow", "motions to show, separated by commas; all = all")

    def datasets(self):
        """-> training set, {"val": held-out set}"""
        raise NotImplementedError

    def build(self, train_set):
        """-> a model with a dict `config`"""
        raise NotImplementedError

    def loss(self, model, batch, rng):
        """batch["video"] uint8 (B, T, H, W, 3), rng torch.Generator -> loss (), {name: number}

        The names are "loss" and "accuracy" (percent).
        """
        raise NotImplementedError
