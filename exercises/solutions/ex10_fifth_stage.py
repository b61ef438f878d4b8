"""A classifier with two answers. `Stage.evaluate` calls `loss` on held-out clips and averages what it reports, so that
"accuracy" becomes "val_accuracy" for nothing."""

from dataclasses import dataclass

import torch

from video.transforms import normalise
from video import moving_shapes
import mae
import train


@dataclass
class Arrow(train.Stage):
    """Which way does time run?"""

    num_frames: int = train.flag(4, "frames per clip", low=2)
    input_size: int = train.flag(32, "height and width in pixels", low=16)
    motions: str = train.flag("grow", "motions to show, with commas; all = all")

    def build(self):
        return mae.VideoClassifier("tiny", classes=2, frames=self.num_frames, image_size=self.input_size, head_scale=1.0)

    def datasets(self):
        worlds = [moving_shapes.MovingShapes(split, self.num_frames, self.input_size, self.seed) for split in ("train", "val")]
        return worlds if self.motions == "all" else [world.only(self.motions.split(",")) for world in worlds]

    def loss(self, model, batch, rng):
        backwards = torch.randint(2, (len(batch["video"]),), generator=rng).to(batch["video"].device)
        video = torch.where(backwards.bool()[:, None, None, None, None], batch["video"].flip(1), batch["video"])
        with self.autocast():
            logits = model(normalise(video, model.mean, model.std)).float()
        loss = torch.nn.functional.cross_entropy(logits, backwards)
        return loss, {"loss": loss.detach(), "accuracy": 100 * (logits.argmax(dim=1) == backwards).float().mean()}
