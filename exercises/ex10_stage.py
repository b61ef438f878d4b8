"""Your own stage: does a clip play forwards or backwards?

("Learning and Using the Arrow of Time", CVPR 2018.)

A stage of train.py is a dataclass. Its fields become flags, and its methods define data, model and
loss. The training loop does the rest, including checkpoints. Write a stage that reverses each clip
with probability 0.5, and learns to classify clips as forwards or backwards. Take random numbers
only from `rng`. A resumed run then equals an uninterrupted one. The result is "val_accuracy" in
percent.

On all moving shapes this cannot work. Every motion has a twin, which is the same motion backwards
and equally frequent, see video/moving_shapes.py. Use `MovingShapes(...).only("motion", ["grow"])`,
whose twin is left out. Check that without `only` the accuracy stays at 50 %.

Read the stage `mae` of train.py and `Stage` in engine/stage.py. The test calls `train.train`.
"""

from dataclasses import dataclass

from engine.stage import Stage, flag


@dataclass
class Arrow(Stage, name="arrow"):
    """Does a clip play forwards or backwards?"""

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
