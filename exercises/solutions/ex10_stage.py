"""A classifier with two classes. `Stage.evaluate` averages the metrics of `loss` over held-out
clips, so "accuracy" becomes "val_accuracy" without more code."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mae
from engine.stage import Stage, flag
from video.moving_shapes import MovingShapes


@dataclass
class Arrow(Stage, name="arrow"):
    """Does a clip play forwards or backwards?"""

    num_frames: int = flag(4, "frames per clip", low=2)
    input_size: int = flag(32, "height and width in pixels", low=16)
    motions: str = flag("grow", "motions to show, separated by commas; all = all")

    def datasets(self):
        sets = [MovingShapes(split, self.num_frames, self.input_size, self.seed)
                for split in ("train", "val")]
        if self.motions != "all":
            sets = [part.only("motion", self.motions.split(",")) for part in sets]
        return sets[0], {"val": sets[1]}

    def build(self, train_set):
        return mae.VideoClassifier("tiny", classes=2, frames=self.num_frames,
                                   image_size=self.input_size, head_scale=1.0)

    def loss(self, model, batch, rng):
        clips = batch["video"]
        backwards = torch.randint(2, (len(clips),), generator=rng).to(clips.device)
        clips = torch.where(backwards.bool()[:, None, None, None, None], clips.flip(1), clips)
        with self.autocast():
            logits = model(clips.permute(0, 4, 1, 2, 3)).float()
        loss = F.cross_entropy(logits, backwards)
        correct = (logits.argmax(dim=1) == backwards).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": 100 * correct}
